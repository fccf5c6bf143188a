"""Ranks by how far the compressed model is from the dense one: there the errors of all layers meet, and what each
costs is no longer what the metrics, which are of the dense model, predict.

Let E be what is cut off a layer's weight. If the model had `a E` of it back, its loss, which is by default the
divergence of its predictions from those of the dense model, would fall at first by
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

from .errors import GfwsvdError
from .joint import See, first_tokens, measured, placed
from .layers import LowRankLinear, dense_weight, loaded
from .losses import Batch, Loss, divergence
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
    if rounds and not takes_rounds(ranks, row):
        raise GfwsvdError(
            f"rounds scale predicted losses, by which global ranks are allocated; {ranks} ranks of method {row.name} "
            "are not: leave out the rounds"
        )


def takes_rounds(ranks: str, row: Method) -> bool:
    """Whether rounds can follow an allocation of `ranks` by the method `row`: it must go by predicted losses."""
    return ranks == "global" and row.predicts_loss


class Refined(NamedTuple):
    """Ranks chosen by the loss of the compressed model.

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
    *,
    rounds: int,
    allocate: Callable[[Mapping[str, Candidate]], Ranks],
    build: Callable[[Ranks], Mapping[str, LowRankLinear]],
    loss: Loss | None = None,
    track: Track[Any],
) -> Refined:
    """Allocates ranks; then `rounds` times measures what each layer's error costs at the compressed model and allocates
    again. `model` has its own layers again at the end, also after an error.

    Args:
        linears: the dense layers that may become low-rank, which are in the model.
        batches: at least one; in a job of several processes the same in all, which share them.
        allocate: ranks by the predicted losses of candidates.
        build: the low-rank layers of some ranks.
        loss: by default the divergence of the model's predictions from those of the dense one.

    Raises:
        GfwsvdError: when the loss is NaN or inf, and what `build` raises.
    """
    scales = dict.fromkeys(candidates, 1.0)
    losses: list[float] = []
    found = Refined({}, losses, scales)
    few = first_tokens(batches, ROUND_TOKENS)
    loss = loss or divergence(lambda model: placed(model, linears))
    for number in range(rounds + 1):
        ranks = allocate({name: _scaled(candidate, scales[name]) for name, candidate in candidates.items()})
        layers = build(ranks)
        see = error_costs(linears, layers) if number < rounds else None
        mean, costs = measured(
            model, layers, few, loss, see=see, title=f"loss after {number} of {rounds} rounds", track=track
        )
        if mean < min(losses, default=math.inf):
            found = Refined(ranks, losses, dict(scales))
        losses.append(mean)
        predicted = {name: candidates[name].tails()[layer.rank].item() for name, layer in layers.items()}
        scales = rescaled(scales, {name: cost.item() for name, cost in costs.items()}, predicted)
        del layers, see  # before the next ones are built
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


def error_costs(linears: Mapping[str, nn.Module], layers: Mapping[str, LowRankLinear]) -> See:
    """Half of the rate at which the loss falls as a layer's error is taken back, `sum <g, y - W x> / 2` with y what the
    low-rank layer gives: what the error costs where the loss is quadratic."""

    def see(name: str, x: Tensor, g: Tensor) -> Tensor:
        linear = linears[name]
        weight, bias = dense_weight(linear).to(x.device), loaded(linear, "bias")
        error = (
            layers[name].forward(x).float() - F.linear(x, weight, None if bias is None else bias.to(x.device)).float()
        )
        return 0.5 * (g.float() * error).sum(dtype=torch.float64)

    return see
