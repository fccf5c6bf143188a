"""Bounds of single layers in the rank allocation: which share of its dense parameters a layer stores at least and at
most, given by patterns of names."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from .errors import GfwsvdError


class Bound(NamedTuple):
    """A layer stores at least `low` and at most `high` of its dense parameters; at `low` 1 it stays dense."""

    low: float = 0.0
    high: float = 1.0


def parse_bounds(texts: Iterable[str]) -> dict[str, Bound]:
    """Bounds by pattern, of texts such as "down_proj=0.5:0.9", or "down_proj=0.5" for 0.5:1.

    Raises:
        GfwsvdError: for a text of another form, or a pattern that stands there twice.
    """
    bounds: dict[str, Bound] = {}
    for text in texts:
        pattern, _, shares = text.rpartition("=")
        low, _, high = shares.partition(":")
        try:
            bound = Bound(float(low), float(high or 1))
        except ValueError:
            bound = None
        if bound is None or not pattern or pattern in bounds:
            raise GfwsvdError(
                f"a bound must be REGEX=LOW:HIGH or REGEX=LOW, each pattern once, such as 'down_proj=0.5:0.9', got "
                f"{text!r}"
            )
        bounds[pattern] = bound
    return bounds


def check_bounds(bounds: Mapping[str, tuple[float, float]]) -> None:
    """GfwsvdError unless each pattern is a regular expression, and its bounds are shares in order."""
    for pattern, bound in bounds.items():
        try:
            re.compile(pattern)
            low, high = bound
            fitting = 0 <= low <= high <= 1
        except (re.error, TypeError, ValueError) as error:
            raise GfwsvdError(
                f"bounds must be a regular expression and two shares (low, high) each, got {pattern!r}: {bound!r}: "
                f"{error}"
            ) from error
        if not fitting:
            raise GfwsvdError(f"bounds must be shares 0 <= low <= high <= 1, got {low} and {high} for {pattern!r}")


def bounds_of(names: Iterable[str], bounds: Mapping[str, tuple[float, float]]) -> dict[str, Bound]:
    """The bound of each layer: that of the last pattern which matches its name (`re.search`), or none, 0 to 1.

    Raises:
        GfwsvdError: for a pattern that matches no name.
    """
    names = list(names)
    found = dict.fromkeys(names, Bound())
    for pattern, bound in bounds.items():
        matching = [name for name in names if re.search(pattern, name)]
        if not matching:
            raise GfwsvdError(
                f"the bound of {pattern!r} matches none of the {len(names)} layers to compress; expected a part of a "
                f"name such as {', '.join(names[:2])}"
            )
        found |= dict.fromkeys(matching, Bound(*bound))
    return found
