"""The command `gfwsvd`."""

import signal  # noqa: I001 - of the commands below, which enter in this order

from . import cli_make, cli_change, cli_measure, cli_plan  # noqa: F401
from .cli_app import app as app


def main() -> None:
    """Runs the command line. SIGTERM, by which torchrun and schedulers end processes, is like Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app()
