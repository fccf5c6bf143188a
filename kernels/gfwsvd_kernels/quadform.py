"""Row-wise quadratic form q_t = x_tᵀ A x_t from the lower triangle of A, without a (T, D) temporary.

As A is symmetric, q_t = 2 x_tᵀ (tril(A, -1) + diag(A) / 2) x_t: half the products. One program owns a block of tokens
and a block of rows of A. It multiplies the tokens with those rows up to the diagonal, in registers, then with the
matching columns of x, and stores one partial sum a token; the partial sums, 1 / BLOCK_I of the size of x, are added in
a fixed order. Bound by the tensor cores: T D (D + 1) FLOP.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfwsvd_kernels import tiles


@triton.jit
def quadratic_form_kernel(
    partial_ptr,
    x_ptr,
    a_ptr,
    num_tokens,
    width,
    stride_xt,
    stride_xd,
    stride_ai,
    stride_aj,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    SPLIT_BF16: tl.constexpr,
):
    block = tl.num_programs(1) - 1 - tl.program_id(1)  # the longest rows first: the short ones fill the gaps at the end
    # 64-bit bases, 32-bit offsets within a tile: fewer registers (`tiles.check_strides` makes sure of them)
    first_t = tl.program_id(0) * BLOCK_T
    first_i = block * BLOCK_I
    offs_t = tl.arange(0, BLOCK_T)
    offs_i = tl.arange(0, BLOCK_I)
    offs_j = tl.arange(0, BLOCK_J)
    mask_t = offs_t < num_tokens - first_t
    mask_i = offs_i < width - first_i
    x_ptr += first_t.to(tl.int64) * stride_xt
    a_ptr += first_i.to(tl.int64) * stride_ai
    xi_ptrs = x_ptr + first_i.to(tl.int64) * stride_xd + (offs_t[:, None] * stride_xt + offs_i[None, :] * stride_xd)
    acc = tl.full((BLOCK_T, BLOCK_I), 0.0, tl.float32)
    for j in range(0, first_i + BLOCK_I, BLOCK_J):
        x = tl.load(  # (BLOCK_T, BLOCK_J)
            x_ptr + (offs_t[:, None] * stride_xt + offs_j[None, :] * stride_xd),
            mask=mask_t[:, None] & (j + offs_j < width)[None, :],
            other=0.0,
        )
        a = tl.load(  # (BLOCK_I, BLOCK_J)
            a_ptr + (offs_i[:, None] * stride_ai + offs_j[None, :] * stride_aj),
            mask=mask_i[:, None] & (j + offs_j[None, :] <= first_i + offs_i[:, None]),
            other=0.0,
        )
        a = tl.trans(tl.where(j + offs_j[None, :] == first_i + offs_i[:, None], 0.5 * a, a))
        x_ptr += BLOCK_J * stride_xd
        a_ptr += BLOCK_J * stride_aj
        if SPLIT_BF16:
            # A as a sum of two bfloat16 numbers, good to 2**-16: two exact products instead of the three of tf32x3
            high = a.to(tl.bfloat16)
            low = (a - high.to(tl.float32)).to(tl.bfloat16)
            acc = tl.dot(x, high, acc)
            acc = tl.dot(x, low, acc)
        else:
            acc = tl.dot(x.to(tl.float32), a, acc, input_precision="tf32x3")
    x = tl.load(xi_ptrs, mask=mask_t[:, None] & mask_i[None, :], other=0.0)  # (BLOCK_T, BLOCK_I)
    q = 2.0 * tl.sum(acc * x.to(tl.float32), axis=1)
    tl.store(partial_ptr + block.to(tl.int64) * num_tokens + first_t + offs_t, q, mask=mask_t)


def quadratic_form(
    x: Tensor, A: Tensor, *, target: tiles.Target | None = None, tile: tiles.Tile | None = None
) -> Tensor:
    num_tokens, width = x.shape
    if num_tokens == 0 or width == 0:
        return torch.zeros(num_tokens, dtype=torch.float32, device=x.device)
    tiles.check_strides(x=x, A=A)
    split_bf16 = x.dtype == torch.bfloat16 and not tiles.interpreted_bf16(x)
    dtype = torch.bfloat16 if split_bf16 else torch.float32
    tile = tile or tiles.tile("quadratic_form", target or tiles.target(x.device), dtype, x, A)
    num_blocks = triton.cdiv(width, tile.cols)
    partial = torch.empty(num_blocks, num_tokens, dtype=torch.float32, device=x.device)
    quadratic_form_kernel[triton.cdiv(num_tokens, tile.rows), num_blocks](
        partial,
        x,
        A,
        num_tokens,
        width,
        *x.stride(),
        *A.stride(),
        BLOCK_T=tile.rows,
        BLOCK_I=tile.cols,
        BLOCK_J=tile.depth,
        SPLIT_BF16=split_bf16,
        **tile.options(),
    )
    return partial.sum(0)
