"""What each process of the jobs in test_jobs.py runs: calibrations of a tiny model, whose statistics rank 0 writes.

    python job_of_calibration.py RANK PROCESSES FOLDER SETTINGS [STOPS]

SETTINGS is a list, one calibration after the other. The process whose rank is STOPS waits within the second pass, once
there is something to lose.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from gfwsvd import passes
from gfwsvd.calibration import calibrate
from gfwsvd.errors import GfwsvdError
from gfwsvd.store import save_statistics
from gfwsvd.work import open_job_work
from tiny_models import random_tokens, tiny_model

BATCHES = [{"input_ids": random_tokens(1, 12, seed=seed)} for seed in range(11)]


def main() -> None:
    rank, processes, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    every_settings = json.loads(sys.argv[4])
    stops = len(sys.argv) > 5 and int(sys.argv[5]) == rank
    passes.SNAPSHOT_SECONDS = passes.SNAPSHOT_COST = -1  # every batch is kept

    def track(items, description):
        print(description, len(items), flush=True)
        for index, item in enumerate(items):
            if stops and "pass 2" in description and index == 2:
                (folder / "waiting").touch()
                time.sleep(600)
            yield item

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=processes)
    try:
        for number, settings in enumerate(every_settings):
            print("calibration", number)
            with open_job_work(folder / f"work-{number}", settings) as work:
                found = calibrate(tiny_model("llama"), BATCHES, heldout=1, work=work, track=track, **settings)
                if rank == 0:
                    save_statistics(found, folder / f"statistics-{number}")
    except GfwsvdError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
