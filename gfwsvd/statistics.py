"""Statistics of one layer: what calibration accumulates from its inputs and output gradients, batch by batch.

`x (T, D_IN)` are a layer's inputs and `g (T, D_OUT)` the gradients of the summed loss with respect to its outputs; the
gradient of one sample i (a token, a sequence or a batch: the Fisher unit) is `G_i = sum_t g_t x_tᵀ`. The nearest
Kronecker product `left ⊗ right` to `sum_i vec(G_i) vec(G_i)ᵀ` is found by power iteration, without ever forming G:

    left <- sum_i G_i right G_iᵀ        right <- sum_i G_iᵀ left G_i

From the identity, both stay positive semi-definite with the right sign. One sweep is one pass over the data that
updates both from the previous pair.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gfwsvd_kernels import gram_accumulate, quadratic_form, sequence_unit_step

from .metrics import inner, kronecker_residual, norm

UNITS = ("token", "sequence", "batch")
LABELS = ("empirical", "sampled")
PROBES = 32  # of the sketch that estimates the Kronecker fit residual


@dataclass
class LayerStatistics:
    """What is known of one layer; matrices are float32 and hold their lower triangle.

    Attributes:
        d_in, d_out: the layer's sizes.
        num_tokens: rows accumulated in one pass.
        input_moment: `sum x xᵀ` (D_IN, D_IN); layers with the same input share one tensor (and `input_abs`).
        input_abs: `sum |x|` (D_IN,).
        output_moment: `sum g gᵀ` (D_OUT, D_OUT), of scaled gradients.
        fisher_rows: sum over tokens of the squared gradients of each weight row (D_OUT,), of scaled gradients.
        left, right: the Kronecker factors, of Frobenius norm one.
        scale: s1, so that `scale * left ⊗ right` fits the sum over samples of scaled gradients best.
        trace: `sum ||G_i||²`, the trace of what is fitted.
        gradient_scale: the power of two that gradients were multiplied by, which keeps fourth orders in range.
        convergence: per sweep, the sine of the angle by which the right factor turned.
        kronecker_residual: share of the Fisher block's energy that the fit misses (an unbiased sketch estimates it).
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


def power_of_two_scale(g: Tensor) -> float:
    """The power of two that brings the root mean square of `g` near one; 1 when `g` is zero."""
    mean_square = g.double().square().mean().item()
    return 2.0 ** -round(math.log2(mean_square) / 2) if mean_square else 1.0


def clip_tokens(x: Tensor, g: Tensor, cu_seqlens: Tensor, *, clip: float) -> Tensor:
    """`g (T, D_OUT)`, its rows scaled down where `g_t x_tᵀ` has more than `clip` times the median Frobenius norm of its
    sequence. A few tokens would otherwise own the fourth-order weights of the power iteration.

    Args:
        x: inputs (T, D_IN).
        cu_seqlens: sequence offsets (N + 1,).
        clip: positive; 0 for no clipping.
    """
    if not clip:
        return g
    norms = _row_norms(x) * _row_norms(g)
    scales = torch.ones_like(norms)
    for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        sizes = norms[start:stop]
        if (positive := sizes[sizes > 0]).numel():  # the last token predicts nothing and has no gradient
            scales[start:stop] = (clip * positive.median() / sizes).clamp_(max=1)
    return g * scales[:, None].to(g.dtype)


def _row_norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)


def accumulate_inputs(stats: LayerStatistics, x: Tensor) -> None:
    """Adds a batch of inputs `x (T, D_IN)` to `input_abs` and `input_moment`."""
    if stats.input_moment is None or stats.input_abs is None:
        stats.input_moment = x.new_zeros(stats.d_in, stats.d_in, dtype=torch.float32)
        stats.input_abs = x.new_zeros(stats.d_in, dtype=torch.float32)
    gram_accumulate(stats.input_moment, x)
    stats.input_abs += x.abs().sum(0, dtype=torch.float32)


def accumulate_outputs(stats: LayerStatistics, x: Tensor, g: Tensor) -> None:
    """Adds a batch of inputs `x (T, D_IN)` and scaled gradients `g (T, D_OUT)` to `output_moment` and `fisher_rows`."""
    if stats.output_moment is None or stats.fisher_rows is None:
        stats.output_moment = g.new_zeros(stats.d_out, stats.d_out, dtype=torch.float32)
        stats.fisher_rows = g.new_zeros(stats.d_out, dtype=torch.float32)
    gram_accumulate(stats.output_moment, g)
    stats.fisher_rows += _token_weights(x, None) @ g.float().square()


class Sweep:
    """One pass of the power iteration for one layer: reads the layer's factors, accumulates their successors."""

    def __init__(self, stats: LayerStatistics, *, unit: str, sketch_seed: int | None = None) -> None:
        """With `sketch_seed`, also sketches the Fisher block, for the fit residual."""
        self.stats, self.unit = stats, unit
        self.left: Tensor | None = None
        self.right: Tensor | None = None
        self.scales: tuple[float, ...] = ()  # bring token weights near one, which half-precision operands need
        self.sketch = _Sketch(stats, sketch_seed) if sketch_seed is not None else None

    def accumulate(self, x: Tensor, g: Tensor, cu_seqlens: Tensor) -> None:
        """Adds a batch: inputs `x (T, D_IN)`, scaled gradients `g (T, D_OUT)`, offsets of sequences (N + 1,)."""
        if self.left is None or self.right is None:
            self.left = x.new_zeros(self.stats.d_out, self.stats.d_out, dtype=torch.float32)
            self.right = x.new_zeros(self.stats.d_in, self.stats.d_in, dtype=torch.float32)
        if self.unit == "token":
            weights = _token_weights(x, self.stats.right), _token_weights(g, self.stats.left)
            self.scales = self.scales or tuple(power_of_two_scale(weight.sqrt()) ** 2 for weight in weights)
            gram_accumulate(self.left, g, weight=weights[0] * self.scales[0])
            gram_accumulate(self.right, x, weight=weights[1] * self.scales[1])
        else:
            offsets = cu_seqlens if self.unit == "sequence" else cu_seqlens[[0, -1]]
            sequence_unit_step(self.left, x, g, self.stats.right, offsets)
            sequence_unit_step(self.right, g, x, self.stats.left, offsets)
        if self.sketch is not None:
            self.sketch.accumulate(x, g, None if self.unit == "token" else offsets)

    def finish(self) -> "_Sketch | None":
        """Makes the accumulated factors the layer's; returns the sketch, whose fit the last sweep's factors decide."""
        stats = self.stats
        if self.left is None or self.right is None:
            return None
        scales = self.scales or (1.0, 1.0)
        sizes = norm(self.left), norm(self.right)
        if min(sizes) > 0:
            self.left /= sizes[0]
            self.right /= sizes[1]
        grown = sizes[0] / scales[0], sizes[1] / scales[1]
        if stats.right is None:  # the start was the identity, whose own fit is the trace
            stats.trace = self.left.diagonal().sum(dtype=torch.float64).item() * grown[0]
            stats.scale = grown[0] * grown[1] / stats.trace if stats.trace else 0.0
            cosine = self.right.diagonal().sum(dtype=torch.float64).item() / stats.d_in**0.5
        else:
            stats.scale = math.sqrt(grown[0] * grown[1])
            cosine = inner(self.right, stats.right)
        stats.convergence.append(math.sqrt(max(0.0, 1.0 - cosine**2)))
        stats.left, stats.right = self.left, self.right
        return self.sketch


def _token_weights(rows: Tensor, metric: Tensor | None) -> Tensor:
    """`row metric rowᵀ` of each row, (T,) float32."""
    if metric is None:
        return rows.float().square().sum(-1)
    return quadratic_form(rows, metric).clamp_(min=0)  # rounding may take a zero below zero


class _Sketch:
    """`sum_i (v'_kᵀ G_i u_j)(v_kᵀ G_i u'_j)` for Gaussian probes u, u', v, v': see `metrics.kronecker_residual`."""

    def __init__(self, stats: LayerStatistics, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(2, stats.d_in, PROBES, generator=generator)
        self.outputs = torch.randn(2, stats.d_out, PROBES, generator=generator)
        self.total = torch.zeros(PROBES, PROBES, dtype=torch.float64)

    def accumulate(self, x: Tensor, g: Tensor, offsets: Tensor | None) -> None:
        self.inputs, self.outputs = self.inputs.to(x.device), self.outputs.to(x.device)
        self.total = self.total.to(x.device)
        x_probes = x.float() @ self.inputs  # (2, T, PROBES)
        g_probes = g.float() @ self.outputs
        if offsets is None:
            self.total += ((g_probes[0] * g_probes[1]).T @ (x_probes[0] * x_probes[1])).double()
            return
        for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            first, second = (g_probes[:, start:stop].mT @ x_probes[:, start:stop]).unbind()
            self.total += (first * second).double()

    def residual(self, stats: LayerStatistics) -> float:
        """The fit residual of the layer's present factors."""
        assert stats.left is not None and stats.right is not None

        def probe(metric: Tensor, probes: Tensor) -> Tensor:
            full = metric.tril() + metric.tril(-1).T
            return (probes[0] * (full @ probes[1])).sum(0)

        return kronecker_residual(
            self.total, stats.scale, probe(stats.left, self.outputs), probe(stats.right, self.inputs)
        )
