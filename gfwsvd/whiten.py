"""Whitening: the damped square root of a metric, by a float64 Cholesky factorisation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gfwsvd_kernels import symmetrize

from .errors import GfwsvdError
from .metrics import Metric, mean_diagonal

_EIGENVALUE_FLOOR = 1e-12  # of the largest eigenvalue, where Cholesky refuses
_POWER_STEPS = 12
# Most numbers in the metrics of layers whose roots are found together, by the kind of device: a GPU waits for launches
# on small matrices, and takes no less time for a batch of those above 2048 x 2048. Others go matrix by matrix anyway.
BATCH_NUMBERS = {"cuda": 1 << 24}


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


def batch_size(d_out: int, d_in: int, device_type: str) -> int:
    """Of how many layers (D_OUT, D_IN) the roots are found together."""
    return max(1, BATCH_NUMBERS.get(device_type, 0) // (d_out**2 + d_in**2))


def root(metric: Metric, *, damping: float, name: str) -> Root:
    """The root of one metric; see `roots`."""
    return roots([metric], damping=damping, names=[name])[0]


def roots(metrics: Sequence[Metric], *, damping: float, names: Sequence[str]) -> list[Root]:
    """The square root of each metric after adding `damping` times its mean diagonal to the diagonal.

    Cholesky in float64 on a copy, of all matrices in one batch; where it refuses (the damped matrix is not numerically
    positive definite), an eigendecomposition whose eigenvalues are raised to 1e-12 of the largest. The extra amount
    counts into `Root.damping`.

    Args:
        metrics: all None, all (D,), or all (D, D) of one D and device; of a matrix only the lower triangle is read.
        damping: relative to the mean diagonal; 0 for none.
        names: what to call them in errors, for instance "left metric of layer model.layers.0.mlp.up_proj".

    Raises:
        GfwsvdError: when a metric is not finite, is zero everywhere, or is far from positive semi-definite; a damping
            that is negative or not finite.
    """
    check_damping(damping)
    matrices: list[Tensor] = []
    found: list[Root] = []
    for metric, name in zip(metrics, names, strict=True):
        if metric is None:
            found.append(Root("identity"))
            continue
        added = damping * _scale(metric, name)
        if metric.dim() == 1:
            found.append(_diagonal_root(metric.double() + added, damping=damping, name=name))
        else:
            matrices.append(symmetrize(metric.double()))
            matrices[-1].diagonal().add_(added)
    return found or _matrix_roots(matrices, damping=damping, names=names)


def _scale(metric: Tensor, name: str) -> float:
    """The mean diagonal of a metric, which is finite and not zero."""
    if not torch.isfinite(metric if metric.dim() == 1 else metric.tril()).all():
        raise GfwsvdError(f"{name} must be finite, got NaN or inf: its statistics are broken; calibrate again")
    scale = mean_diagonal(metric)
    if scale <= 0:
        raise GfwsvdError(
            f"{name} is singular: expected some activations and gradients to reach the layer, got zeros only; "
            f"exclude the layer, or calibrate with text and a loss that reach it"
        )
    return scale


def _diagonal_root(damped: Tensor, *, damping: float, name: str) -> Root:
    if damped.min() <= 0:
        raise GfwsvdError(f"{name} is singular: its diagonal has zeros and damping is {damping}; raise damping")
    return Root("diagonal", damped.sqrt(), damping=damping, condition=(damped.max() / damped.min()).item())


def _matrix_roots(matrices: list[Tensor], *, damping: float, names: Sequence[str]) -> list[Root]:
    damped = torch.stack(matrices) if len(matrices) > 1 else matrices[0][None]
    matrices.clear()  # which `damped` is a copy of
    factors, refused = torch.linalg.cholesky_ex(damped)
    conditions = _conditions(damped, factors).tolist()
    return [
        _eigen_root(matrix, damping=damping, name=name)
        if refuses
        else Root("cholesky", factor, damping=damping, condition=condition)
        for matrix, factor, refuses, condition, name in zip(
            damped, factors, refused.tolist(), conditions, names, strict=True
        )
    ]


def _eigen_root(damped: Tensor, *, damping: float, name: str) -> Root:
    scale = mean_diagonal(damped) / (1 + damping)
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


def _conditions(matrices: Tensor, factors: Tensor) -> Tensor:
    """Condition numbers (N,) of `matrices = factors factorsᵀ` (N, D, D), estimated by power and inverse iteration."""
    generator = torch.Generator().manual_seed(0)  # of no particular direction, and the same at every call
    start = torch.randn(matrices.shape[1], 1, generator=generator, dtype=matrices.dtype).to(matrices.device)
    big = small = (start / start.norm()).expand(len(matrices), -1, -1)
    for _ in range(_POWER_STEPS):
        big = matrices @ big
        half = torch.linalg.solve_triangular(factors, small, upper=False)
        small = torch.linalg.solve_triangular(factors.mT, half, upper=True)
        largest, inverse_smallest = (each.norm(dim=1, keepdim=True) for each in (big, small))
        big, small = big / largest, small / inverse_smallest
    return (largest * inverse_smallest).flatten()
