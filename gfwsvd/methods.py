"""The methods: each is a row that says which metrics it weighs errors by, and what calibration it needs for that.

All minimise `tr(Eᵀ left E right)` over the error E of a low-rank weight. Where the metrics carry the loss's own scale,
that objective is the predicted increase of the loss, in nats per predicted token.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from gfwsvd_kernels import symmetrize

from .errors import GfwsvdError
from .metrics import Metric, mean_diagonal, packed_diagonal
from .statistics import LayerStatistics

INPUTS, GRADIENTS, KRONECKER = "inputs", "gradients", "kronecker"  # what calibration can collect


@dataclass(frozen=True)
class Method:
    """A row of `METHODS`.

    Attributes:
        needs: which of INPUTS, GRADIENTS, KRONECKER its metrics are made of.
        left, right: the metrics of a layer's statistics; `left` takes the number of loss terms too.
        matrices: the statistics that `left` and `right` are, where these are full matrices.
        predicts_loss: whether the objective is in nats per predicted token.
        source: where the method comes from.
    """

    name: str
    needs: frozenset[str]
    left: Callable[[LayerStatistics, int], Metric]
    right: Callable[[LayerStatistics], Metric]
    predicts_loss: bool
    source: str
    matrices: tuple[str | None, str | None] = (None, None)


def _identity(*_: object) -> None:
    return None


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "collected statistics were checked against the method's needs"
    return tensor


def _full(packed: Tensor | None) -> Tensor:
    return symmetrize(_present(packed))


def _second_order(stats: LayerStatistics, num_losses: int) -> float:
    """From a sum over scaled gradient samples to half the curvature of the mean loss."""
    return 0.5 / (num_losses * stats.gradient_scale**2)


def _fisher_rows(stats: LayerStatistics, num_losses: int) -> Tensor:
    return _present(stats.fisher_rows).double() * (_second_order(stats, num_losses) / stats.d_in)


def _output_moment(stats: LayerStatistics, num_losses: int) -> Tensor:
    return _full(stats.output_moment).double() * _second_order(stats, num_losses)


def _fisher_left(stats: LayerStatistics, num_losses: int) -> Tensor:
    # Scaled to the trace of the Fisher, not by s1: the fit leaves out energy, and with s1 the predicted loss would lack
    # it, in some layers more than in others. With the trace it is right on average over directions of the error.
    diagonals = packed_diagonal(_present(stats.left)), packed_diagonal(_present(stats.right))
    traces = mean_diagonal(diagonals[0]) * stats.d_out * mean_diagonal(diagonals[1]) * stats.d_in
    left = _full(stats.left).double()
    return left * (stats.trace / traces * _second_order(stats, num_losses)) if traces else left


def _fisher_right(stats: LayerStatistics) -> Tensor:
    return _full(stats.right)


def _input_moment(stats: LayerStatistics) -> Tensor:
    return _full(stats.input_moment).double() / stats.num_tokens


def _input_abs(stats: LayerStatistics) -> Tensor:
    return _present(stats.input_abs).double() / stats.num_tokens  # (mean |x|)^(2 alpha), alpha = 0.5


METHODS = {
    row.name: row
    for row in (
        Method("svd", frozenset(), _identity, _identity, False, "Eckart and Young, 1936"),
        Method("fwsvd", frozenset({GRADIENTS}), _fisher_rows, _identity, True, "Hsu et al., ICLR 2022"),
        Method("asvd", frozenset({INPUTS}), _identity, _input_abs, False, "arXiv 2312.05821"),
        Method(
            "svd_llm",
            frozenset({INPUTS}),
            _identity,
            _input_moment,
            False,
            "ICLR 2025, arXiv 2403.07378",
            (None, "input_moment"),
        ),
        Method(
            "kfac",
            frozenset({INPUTS, GRADIENTS}),
            _output_moment,
            _input_moment,
            True,
            "arXiv 1503.05671",
            ("output_moment", "input_moment"),
        ),
        Method(
            "gfwsvd",
            frozenset({KRONECKER}),
            _fisher_left,
            _fisher_right,
            True,
            "arXiv 2505.17974",
            ("left", "right"),
        ),
    )
}


def method_named(name: str) -> Method:
    """The row of `METHODS` called `name`; GfwsvdError names the rows there are."""
    if name not in METHODS:
        raise GfwsvdError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]
