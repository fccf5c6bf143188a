"""The one solver behind all methods: the best low-rank weight under two metrics, in closed form."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import GfwsvdError
from .metrics import Metric
from .whiten import Root, root


@dataclass(frozen=True)
class Decomposition:
    """The singular value decomposition of a whitened weight, `Clᵀ W Cr = U S Vᵀ`; `left = Cl Clᵀ`, `right = Cr Crᵀ`.

    Attributes:
        spectrum: S in descending order, (min(D_OUT, D_IN),) float64; `sum(S[r:] ** 2)` is the objective at rank r.
        basis: V (D_IN, D_IN) where D_OUT >= D_IN, else U (D_OUT, D_OUT); float64.
        left, right: the roots used, with the damping and condition of each.
    """

    spectrum: Tensor
    basis: Tensor
    left: Root
    right: Root

    def factors(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """`up (D_OUT, R)` and `down (R, D_IN)`, float64, that minimise the objective at `rank`.

        Each column of up is as long as the row of down that it meets, whatever the scale of the metrics, so that both
        fit a narrow dtype. At a smaller rank the factors are the first columns and rows of these.
        """
        weight, kept = weight.double(), self.basis[:, :rank]
        if weight.shape[0] >= weight.shape[1]:  # Cl⁻ᵀ U S = W Cr V
            up, down = self.right.times(weight) @ kept, self.right.solve(kept.T)
        else:  # S Vᵀ Cr⁻¹ = Uᵀ Clᵀ W
            up, down = self.left.solve(kept.T).T, kept.T @ self.left.times(weight.T).T
        up_norms, down_norms = up.norm(dim=0), down.norm(dim=1)
        balance = torch.where(up_norms * down_norms > 0, (down_norms / up_norms).sqrt(), 0.0)
        return up * balance, torch.where(balance > 0, 1 / balance, 0.0)[:, None] * down


def decompose(weight: Tensor, left: Metric, right: Metric, *, damping: float, name: str) -> Decomposition:
    """Whitens `weight (D_OUT, D_IN)` by two metrics, of any device, and decomposes it, in float64.

    The singular vectors come from the smaller Gram matrix (D, D) of the whitened weight, three times faster than its
    SVD. Squares of singular values are within D eps of the largest, eps = 2.2e-16; the factors apply the weight
    itself, so that only the order of singular values below 1e-8 of the first is uncertain.

    Raises:
        GfwsvdError: a weight that is not finite, or a metric that cannot be whitened (`whiten.root`); names the layer.
    """
    left, right = (None if metric is None else metric.to(weight.device) for metric in (left, right))
    left_root = root(left, damping=damping, name=f"the left metric of layer {name}")
    right_root = root(right, damping=damping, name=f"the right metric of layer {name}")
    return whitened_decomposition(weight, left_root, right_root, name=name)


def whitened_decomposition(weight: Tensor, left: Root, right: Root, *, name: str) -> Decomposition:
    """As `decompose`, with the roots of the metrics on the weight's device."""
    if not torch.isfinite(weight).all():
        raise GfwsvdError(f"the weight of layer {name} holds NaN or inf; expected finite numbers")
    whitened = left.times(right.times(weight.double()).T).T
    if weight.shape[0] < weight.shape[1]:
        whitened = whitened.T
    values, vectors = torch.linalg.eigh(whitened.T @ whitened)
    return Decomposition(values.flip(0).clamp(min=0).sqrt(), vectors.flip(1), left, right)
