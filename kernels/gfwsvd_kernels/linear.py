"""y = x weightᵀ, summed in float32: the product with a metric that `sequence_unit_step` begins with.

A program owns one tile of y and walks the reduction with its sums in registers; groups of row tiles share the columns
of weight that they read, so that these stay in L2. Bound by the tensor cores.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfwsvd_kernels import tiles

GROUP_ROWS = 8  # row tiles that run side by side over the same columns of weight


@triton.jit
def linear_kernel(
    y_ptr,
    x_ptr,
    weight_ptr,
    num_tokens,
    d_out,
    d_in,
    stride_xt,
    stride_xi,
    stride_wo,
    stride_wi,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    num_rows = tl.cdiv(num_tokens, BLOCK_T)
    num_cols = tl.cdiv(d_out, BLOCK_O)
    group = tl.program_id(0) // (GROUP * num_cols)
    rows_here = tl.minimum(num_rows - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * num_cols)
    row = group * GROUP + within % rows_here
    col = within // rows_here

    # 64-bit bases, 32-bit offsets within a tile: fewer registers (`tiles.check_strides` makes sure of them)
    first_t = row * BLOCK_T
    first_o = col * BLOCK_O
    offs_t = tl.arange(0, BLOCK_T)
    offs_o = tl.arange(0, BLOCK_O)
    offs_i = tl.arange(0, BLOCK_I)
    mask_t = offs_t < num_tokens - first_t
    mask_o = offs_o < d_out - first_o
    x_ptr += first_t.to(tl.int64) * stride_xt
    weight_ptr += first_o.to(tl.int64) * stride_wo
    acc = tl.full((BLOCK_T, BLOCK_O), 0.0, tl.float32)
    for i in range(0, d_in, BLOCK_I):
        mask_i = offs_i < d_in - i
        x = tl.load(  # (BLOCK_T, BLOCK_I)
            x_ptr + (offs_t[:, None] * stride_xt + offs_i[None, :] * stride_xi),
            mask=mask_t[:, None] & mask_i[None, :],
            other=0.0,
        )
        weight = tl.load(  # (BLOCK_O, BLOCK_I)
            weight_ptr + (offs_o[:, None] * stride_wo + offs_i[None, :] * stride_wi),
            mask=mask_o[:, None] & mask_i[None, :],
            other=0.0,
        )
        x_ptr += BLOCK_I * stride_xi
        weight_ptr += BLOCK_I * stride_wi
        if UPCAST:
            x = x.to(tl.float32)
            weight = weight.to(tl.float32)
        acc = tl.dot(x, tl.trans(weight), acc, input_precision="tf32x3")
    y_ptrs = y_ptr + first_t.to(tl.int64) * d_out + first_o + (offs_t[:, None] * d_out + offs_o[None, :])
    tl.store(y_ptrs, acc, mask=mask_t[:, None] & mask_o[None, :])


def linear(
    x: Tensor,
    weight: Tensor,
    *,
    target: tiles.Target | None = None,
    tile: tiles.Tile | None = None,
) -> Tensor:
    """x (T, D_IN) times weight (D_OUT, D_IN) transposed, float32; multiplied in float32 where those dtypes differ."""
    num_tokens, d_in = x.shape
    d_out = weight.shape[0]
    y = torch.empty(num_tokens, d_out, dtype=torch.float32, device=x.device)
    if y.numel() == 0:
        return y
    tiles.check_strides(x=x, weight=weight, y=y)
    upcast = x.dtype != weight.dtype or tiles.interpreted_bf16(x)
    dtype = torch.float32 if upcast else x.dtype
    tile = tile or tiles.tile("linear", target or tiles.target(x.device), dtype, y, x, weight)
    linear_kernel[(triton.cdiv(num_tokens, tile.rows) * triton.cdiv(d_out, tile.cols),)](
        y,
        x,
        weight,
        num_tokens,
        d_out,
        d_in,
        *x.stride(),
        *weight.stride(),
        BLOCK_T=tile.rows,
        BLOCK_O=tile.cols,
        BLOCK_I=tile.depth,
        GROUP=GROUP_ROWS,
        UPCAST=upcast,
        **tile.options(),
    )
    return y
