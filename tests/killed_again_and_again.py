"""What test_killed.py runs: the command `gfwsvd` in children that are killed at random moments until one has ended.

    python killed_again_and_again.py KILLS LONGEST ARGUMENT...

Children are forked, so that none has to import anything. Each is killed after a random time, of LONGEST seconds at
most, until KILLS were; then one is left to end. The last line of output is how many were killed, and how many ended.
"""

import os
import random
import signal
import sys
import time

import torch

torch.set_num_threads(1)  # no thread must be running where a process is forked

import gfwsvd.hf  # noqa: E402, F401 - before the fork
from gfwsvd import passes  # noqa: E402
from gfwsvd.cli import app  # noqa: E402


def main() -> None:
    kills, longest, arguments = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    passes.SNAPSHOT_SECONDS = passes.SNAPSHOT_COST = -1  # every batch is kept
    moments = random.Random(0)
    killed = 0
    while True:
        child = os.fork()
        if not child:
            app(arguments)
        if killed < kills:
            time.sleep(moments.uniform(0, longest))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            print(killed, os.waitstatus_to_exitcode(status), flush=True)
            return
        killed += 1


if __name__ == "__main__":
    main()
