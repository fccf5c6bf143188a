"""The layers of a model solved and built by all ranks of a job, each its share: all end with all of them."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import Statistics
from .gains import half_curvature
from .layers import LowRankLinear, layer_device, weight_shape
from .methods import Method
from .ranked import gathered, owners, rank, send, share, shared_errors
from .ranks import Candidate, Cost
from .solve import Built, Factors, Roots, Solution, blank_layer, low_rank, metrics_of, roots_of, solve
from .track import Track
from .whiten import batch_size


def solve_layers(
    linears: Mapping[str, nn.Module],
    statistics: Statistics,
    row: Method,
    *,
    blanks: Mapping[str, Candidate],
    damping: float,
    track: Track,
    **settings: Any,
) -> tuple[dict[str, Solution], dict[str, Factors]]:
    """The solutions of all layers, and the factors of those that are this rank's.

    Args:
        blanks, damping, settings: see `solve.solve`.

    Raises:
        GfwsvdError: on all ranks, what `solve.solve` raises on one.
    """
    batch_of = {name: batch for batch in _batches(linears) for name in batch}
    mine = _mine(linears)
    solutions: dict[str, Solution] = {}
    factors: dict[str, Factors] = {}
    waiting: dict[str, Roots] = {}

    def roots(name: str) -> Roots:
        if name not in waiting:
            waiting.clear()  # of the batch before, what nobody asked for
            batch = {other: linears[other] for other in batch_of[name]}
            waiting.update(roots_of(batch, statistics, row, damping=damping))
        return waiting.pop(name)

    with shared_errors():
        for name in track(mine, f"{row.name}: {len(mine)} layers"):
            given = {"blank": blanks[name], "roots": partial(roots, name), "damping": damping, **settings}
            solutions[name], factors[name] = solve(name, linears[name], statistics, row, **given)
    found = _merged(solutions)
    return {name: found[name] for name in linears}, factors


def build_layers(
    linears: Mapping[str, nn.Module],
    statistics: Statistics,
    row: Method,
    *,
    solutions: Mapping[str, Solution],
    factors: Mapping[str, Factors],
    ranks: Mapping[str, int | None],
    bits: int | None,
    multiple: int,
    cost: Cost,
    plain: bool = False,
    track: Track,
) -> dict[str, Built]:
    """The new layers, on every rank, of those that `ranks` does not leave dense.

    Args:
        solutions, factors: of `solve_layers`.
        bits, multiple, cost: see `solve.low_rank`.
        plain: two factors everywhere, whose rounding nobody judges: the same products at a fraction of the time.

    Raises:
        GfwsvdError: on all ranks, what is raised on one.
    """
    chosen = {name: number for name in _mine(linears) if (number := ranks[name]) is not None}
    built: dict[str, Built] = {}
    with shared_errors():
        for name in track(list(chosen), f"{row.name}: {len(chosen)} low-rank layers"):
            candidate, soundness = solutions[name]
            metrics = partial(metrics_of, statistics, name, row, soundness["metrics"])
            built[name] = low_rank(
                linears[name],
                replace(candidate, pivoted=candidate.pivoted and not plain),
                factors[name](),
                chosen[name],
                bits=bits,
                multiple=multiple,
                cost=cost,
                metrics=None if plain else metrics,
                damping=soundness["damping_right"],
            )
    forms = _merged({name: (new.layer.rank, new.layer.kind == "pivoted", new.rounding) for name, new in built.items()})
    owner = _owners(linears)
    layers: dict[str, Built] = {}
    for name in filter(forms.__contains__, linears):
        number, pivoted, rounding = forms[name]
        layers[name] = built.get(name) or Built(
            blank_layer(linears[name], number, pivoted=pivoted, bits=bits), rounding
        )
        for tensor in layers[name].layer.state_dict().values():
            send(tensor, owner[name])
    return layers


def curvatures(layers: Mapping[str, LowRankLinear], statistics: Statistics, row: Method) -> dict[str, Tensor]:
    """`gains.half_curvature` of low-rank layers, on every rank, by the metrics of the method itself: what the guard
    puts in their place does not predict the loss."""
    with shared_errors():
        found = {
            name: half_curvature(layers[name], *metrics_of(statistics, name, row)).cpu() for name in share(list(layers))
        }
    return _merged(found)


def _batches(linears: Mapping[str, nn.Module]) -> list[tuple[str, ...]]:
    """The layers, in batches of one shape on one device whose roots are found together. The same in every job and after
    an interruption, since the last bits on a GPU depend on what is in a batch."""
    equal: dict[tuple[torch.device, tuple[int, int]], list[str]] = {}
    for name, module in linears.items():
        equal.setdefault((layer_device(module), weight_shape(module)), []).append(name)
    batches: list[tuple[str, ...]] = []
    for (device, shape), names in equal.items():
        size = batch_size(*shape, device.type)
        batches += [tuple(names[start : start + size]) for start in range(0, len(names), size)]
    return batches


def _owners(linears: Mapping[str, nn.Module]) -> dict[str, int]:
    """The rank that solves and builds each layer: one for a batch."""
    batches = {batch[0]: batch for batch in _batches(linears)}
    costs = {}
    for first, batch in batches.items():
        d_out, d_in = weight_shape(linears[first])
        costs[first] = float(d_out * d_in * min(d_out, d_in) * len(batch))
    return {name: owner for first, owner in owners(costs).items() for name in batches[first]}


def _mine(linears: Mapping[str, nn.Module]) -> list[str]:
    """The layers of this rank, those of a batch after each other."""
    return [name for name, owner in _owners(linears).items() if owner == rank()]


def _merged(found: dict[str, Any]) -> dict[str, Any]:
    """What all ranks have found, by layer."""
    return {name: value for part in gathered(found) for name, value in part.items()}
