"""Compression of a model in memory: statistics, spectra, ranks, factors, and only then the new layers."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from . import pivot
from .bounds import Bound, bounds_of, check_bounds
from .calibration import CLIP, Batch, Loss, Statistics, Track, calibrate, silent
from .errors import GfwsvdError
from .guard import chosen_metrics, judged_decomposition
from .latency import LatencyTable
from .layers import LowRankLinear, dense_weight, find_linears, fingerprint, weight_shape
from .methods import KRONECKER, Method, method_named
from .metrics import Metric, objective
from .ranks import Candidate, Cost, allocate, check_keep, check_ranks, check_storage, why_dense
from .statistics import LayerStatistics
from .whiten import check_damping

DAMPING = 1e-2
RANK_MULTIPLE = 8
_SPECTRUM_POINTS = 64  # of a spectrum in the report


@dataclass
class LayerReport:
    """What became of one linear layer, and how sound its numbers are.

    Attributes:
        kind: "lowrank" (two factors), "pivoted" or "dense"; `reason` says why a layer stayed dense, or is stored as two
            factors where it was to be pivoted.
        stored, dense: numbers stored now and before, biases aside.
        predicted_loss: the method's objective at the rank: nats per predicted token where the method predicts the loss.
        rounding_loss: what the rounding of the stored numbers to half precision adds to it; None in other dtypes.
        metrics: which of `guard.CHOICES` the layer was factored by.
        heldout_losses: objective of each choice by held-out tokens, at the rank of uniform ranks, in nats per token;
            empty where nothing was compared.
        damping_left, damping_right: added to the diagonals of the metrics, relative to their means.
        condition_left, condition_right: of the damped metrics, estimated.
        convergence: of the Kronecker power iteration: the sine of the last sweep's turn; None where it is not used.
        kronecker_residual: share of the Fisher block's energy that its Kronecker fit misses.
        bound: shares of `dense` that it had to store at least and at most; None where nothing was asked.
        spectrum, spectrum_index: some whitened singular values and their positions, from 0.
    """

    name: str
    kind: str
    d_in: int
    d_out: int
    rank: int | None
    stored: int
    dense: int
    predicted_loss: float = 0.0
    rounding_loss: float | None = None
    metrics: str = ""
    heldout_losses: dict[str, float] = field(default_factory=dict)
    damping_left: float | None = None
    damping_right: float | None = None
    condition_left: float | None = None
    condition_right: float | None = None
    convergence: float | None = None
    kronecker_residual: float | None = None
    reason: str = ""
    bound: list[float] | None = None
    spectrum: list[float] = field(default_factory=list)
    spectrum_index: list[int] = field(default_factory=list)


@dataclass
class CompressionReport:
    """What a compression did.

    Attributes:
        keep: asked share of the compressed linear layers' parameters, or with a latency table of their time.
        kept: achieved `stored / dense` of those layers.
        stored, dense: parameters of those layers (weights), now and before.
        model_stored, model_dense: parameters of the whole model, shared ones once.
        predicts_loss: whether predicted losses are in nats per predicted token.
        seconds: wall time of the factorisation, calibration aside.
        provenance: where the numbers come from: calibration data, settings, latency table, versions.
        time_kept: their time now over that before, as the latency table predicts it; None without one.
        guard: whether held-out tokens could change the metrics of a layer.
    """

    method: str
    keep: float
    kept: float
    ranks: str
    rank_multiple: int
    storage: str
    damping: float
    stored: int
    dense: int
    model_stored: int
    model_dense: int
    predicts_loss: bool
    seconds: float
    layers: list[LayerReport]
    provenance: dict[str, Any]
    time_kept: float | None = None
    guard: bool = False

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "CompressionReport":
        """The report of `to_json`'s values; GfwsvdError where they are not one."""
        try:
            return cls(**{**values, "layers": [LayerReport(**layer) for layer in values["layers"]]})
        except (KeyError, TypeError) as error:
            raise GfwsvdError(f"not a compression report of this version of gfwsvd: {error}") from error


def compress(
    model: nn.Module,
    batches: Iterable[Batch] | None = None,
    *,
    method: str = "gfwsvd",
    keep: float = 0.8,
    ranks: str = "global",
    rank_multiple: int = RANK_MULTIPLE,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    latency: LatencyTable | None = None,
    storage: str = "pivoted",
    damping: float = DAMPING,
    guard: bool = True,
    statistics: Statistics | None = None,
    unit: str = "token",
    labels: str = "empirical",
    sweeps: int = 1,
    clip: float = CLIP,
    seed: int = 0,
    exclude: Iterable[str] = (),
    loss: Loss | None = None,
    track: Track = silent,
) -> CompressionReport:
    """Replaces linear layers of `model`, in place, by low-rank ones; on an error the model keeps all its layers.

    Args:
        batches: calibration data, see `calibrate`; not needed with `statistics`, nor for method "svd".
        method: a row of `METHODS`.
        keep: stored over dense parameters of the compressed linear layers, in (0, 1]; with `latency`, time instead.
        ranks: "uniform" or "global", see `allocate`.
        rank_multiple: ranks are multiples of it.
        bounds: by regular expression, the shares (low, high) of its own dense parameters that a layer whose name it
            matches (`re.search`) stores at least and at most; the last match counts. 1 and 1 keep it dense. Where no
            rank lies between, it is the last one below `high`.
        latency: global ranks minimise the predicted loss within the share `keep` of the layers' time by this table.
        storage: "pivoted" stores a low-rank layer as some of its rows and the coefficients of the others, hence more
            ranks in the same size, except where two factors are smaller or rounding to half precision would cost more
            than the ranks bring; "factors" stores two factors everywhere.
        damping: added to each metric's diagonal, relative to its mean.
        guard: where a method weighs both sides and the statistics have held-out tokens, factor each layer by whichever
            of `guard.CHOICES` costs least there: both metrics, both shrunk, the input's alone, or none.
        statistics: of an earlier `calibrate` of this model, in place of the arguments from `unit` to `loss`.
        unit, labels, sweeps, clip, seed, exclude, loss: see `calibrate`.
        track: wraps long loops to show progress.

    Raises:
        GfwsvdError: for any argument out of range, bounds that match no layer or contradict `keep`, a table that lacks
            a layer's shape, calibration that fails, statistics that lack what the method needs
            or belong to other layers, or a layer whose metrics cannot be whitened.
    """
    row = method_named(method)
    check_keep(keep)
    check_ranks(ranks, rank_multiple)
    check_storage(storage)
    check_damping(damping)
    check_bounds(bounds or {})
    if latency is not None and ranks != "global":
        raise GfwsvdError(f"a latency table serves global ranks, got {ranks}: leave the table out or the ranks global")
    if any(isinstance(module, LowRankLinear) for module in model.modules()):
        raise GfwsvdError("the model has low-rank layers already; expected a dense one: compress the original again")
    blanks = _blanks(model, statistics, exclude, bounds or {}, pivoted=storage == "pivoted")
    if latency is not None:
        latency.check((blank.d_out, blank.d_in) for blank in blanks.values())
    cost: Cost = Candidate.stored if latency is None else latency.cost
    if statistics is None:
        if row.needs and batches is None:
            raise GfwsvdError(f"method {method} needs calibration: give batches or statistics")
        statistics = calibrate(
            model,
            batches or (),
            collect=row.needs,
            unit=unit,
            labels=labels,
            sweeps=sweeps,
            clip=clip,
            seed=seed,
            exclude=exclude,
            loss=loss,
            track=track,
        )
    began = time.perf_counter()
    linears = _checked_linears(model, statistics, row)
    solutions = {
        name: _solve(name, linears[name], statistics, row, keep=keep, damping=damping, guard=guard, blank=blanks[name])
        for name in track(list(linears), f"{method}: {len(linears)} layers")
    }
    candidates = {name: solution.candidate for name, solution in solutions.items()}
    chosen = allocate(candidates, keep=keep, ranks=ranks, rank_multiple=rank_multiple, cost=cost)
    model_dense = _numbers(model)
    low_rank = [(name, rank) for name, rank in chosen.items() if rank is not None]
    layers = {
        name: _low_rank(
            linears[name], solutions[name], rank, rank_multiple, cost, _metrics(statistics, name, row, solutions[name])
        )
        for name, rank in track(low_rank, f"{method}: {len(low_rank)} low-rank layers")
    }
    for name, (layer, _) in layers.items():
        model.set_submodule(name, layer)
    reports = [_layer_report(name, solutions[name], layers.get(name), statistics.layers[name], row) for name in linears]
    for report in reports:
        if report.kind == "dense":
            candidate = candidates[report.name]
            report.reason = why_dense(candidate, keep=keep, rank_multiple=rank_multiple, cost=cost)
    stored, dense = sum(layer.stored for layer in reports), sum(layer.dense for layer in reports)
    return CompressionReport(
        method=method,
        keep=keep,
        kept=stored / dense,
        ranks=ranks,
        rank_multiple=rank_multiple,
        storage=storage,
        damping=damping,
        guard=guard,
        stored=stored,
        dense=dense,
        model_stored=_numbers(model),
        model_dense=model_dense,
        predicts_loss=row.predicts_loss,
        seconds=time.perf_counter() - began,
        layers=reports,
        provenance={
            "settings": statistics.settings,
            "num_losses": statistics.num_losses,
            "num_sequences": statistics.num_sequences,
            "data_sha256": statistics.data_sha256,
            "model_sha256": statistics.model_sha256,
            "calibration_seconds": list(statistics.seconds),
            "unreached": list(statistics.unreached),
            **({} if latency is None else {"latency": latency.about()}),
        },
        time_kept=None
        if latency is None
        else latency.share(((layer.d_out, layer.d_in), layer.kind, layer.rank or 0) for layer in reports),
    )


def _blanks(
    model: nn.Module,
    statistics: Statistics | None,
    exclude: Iterable[str],
    bounds: Mapping[str, tuple[float, float]],
    *,
    pivoted: bool,
) -> dict[str, Candidate]:
    """The layers that will be compressed, before anything is computed: their spectra are empty."""
    if statistics is None:
        shapes = {name: weight_shape(module) for name, module in find_linears(model, exclude=exclude).items()}
    else:
        shapes = {name: (stats.d_out, stats.d_in) for name, stats in statistics.layers.items()}
    limits = bounds_of(shapes, bounds)
    return {name: Candidate(*shape, torch.empty(0), pivoted, limits[name]) for name, shape in shapes.items()}


def _checked_linears(model: nn.Module, statistics: Statistics, row: Method) -> dict[str, nn.Module]:
    """The model's layers that the statistics are about; GfwsvdError unless they fit each other and the method."""
    missing = row.needs - statistics.collected
    if missing:
        raise GfwsvdError(
            f"method {row.name} needs the statistics {', '.join(sorted(row.needs))}; these hold "
            f"{', '.join(sorted(statistics.collected)) or 'none'}: calibrate again"
        )
    linears = find_linears(model)
    advice = "the statistics belong to another model; calibrate this one"
    for name, stats in statistics.layers.items():
        found = weight_shape(linears[name]) if name in linears else "no linear layer"
        if found != (stats.d_out, stats.d_in):
            raise GfwsvdError(
                f"expected a layer {name} of weight {(stats.d_out, stats.d_in)}, the model has {found} there: {advice}"
            )
    linears = {name: linears[name] for name in statistics.layers}
    if fingerprint(linears) != statistics.model_sha256:
        raise GfwsvdError(f"the model's weights are not those that were calibrated, or rounded to float16: {advice}")
    return linears


class _Solution(NamedTuple):
    """What is kept of a layer's decomposition until ranks are chosen: at most twice the layer's own size in float32.

    `up` and `down` have the largest rank that stores less than the weight; any lower rank is the first part of them.
    They are in the weight's dtype, but at least float32 for a pivoted form, which is made of their product.
    `soundness` holds the report's fields on metrics, damping and condition.
    """

    candidate: Candidate
    up: Tensor
    down: Tensor
    soundness: dict[str, Any]


def _solve(
    name: str,
    module: nn.Module,
    statistics: Statistics,
    row: Method,
    *,
    keep: float,
    damping: float,
    guard: bool,
    blank: Candidate,
) -> _Solution:
    weight = dense_weight(module)
    judged = judged_decomposition(
        weight,
        _metrics(statistics, name, row),
        statistics.layers[name],
        row,
        rank=blank.largest_within(int(keep * blank.dense)),
        damping=damping,
        guard=guard,
        name=name,
    )
    found = judged.found
    candidate = replace(blank, spectrum=found.spectrum.cpu())
    up, down = found.factors(weight, candidate.largest_rank)
    soundness = {
        f"{what}_{side}": getattr(root, what)
        for side, root in (("left", found.left), ("right", found.right))
        for what in ("damping", "condition")
    }
    soundness |= {"metrics": judged.choice, "heldout_losses": judged.losses}
    dtype = torch.promote_types(weight.dtype, torch.float32) if blank.pivoted else weight.dtype
    return _Solution(candidate, up.to(dtype), down.to(dtype), soundness)


def _metrics(
    statistics: Statistics, name: str, row: Method, solution: _Solution | None = None
) -> tuple[Metric, Metric]:
    """The metrics of a layer, or those that its solution chose."""
    stats = statistics.layers[name]
    metrics = row.left(stats, statistics.num_losses), row.right(stats)
    return metrics if solution is None else chosen_metrics(solution.soundness["metrics"], metrics, stats, row)


def _low_rank(
    module: nn.Module, solution: _Solution, rank: int, multiple: int, cost: Cost, metrics: tuple[Metric, Metric]
) -> tuple[LowRankLinear, float | None]:
    """The new layer, and what rounding to half precision adds to its objective (None in other dtypes).

    A layer to be pivoted is stored as two factors of a lower rank, within the same size and cost, if that loses less.
    """
    candidate = solution.candidate
    layer = _stored_layer(module, solution, rank, pivoted=candidate.pivots(rank))
    if layer.weight.dtype.itemsize >= 4:
        return layer, None
    rounding = _rounding_loss(layer, solution, metrics)
    lower = candidate.two_factors(rank, multiple, cost)
    if layer.kind == "pivoted" and lower:
        tails = candidate.tails()
        other = _stored_layer(module, solution, lower, pivoted=False)
        other_rounding = _rounding_loss(other, solution, metrics)
        if tails[lower].item() + other_rounding < tails[rank].item() + rounding:
            return other, other_rounding
    return layer, rounding


def _stored_layer(module: nn.Module, solution: _Solution, rank: int, *, pivoted: bool) -> LowRankLinear:
    weight = cast(Tensor, module.weight)
    up, down, order = solution.up[:, :rank].clone(), solution.down[:rank].clone(), None
    if pivoted:
        form = pivot.pivoted(up, down)
        up, down, order = form.up, form.down, form.order()
    bias = cast(Tensor | None, module.bias)
    layer = LowRankLinear.from_factors(up.to(weight.dtype), down.to(weight.dtype), bias, order)
    return layer.train(module.training).requires_grad_(weight.requires_grad)


def _rounding_loss(layer: LowRankLinear, solution: _Solution, metrics: tuple[Metric, Metric]) -> float:
    """The objective of what the dtype of the layer makes of its rank: the error of its weight beside the exact one."""
    exact = solution.up[:, : layer.rank].double() @ solution.down[: layer.rank].double()
    return objective(layer.product(torch.float64) - exact, *metrics)


def _layer_report(
    name: str,
    solution: _Solution,
    chosen: tuple[LowRankLinear, float | None] | None,
    stats: LayerStatistics,
    row: Method,
) -> LayerReport:
    candidate, spectrum = solution.candidate, solution.candidate.spectrum
    points = torch.linspace(0, len(spectrum) - 1, min(_SPECTRUM_POINTS, len(spectrum))).round().long().unique()
    kronecker = KRONECKER in row.needs
    layer, rounding = chosen or (None, None)
    reason = ""
    if layer is not None and candidate.pivoted and layer.kind == "lowrank":
        few = not candidate.pivots(layer.rank)
        reason = "two factors: " + (
            "smaller at so low a rank" if few else "pivoted, rounding would lose more than it saves"
        )
    return LayerReport(
        name=name,
        kind="dense" if layer is None else layer.kind,
        d_in=candidate.d_in,
        d_out=candidate.d_out,
        rank=None if layer is None else layer.rank,
        stored=candidate.dense if layer is None else layer.stored,
        dense=candidate.dense,
        predicted_loss=0.0 if layer is None else candidate.tails()[layer.rank].item(),
        rounding_loss=rounding,
        convergence=stats.convergence[-1] if kronecker else None,
        kronecker_residual=stats.kronecker_residual if kronecker else None,
        reason=reason,
        bound=None if candidate.bound == Bound() else list(candidate.bound),
        spectrum=spectrum[points].tolist(),
        spectrum_index=points.tolist(),
        **solution.soundness,
    )


def _numbers(model: nn.Module) -> int:
    """What the model stores: its parameters, and the orders of outputs of pivoted layers."""
    layers = (module for module in model.modules() if isinstance(module, LowRankLinear) and module.order is not None)
    return sum(parameter.numel() for parameter in model.parameters()) + sum(layer.out_features for layer in layers)
