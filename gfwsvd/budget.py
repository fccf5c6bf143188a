"""How much memory the statistics of a model take, and which layers are collected together within a budget."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from .errors import GfwsvdError
from .kronecker import PROBES
from .methods import GRADIENTS, INPUTS, KRONECKER
from .statistics import HELDOUT_TOKENS

_FLOAT, _HALF = 4, 2  # bytes
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True)
class Collected:
    """The layers whose statistics are collected, and what of them.

    Attributes:
        sizes: (d_in, d_out) of each layer, in the model's order.
        leaders: of each, the first layer with the same input, which holds the moment of both.
        collect, online: see `calibrate`.
        sweeps: see `calibrate`; one more where it starts from earlier factors.
    """

    sizes: Mapping[str, tuple[int, int]]
    leaders: Mapping[str, str]
    collect: frozenset[str] = frozenset({INPUTS, GRADIENTS, KRONECKER})
    sweeps: int = 1
    online: bool = False

    def bytes(self, names: Iterable[str]) -> int:
        """The most that the statistics of some layers take while a pass collects them, all sums and one layer in
        work; 0 of no layer."""
        names = list(names)
        return sum(map(self._held, names)) + max((_in_work(*self.sizes[name]) for name in names), default=0)

    def families(self) -> list[list[str]]:
        """The layers of each input."""
        found: dict[str, list[str]] = {}
        for name in self.sizes:
            found.setdefault(self.leaders[name], []).append(name)
        return list(found.values())

    def _held(self, name: str) -> int:
        """Bytes of the sums of a layer: triangles of moments, of the new Kronecker factors, from the second sweep on of
        those before, of what weighs samples where that is neither; the sketch's probes, held-out tokens."""
        d_in, d_out = self.sizes[name]
        factors = (1 + (self.sweeps > 1) + self.online) * (KRONECKER in self.collect)
        inputs = factors + (INPUTS in self.collect and self.leaders[name] == name)
        outputs = factors + (GRADIENTS in self.collect)
        triangles = (inputs * d_in * (d_in + 1) + outputs * d_out * (d_out + 1)) // 2
        probes = 2 * PROBES * (KRONECKER in self.collect)
        heldout = HELDOUT_TOKENS * bool(self.collect & {GRADIENTS, KRONECKER})
        return _FLOAT * triangles + (_FLOAT * probes + _HALF * heldout) * (d_in + d_out)


@dataclass(frozen=True)
class Room:
    """Memory that the statistics of some layers share.

    Attributes:
        limit: bytes in all.
        taken: bytes of them that the model and a batch take.
        layers: whose statistics come to it.
        place: what it is called, such as "cuda:0".
    """

    limit: int
    taken: int
    layers: Collection[str]
    place: str = "the device"

    @property
    def left(self) -> int:
        return self.limit - self.taken


def _in_work(d_in: int, d_out: int) -> int:
    """Bytes of a layer besides: a factor as a full matrix, and two products on their way to a sum."""
    return 3 * _FLOAT * max(d_in, d_out) ** 2


def layer_groups(collected: Collected, rooms: Iterable[Room]) -> list[list[str]]:
    """The layers in groups whose statistics fit into every room; those of one input stay together, each in the first
    group that has room for them, so that a group may fill several devices.

    Raises:
        GfwsvdError: when the layers of one input alone need more.
    """
    shares = [(room, frozenset(room.layers)) for room in rooms]
    groups: list[list[str]] = []
    for family in collected.families():
        for room, layers in shares:
            if (needed := collected.bytes(layers.intersection(family))) > room.left:
                raise GfwsvdError(_too_little(family, needed, room))
        for group in groups:
            if all(collected.bytes(layers.intersection(group + family)) <= room.left for room, layers in shares):
                group += family
                break
        else:
            groups.append(list(family))
    return groups


def _too_little(family: Sequence[str], needed: int, room: Room) -> str:
    left = f"{bytes_text(room.left)} are left" if room.left > 0 else "none is left"
    return (
        f"the statistics of {_names(family)} take {bytes_text(needed)}: of {bytes_text(room.limit)} on {room.place} "
        f"the model and a batch take {bytes_text(room.taken)}, {left} for statistics; give more memory, or smaller "
        "batches or shorter sequences"
    )


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
