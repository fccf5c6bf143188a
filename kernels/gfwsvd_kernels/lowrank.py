"""y = (x downᵀ) upᵀ + bias in two launches of one kernel, y = x weightᵀ + bias.

A program owns one tile of y and walks the reduction with its sums in registers; groups of row tiles share the columns
of weight that they read, so that these stay in L2. For a few tokens the kernel is bound by reading the weights once, R
(D_IN + D_OUT) elements; for many, by the tensor cores. The intermediate x downᵀ goes through memory in the dtype of x.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfwsvd_kernels import tiles

FEW_TOKENS = 16  # up to here one row tile of the smallest tensor-core height holds all tokens
GROUP_ROWS = 8  # row tiles that run side by side over the same columns of weight


@triton.jit
def linear_kernel(
    y_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    num_tokens,
    d_out,
    d_in,
    stride_xt,
    stride_xi,
    stride_wo,
    stride_wi,
    stride_b,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
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
    if HAS_BIAS:
        bias = tl.load(bias_ptr + (first_o + offs_o).to(tl.int64) * stride_b, mask=mask_o, other=0.0)  # (BLOCK_O,)
        acc += bias.to(tl.float32)[None, :]
    y_ptrs = y_ptr + first_t.to(tl.int64) * d_out + first_o + (offs_t[:, None] * d_out + offs_o[None, :])
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_t[:, None] & mask_o[None, :])


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    out_dtype: torch.dtype,
    target: tiles.Target | None = None,
    tile: tiles.Tile | None = None,
) -> Tensor:
    """x (T, D_IN) times weight (D_OUT, D_IN) transposed, plus bias; in float32 where those dtypes differ."""
    num_tokens, d_in = x.shape
    d_out = weight.shape[0]
    interpreted_bf16 = tiles.interpreted_bf16(x)
    stored_dtype = torch.float32 if interpreted_bf16 else out_dtype  # the interpreter truncates to bfloat16
    y = torch.empty(num_tokens, d_out, dtype=stored_dtype, device=x.device)
    if y.numel() == 0:
        return y.to(out_dtype)
    tiles.check_strides(x=x, weight=weight, y=y)
    upcast = x.dtype != weight.dtype or interpreted_bf16
    kernel = "linear_few" if num_tokens <= FEW_TOKENS else "linear"
    tile = tile or tiles.tile(
        kernel, target or tiles.target(x.device), torch.float32 if upcast else x.dtype, y, x, weight
    )
    linear_kernel[(triton.cdiv(num_tokens, tile.rows) * triton.cdiv(d_out, tile.cols),)](
        y,
        x,
        weight,
        bias,
        num_tokens,
        d_out,
        d_in,
        *x.stride(),
        *weight.stride(),
        0 if bias is None else bias.stride(0),
        BLOCK_T=tile.rows,
        BLOCK_O=tile.cols,
        BLOCK_I=tile.depth,
        GROUP=GROUP_ROWS,
        HAS_BIAS=bias is not None,
        UPCAST=upcast,
        **tile.options(),
    )
    return y.to(out_dtype)


def lowrank_linear(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    *,
    target: tiles.Target | None = None,
    tile: tiles.Tile | None = None,
) -> Tensor:
    z = linear(x.reshape(-1, x.shape[-1]), down, None, out_dtype=x.dtype, target=target, tile=tile)
    y = linear(z, up, bias, out_dtype=x.dtype, target=target, tile=tile)
    return y.view(*x.shape[:-1], up.shape[0])
