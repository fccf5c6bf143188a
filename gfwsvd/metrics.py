"""Metrics: the positive semi-definite matrices that say what an error in a weight costs.

A metric is `None` (the identity), a vector (D,) (a diagonal), or a matrix (D, D) of which the lower triangle counts.
A method picks a `left` metric over outputs and a `right` metric over inputs; the objective is `tr(Eᵀ left E right)`.
"""

from math import isqrt

import torch
from torch import Tensor

from gfwsvd_kernels import pack, symmetrize

Metric = Tensor | None

_PIECE = 1 << 20  # numbers, of which float64 copies stay small


def width(packed: Tensor) -> int:
    """The D of a packed triangle (D (D + 1) / 2,)."""
    return isqrt(2 * packed.shape[0])


def packed_diagonal(packed: Tensor) -> Tensor:
    """The diagonal (D,) of a packed triangle (D (D + 1) / 2,); a copy."""
    rows = torch.arange(1, width(packed) + 1, device=packed.device)
    return packed[rows * (rows + 1) // 2 - 1]


def inner(first: Tensor, second: Tensor) -> float:
    """Frobenius inner product of two symmetric matrices, given as packed triangles (D (D + 1) / 2,), in float64."""
    pieces = zip(first.split(_PIECE), second.split(_PIECE), strict=True)
    twice = 2 * sum(_dot(a, b) for a, b in pieces)
    return float(twice - _dot(packed_diagonal(first), packed_diagonal(second)))  # what waits for a GPU comes last


def _dot(first: Tensor, second: Tensor) -> Tensor:
    return (first.double() * second.double()).sum()


def norm(packed: Tensor) -> float:
    """Frobenius norm of the symmetric matrix whose packed triangle (D (D + 1) / 2,) is given, in float64."""
    return max(inner(packed, packed), 0.0) ** 0.5


def diagonal(metric: Tensor) -> Tensor:
    """The diagonal (D,) of a metric that is not the identity; a view."""
    return metric if metric.dim() == 1 else metric.diagonal()


def mean_diagonal(metric: Metric) -> float:
    """Mean of the diagonal: the scale that damping is relative to."""
    return 1.0 if metric is None else diagonal(metric).double().mean().item()


def shrinkage(metric: Tensor, noise: float) -> float:
    """The share of the identity in that mixture of a matrix (D, D) and the identity, of the same trace, which has the
    least expected squared distance to the truth (Ledoit and Wolf, 2004).

    Args:
        noise: expected squared distance of `metric` to the truth, as a share of its own squared norm.
    """
    packed = pack(metric)
    energy = inner(packed, packed)
    around_sphere = energy - metric.shape[0] * mean_diagonal(metric) ** 2
    return min(noise * energy / around_sphere, 1.0) if around_sphere > 0 else 1.0


def multiply(metric: Metric, matrix: Tensor) -> Tensor:
    """`metric @ matrix`, in the dtype of `matrix`."""
    if metric is None:
        return matrix
    metric = metric.to(matrix)
    return metric[:, None] * matrix if metric.dim() == 1 else symmetrize(metric) @ matrix


def objective(error: Tensor, left: Metric, right: Metric) -> float:
    """`tr(Eᵀ left E right)` of an error E (D_OUT, D_IN), in float64."""
    error = error.double()
    return (multiply(left, error) * multiply(right, error.T).T).sum().item()


def kronecker_residual(sketch: Tensor, scale: float, left_probe: Tensor, right_probe: Tensor) -> float:
    """Share of the Fisher block's energy that `scale * left ⊗ right` misses, 0 (exactly Kronecker) to 1.

    The rearranged Fisher R has one entry in `sketch` (M, M) per pair of rank-one probes, so the mean square of the
    sketch estimates `||R||²`; subtracting the fit's own probes first leaves the noise on the missed part alone.

    Args:
        sketch: `sum_i (v'_kᵀ G_i u_j) (v_kᵀ G_i u'_j)` over gradient samples G_i, (k, j).
        scale: s1, the fit's Frobenius norm when both factors have norm one.
        left_probe: `v'_kᵀ left v_k`, (M,).
        right_probe: `u'_jᵀ right u_j`, (M,).
    """
    missed = (sketch.double() - scale * torch.outer(left_probe.double(), right_probe.double())).square().mean().item()
    return missed / (missed + scale**2) if missed + scale**2 > 0 else 0.0
