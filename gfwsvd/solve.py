"""One layer of a compression: its solution, on disk where asked, and the low-rank layer that is made of it."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from . import pivot
from .calibration import Statistics
from .errors import GfwsvdError
from .factorize import whitened_decomposition
from .feedback import whole_numbered
from .guard import chosen_metrics, judged_decomposition
from .layers import LowRankLinear, dense_weight, layer_device, loaded, weight_shape
from .methods import Method
from .metrics import Metric, objective
from .packed import NUMBERS
from .ranks import Candidate, Cost
from .whiten import Root, root, roots
from .work import Work


class Solution(NamedTuple):
    """What ranks are chosen by, and the report's fields on metrics, damping and condition."""

    candidate: Candidate
    soundness: dict[str, Any]


Roots = tuple[Root, Root]  # of the left and the right metric of a layer
# Gives `up (D_OUT, R)` and `down (R, D_IN)` of the largest rank R that stores less than the weight; any lower rank is
# the first part of them. They are in the weight's dtype, but at least float32 for a pivoted form, which is made of
# their product: at most twice the layer's own size in float32.
Factors = Callable[[], tuple[Tensor, Tensor]]


class Built(NamedTuple):
    """A new layer, and what rounding to half precision adds to its objective (None in other dtypes)."""

    layer: LowRankLinear
    rounding: float | None


def solve(
    name: str,
    module: nn.Module,
    statistics: Statistics,
    row: Method,
    *,
    blank: Candidate,
    roots: Callable[[], Roots],
    work: Work | None,
    **settings: Any,
) -> tuple[Solution, Factors]:
    """Decomposes a layer by the metrics of the method `row`.

    Args:
        blank: the layer before its spectrum is known.
        roots: gives the roots of those metrics.
        work: where the solution is kept; it is taken from there if statistics of the same numbers left it, and the
            factors are read when they are asked for.
        settings: the share `keep` at whose rank the guard compares, and `damping` and `guard` as in `compress`.

    Raises:
        GfwsvdError: see `factorize.decompose` and `work.Work`.
    """
    if work is None:
        solution, up, down = _solved(name, module, statistics, row, blank=blank, roots=roots, **settings)
        return solution, lambda: (up, down)
    key = _key(name, statistics)
    kept = work.load(f"{key}.spectrum")
    if kept is None:
        solution, up, down = _solved(name, module, statistics, row, blank=blank, roots=roots, **settings)
        work.save(f"{key}.factors", {"up": up, "down": down}, {})
        spectrum = {"spectrum": solution.candidate.spectrum}
        work.save(f"{key}.spectrum", spectrum, solution.soundness)  # last: where it is, the factors are
    else:
        solution = Solution(replace(blank, spectrum=kept[0]["spectrum"]), kept[1])
    return solution, _kept_factors(work, key, name, layer_device(module))


def _solved(
    name: str,
    module: nn.Module,
    statistics: Statistics,
    row: Method,
    *,
    blank: Candidate,
    roots: Callable[[], Roots],
    keep: float,
    damping: float,
    guard: bool,
) -> tuple[Solution, Tensor, Tensor]:
    weight = dense_weight(module).to(layer_device(module))
    judged = judged_decomposition(
        weight,
        whitened_decomposition(weight, *roots(), name=name),
        statistics.layers[name],
        row,
        metrics=partial(metrics_of, statistics, name, row),
        rank=blank.largest_within(int(keep * blank.dense)),
        damping=damping,
        guard=guard,
        name=name,
    )
    found = judged.found
    soundness = {
        f"{what}_{side}": getattr(root, what)
        for side, root in (("left", found.left), ("right", found.right))
        for what in ("damping", "condition")
    }
    soundness |= {"metrics": judged.choice, "heldout_losses": judged.losses}
    dtype = torch.promote_types(weight.dtype, torch.float32) if blank.pivoted else weight.dtype
    # Contiguous, as a disk gives them back: the last bits of a product depend on the layout.
    up, down = (factor.to(dtype).contiguous() for factor in found.factors(weight, blank.largest_rank))
    return Solution(replace(blank, spectrum=found.spectrum.cpu()), soundness), up, down


def _key(name: str, statistics: Statistics) -> str:
    """What the states of a layer are called, by the numbers of its statistics: of others, the last bits differ."""
    numbers = [getattr(statistics.layers[name], number) for number in NUMBERS]
    return hashlib.sha256(repr((name, statistics.num_losses, numbers)).encode()).hexdigest()


def _kept_factors(work: Work, key: str, name: str, device: torch.device) -> Factors:
    def factors() -> tuple[Tensor, Tensor]:
        kept = work.load(f"{key}.factors")
        if kept is None:
            raise GfwsvdError(f"the factors of layer {name} are gone from {work.path}; remove it to solve all anew")
        return kept[0]["up"].to(device), kept[0]["down"].to(device)

    return factors


def metrics_of(statistics: Statistics, name: str, row: Method, choice: str | None = None) -> tuple[Metric, Metric]:
    """The left and right metric of a layer, or what a `choice` of the guard makes of them."""
    stats = statistics.layers[name]
    metrics = row.left(stats, statistics.num_losses), row.right(stats)
    return metrics if choice is None else chosen_metrics(choice, metrics, stats, row)


def roots_of(
    linears: Mapping[str, nn.Module], statistics: Statistics, row: Method, *, damping: float
) -> dict[str, Roots]:
    """The roots of the metrics of layers of one shape, found together on the device of the first one.

    Raises:
        GfwsvdError: see `whiten.roots`.
    """
    device = layer_device(next(iter(linears.values())))
    pairs = [metrics_of(statistics, name, row) for name in linears]
    found = []
    for side, metrics in zip(("left", "right"), zip(*pairs, strict=True), strict=True):
        there = [None if metric is None else metric.to(device) for metric in metrics]
        found.append(roots(there, damping=damping, names=[f"the {side} metric of layer {name}" for name in linears]))
    return dict(zip(linears, zip(*found, strict=True), strict=True))


def with_gains(factors: Factors, gains: Tensor | None) -> Factors:
    """The factors of a layer whose outputs have `gains` (D_OUT,), or none."""
    if gains is None:
        return factors

    def scaled() -> tuple[Tensor, Tensor]:
        up, down = factors()
        return up * gains[:, None].to(up), down

    return scaled


def low_rank(
    module: nn.Module,
    candidate: Candidate,
    factors: tuple[Tensor, Tensor],
    rank: int,
    *,
    bits: int | None,
    multiple: int,
    cost: Cost,
    metrics: Callable[[], tuple[Metric, Metric]] | None,
    damping: float,
) -> Built:
    """The layer of `rank` that takes the place of the linear `module`, its factors in `bits` if given.

    A layer to be pivoted is stored as two factors of a lower rank, within the same size and cost, if that loses less.

    Args:
        metrics: that rounding is judged by, and in four bits done by; None leaves it out of account.
        damping: of the metric over inputs, as in its decomposition.
    """
    form: dict[str, Any] = {"bits": bits, "right": Root("identity")}
    if metrics is None or bits is None and cast(Tensor, module.weight).dtype.itemsize >= 4:
        return Built(_stored_layer(module, factors, rank, pivoted=candidate.pivots(rank), **form), None)
    weighed_by = metrics()
    if bits == 4:
        right = None if weighed_by[1] is None else weighed_by[1].to(factors[0].device)
        form["right"] = root(right, damping=damping, name="the right metric of a layer")
    layer = _stored_layer(module, factors, rank, pivoted=candidate.pivots(rank), **form)
    rounding = _rounding_loss(layer, factors, weighed_by)
    lower = candidate.two_factors(rank, multiple, cost)
    if layer.kind == "pivoted" and lower:
        tails = candidate.tails()
        other = _stored_layer(module, factors, lower, pivoted=False, **form)
        other_rounding = _rounding_loss(other, factors, weighed_by)
        if tails[lower].item() + other_rounding < tails[rank].item() + rounding:
            return Built(other, other_rounding)
    return Built(layer, rounding)


def blank_layer(module: nn.Module, rank: int, *, pivoted: bool, bits: int | None) -> LowRankLinear:
    """The layer that takes the place of the linear `module`, before its numbers are known."""
    d_out, d_in = weight_shape(module)
    dtype = cast(Tensor, module.weight).dtype
    layer = LowRankLinear(d_in, d_out, rank, pivoted=pivoted, bits=bits, bias=module.bias is not None, dtype=dtype)
    return _like(module, layer)


def _stored_layer(
    module: nn.Module, factors: tuple[Tensor, Tensor], rank: int, *, pivoted: bool, bits: int | None, right: Root
) -> LowRankLinear:
    dtype = cast(Tensor, module.weight).dtype
    up, down, order, scales = factors[0][:, :rank].clone(), factors[1][:rank].clone(), None, None
    if pivoted:
        form = pivot.pivoted(up, down)
        up, down, order = form.up, form.down, form.order()
    if bits is None:
        up, down = up.to(dtype), down.to(dtype)
    else:
        up, down, scales = whole_numbered(up, down, right, bits=bits, dtype=dtype)
    return _like(module, LowRankLinear.from_factors(up, down, loaded(module, "bias"), order, scales))


def _like(module: nn.Module, layer: LowRankLinear) -> LowRankLinear:
    layer = layer.to(layer_device(module)).train(module.training)
    for parameter in layer.parameters():
        parameter.requires_grad_(cast(Tensor, module.weight).requires_grad and parameter.is_floating_point())
    return layer


def _rounding_loss(layer: LowRankLinear, factors: tuple[Tensor, Tensor], metrics: tuple[Metric, Metric]) -> float:
    """The objective of what the dtype of the layer makes of its rank: the error of its weight beside the exact one."""
    exact = factors[0][:, : layer.rank].double() @ factors[1][: layer.rank].double()
    return objective(layer.product(torch.float64) - exact, *metrics)
