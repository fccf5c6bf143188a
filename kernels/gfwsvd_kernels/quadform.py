"""Row-wise quadratic form q_t = x_tᵀ A x_t from the lower triangle of A, without a (T, D) temporary; rows scaled by it.

As A is symmetric, q_t = 2 x_tᵀ (tril(A, -1) + diag(A) / 2) x_t: half the products. One program owns a block of tokens
and a block of rows of A. It multiplies the tokens with those rows up to the diagonal, in registers, then with the
matching columns of x, and stores one partial sum a token, 1 / BLOCK_I of the size of x. The last program to arrive at a
block of tokens adds its partial sums in a fixed order and scales the rows of g. Bound by the tensor cores: T D (D + 1)
FLOP.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfwsvd_kernels import tiles
from gfwsvd_kernels.gram import halves

GROUP_TOKENS = 8  # blocks of tokens that run side by side over the same rows of A, which stay in L2
BLOCK_PARTIAL = 16  # partial sums of a token that are added at once


@triton.jit
def row_sums(part, NTH: tl.constexpr, x_ptr, mask_t, width, stride_xt, stride_xd):
    """The sum of each row of part * x, where `part` is the nth of equal parts of a tile and x has `width` columns."""
    offs_t = tl.arange(0, part.shape[0])
    offs_i = NTH * part.shape[1] + tl.arange(0, part.shape[1])
    x_ptrs = x_ptr + (offs_t[:, None] * stride_xt + offs_i[None, :] * stride_xd)
    x = tl.load(x_ptrs, mask=mask_t[:, None] & (offs_i < width)[None, :], other=0.0)  # like part
    return tl.sum(part * x.to(tl.float32), axis=1)


@triton.jit(do_not_specialize=["num_tokens"])
def quadratic_form_kernel(
    q_ptr,
    x_ptr,
    a_ptr,
    g_ptr,
    scaled_ptr,
    partial_ptr,
    arrived_ptr,
    scale,
    num_tokens,
    width,
    width_g,
    stride_xt,
    stride_xd,
    stride_ai,
    stride_aj,
    stride_gt,
    stride_gd,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_P: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT_BF16: tl.constexpr,
    UPCAST: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_G: tl.constexpr,
):
    num_rows = tl.cdiv(num_tokens, BLOCK_T)
    num_blocks = tl.cdiv(width, BLOCK_I)
    group = tl.program_id(0) // (GROUP * num_blocks)
    rows_here = tl.minimum(num_rows - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * num_blocks)
    row = group * GROUP + within % rows_here
    block = num_blocks - 1 - within // rows_here  # the longest rows first: the short ones fill the gaps at the end

    # 64-bit bases, 32-bit offsets within a tile: fewer registers (`tiles.check_strides` makes sure of them)
    first_t = row * BLOCK_T
    first_i = block * BLOCK_I
    offs_t = tl.arange(0, BLOCK_T)
    offs_i = tl.arange(0, BLOCK_I)
    offs_j = tl.arange(0, BLOCK_J)
    mask_t = offs_t < num_tokens - first_t
    mask_i = offs_i < width - first_i
    x_ptr += first_t.to(tl.int64) * stride_xt
    if PACKED:  # row i starts at i (i + 1) / 2
        a_ptr += first_i.to(tl.int64) * (first_i + 1) // 2
        offs_a = offs_i * first_i + offs_i * (offs_i + 1) // 2
    else:
        a_ptr += first_i.to(tl.int64) * stride_ai
        offs_a = offs_i * stride_ai
    xj_ptr = x_ptr
    acc = tl.full((BLOCK_T, BLOCK_I), 0.0, tl.float32)
    for j in range(0, first_i + BLOCK_I, BLOCK_J):
        mask_j = offs_j < width - j
        x = tl.load(  # (BLOCK_T, BLOCK_J)
            xj_ptr + (offs_t[:, None] * stride_xt + offs_j[None, :] * stride_xd),
            mask=mask_t[:, None] & mask_j[None, :],
            other=0.0,
        )
        a = tl.load(  # (BLOCK_I, BLOCK_J); a mask of whole rows leaves vectors whole
            a_ptr + (offs_a[:, None] + offs_j[None, :] * stride_aj),
            mask=mask_i[:, None] & mask_j[None, :],
            other=0.0,
        )
        if UPCAST:
            x = x.to(tl.float32)
            a = a.to(tl.float32)
        above = j + offs_j[None, :] - (first_i + offs_i[:, None])  # the diagonal
        a = tl.trans(tl.where(above < 0, a, tl.where(above > 0, 0.0, 0.5 * a)))
        xj_ptr += BLOCK_J * stride_xd
        a_ptr += BLOCK_J * stride_aj
        if SPLIT_BF16:
            # A as a sum of two bfloat16 numbers, good to 2**-16: two exact products instead of the three of tf32x3
            high = a.to(tl.bfloat16)
            low = (a - high.to(tl.float32)).to(tl.bfloat16)
            acc = tl.dot(x, high, acc)
            acc = tl.dot(x, low, acc)
        else:
            acc = tl.dot(x, a, acc, input_precision="tf32x3")
    x_ptr += first_i.to(tl.int64) * stride_xd
    left, right = halves(acc)  # in parts, so that x fits the registers beside them
    first, second = halves(left)
    third, fourth = halves(right)
    q = row_sums(first, 0, x_ptr, mask_t, width - first_i, stride_xt, stride_xd)
    q += row_sums(second, 1, x_ptr, mask_t, width - first_i, stride_xt, stride_xd)
    q += row_sums(third, 2, x_ptr, mask_t, width - first_i, stride_xt, stride_xd)
    q += row_sums(fourth, 3, x_ptr, mask_t, width - first_i, stride_xt, stride_xd)
    q *= 2.0
    tl.store(partial_ptr + block.to(tl.int64) * num_tokens + first_t + offs_t, q, mask=mask_t)

    tl.debug_barrier()  # every thread has stored before the program counts as arrived
    if tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel") == num_blocks - 1:
        q = tl.full((BLOCK_T,), 0.0, tl.float32)
        for first_p in range(0, num_blocks, BLOCK_P):
            offs_p = first_p + tl.arange(0, BLOCK_P)
            q += tl.sum(
                tl.load(  # (BLOCK_P, BLOCK_T); from L2, where other programs wrote
                    partial_ptr + offs_p.to(tl.int64)[:, None] * num_tokens + first_t + offs_t[None, :],
                    mask=(offs_p < num_blocks)[:, None] & mask_t[None, :],
                    other=0.0,
                    cache_modifier=".cg",
                ),
                axis=0,
            )
        tl.store(q_ptr + first_t + offs_t, q, mask=mask_t)
        if HAS_G:
            weight = scale * q
            root = tl.sqrt(tl.where(weight < 0.0, 0.0, weight))[:, None]  # NaN stays NaN
            g_ptr += first_t.to(tl.int64) * stride_gt
            scaled_ptr += first_t.to(tl.int64) * width_g
            for d in range(0, width_g, BLOCK_I):
                mask = mask_t[:, None] & (offs_i < width_g - d)[None, :]
                g = tl.load(  # (BLOCK_T, BLOCK_I)
                    g_ptr + (offs_t[:, None] * stride_gt + offs_i[None, :] * stride_gd), mask=mask, other=0.0
                )
                scaled = (g.to(tl.float32) * root).to(scaled_ptr.dtype.element_ty)
                tl.store(scaled_ptr + (offs_t[:, None] * width_g + offs_i[None, :]), scaled, mask=mask)
                g_ptr += BLOCK_I * stride_gd
                scaled_ptr += BLOCK_I


def quadratic_form(
    x: Tensor, A: Tensor, *, target: tiles.Target | None = None, tile: tiles.Tile | None = None
) -> Tensor:
    if x.numel() == 0:
        return torch.zeros(x.shape[0], dtype=torch.float32, device=x.device)
    return _launch(x, A, None, None, 0.0, target, tile)


def quadratic_form_scale(
    x: Tensor,
    A: Tensor,
    g: Tensor,
    scale: float,
    *,
    target: tiles.Target | None = None,
    tile: tiles.Tile | None = None,
) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        return torch.zeros(x.shape[0], dtype=torch.float32, device=x.device), torch.zeros_like(g)
    dtype = torch.float32 if tiles.interpreted_bf16(g) else g.dtype  # the interpreter truncates to bfloat16
    scaled = torch.empty(g.shape, dtype=dtype, device=g.device)
    return _launch(x, A, g, scaled, scale, target, tile), scaled.to(g.dtype)


def _launch(
    x: Tensor,
    A: Tensor,
    g: Tensor | None,
    scaled: Tensor | None,
    scale: float,
    target: tiles.Target | None,
    tile: tiles.Tile | None,
) -> Tensor:
    num_tokens, width = x.shape
    tiles.check_strides(x=x, A=A)
    if g is not None and scaled is not None:
        tiles.check_strides(g=g, scaled=scaled)
    split_bf16 = x.dtype == torch.bfloat16 and A.dtype == torch.float32 and not tiles.interpreted_bf16(x)
    upcast = not split_bf16 and (x.dtype != A.dtype or tiles.interpreted_bf16(x))
    dtype = torch.float32 if upcast else x.dtype
    tile = tile or tiles.quadratic_form_tile(target or tiles.target(x.device), dtype, x, A, g)
    num_rows, num_blocks = triton.cdiv(num_tokens, tile.rows), triton.cdiv(width, tile.cols)
    q = torch.empty(num_tokens, dtype=torch.float32, device=x.device)
    partial = torch.empty(num_blocks, num_tokens, dtype=torch.float32, device=x.device)
    arrived = torch.zeros(num_rows, dtype=torch.int32, device=x.device)
    quadratic_form_kernel[(num_rows * num_blocks,)](
        q,
        x,
        A,
        g,
        scaled,
        partial,
        arrived,
        scale,
        num_tokens,
        width,
        0 if g is None else g.shape[1],
        *x.stride(),
        *(A.stride() if A.ndim == 2 else (0, 1)),
        *((0, 0) if g is None else g.stride()),
        BLOCK_T=tile.rows,
        BLOCK_I=tile.cols,
        BLOCK_J=tile.depth,
        BLOCK_P=BLOCK_PARTIAL,
        GROUP=GROUP_TOKENS,
        SPLIT_BF16=split_bf16,
        UPCAST=upcast,
        PACKED=A.ndim == 1,
        HAS_G=g is not None,
        **tile.options(),
    )
    return q
