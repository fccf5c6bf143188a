"""How long loops show their progress: a function that wraps what they go through."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Track = Callable[[Sequence[Item], str], Iterable[Item]]


def silent(items: Sequence[Item], description: str) -> Iterable[Item]:
    """The `Track` that shows nothing."""
    return items
