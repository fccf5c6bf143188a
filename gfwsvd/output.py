"""What commands print."""

import json
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from .ranked import rank


def print_values(values: dict[str, Any], json_output: bool) -> None:
    """One JSON object on one line, or a table of what is not None; of the ranks of a job, rank 0 prints."""
    if rank():
        return
    if json_output:
        print(json.dumps(values, allow_nan=False))
        return
    table = Table(Column(), Column(overflow="fold"), show_header=False, box=None)
    for key, value in values.items():
        if value is not None:
            table.add_row(key.replace("_", " "), plain(value))
    Console(markup=False).print(table)  # values are shown as they are


def plain(value: Any) -> str:
    """A value in words."""
    match value:
        case bool() | str():
            return str(value)
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.5g}"
        case dict():
            return ", ".join(f"{key} {plain(entry)}" for key, entry in value.items())
        case list():
            return ", ".join(map(plain, value)) or "none"
        case _:
            return str(value)
