"""Ctrl-C that waits for a good place."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from .ranked import rank

_NOTE = b"\ngfwsvd: interrupted; the step in hand is finished and kept, another Ctrl-C ends it at once\n"


@contextlib.contextmanager
def noted_interrupts(wanted: bool = True) -> Iterator[threading.Event]:
    """Within it, where `wanted`, Ctrl-C only sets the event that is yielded, and the block may end where it can be gone
    on with: KeyboardInterrupt is raised when it has ended, and by a second Ctrl-C at once. Where Ctrl-C does something
    else already, or outside the main thread, it goes on doing that.
    """
    noted, before = threading.Event(), signal.getsignal(signal.SIGINT)

    def note(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        noted.set()
        if rank() == 0:
            os.write(2, _NOTE)  # what was interrupted may be in the middle of a print

    main = threading.current_thread() is threading.main_thread()
    if not (wanted and main and before is signal.default_int_handler):
        yield noted
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)
        if noted.is_set():  # in place of an error: other processes that were interrupted too may be gone
            raise KeyboardInterrupt
