"""Statistics of one layer: what calibration accumulates from its inputs and output gradients, batch by batch.

`x (T, D_IN)` are a layer's inputs and `g (T, D_OUT)` the gradients of the summed loss with respect to its outputs; the
gradient of one sample i (a token, a sequence or a batch: the Fisher unit) is `G_i = sum_t g_t x_tᵀ`. Its Kronecker
factors come from `kronecker.py`.
"""

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gfwsvd_kernels import gram_accumulate

from .metrics import norm
from .ranked import add_up, gathered, summed

UNITS = ("token", "sequence", "batch")
LABELS = ("empirical", "sampled")
HELDOUT_TOKENS = 512  # most tokens of a layer to keep of sequences that are held out
PART_PROBES = 8  # by which the squared norms of the parts of a sum are estimated


@dataclass
class LayerStatistics:
    """What is known of one layer; matrices are symmetric and float32, their lower triangles packed row by row as
    `gfwsvd_kernels.pack` does: D (D + 1) / 2 numbers of (D, D).

    Attributes:
        d_in, d_out: the layer's sizes.
        num_tokens: rows accumulated in one pass.
        input_moment: `sum x xᵀ`, of D_IN; layers with the same input share one tensor (and `input_abs`).
        input_abs: `sum |x|` (D_IN,).
        output_moment: `sum g gᵀ`, of D_OUT and of scaled gradients.
        fisher_rows: sum over tokens of the squared gradients of each weight row (D_OUT,), of scaled gradients.
        left, right: the Kronecker factors, of D_OUT and of D_IN, of Frobenius norm one.
        scale: s1, so that `scale * left ⊗ right` fits the sum over samples of scaled gradients best.
        trace: `sum ||G_i||²`, the trace of what is fitted.
        gradient_scale: the power of two that gradients were multiplied by, which keeps fourth orders in range.
        convergence: per sweep, the sine of the angle by which the right factor turned.
        kronecker_residual: share of the Fisher block's energy that the fit misses (an unbiased sketch estimates it).
        num_parts: sequences, of which each adds a part to every matrix.
        squared_parts: by matrix, the sum of the squared Frobenius norms of its parts; random probes estimate it.
        heldout_x, heldout_g: inputs (M, D_IN) and scaled gradients (M, D_OUT), bfloat16, of tokens of sequences that
            count in nothing above; layers with the same input share one tensor.
        heldout_lengths: of these M tokens, how many each sequence has, in order; [] in statistics from before it was.
    """

    d_in: int
    d_out: int
    num_tokens: int = 0
    input_moment: Tensor | None = None
    input_abs: Tensor | None = None
    output_moment: Tensor | None = None
    fisher_rows: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    scale: float = 0.0
    trace: float = 0.0
    gradient_scale: float = 0.0
    convergence: list[float] = field(default_factory=list)
    kronecker_residual: float | None = None
    num_parts: int = 0
    squared_parts: dict[str, float] = field(default_factory=dict)
    heldout_x: Tensor | None = None
    heldout_g: Tensor | None = None
    heldout_lengths: list[int] = field(default_factory=list)

    def merge(self) -> float:
        """Adds up what the processes of a job accumulated, each from samples of its own: all but the Kronecker factors.
        Gradients get the scale of the first process that has one; returns the factor by which this process's squares of
        them grew for it, a power of two."""
        scale = next(filter(None, gathered(self.gradient_scale)), 0.0)
        grown = (scale / self.gradient_scale) ** 2 if self.gradient_scale else 1.0
        self.gradient_scale = scale
        for value in (self.output_moment, self.fisher_rows):
            if value is not None:
                value *= grown
        if "output_moment" in self.squared_parts:
            self.squared_parts["output_moment"] *= grown**2
        counts = summed({"num_tokens": self.num_tokens, "num_parts": self.num_parts})
        self.num_tokens, self.num_parts = int(counts["num_tokens"]), int(counts["num_parts"])
        moments = ("input_moment", "output_moment")
        self.squared_parts |= summed({name: self.squared_parts[name] for name in moments if name in self.squared_parts})
        sums = (self.input_moment, self.input_abs, self.output_moment, self.fisher_rows)
        add_up(value for value in sums if value is not None)
        return grown

    def noise(self, matrix: str) -> float | None:
        """The share of the squared norm of a matrix that is chance: the variance of a sum of independent parts.

        None where fewer than two parts are known.
        """
        if self.num_parts < 2 or matrix not in self.squared_parts:
            return None
        energy = norm(getattr(self, matrix)) ** 2
        excess = self.squared_parts[matrix] - energy / self.num_parts
        return max(0.0, excess * self.num_parts / (self.num_parts - 1) / energy) if energy else 0.0


def power_of_two_scale(g: Tensor) -> float:
    """The power of two that brings the root mean square of `g` near one; 1 when `g` is zero or not finite."""
    mean_square = g.double().square().mean().item()
    return 2.0 ** -round(math.log2(mean_square) / 2) if 0 < mean_square < math.inf else 1.0


def clip_tokens(x: Tensor, g: Tensor, cu_seqlens: Tensor, *, clip: float) -> Tensor:
    """`g (T, D_OUT)`, its rows scaled down where `g_t x_tᵀ` has more than `clip` times the median Frobenius norm of its
    sequence. A few tokens would otherwise own the fourth-order weights of the power iteration.

    Args:
        x: inputs (T, D_IN).
        cu_seqlens: sequence offsets (N + 1,), on the CPU: nothing here waits for a GPU.
        clip: positive; 0 for no clipping.
    """
    if not clip:
        return g
    norms = _row_norms(x) * _row_norms(g)
    scales = torch.ones_like(norms)
    for part in sequences(cu_seqlens):
        positive = norms[part] > 0  # the last token predicts nothing and has no gradient
        median = norms[part].where(positive, torch.nan).nanmedian()
        scales[part] = (clip * median / norms[part]).clamp_(max=1).where(positive, 1.0)
    return g * scales[:, None].to(g.dtype)


def _row_norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)


def empty_triangle(size: int, rows: Tensor) -> Tensor:
    """A packed triangle of zeros, (size (size + 1) / 2,) float32, where `rows` are."""
    return rows.new_zeros(size * (size + 1) // 2, dtype=torch.float32)


def accumulate_inputs(stats: LayerStatistics, x: Tensor, cu_seqlens: Tensor) -> None:
    """Adds a batch of inputs `x (T, D_IN)`, with offsets of sequences (N + 1,), to `input_abs` and `input_moment`."""
    if stats.input_moment is None or stats.input_abs is None:
        stats.input_moment = empty_triangle(stats.d_in, x)
        stats.input_abs = x.new_zeros(stats.d_in, dtype=torch.float32)
    gram_accumulate(stats.input_moment, x)
    stats.input_abs += x.abs().sum(0, dtype=torch.float32)
    add_parts(stats.squared_parts, "input_moment", gram_parts(x, cu_seqlens))


def accumulate_outputs(stats: LayerStatistics, x: Tensor, g: Tensor, cu_seqlens: Tensor) -> None:
    """Adds a batch of inputs `x (T, D_IN)` and scaled gradients `g (T, D_OUT)`, with offsets of sequences (N + 1,), to
    `output_moment` and `fisher_rows`."""
    if stats.output_moment is None or stats.fisher_rows is None:
        stats.output_moment = empty_triangle(stats.d_out, g)
        stats.fisher_rows = g.new_zeros(stats.d_out, dtype=torch.float32)
    gram_accumulate(stats.output_moment, g)
    stats.fisher_rows += squared_norms(x) @ g.float().square()
    add_parts(stats.squared_parts, "output_moment", gram_parts(g, cu_seqlens))


def squared_norms(rows: Tensor) -> Tensor:
    """Of each row, (T,) float32."""
    return _row_norms(rows).square()


def add_parts(sums: dict[str, Any], matrix: str, squared: Tensor) -> None:
    """Adds a number (a tensor of no dimension) where it was computed: nothing waits for it before `settle`."""
    sums[matrix] = sums.get(matrix, 0.0) + squared


def settle(sums: dict[str, Any]) -> None:
    """Makes floats of the numbers that `add_parts` has added."""
    sums.update({name: float(value) for name, value in sums.items()})


def gram_parts(rows: Tensor, cu_seqlens: Tensor, weight: Tensor | None = None) -> Tensor:
    """The sum over sequences of `||rows_sᵀ diag(weight_s) rows_s||²`, estimated; a number, float64."""
    if rows.dtype != torch.bfloat16:  # whose range is enough, and copies in float32 would take longer than the products
        rows = rows.float()
    projected = rows @ part_probes(rows.shape[1], rows.device).to(rows.dtype)
    if weight is not None:
        projected = (projected * weight[:, None]).to(rows.dtype)
    total = rows.new_zeros((), dtype=torch.float64)
    for part in sequences(cu_seqlens):
        total += part_energy(rows[part].T @ projected[part])
    return total


def part_energy(product: Tensor) -> Tensor:
    """The squared Frobenius norm of a symmetric M, estimated from its product with `part_probes`; a number, float64."""
    return product.float().square().sum(dtype=torch.float64) / PART_PROBES


@functools.lru_cache(maxsize=64)  # to draw them takes longer than to use them
def part_probes(width: int, device: torch.device) -> Tensor:
    """Gaussian probes for rows (T, WIDTH), (WIDTH, PART_PROBES), the same at every call: not to be changed."""
    generator = torch.Generator().manual_seed(width)
    return torch.randn(width, PART_PROBES, generator=generator).to(device)


def sequences(cu_seqlens: Tensor) -> list[slice]:
    """The rows of each sequence, by offsets on the CPU; empty ones left out."""
    bounds = cu_seqlens.tolist()
    return [slice(start, stop) for start, stop in zip(bounds[:-1], bounds[1:], strict=True) if start < stop]
