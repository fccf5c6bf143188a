"""`lowrank_group` on a GPU: which way a number of tokens goes.

Up to `FEW_TOKENS` take two launches that read every weight once (`skinny.py`). More tokens are matrix products, which
the BLAS does best, and one pass that finishes them where there is a pivot or an activation.
"""

from typing import Any

import torch
from torch import Tensor

from gfwsvd_kernels import tiles
from gfwsvd_kernels.finish import finish
from gfwsvd_kernels.layout import FEW_TOKENS, UNIT, Layout, Operands
from gfwsvd_kernels.skinny import skinny


def matmuls(x: Tensor, operands: Operands, layout: Layout) -> Tensor:
    """y (T, out_width) of x (T, D_IN) for any number of tokens."""
    down, up, bias, table, scales = operands
    if scales is None:
        z = to_up = x @ down.mT
    else:
        unit = x.new_full((), UNIT)  # brings whole numbers to the dtype of x
        z = (x @ (down * unit).mT) * scales[0]
        to_up, up = z * scales[1], up * unit
    finishes = layout.pivoted or layout.silu_mul
    stored = torch.float32 if finishes and tiles.interpreted_bf16(x) else x.dtype  # it truncates to bfloat16
    y = x.new_empty(len(x), layout.out_width, dtype=stored)
    sums = x.new_empty(len(x), layout.sums_width) if finishes else y
    projections = layout.projections
    zs, parts = to_up.split([p.pitch for p in projections], 1), sums.split([p.rows for p in projections], 1)
    ups = up.split([p.rows * p.pitch for p in projections])
    biases = (None,) * len(projections) if finishes or bias is None else bias.split([p.d_out for p in projections])
    for p, z_i, up_i, bias_i, part in zip(projections, zs, ups, biases, parts, strict=True):
        factor = up_i.view(p.rows, p.pitch).mT
        if bias_i is None:
            torch.mm(z_i, factor, out=part)
        else:
            torch.addmm(bias_i, z_i, factor, out=part)
    if finishes:
        finish(y, sums, z, bias, table, layout)
    return y.to(x.dtype)


def lowrank_group(x: Tensor, *arguments: Any, target: tiles.Target | None = None) -> Tensor:
    """Launch; `arguments` are those of the operator after x."""
    *tensors, sizes, silu_mul = arguments
    operands, layout = Operands(*tensors), Layout.of(sizes, silu_mul)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if not len(rows):
        y = x.new_empty(0, layout.out_width)
    elif len(rows) > FEW_TOKENS:
        y = matmuls(rows, operands, layout)
    else:
        y = skinny(rows, operands, layout, target=target)
    return y.view(*x.shape[:-1], layout.out_width)
