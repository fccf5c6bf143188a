"""Ranks by what the loss says of the compressed model: there the errors of all layers meet, and what each costs is no
longer what the metrics, which are of the dense model, predict.

Let E be what is cut off a layer's weight. If the model had `a E` of it back, its loss would fall at first by
`-dL/da = sum <g, E x>`, which one backward pass gives for all layers at once; by the prediction p it falls by 2 p. The
ratio of the two scales what the layer's spectrum predicts, and ranks are allocated again.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ranked
from .batches import num_rows
from .errors import GfwsvdError
from .hooks import frozen, watch
from .layers import LowRankLinear, dense_weight, loaded, model_device
from .losses import Batch, Loss
from .methods import Method
from .ranks import Candidate
from .track import Track

Ranks = dict[str, int | None]
ROUND_TOKENS = 8192  # of a round, at least, where the batches hold so many
STEP = 0.5  # of the way from the scale before to the one that was measured, in the logarithm
LIMIT = 4.0  # by which a scale differs from the mean at most, up or down


def check_rounds(rounds: int, ranks: str, row: Method) -> None:
    """GfwsvdError unless so many `rounds` can follow an allocation of `ranks` by the method `row`."""
    if not isinstance(rounds, int) or rounds < 0:
        raise GfwsvdError(f"rounds must be a whole number from 0 on, got {rounds!r}")
    if rounds and (ranks != "global" or not row.predicts_loss):
        raise GfwsvdError(
            f"rounds scale predicted losses, by which global ranks are allocated; {ranks} ranks of method {row.name} "
            "are not: leave out the rounds"
        )


class Refined(NamedTuple):
    """Ranks chosen by the loss.

    Attributes:
        ranks: those of the round with the lowest loss; None for a layer that stays dense.
        losses: mean loss of the compressed model at the first ranks and after each round, in nats for a loss in nats.
        scales: by layer, what its predicted losses were multiplied by in the round that was taken.
    """

    ranks: Ranks
    losses: list[float]
    scales: dict[str, float]


def refined(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    candidates: Mapping[str, Candidate],
    batches: Sequence[Batch],
    loss: Loss,
    *,
    rounds: int,
    allocate: Callable[[Mapping[str, Candidate]], Ranks],
    build: Callable[[Ranks], Mapping[str, LowRankLinear]],
    track: Track[Any],
) -> Refined:
    """Allocates ranks; then `rounds` times measures what each layer's error costs at the compressed model and allocates
    again. `model` has its own layers again at the end, also after an error.

    Args:
        linears: the dense layers that may become low-rank, which are in the model.
        batches: at least one; in a job of several processes the same in all, which share them.
        allocate: ranks by the predicted losses of candidates.
        build: the low-rank layers of some ranks.

    Raises:
        GfwsvdError: when the loss is NaN or inf, and what `build` raises.
    """
    scales = dict.fromkeys(candidates, 1.0)
    losses: list[float] = []
    found = Refined({}, losses, scales)
    few = _first(batches)
    for number in range(rounds + 1):
        ranks = allocate({name: _scaled(candidate, scales[name]) for name, candidate in candidates.items()})
        layers = build(ranks)
        measure: dict[str, Any] = {
            "backward": number < rounds,
            "title": f"loss after {number} of {rounds} rounds",
            "track": track,
        }
        try:
            for name in layers:
                model.set_submodule(name, layers[name])
            mean, costs = measured(model, linears, layers, few, loss, **measure)
        finally:
            for name in layers:
                model.set_submodule(name, linears[name])
        if mean < min(losses, default=math.inf):
            found = Refined(ranks, losses, dict(scales))
        losses.append(mean)
        predicted = {name: candidates[name].tails()[layer.rank].item() for name, layer in layers.items()}
        scales = rescaled(scales, costs, predicted)
        del layers  # before the next ones are built
    return found


def rescaled(
    scales: Mapping[str, float], costs: Mapping[str, float], predicted: Mapping[str, float]
) -> dict[str, float]:
    """New scales of the predicted losses: those before, moved by `STEP` to what was measured.

    The ratio of a measured cost to its prediction counts relative to that of all layers together, and within `LIMIT`:
    near the ends it says more of chance, and of ranks about to change, than of the layer.
    """
    total = sum(costs.values())
    if total <= 0 or sum(predicted.values()) <= 0:  # nothing but noise: so little was cut off
        return dict(scales)
    mean = total / sum(predicted[name] for name in costs)
    moved = dict(scales)
    for name, cost in costs.items():
        if predicted[name] > 0:
            ratio = min(max(cost / predicted[name] / mean, 1 / LIMIT), LIMIT)
            moved[name] = scales[name] ** (1 - STEP) * ratio**STEP
    return moved


def _scaled(candidate: Candidate, scale: float) -> Candidate:
    return replace(candidate, spectrum=candidate.spectrum * math.sqrt(scale))


def _first(batches: Sequence[Batch]) -> list[Batch]:
    """As many batches as hold `ROUND_TOKENS` entries of their first tensor."""
    few: list[Batch] = []
    tokens = 0
    for batch in batches:
        if tokens < ROUND_TOKENS:
            few.append(batch)
            tokens += next(iter(batch.values())).numel()
    return few


def measured(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    layers: Mapping[str, LowRankLinear],
    batches: Sequence[Batch],
    loss: Loss,
    *,
    backward: bool,
    title: str,
    track: Track[Any],
) -> tuple[float, dict[str, float]]:
    """The mean loss over `batches` of a `model` in which `layers` are; with `backward` also, of each of them, half of
    the rate at which the loss falls as its error is taken back: what the error costs where the loss is quadratic.

    Args:
        linears: the dense layers in whose place they are.
        title: of the progress.

    Raises:
        GfwsvdError: on all ranks of a job, when the loss is NaN or inf.
    """
    costs: dict[str, float] = {}

    def see(name: str, x: Tensor, g: Tensor) -> None:
        costs[name] = costs.get(name, 0.0) + _cost(layers[name], linears[name], x, g)

    rows = []
    device = model_device(model)
    with ranked.shared_errors(), frozen(model), torch.set_grad_enabled(backward):
        for number in track(ranked.share(range(len(batches))), title):
            batch = batches[number]
            costs.clear()
            with watch(layers, on_input=lambda name, x: None, on_gradient=see):
                losses = loss(model, {name: value.to(device) for name, value in batch.items()})
                if not torch.isfinite(total := losses.double().sum()):
                    raise GfwsvdError(f"the loss of the compressed model is NaN or inf ({num_rows(batch)} sequences)")
                if backward:
                    total.backward()
            rows.append((number, losses.numel(), total.item(), dict(costs)))
    # By batch, not by process, so that the sums have the same bits in any job
    found = sorted(row for part in ranked.gathered(rows) for row in part)
    count = sum(terms for _, terms, _, _ in found)
    sums = {name: math.fsum(row[3].get(name, 0.0) for row in found) / count for name in layers} if backward else {}
    return math.fsum(row[2] for row in found) / count, sums


def _cost(layer: LowRankLinear, linear: nn.Module, x: Tensor, g: Tensor) -> float:
    """`sum <g, y - W x> / 2` over the rows of a batch, y what the low-rank layer gives."""
    weight, bias = dense_weight(linear).to(x.device), loaded(linear, "bias")
    error = layer.forward(x).float() - F.linear(x, weight, None if bias is None else bias.to(x.device)).float()
    return 0.5 * (g.float() * error).sum(dtype=torch.float64).item()
