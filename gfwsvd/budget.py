"""How much memory the statistics of a model take, and which layers are collected together within a budget."""

from collections.abc import Mapping, Sequence

from .errors import GfwsvdError
from .kronecker import PROBES
from .statistics import HELDOUT_TOKENS

_FLOAT, _HALF = 4, 2  # bytes
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def statistics_bytes(d_in: int, d_out: int, *, sweeps: int = 1, on_host: bool = True) -> int:
    """The most that the statistics of one layer take while a pass collects them: two moments, the new Kronecker factors
    and, from the second sweep on, those before, a product on its way to a sum, the sketch's probes, held-out tokens; on
    the host also the triangles on their way to a file, which a GPU hands over one by one."""
    squares = d_in**2 + d_out**2
    matrices = squares * (2 if sweeps == 1 else 3)
    matrices += matrices // 2 if on_host else 0
    matrices += max(d_in, d_out) ** 2
    return _FLOAT * (matrices + 2 * PROBES * (d_in + d_out)) + _HALF * HELDOUT_TOKENS * (d_in + d_out)


def layer_groups(
    sizes: Mapping[str, tuple[int, int]],
    leaders: Mapping[str, str],
    budget: int | None,
    *,
    sweeps: int = 1,
    on_host: bool = True,
) -> list[list[str]]:
    """The layers, in order, in groups whose statistics fit into `budget` bytes; layers of one input stay together.

    Args:
        sizes: (d_in, d_out) of each layer.
        leaders: of each layer, the first one with the same input; see `calibrate`.
        budget: None for all layers in one group.

    Raises:
        GfwsvdError: when the layers of one input alone need more.
    """
    families: dict[str, list[str]] = {}
    for name in sizes:
        families.setdefault(leaders[name], []).append(name)
    groups: list[list[str]] = []
    room = 0
    for family in families.values():
        needed = sum(statistics_bytes(*sizes[name], sweeps=sweeps, on_host=on_host) for name in family)
        if budget is not None and needed > budget:
            raise GfwsvdError(
                f"the statistics of {_names(family)} take {bytes_text(needed)}, {bytes_text(budget)} are left for "
                "statistics: give more memory, or smaller batches or shorter sequences, whose activations take the rest"
            )
        if not groups or budget is not None and needed > room:
            groups.append([])
            room = budget or 0
        groups[-1] += family
        room -= needed
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
