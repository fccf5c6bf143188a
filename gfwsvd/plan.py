"""What `gfwsvd calibrate` and `gfwsvd compress` will take of a machine, phase by phase, before anything is computed."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from .budget import Collected, Room, bytes_text, layer_groups
from .checks import check_length
from .collecting import collection
from .effort import Shape, Step, costs, factorisation, flops, model_pass, moves, seconds, slopes
from .errors import GfwsvdError
from .footprint import (
    Settings,
    activation_bytes,
    check_settings,
    factor_bytes,
    gain_bytes,
    placed,
    recomputed_bytes,
    round_bytes,
    sample_bytes,
    saved_bytes,
    statistics_on_disk,
    uniform_ranks,
    workspace_bytes,
)
from .hardware import Hardware
from .methods import method_named

JUDGEMENTS = 1.3  # of a step of gains, on average: one, and further ones where it was too long
_SHORTEST = 32  # tokens of a sequence, below which no shorter ones are proposed


@dataclass(frozen=True)
class Phase:
    """A part of the work.

    Attributes:
        name: for people.
        seconds: estimated time.
        flops: operations of its products and factorisations.
        device_bytes: most memory of the device; on a CPU zero, since all is in the host's.
        host_bytes: most memory of the host.
        disk_bytes: of files that the work makes, at the end of the phase.
    """

    name: str
    seconds: float
    flops: float
    device_bytes: int
    host_bytes: int
    disk_bytes: int


@dataclass(frozen=True)
class Plan:
    """What the work takes, and gives.

    Attributes:
        phases: in order; for `passes`, one for every sweep, which goes over the text once for each group of layers.
        groups: groups that layers are collected in, so that their statistics fit the memory; 0 without calibration.
        passes: passes over the text in all, but for the batches of rounds and gains.
        statistics_bytes: of the directory of statistics.
        dense_bytes, output_bytes: of the weights before and after; with bits, of layers that all become low-rank: one
            that stays dense keeps its dtype.
        speedup: an upper bound for decoding one text: bytes that a token reads before over those after.
        recomputed: whether activations are, since memory is short or weights wait on host or disk.
        ceilings: see `Hardware.ceilings`.
    """

    device: str
    groups: int
    passes: int
    phases: tuple[Phase, ...]
    statistics_bytes: int
    dense_bytes: int
    output_bytes: int
    speedup: float
    recomputed: bool
    ceilings: Mapping[str, float]

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON values, sums included."""
        totals = {"seconds": self.seconds, "flops": sum(phase.flops for phase in self.phases)}
        peaks = {
            name: max(getattr(phase, name) for phase in self.phases)
            for name in ("device_bytes", "host_bytes", "disk_bytes")
        }
        return {**asdict(self), "phases": [asdict(phase) for phase in self.phases], **totals, **peaks}


def plan(shape: Shape, settings: Settings, hardware: Hardware) -> Plan:
    """The `estimate`, of work that finds room.

    Raises:
        GfwsvdError: settings out of range, or more memory or disk than there is; says what would fit.
    """
    check_settings(settings)
    if method_named(settings.method).needs:
        check_length(settings.seq_len, shape.positions)
    found = estimate(shape, settings, hardware)
    for phase in found.phases:
        for what, needed, there in _rooms(phase, hardware):
            if needed > there:
                raise GfwsvdError(
                    f"{phase.name} needs {bytes_text(needed)} of {what}, {bytes_text(there)} are there: "
                    f"{_advice(found, shape, settings, hardware)}"
                )
    return found


def estimate(shape: Shape, settings: Settings, hardware: Hardware) -> Plan:
    """What a model of `shape` takes of `hardware`, whether or not there is so much."""
    collecting = _collecting(shape, settings, hardware)
    groups = collecting.groups
    phases = tuple(_phases(shape, settings, hardware, collecting))
    weights, saved = shape.parameters * shape.itemsize, saved_bytes(shape, settings)
    read = weights - shape.embedding * shape.itemsize
    return Plan(
        device=hardware.name,
        groups=len(groups),
        passes=settings.sweeps * len(groups),
        phases=phases,
        statistics_bytes=statistics_on_disk(shape, settings, shape.linears) if groups else 0,
        dense_bytes=weights,
        output_bytes=weights - saved,
        speedup=read / (read - saved),
        recomputed=collecting.recomputed,
        ceilings=hardware.ceilings,
    )


@dataclass(frozen=True)
class _Collecting:
    """How the statistics are collected: the groups, the most that one of them takes on a device, the bytes of a batch's
    activations, and whether these are recomputed."""

    groups: list[list[str]]
    held: int
    activations: int
    recomputed: bool


def _collecting(shape: Shape, settings: Settings, hardware: Hardware) -> _Collecting:
    """As `memory.divided` does it; where not even the layers of one input find room, as few groups as these
    need."""
    if not method_named(settings.method).needs:
        return _Collecting([], 0, 0, False)
    about, weights = _about(shape, settings), placed(shape, hardware)
    shares = _shares(shape, hardware)
    family = max(map(about.bytes, about.families()))
    kept, recomputed = activation_bytes(shape, settings), recomputed_bytes(shape, settings)
    short = weights.waiting > 0 or hardware.device_memory - weights.device - kept < family
    activations = (recomputed if short else kept) + sample_bytes(shape, settings)
    rooms = [Room(max(hardware.device_memory - weights.device - activations, family), 0, share) for share in shares]
    if hardware.device != "cpu":  # the host gets the sums of a group, to write them
        rooms.append(Room(max(hardware.host_memory - weights.host, family), 0, shape.linears))
    groups = layer_groups(about, rooms)
    held = max(about.bytes(share.intersection(names)) for names in groups for share in shares)
    return _Collecting(groups, held, activations, short)


def _shares(shape: Shape, hardware: Hardware) -> list[frozenset[str]]:
    """The layers of each device: with weights spread, as many of the next ones for each; none divides an input's."""
    families = _about(shape, Settings()).families()
    count = hardware.gpus if hardware.spread else 1
    size = -(-len(families) // count)
    parts = (families[place : place + size] for place in range(0, len(families), size))
    return [frozenset(itertools.chain(*part)) for part in parts]


def _about(shape: Shape, settings: Settings) -> Collected:
    return Collected(shape.linears, shape.leaders, settings.collect, settings.sweeps)


def _phases(shape: Shape, settings: Settings, hardware: Hardware, collecting: _Collecting) -> Iterator[Phase]:
    groups = collecting.groups
    on_cpu = hardware.device == "cpu"

    def phase(
        name: str,
        steps: Iterable[Step] = (),
        /,
        *,
        device: int,
        host: int = 0,
        disk: int = 0,
        read: int = 0,
        written: int = 0,
        moved: float = 0,
    ) -> Phase:
        """`host` is what the host holds where it is not the device; `read` and `written` are bytes of files; `moved`
        says how often all weights that wait on the host or on disk come to the device."""
        steps = list(steps)
        took = seconds(steps, hardware) + (read / hardware.disk_read + written / hardware.disk_write)
        took += (read + written) / hardware.digest
        took += moved * (place.waiting / hardware.link + place.disk / hardware.disk_read)
        memory = (0, device) if on_cpu else (device, host + place.host)
        return Phase(name, took, flops(steps), *memory, disk)

    weights = shape.parameters * shape.itemsize
    place = placed(shape, hardware)
    there = place.device
    # What waits computes on the first device, and so its compressed form is there
    on_first = (there + place.waiting) / weights
    yield phase("load", device=there, host=shape.largest * shape.itemsize, read=weights)
    statistics = 0
    if groups:
        statistics = statistics_on_disk(shape, settings, shape.linears)
        state = max(statistics_on_disk(shape, settings, names) for names in groups)
        # Beside what is done lie the last state of a group and that of its present pass
        room = {"device": there + collecting.activations + collecting.held, "host": state}
        room["disk"] = statistics + 2 * state
        for number, steps in enumerate(_sweeps(shape, settings, collecting, on_cpu), start=1):
            yield phase(f"calibration sweep {number}", steps, moved=2 * _batches(settings) * len(groups), **room)
        held_out = settings.heldout * settings.seq_len / settings.batch_tokens * len(groups)
        yield phase("held-out tokens", _others(shape, settings, collecting), moved=2 * held_out, **room)
        # Read once more, to be compared with their digests
        yield phase("statistics to disk", **room, read=statistics, written=(settings.sweeps + 1) * statistics)
    solving: dict[str, Any] = {"keep": settings.keep, "sides": settings.sides, "bits": settings.bits}
    solving |= {"pivoted": settings.storage == "pivoted", "heldout": settings.heldout_tokens if groups else 0}
    solved = [factorisation(shape, *sizes, **solving) for sizes in shape.linears.values()]
    smaller = weights - saved_bytes(shape, settings)
    workspace = workspace_bytes(shape, settings, hardware.device)
    factors = factor_bytes(shape, settings)
    yield phase(
        "factorisation", itertools.chain(*solved), device=there + workspace, host=workspace // 4, disk=statistics
    )
    files = statistics + factors
    yield phase("factors to disk", device=there, disk=files, written=factors)
    if settings.rounds:
        beside = round_bytes(shape, settings)
        for number in range(settings.rounds + 1):
            steps = _measured(shape, settings, backward=number < settings.rounds)
            title = f"loss after {number} of {settings.rounds} rounds"
            yield phase(title, steps, device=there + beside, disk=files, read=factors)
    if settings.gains:
        title = f"{settings.gains} steps of gains"
        beside = gain_bytes(shape, settings)
        yield phase(title, _fitted(shape, settings), device=there + beside, disk=files, read=factors)
    yield phase("factors from disk", device=there + int(on_first * smaller), disk=files, read=files)
    yield phase("writing", device=int(on_first * smaller), host=smaller, disk=files + smaller, written=smaller)


def _batches(settings: Settings) -> float:
    """Batches of one pass."""
    return (settings.sequences - settings.heldout) * settings.seq_len / settings.batch_tokens


def _sweeps(shape: Shape, settings: Settings, collecting: _Collecting, on_cpu: bool) -> Iterator[list[Step]]:
    """The passes of each sweep."""
    batches = _batches(settings)
    for number in range(settings.sweeps):
        steps = _pass(shape, settings, collecting, times=batches * len(collecting.groups))
        about: dict[str, Any] = {"collect": settings.collect, "on_cpu": on_cpu, "times": batches}
        about["sample"] = settings.sample_tokens
        yield steps + collection(shape, settings.batch_tokens, first=number == 0, **about)


def _others(shape: Shape, settings: Settings, collecting: _Collecting) -> list[Step]:
    """The forward pass that shows which layers share an input, and the passes over what is held out."""
    times = settings.heldout * settings.seq_len / settings.batch_tokens * len(collecting.groups)
    first = model_pass(shape, settings.batch_tokens, settings.seq_len, backward=False)
    return first + _pass(shape, settings, collecting, times=times)


def _pass(shape: Shape, settings: Settings, collecting: _Collecting, *, times: float) -> list[Step]:
    """Forward and backward, and forward once more where activations are recomputed."""
    sizes = settings.batch_tokens, settings.seq_len
    again = model_pass(shape, *sizes, backward=False, times=times) if collecting.recomputed else []
    return model_pass(shape, *sizes, times=times) + again


def _measured(shape: Shape, settings: Settings, *, backward: bool) -> list[Step]:
    """Two factors for every layer, and how far the model with them is from the dense one, which runs too; with
    `backward` what errors cost as well."""
    tokens, ranks, times = settings.batch_tokens, uniform_ranks(shape, settings), settings.round_batches
    # Their part of the largest rank, in the dtype of the model
    steps = [moves(rank * sum(shape.linears[name]), 2) for name, rank in ranks.items() if rank is not None]
    steps += model_pass(shape, tokens, settings.seq_len, backward=False, times=times)
    steps += model_pass(shape, tokens, settings.seq_len, backward=backward, times=times, ranks=ranks)
    return steps + costs(shape, tokens, ranks=ranks, times=times * backward)


def _fitted(shape: Shape, settings: Settings) -> list[Step]:
    """Steps of gains, each fitted to some batches and judged by others, where the dense model runs too."""
    tokens, ranks, seq_len = settings.batch_tokens, uniform_ranks(shape, settings), settings.seq_len
    fitted = settings.gains * settings.step_batches
    judged = (1 + JUDGEMENTS * settings.gains) * settings.judged_batches
    steps = model_pass(shape, tokens, seq_len, backward=False, times=fitted + judged)
    steps += model_pass(shape, tokens, seq_len, backward=False, times=judged, ranks=ranks)
    steps += model_pass(shape, tokens, seq_len, times=fitted, ranks=ranks)
    return steps + slopes(shape, tokens, ranks=ranks, times=fitted)


def _rooms(phase: Phase, hardware: Hardware) -> list[tuple[str, int, int]]:
    """What a phase needs of each resource, and what there is."""
    return [
        ("memory of the device", phase.device_bytes, hardware.device_memory),
        ("memory of the host", phase.host_bytes, hardware.host_memory),
        ("disk", phase.disk_bytes, hardware.disk),
    ]


def _advice(found: Plan, shape: Shape, settings: Settings, hardware: Hardware) -> str:
    """What to change so that all fits."""
    ways = [("", hardware)]
    if not hardware.spread:
        ways.append(("--device auto", replace(hardware, spread=True)))
    for spread, machine in ways:
        for option, smaller in [("", settings), *_smaller(settings)]:
            phases = estimate(shape, smaller, machine).phases
            if all(needed <= there for phase in phases for _, needed, there in _rooms(phase, machine)):
                return f"{' '.join(filter(None, (spread, option)))} fits"
    lacking = []
    by_resource = zip(*(_rooms(phase, hardware) for phase in found.phases), strict=True)
    for rooms, advice in zip(by_resource, _LACKING, strict=True):
        if (most := max(needed for _, needed, _ in rooms)) > rooms[0][2]:
            lacking.append(advice.format(f"{math.ceil(most / 2**20)}M"))
    return "it takes " + " and ".join(lacking)


_LACKING = (
    "a device with {0} free (--device-memory {0}) or --device cpu",
    "a host with {0} free (--host-memory {0})",
    "{0} of free disk where the command is started",
)


def _smaller(settings: Settings) -> Iterator[tuple[str, Settings]]:
    """Smaller batches, then shorter sequences, the text as long as before, then no rounds, no gains, neither."""
    size, length, sequences = settings.batch_size, settings.seq_len, settings.sequences
    while size > 1:
        size //= 2
        yield f"--batch-size {size}", replace(settings, batch_size=size)
    while length // 2 >= _SHORTEST:
        length, sequences = length // 2, sequences * 2
        shorter = replace(settings, batch_size=1, seq_len=length, sequences=sequences)
        yield f"--batch-size 1 --seq-len {length} --sequences {sequences}", shorter
    if settings.rounds:
        yield "--rounds 0", replace(settings, rounds=0)
    if settings.gains:
        yield "--gains 0", replace(settings, gains=0)
    if settings.rounds and settings.gains:
        yield "--rounds 0 --gains 0", replace(settings, rounds=0, gains=0)
