"""The nearest Kronecker product `left ⊗ right` to a layer's Fisher block `sum_i vec(G_i) vec(G_i)ᵀ`, by power iteration
that never forms a gradient sample `G_i = sum_t g_t x_tᵀ`:

    left <- sum_i G_i right G_iᵀ        right <- sum_i G_iᵀ left G_i

From the identity, or other positive semi-definite factors, both stay positive semi-definite with the right sign. One
sweep is one pass over the data that updates both from the previous pair.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gfwsvd_kernels import gram_accumulate, quadratic_form, sequence_unit_step, symmetrize

from .metrics import inner, kronecker_residual, norm, packed_diagonal, width
from .ranked import add_up, gathered, summed
from .statistics import (
    LayerStatistics,
    add_parts,
    empty_triangle,
    gram_parts,
    part_energy,
    part_probes,
    power_of_two_scale,
    sequences,
    settle,
    squared_norms,
)

PROBES = 32  # of the sketch that estimates the Kronecker fit residual
_PLAIN = ("num_tokens", "renewed_at", "trace", "squared_parts", "scales")  # numbers of a sweep's state


class Sweep:
    """One pass of the power iteration for one layer: reads the layer's factors, accumulates their successors."""

    def __init__(
        self, stats: LayerStatistics, *, unit: str, online: bool = False, sketch_seed: int | None = None
    ) -> None:
        """With `sketch_seed`, also sketches the Fisher block, for the fit residual. With `online`, what was accumulated
        so far weighs further samples, anew whenever the number of tokens has doubled."""
        self.stats, self.unit, self.online = stats, unit, online
        self.left: Tensor | None = None
        self.right: Tensor | None = None
        self.weigh_left, self.weigh_right = stats.left, stats.right  # what samples are weighed by
        self.num_tokens = self.renewed_at = 0
        self.trace: Tensor | float = 0.0
        self.squared_parts: dict[str, Any] = {}
        self.scales: tuple[float, ...] = ()  # bring token weights near one, which half-precision operands need
        self.sketch = Sketch(stats, sketch_seed) if sketch_seed is not None else None

    def accumulate(self, x: Tensor, g: Tensor, cu_seqlens: Tensor) -> None:
        """Adds a batch: inputs `x (T, D_IN)`, scaled gradients `g (T, D_OUT)`, offsets of sequences (N + 1,), which are
        on the CPU. Numbers stay where they are computed until `settle`."""
        if self.left is None or self.right is None:
            self.left = empty_triangle(self.stats.d_out, x)
            self.right = empty_triangle(self.stats.d_in, x)
        elif self.online and self.num_tokens >= 2 * self.renewed_at:
            self.weigh_left, self.weigh_right = _like_identity(self.left), _like_identity(self.right)
            self.renewed_at = self.num_tokens
        self.num_tokens += x.shape[0]
        offsets = cu_seqlens[[0, -1]] if self.unit == "batch" else cu_seqlens
        if self.unit == "token":
            self._accumulate_tokens(x, g, cu_seqlens)
        else:
            sequence_unit_step(self.left, x, g, self.weigh_right, offsets.to(x.device))
            sequence_unit_step(self.right, g, x, self.weigh_left, offsets.to(x.device))
            add_parts(self.squared_parts, "left", _sample_parts(g, x, self.weigh_right, offsets))
            add_parts(self.squared_parts, "right", _sample_parts(x, g, self.weigh_left, offsets))
            for part in sequences(offsets):
                self.trace = self.trace + _energy(x[part].float().T @ g[part].float())
        if self.sketch is not None:
            self.sketch.accumulate(x, g, None if self.unit == "token" else offsets)

    def _accumulate_tokens(self, x: Tensor, g: Tensor, cu_seqlens: Tensor) -> None:
        assert self.left is not None and self.right is not None
        weights = _token_weights(x, self.weigh_right), _token_weights(g, self.weigh_left)
        self.scales = self.scales or tuple(power_of_two_scale(weight.sqrt()) ** 2 for weight in weights)
        for factor, name, rows, weight, scale in (
            (self.left, "left", g, weights[0], self.scales[0]),
            (self.right, "right", x, weights[1], self.scales[1]),
        ):
            gram_accumulate(factor, rows, weight=weight * scale)
            add_parts(self.squared_parts, name, gram_parts(rows, cu_seqlens, weight * scale))
        self.trace = self.trace + squared_norms(x).double() @ squared_norms(g).double()

    def settle(self) -> None:
        """Makes floats of the numbers that were accumulated."""
        self.trace = float(self.trace)
        settle(self.squared_parts)

    def merge(self, grown: float = 1.0) -> None:
        """Adds up what the processes of a job accumulated, each from samples of its own.

        Args:
            grown: by how much the squares of this process's gradients grow for the common gradient scale.
        """
        scales = self.scales or (1.0, 1.0)
        common = gathered(scales)[0]
        for factor, name, ours, theirs in zip(
            (self.left, self.right), self.squared_parts, scales, common, strict=False
        ):
            factor *= grown * theirs / ours  # powers of two
            self.squared_parts[name] *= (grown * theirs / ours) ** 2
        self.scales = common
        numbers = summed({"trace": float(self.trace) * grown, **self.squared_parts})
        self.trace, self.squared_parts = numbers.pop("trace"), numbers
        sketched = [] if self.sketch is None else [self.sketch.total.mul_(grown)]
        add_up(tensor for tensor in (self.left, self.right, *sketched) if tensor is not None)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values by which `restore` makes another sweep of the layer go on from here."""
        tensors = {"left": self.left, "right": self.right}
        if self.online:
            tensors |= {"weigh_left": self.weigh_left, "weigh_right": self.weigh_right}
        if self.sketch is not None:
            tensors["sketch"] = self.sketch.total
        values = {name: getattr(self, name) for name in _PLAIN}
        return {name: value for name, value in tensors.items() if value is not None}, values

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Goes on from the `state` of a sweep of the same settings."""
        self.left, self.right = tensors.get("left"), tensors.get("right")
        if self.online:
            self.weigh_left, self.weigh_right = tensors.get("weigh_left"), tensors.get("weigh_right")
        if self.sketch is not None:
            self.sketch.total = tensors["sketch"]
        for name in _PLAIN:
            setattr(self, name, values[name])

    def finish(self) -> "Sketch | None":
        """Makes the accumulated factors the layer's; returns the sketch, whose fit the last sweep's factors decide."""
        stats = self.stats
        if self.left is None or self.right is None:
            return None
        settle(self.squared_parts)
        trace, scales = float(self.trace), self.scales or (1.0, 1.0)
        sizes = norm(self.left), norm(self.right)
        if min(sizes) > 0:
            self.left /= sizes[0]
            self.right /= sizes[1]
            self.squared_parts = {
                name: self.squared_parts[name] / size**2 for name, size in zip(("left", "right"), sizes, strict=True)
            }
        grown = sizes[0] / scales[0], sizes[1] / scales[1]
        if self.weigh_right is None:  # the identity, whose own fit is the trace
            stats.scale = grown[0] * grown[1] / trace if trace else 0.0
            cosine = packed_diagonal(self.right).sum(dtype=torch.float64).item() / stats.d_in**0.5
        else:
            lengths = _norm_of(self.weigh_left), _norm_of(self.weigh_right)
            stats.scale = math.sqrt(grown[0] / lengths[1] * grown[1] / lengths[0])
            cosine = inner(self.right, self.weigh_right) / lengths[1]
        stats.trace = trace
        stats.convergence.append(math.sqrt(max(0.0, 1.0 - cosine**2)))
        stats.left, stats.right = self.left, self.right
        if self.online and self.sketch is not None:  # no pair weighed all samples
            stats.scale = self.sketch.fit(stats)
        stats.squared_parts |= self.squared_parts
        return self.sketch


def _like_identity(factor: Tensor) -> Tensor | None:
    """The direction of a factor, as long as the identity; None, the identity itself, while the factor is zero."""
    length = norm(factor)
    return factor * (width(factor) ** 0.5 / length) if length else None


def _norm_of(metric: Tensor | None) -> float:
    return 1.0 if metric is None else norm(metric) or 1.0


def _token_weights(rows: Tensor, metric: Tensor | None) -> Tensor:
    """`row metric rowᵀ` of each row, (T,) float32."""
    if metric is None:
        return squared_norms(rows)
    return quadratic_form(rows, metric).clamp_(min=0)  # rounding may take a zero below zero


def _energy(matrix: Tensor) -> Tensor:
    return matrix.square().sum(dtype=torch.float64)


def _sample_parts(g: Tensor, x: Tensor, metric: Tensor | None, offsets: Tensor) -> Tensor:
    """The sum over samples of `||g_sᵀ x_s metric x_sᵀ g_s||²`, estimated; a number, float64."""
    projected = g.float() @ part_probes(g.shape[1], g.device)
    total = projected.new_zeros((), dtype=torch.float64)
    full = None if metric is None else symmetrize(metric)
    for part in sequences(offsets):
        seen = x[part].float().T @ projected[part]
        total += part_energy(g[part].float().T @ (x[part].float() @ (seen if full is None else full @ seen)))
    return total


class Sketch:
    """`sum_i (v'_kᵀ G_i u_j)(v_kᵀ G_i u'_j)` for Gaussian probes u, u', v, v': see `metrics.kronecker_residual`."""

    def __init__(self, stats: LayerStatistics, seed: int) -> None:
        """Probes are drawn by `seed`."""
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
        return kronecker_residual(self.total, stats.scale, *self._probed(stats))

    def fit(self, stats: LayerStatistics) -> float:
        """The scale at which the layer's present factors fit best."""
        left, right = self._probed(stats)
        return (self.total * torch.outer(left.double(), right.double())).mean().item()

    def _probed(self, stats: LayerStatistics) -> tuple[Tensor, Tensor]:
        assert stats.left is not None and stats.right is not None
        left, right = (
            (probes[0] * (symmetrize(metric.to(probes)) @ probes[1])).sum(0)
            for metric, probes in ((stats.left, self.outputs), (stats.right, self.inputs))
        )
        return left, right
