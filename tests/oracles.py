"""The Fisher block of a layer the slow and obvious way, in float64: what the streaming code is compared with."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gfwsvd.layers import LowRankLinear, dense_weight


def symmetric(lower: Tensor) -> Tensor:
    """The full float64 matrix of a lower triangle (D, D), or packed row by row (D (D + 1) / 2,), on the CPU."""
    lower = lower.cpu()
    if lower.dim() == 1:
        size = round((2 * len(lower) + 0.25) ** 0.5 - 0.5)
        square = torch.zeros(size, size, dtype=torch.float64)
        square[torch.tril_indices(size, size).unbind()] = lower.double()
        return symmetric(square)
    lower = torch.tril(lower.double())
    return lower + lower.T - torch.diag(torch.diag(lower))


def psd(size: int, *, rank: int | None = None, seed: int = 0) -> Tensor:
    """A random positive semi-definite matrix (size, size), float64."""
    root = torch.randn(size, rank or 2 * size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return root @ root.T / root.shape[1]


def nan_above(matrix: Tensor) -> Tensor:
    """The same lower triangle with NaN above it, which nobody may read."""
    return torch.where(torch.ones_like(matrix, dtype=torch.bool).tril(), matrix, torch.nan)


def gradient_samples(x: Tensor, g: Tensor, cu_seqlens: Tensor, unit: str) -> Tensor:
    """The gradient of the weight from each sample, (N, D_OUT, D_IN)."""
    tokens = torch.einsum("to,ti->toi", g.double(), x.double())
    if unit == "token":
        return tokens
    if unit == "batch":
        return tokens.sum(0, keepdim=True)
    return torch.stack([part.sum(0) for part in tokens.split(cu_seqlens.diff().tolist())])


def rearranged(samples: Tensor) -> Tensor:
    """Van Loan's rearrangement of `sum_i vec(G_i) vec(G_i)ᵀ`, (D_OUT², D_IN²); of `left ⊗ right`, it has rank one."""
    _, d_out, d_in = samples.shape
    return torch.einsum("nac,nbd->abcd", samples, samples).reshape(d_out**2, d_in**2)


def nearest_kronecker(samples: Tensor) -> tuple[Tensor, Tensor, float]:
    """The best `scale * left ⊗ right` by the dense SVD, factors of norm one and positive trace."""
    _, d_out, d_in = samples.shape
    u, s, vh = torch.linalg.svd(rearranged(samples), full_matrices=False)
    left, right = u[:, 0].reshape(d_out, d_out), vh[0].reshape(d_in, d_in)
    sign = left.trace().sign()
    return sign * left, sign * right, s[0].item()


def power_sweeps(samples: Tensor, sweeps: int) -> tuple[Tensor, Tensor, float]:
    """Both factors, of norm one, after some sweeps from the identity, each from the previous pair; and the geometric
    mean of the factors by which the last sweep made them longer, which tends to the scale of the fit from below.
    """
    _, d_out, d_in = samples.shape
    left, right = (torch.eye(size, dtype=torch.float64) / size**0.5 for size in (d_out, d_in))
    for _ in range(sweeps):
        left, right = (
            torch.einsum("nac,cd,nbd->ab", samples, right, samples),
            torch.einsum("nac,ab,nbd->cd", samples, left, samples),
        )
        scale = (left.norm() * right.norm()).sqrt().item()
        left, right = left / left.norm(), right / right.norm()
    return left, right, scale


def kronecker_tokens(d_out: int, d_in: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens whose Fisher block is exactly `left ⊗ right`: one for every pair of columns of the two roots.

    Returns:
        x (T, D_IN), g (T, D_OUT), left, right; float64.
    """
    left_root, right_root = (
        torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + size))
        for size in (d_out, d_in)
    )
    g, x = left_root.T.repeat_interleave(d_in, 0), right_root.T.repeat(d_out, 1)
    return x, g, left_root @ left_root.T, right_root @ right_root.T


class WeightPerToken(nn.Module):
    """A linear layer in which every token has a weight of its own: its gradient is that of each token."""

    def __init__(self, weight: Tensor, bias: Tensor | None, tokens: tuple[int, int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().expand(*tokens, *weight.shape).clone())
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bsoi,bsi->bso", self.weight, x)
        return y if self.bias is None else y + self.bias


def gradients_per_token(model: nn.Module, name: str, batch: dict[str, Tensor], loss) -> Tensor:
    """The gradient of the summed loss by a layer's weight at each token, (B, S, D_OUT, D_IN), by autograd alone."""
    original = model.get_submodule(name)
    weight = original.weight.T if type(original).__name__ == "Conv1D" else original.weight
    layer = WeightPerToken(weight, original.bias, tuple(batch["input_ids"].shape))
    model.set_submodule(name, layer)
    try:
        (gradient,) = torch.autograd.grad(loss(model, batch).sum(), layer.weight)
    finally:
        model.set_submodule(name, original)
    return gradient


def is_exact_product(dense: nn.Module, compressed: nn.Module) -> bool:
    """Whether the weights of a float32 model are the products, in float64, of all low-rank layers of another."""
    layers = {name: layer for name, layer in compressed.named_modules() if isinstance(layer, LowRankLinear)}
    return bool(layers) and all(
        torch.equal(dense_weight(dense.get_submodule(name)), layer.product(torch.float64).float())
        for name, layer in layers.items()
    )


class Reweighted(nn.Module):
    """A model that computes by other parameters, by name, which may need gradients."""

    def __init__(self, model: nn.Module, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self.model, self.others, self.config = [model], parameters, model.config

    def forward(self, **inputs: Tensor) -> Any:
        return functional_call(self.model[0], self.others, kwargs=inputs)
