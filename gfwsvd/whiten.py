"""Whitening: the damped square root of a metric, by a float64 Cholesky factorisation."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gfwsvd_kernels import symmetrize

from .errors import GfwsvdError
from .metrics import Metric, mean_diagonal

_EIGENVALUE_FLOOR = 1e-12  # of the largest eigenvalue, where Cholesky refuses
_POWER_STEPS = 12


@dataclass(frozen=True)
class Root:
    """C with `metric + damping I = C Cᵀ`.

    Attributes:
        route: how it was found: "identity", "diagonal", "cholesky" or "eigh".
        factor: None, the square roots of the diagonal (D,), a lower triangle (D, D), or eigenvectors (D, D).
        scales: square roots of the eigenvalues (D,) for "eigh", else None.
        damping: what was added to each diagonal entry, relative to their mean.
        condition: estimated ratio of the largest to the smallest eigenvalue of the damped metric.
    """

    route: str
    factor: Tensor | None = None
    scales: Tensor | None = None
    damping: float = 0.0
    condition: float = 1.0

    def times(self, matrix: Tensor) -> Tensor:
        """`matrix @ C`."""
        if self.factor is None:
            return matrix
        if self.factor.dim() == 1:
            return matrix * self.factor
        product = matrix @ self.factor
        return product if self.scales is None else product * self.scales

    def unit_triangle(self) -> Tensor | None:
        """The lower triangle (D, D) K with ones on its diagonal of `C Cᵀ = K diag Kᵀ`; None for a diagonal metric."""
        if self.factor is None or self.factor.dim() == 1:
            return None
        triangle = self.factor if self.scales is None else torch.linalg.qr((self.factor * self.scales).T).R.T
        return triangle / triangle.diagonal()

    def solve(self, matrix: Tensor) -> Tensor:
        """`matrix @ C⁻¹`."""
        if self.factor is None:
            return matrix
        if self.factor.dim() == 1:
            return matrix / self.factor
        if self.scales is None:
            return torch.linalg.solve_triangular(self.factor, matrix, upper=False, left=False)
        return (matrix / self.scales) @ self.factor.T


def check_damping(damping: float) -> None:
    """GfwsvdError unless `damping` is a finite number from 0 up."""
    if not 0 <= damping < math.inf:
        raise GfwsvdError(f"damping must be a number from 0 up, relative to the mean diagonal, got {damping}")


def root(metric: Metric, *, damping: float, name: str) -> Root:
    """The square root of `metric` after adding `damping` times its mean diagonal to the diagonal.

    Cholesky in float64 on a copy; where it refuses (the damped matrix is not numerically positive definite), an
    eigendecomposition whose eigenvalues are raised to 1e-12 of the largest. The extra amount counts into
    `Root.damping`.

    Args:
        metric: None, (D,) or (D, D); of a matrix only the lower triangle is read.
        damping: relative to the mean diagonal; 0 for none.
        name: what to call the metric in errors, for instance "left metric of layer model.layers.0.mlp.up_proj".

    Raises:
        GfwsvdError: when the metric is not finite, is zero everywhere, or is far from positive semi-definite; a damping
            that is negative or not finite.
    """
    check_damping(damping)
    if metric is None:
        return Root("identity")
    if not torch.isfinite(metric if metric.dim() == 1 else metric.tril()).all():
        raise GfwsvdError(f"{name} must be finite, got NaN or inf: its statistics are broken; calibrate again")
    scale = mean_diagonal(metric)
    if scale <= 0:
        raise GfwsvdError(
            f"{name} is singular: expected some activations and gradients to reach the layer, got zeros only; "
            f"exclude the layer, or calibrate with text and a loss that reach it"
        )
    if metric.dim() == 1:
        diagonal = metric.double() + damping * scale
        if diagonal.min() <= 0:
            raise GfwsvdError(f"{name} is singular: its diagonal has zeros and damping is {damping}; raise damping")
        condition = (diagonal.max() / diagonal.min()).item()
        return Root("diagonal", diagonal.sqrt(), damping=damping, condition=condition)
    damped = symmetrize(metric.double())
    damped.diagonal().add_(damping * scale)
    factor, refused = torch.linalg.cholesky_ex(damped)
    if refused.item() == 0:
        return Root("cholesky", factor, damping=damping, condition=_condition(damped, factor))
    return _eigen_root(damped, damping=damping, scale=scale, name=name)


def _eigen_root(damped: Tensor, *, damping: float, scale: float, name: str) -> Root:
    values, vectors = torch.linalg.eigh(damped)
    largest, smallest = values[-1].item(), values[0].item()
    if smallest < -1e-4 * largest:
        raise GfwsvdError(
            f"{name} is singular and not positive semi-definite: its eigenvalues run from {smallest:.3e} to "
            f"{largest:.3e}; raise damping above {damping - smallest / scale:.1e}, or calibrate with more tokens"
        )
    floor = _EIGENVALUE_FLOOR * largest
    raised = values.clamp(min=floor)
    return Root(
        "eigh",
        vectors,
        raised.sqrt(),
        damping=damping + max(floor - smallest, 0.0) / scale,
        condition=(raised[-1] / raised[0]).item(),
    )


def _condition(matrix: Tensor, factor: Tensor) -> float:
    """Condition number of `matrix = factor factorᵀ`, estimated by power and inverse iteration."""
    generator = torch.Generator().manual_seed(0)  # of no particular direction, and the same at every call
    start = torch.randn(matrix.shape[0], 1, generator=generator, dtype=matrix.dtype).to(matrix.device)
    big, small = start / start.norm(), start / start.norm()
    for _ in range(_POWER_STEPS):
        big = matrix @ big
        half = torch.linalg.solve_triangular(factor, small, upper=False)
        small = torch.linalg.solve_triangular(factor.mT, half, upper=True)
        largest, inverse_smallest = big.norm(), small.norm()
        big, small = big / largest, small / inverse_smallest
    return (largest * inverse_smallest).item()
