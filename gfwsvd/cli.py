"""The command `gfwsvd`."""

from . import cli_make, cli_measure, cli_plan  # noqa: F401 - they enter their commands
from .cli_app import app as app


def main() -> None:
    """Runs the command line."""
    app()
