"""`lowrank_group` on a GPU: which way a number of tokens goes.

Up to `SKINNY_TOKENS` take two launches that read every weight once (`skinny.py`), and up to `FEW_TOKENS` in half
precision two that use tensor cores beside that (`few.py`). More tokens, and what `few` does not take, are matrix
products, which the BLAS does best, and one pass that finishes them where there is a pivot or an activation.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gfwsvd_kernels import tiles
from gfwsvd_kernels.few import few, takes
from gfwsvd_kernels.finish import finish
from gfwsvd_kernels.layout import SKINNY_TOKENS, UNIT, Layout, Operands
from gfwsvd_kernels.skinny import skinny


def matmuls(x: Tensor, operands: Operands, layout: Layout) -> Tensor:
    """y (T, out_width) of x (T, D_IN) for any number of tokens."""
    down, up, bias, table, scales = operands
    if scales is None:
        z = to_up = F.linear(x, down)
    else:
        unit = x.new_full((), UNIT)  # brings whole numbers to the dtype of x
        z = F.linear(x, down * unit) * scales[0]
        to_up, up = z * scales[1], up * unit
    num_tokens = x.shape[0]
    finishes = layout.pivoted or layout.silu_mul
    sums = x.new_empty(num_tokens, layout.sums_width)
    for record in layout.records:
        _multiply(to_up, up, None if finishes else bias, sums, record)
    if not finishes:
        return sums
    y = x.new_empty(num_tokens, layout.out_width, dtype=torch.float32 if tiles.interpreted_bf16(x) else x.dtype)
    finish(y, sums, z, bias, table, layout)
    return y.to(x.dtype)  # the interpreter truncates to bfloat16


def _multiply(z: Tensor, up: Tensor, bias: Tensor | None, sums: Tensor, record: dict[str, int]) -> None:
    """Writes z_i up_iᵀ of one projection, and its bias if there is one, to its columns of `sums`.

    Each view is one call: slicing, shaping and transposing would take the host as long as the product itself.
    """
    num_tokens, pitch, rows, start = z.shape[0], record["pitch"], record["rows"], record["sums_start"]
    z_i = z.as_strided((num_tokens, pitch), z.stride(), record["z_start"])
    factor = up.as_strided((pitch, rows), (1, pitch), up.storage_offset() + record["up_start"])
    part = sums.as_strided((num_tokens, rows), sums.stride(), start)
    if bias is None:
        torch.mm(z_i, factor, out=part)
    else:
        torch.addmm(bias[start : start + rows], z_i, factor, out=part)


def group(x: Tensor, operands: Operands, layout: Layout, *, target: tiles.Target | None = None) -> Tensor:
    """Launch what suits the number of tokens of x (..., D_IN); y (..., out_width)."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    num_tokens = rows.shape[0]
    if not num_tokens:
        y = x.new_empty(0, layout.out_width)
    elif num_tokens <= SKINNY_TOKENS:
        y = skinny(rows, operands, layout, target=target)
    elif num_tokens <= tiles.FEW_TOKENS and takes(rows, operands):
        y = few(rows, operands, layout, target=target)
    else:
        y = matmuls(rows, operands, layout)
    return y.view(*x.shape[:-1], layout.out_width)


def lowrank_group(x: Tensor, *arguments: Any, target: tiles.Target | None = None) -> Tensor:
    """The same; `arguments` are those of the operator after x."""
    *tensors, sizes, silu_mul = arguments
    return group(x, Operands(*tensors), Layout.of(sizes, silu_mul), target=target)
