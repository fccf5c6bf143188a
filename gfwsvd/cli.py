"""The command `gfwsvd`."""

from . import cli_make, cli_change, cli_measure, cli_plan  # noqa: F401, I001 - they enter their commands, in this order
from .cli_app import app as app


def main() -> None:
    """Runs the command line."""
    app()
