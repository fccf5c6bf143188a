"""How much memory the statistics of a model take, and which layers are collected together within a budget."""

from collections.abc import Iterable, Mapping, Sequence

from .errors import GfwsvdError
from .kronecker import PROBES
from .statistics import HELDOUT_TOKENS

_FLOAT, _HALF = 4, 2  # bytes
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def statistics_bytes(sizes: Iterable[tuple[int, int]], *, sweeps: int = 1, online: bool = False) -> int:
    """The most that the statistics of some layers take while a pass collects them, all sums and one layer in work.

    Args:
        sizes: (d_in, d_out) of each layer.
        sweeps, online: see `calibrate`.
    """
    sizes = list(sizes)
    return sum(_held(*size, sweeps=sweeps, online=online) for size in sizes) + max(_in_work(*size) for size in sizes)


def _held(d_in: int, d_out: int, *, sweeps: int, online: bool) -> int:
    """Bytes of the sums of a layer: triangles of two moments, of the new Kronecker factors and, from the second sweep
    on, of those before, of what weighs samples where that is neither; the sketch's probes, held-out tokens."""
    triangles = (2 + (sweeps > 1) + online) * (d_in * (d_in + 1) + d_out * (d_out + 1)) // 2
    return _FLOAT * (triangles + 2 * PROBES * (d_in + d_out)) + _HALF * HELDOUT_TOKENS * (d_in + d_out)


def _in_work(d_in: int, d_out: int) -> int:
    """Bytes of a layer besides: a factor as a full matrix, and two products on their way to a sum."""
    return 3 * _FLOAT * max(d_in, d_out) ** 2


def layer_groups(
    sizes: Mapping[str, tuple[int, int]],
    leaders: Mapping[str, str],
    budget: int | None,
    *,
    sweeps: int = 1,
    online: bool = False,
) -> list[list[str]]:
    """The layers, in order, in groups whose statistics fit into `budget` bytes; layers of one input stay together.

    Args:
        sizes: (d_in, d_out) of each layer.
        leaders: of each layer, the first one with the same input; see `calibrate`.
        budget: None for all layers in one group.
        sweeps, online: see `calibrate`.

    Raises:
        GfwsvdError: when the layers of one input alone need more.
    """
    families: dict[str, list[str]] = {}
    for name in sizes:
        families.setdefault(leaders[name], []).append(name)
    groups: list[list[str]] = []
    held = in_work = 0  # of the last group
    for family in families.values():
        own = sum(_held(*sizes[name], sweeps=sweeps, online=online) for name in family)
        widest = max(_in_work(*sizes[name]) for name in family)
        if budget is not None and own + widest > budget:
            raise GfwsvdError(
                f"the statistics of {_names(family)} take {bytes_text(own + widest)}, {bytes_text(budget)} are left "
                "for statistics: give more memory, or smaller batches or shorter sequences, whose activations take the "
                "rest"
            )
        if not groups or budget is not None and held + own + max(in_work, widest) > budget:
            groups.append([])
            held = in_work = 0
        groups[-1] += family
        held, in_work = held + own, max(in_work, widest)
    return groups


def parse_bytes(text: str) -> int:
    """The bytes that a text such as "80G", "512M" or "1.5T" names, in powers of 1024.

    Raises:
        GfwsvdError: for a text that names none, or less than one.
    """
    number, unit = text.strip().upper().removesuffix("B").removesuffix("I"), ""
    if number[-1:] in UNITS and number:
        number, unit = number[:-1], number[-1]
    try:
        size = float(number) * UNITS[unit]
        if 1 <= size < float("inf"):
            return int(size)
    except ValueError:
        pass
    raise GfwsvdError(f"expected an amount of memory such as 80G, 1.5T or 512M, got {text!r}")


def bytes_text(size: float) -> str:
    """A number of bytes for people: "1.5 GiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def _names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} with the same input"
