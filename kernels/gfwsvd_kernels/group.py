"""A group of low-rank projections of one input, laid out for inference: the module that owns weights and workspace."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gfwsvd_kernels.layout import Layout, Operands, Projection
from gfwsvd_kernels.ops import lowrank_group

ACTIVATIONS = (None, "silu_mul")


class Factors(NamedTuple):
    """One projection of an input x (..., D_IN): `y = up (down x) + bias`.

    With `pivots`, the outputs `pivots` are `down x` themselves and `up` makes the others, in their order (the pivoted
    form of PIFA, ICML 2025).

    Attributes:
        down: (R, D_IN).
        up: (D_OUT, R); with pivots (D_OUT - R, R).
        bias: (D_OUT,) or None.
        pivots: (R,) distinct outputs, int64, or None.
        scales: (2, R) of the rows of down and the columns of up, where these are int8 (`layout.py`), or None.
    """

    down: Tensor
    up: Tensor
    bias: Tensor | None = None
    pivots: Tensor | None = None
    scales: Tensor | None = None

    @property
    def d_out(self) -> int:
        return self.up.shape[0] + (0 if self.pivots is None else self.down.shape[0])


class LowRankGroup(nn.Module):
    """Projections of one input in as few launches as the number of tokens allows, at inference.

    `group(x)` is (..., sum of the D_OUT), the projections side by side; with `activation="silu_mul"`, which takes two
    projections of one D_OUT, it is `silu(y_0) * y_1` (..., D_OUT). The intermediate `down x` is rounded to the dtype of
    x, everything else is summed in float32.

    On a GPU one or two tokens take two launches that read every weight once and overlap, and a third one for an
    activation of pivoted projections; up to 16 tokens in half precision, where D_IN is a multiple of 8, take two
    launches on tensor cores; more tokens take matrix products. Results repeat bit for bit. Calls can be
    captured in a CUDA graph and traced by `torch.compile`. The buffers are laid out for the kernels (`layout.py`), are
    no part of a state dict, and have no gradient.
    """

    down: Tensor
    up: Tensor
    bias: Tensor | None
    table: Tensor
    scales: Tensor | None

    def __init__(self, projections: Sequence[Factors], *, activation: str | None = None) -> None:
        """Copies the factors, which must agree in dtype, device and D_IN.

        Raises:
            TypeError: factors of different dtypes, or of one that is not floating-point, or int8 with scales.
            ValueError: shapes that do not fit, a rank of zero, pivots that are not R distinct outputs, different
                devices, an unknown activation or projections that it cannot take, 2^31 elements of up or more.
        """
        super().__init__()
        projections = [Factors(*projection) for projection in projections]
        _check(projections, activation)
        first = projections[0].down
        self.d_in, self.activation = first.shape[1], activation
        self.layout, operands = _lay_out(projections, activation == "silu_mul")
        for name, tensor in operands._asdict().items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return lowrank_group(x, self.operands, self.layout)

    @property
    def operands(self) -> Operands:
        """The module's tensors as the launchers take them."""
        buffers: Any = self._buffers  # in their order; each by its name would take the host longer
        return Operands(*buffers.values())

    def extra_repr(self) -> str:
        ranks = ", ".join(f"{p.rank}{' pivoted' if p.pivoted else ''}" for p in self.layout.projections)
        widths = ", ".join(str(p.d_out) for p in self.layout.projections)
        return f"d_in={self.d_in}, d_out=({widths}), ranks=({ranks}), activation={self.activation}"


def _lay_out(projections: Sequence[Factors], silu_mul: bool) -> tuple[Layout, Operands]:
    """The sizes of a group and its tensors, as `layout.py` describes them."""
    sizes = Layout(tuple(Projection(len(p.down), p.d_out, int(p.pivots is not None)) for p in projections), silu_mul)
    if sizes.up_numel >= 2**31:
        raise ValueError(
            f"the up factors of a group must have fewer than 2^31 elements, got {sizes.up_numel}: split it"
        )
    like = projections[0].down
    down, up = like.new_zeros(sizes.z_width, like.shape[1]), like.new_zeros(sizes.up_numel)
    for p, own, record in zip(projections, sizes.projections, sizes.records, strict=True):
        z, start = record["z_start"], record["up_start"]
        down[z : z + own.rank] = p.down.detach()
        up[start : start + own.rows * own.pitch].view(own.rows, own.pitch)[:, : own.rank] = p.up.detach()
    bias = scales = None
    if any(p.bias is not None for p in projections):
        given = next(p.bias for p in projections if p.bias is not None)
        bias = torch.cat([given.new_zeros(p.d_out) if p.bias is None else p.bias.detach() for p in projections])
    if projections[0].scales is not None:
        scales = projections[0].scales.new_zeros(2, sizes.z_width)
        for p, own, record in zip(projections, sizes.projections, sizes.records, strict=True):
            assert p.scales is not None
            scales[:, record["z_start"] :][:, : own.rank] = p.scales.detach()
    table = sizes.table([None if p.pivots is None else p.pivots.cpu() for p in projections])
    return sizes, Operands(down, up, bias, table.to(like.device), scales)


def _check(projections: Sequence[Factors], activation: str | None) -> None:
    if not projections:
        raise ValueError("a group needs at least one projection, got none")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    first, scales = projections[0].down, projections[0].scales
    if first.dtype != torch.int8 if scales is not None else not first.dtype.is_floating_point:
        raise TypeError(f"down must be floating-point, or int8 with scales, got {first.dtype}")
    dtype = first.dtype if scales is None else scales.dtype
    if not dtype.is_floating_point:
        raise TypeError(f"scales must be floating-point, got {dtype}")
    for i, p in enumerate(projections):
        shapes = {name: None if part is None else tuple(part.shape) for name, part in p._asdict().items()}
        if p.down.ndim != 2 or p.up.ndim != 2 or p.down.shape[0] != p.up.shape[1] or p.down.shape[0] < 1:
            raise ValueError(f"projection {i} must have down (R, D_IN) and up (D_OUT, R) with R >= 1, got {shapes}")
        if p.down.shape[1] != first.shape[1]:
            raise ValueError(f"projection {i} must read the {first.shape[1]} inputs of the first, got {shapes}")
        if p.bias is not None and p.bias.shape != (p.d_out,):
            raise ValueError(f"the bias of projection {i} must be ({p.d_out},), got {shapes}")
        if (p.scales is None) != (scales is None) or p.scales is not None and p.scales.shape != (2, len(p.down)):
            raise ValueError(f"the scales of projection {i} must be (2, {len(p.down)}), or None in all, got {shapes}")
        dtypes = {"down": first.dtype, "up": first.dtype, "bias": dtype, "scales": dtype}
        for name, part in ((name, getattr(p, name)) for name in dtypes):
            if part is not None and part.dtype != dtypes[name]:
                raise TypeError(f"{name} of projection {i} must be {dtypes[name]} as the first, got {part.dtype}")
            if part is not None and part.device != first.device:
                raise ValueError(f"{name} of projection {i} must be on {first.device}, got {part.device}")
        if p.pivots is not None:
            distinct = p.pivots.unique()
            if p.pivots.dtype != torch.int64 or p.pivots.shape != p.down.shape[:1] or distinct.shape != p.pivots.shape:
                raise ValueError(f"the pivots of projection {i} must be {p.down.shape[0]} distinct int64, got {shapes}")
            if distinct[0] < 0 or distinct[-1] >= p.d_out:
                found = f"{distinct[0]} to {distinct[-1]}"
                raise ValueError(f"the pivots of projection {i} must be outputs 0 to {p.d_out - 1}, got {found}")
    widths = [p.d_out for p in projections]
    if activation == "silu_mul" and widths != widths[:1] * 2:
        raise ValueError(f"silu_mul needs two projections with the same number of outputs, got {widths}")
