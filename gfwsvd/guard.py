"""Which metrics of a layer to trust: those that are best for held-out tokens, which no statistics have seen.

With few tokens, or where a layer's gradients differ in kind from text to text, a metric can do more harm than good.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .factorize import Decomposition, decompose
from .methods import Method
from .metrics import Metric, mean_diagonal, shrinkage
from .statistics import LayerStatistics


def _same(metric: Metric, noise: float | None) -> Metric:
    return metric


def _isotropic(metric: Metric, noise: float | None) -> Metric:
    """The multiple of the identity (a diagonal) with the same trace."""
    return None if metric is None else torch.full_like(metric.diagonal(), mean_diagonal(metric))


def _shrunk(metric: Metric, noise: float | None) -> Metric:
    """Mixed with the identity by as much as the metric owes to chance, the trace as before."""
    if metric is None or noise is None:
        return metric
    share = shrinkage(metric, noise)
    mixed = metric * (1 - share)
    mixed.diagonal().add_(share * mean_diagonal(metric))
    return mixed


# What becomes of the left and the right metric
CHOICES: dict[str, tuple[Callable[[Metric, float | None], Metric], Callable[[Metric, float | None], Metric]]] = {
    "two-sided": (_same, _same),
    "shrunk": (_shrunk, _shrunk),
    "input-only": (_isotropic, _same),
    "plain": (_isotropic, _isotropic),
}


# The others are tried where the first loses so many times the share of the layer's loss that it predicts.
SUSPICION = 2.0


class Judged(NamedTuple):
    """A decomposition, the choice of metrics it is of, and the losses by held-out tokens of the choices tried."""

    found: Decomposition
    choice: str
    losses: dict[str, float]


def chosen_metrics(
    choice: str, metrics: tuple[Metric, Metric], stats: LayerStatistics, row: Method
) -> tuple[Metric, Metric]:
    """What `choice` makes of the left and right metric that `row` takes from `stats`."""
    left, right = (
        change(metric, None if matrix is None else stats.noise(matrix))
        for change, metric, matrix in zip(CHOICES[choice], metrics, row.matrices, strict=True)
    )
    return left, right


def judged_decomposition(
    weight: Tensor,
    first: Decomposition,
    stats: LayerStatistics,
    row: Method,
    *,
    metrics: Callable[[str], tuple[Metric, Metric]],
    rank: int,
    damping: float,
    guard: bool,
    name: str,
) -> Judged:
    """The decomposition of `weight (D_OUT, D_IN)` by the metrics of a method, which is the `first`, or, where `guard`
    is on, both of them are full matrices and held-out tokens raise suspicion, by the choice among `CHOICES` whose error
    at `rank` costs least there; by another than the first only where that is certain.

    Suspicious is an error that costs the held-out tokens more than `SUSPICION` times the share of what the whole weight
    is worth to them that the metrics predict.

    Args:
        metrics: what a choice makes of the method's metrics, see `chosen_metrics`.

    Raises:
        GfwsvdError: as `decompose`.
    """
    if not guard or None in row.matrices or stats.heldout_g is None:
        return Judged(first, "two-sided", {})
    best: Judged | None = None
    losses: dict[str, float] = {}
    for choice in CHOICES:
        found = first if best is None else decompose(weight, *metrics(choice), damping=damping, name=name)
        up, down = found.factors(weight, rank)
        costs = heldout_costs(weight.double() - up @ down, stats)
        losses[choice] = costs.mean().item()
        if best is None:
            best, first_costs = Judged(found, choice, losses), costs
            energy = found.spectrum.square()
            predicted = (energy[rank:].sum() / energy.sum()).item()
            if losses[choice] <= SUSPICION * predicted * heldout_costs(weight.double(), stats).mean().item():
                return best
        elif losses[choice] < losses[best.choice] and _is_certain(first_costs - costs, stats.heldout_lengths):
            best = Judged(found, choice, losses)
    assert best is not None
    return best


def heldout_costs(error: Tensor, stats: LayerStatistics) -> Tensor:
    """`(g_tᵀ E x_t)² / 2` of each held-out token for an error E (D_OUT, D_IN), (M,): their mean is the second-order
    increase of the loss, in nats per predicted token."""
    assert stats.heldout_x is not None and stats.heldout_g is not None
    x, g = (rows.to(error) for rows in (stats.heldout_x, stats.heldout_g))
    return 0.5 * ((x @ error.T) * g).sum(1).square() / stats.gradient_scale**2


def _is_certain(gains: Tensor, lengths: list[int]) -> bool:
    """Whether the mean of `gains (M,)`, one a held-out token, is above zero by two standard errors. These are from sums
    over sequences, of these `lengths`, since tokens of one sequence are not independent; where two sequences are not
    known, over single tokens."""
    lengths = lengths if len(lengths) > 1 else [1] * len(gains)
    count, mean = len(lengths), gains.mean()
    deviations = torch.stack([part.sum() for part in (gains - mean).split(lengths)])
    return count > 1 and bool(mean * len(gains) > 2 * (deviations.square().sum() * count / (count - 1)).sqrt())
