"""Weighted symmetric rank-T update: lower triangle of out += xᵀ diag(w) y, in place, in float32.

One program owns one square tile of the triangle and one part of the tokens. It walks its tokens with the products in
registers, then adds the tile to `out`: a plain read and write where it is the only one on that tile, atomically where
the tokens are split.

Bound by the tensor cores for T and D in the thousands: T D (D + 1) FLOP against (T + D / 2) D
elements moved. Splitting the tokens is what fills the machine when the triangle has fewer tiles than it has SMs (the
idea of stream-K, Osama et al., arXiv:2301.03598).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfwsvd_kernels import tiles


@triton.jit
def gram_kernel(
    out_ptr,
    x_ptr,
    y_ptr,
    weight_ptr,
    num_tokens,
    width,
    part,
    stride_or,
    stride_xt,
    stride_xd,
    stride_yt,
    stride_yd,
    stride_w,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # tile number -> (row, col) with col <= row; the square root may be off by one in the last place
    tile = tl.program_id(0)
    row = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) / 2.0).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    col = tile - row * (row + 1) // 2

    # 64-bit bases, 32-bit offsets within a tile: fewer registers (`tiles.check_strides` makes sure of them)
    offs_t = tl.arange(0, BLOCK_T)
    offs_d = tl.arange(0, BLOCK_D)
    first_i = row * BLOCK_D
    first_j = col * BLOCK_D
    mask_i = offs_d < width - first_i
    mask_j = offs_d < width - first_j
    start = tl.program_id(1) * part
    stop = tl.minimum(start + part, num_tokens)
    x_ptr += start.to(tl.int64) * stride_xt + first_i.to(tl.int64) * stride_xd
    y_ptr += start.to(tl.int64) * stride_yt + first_j.to(tl.int64) * stride_yd
    if HAS_WEIGHT:
        weight_ptr += start.to(tl.int64) * stride_w
    acc = tl.full((BLOCK_D, BLOCK_D), 0.0, tl.float32)
    for t in range(start, stop, BLOCK_T):
        mask_t = offs_t < stop - t
        x = tl.load(  # (BLOCK_T, BLOCK_D)
            x_ptr + (offs_t[:, None] * stride_xt + offs_d[None, :] * stride_xd),
            mask=mask_t[:, None] & mask_i[None, :],
            other=0.0,
        )
        y = tl.load(  # (BLOCK_T, BLOCK_D)
            y_ptr + (offs_t[:, None] * stride_yt + offs_d[None, :] * stride_yd),
            mask=mask_t[:, None] & mask_j[None, :],
            other=0.0,
        )
        if UPCAST:
            x = x.to(tl.float32)
            y = y.to(tl.float32)
        if HAS_WEIGHT:
            # Both operands are rounded alike once scaled: the tiles together hold the Gram matrix of one rounded matrix
            root = tl.sqrt(tl.load(weight_ptr + offs_t * stride_w, mask=mask_t, other=0.0))[:, None]
            x = (x.to(tl.float32) * root).to(x.dtype)
            y = (y.to(tl.float32) * root).to(y.dtype)
            weight_ptr += BLOCK_T * stride_w
        acc = tl.dot(tl.trans(x), y, acc, input_precision="tf32x3")
        x_ptr += BLOCK_T * stride_xt
        y_ptr += BLOCK_T * stride_yt

    out_ptrs = out_ptr + first_i.to(tl.int64) * stride_or + first_j + (offs_d[:, None] * stride_or + offs_d[None, :])
    mask = mask_i[:, None] & (first_j + offs_d[None, :] <= first_i + offs_d[:, None])
    if SPLIT:
        tl.atomic_add(out_ptrs, acc, mask=mask, sem="relaxed")
    else:
        tl.store(out_ptrs, tl.load(out_ptrs, mask=mask, other=0.0) + acc, mask=mask)


def gram_accumulate(
    out: Tensor,
    x: Tensor,
    weight: Tensor | None = None,
    other: Tensor | None = None,
    *,
    target: tiles.Target | None = None,
    tile: tiles.Tile | None = None,
    splits: int | None = None,
) -> None:
    """Launch. `splits` is the number of parts of the tokens; more than one adds in no fixed order.

    `other` may have another dtype than x here: both are then multiplied in float32.
    """
    num_tokens, width = x.shape
    if num_tokens == 0 or width == 0:
        return
    target = target or tiles.target(x.device)
    other = x if other is None else other
    tiles.check_strides(out=out, x=x, other=other)
    upcast = x.dtype != other.dtype or tiles.interpreted_bf16(x)
    tile = tile or tiles.tile("gram", target, torch.float32 if upcast else x.dtype, out, x, other)
    edge = triton.cdiv(width, tile.rows)
    num_tiles = edge * (edge + 1) // 2
    if torch.are_deterministic_algorithms_enabled():
        splits = 1
    splits = splits or tiles.token_splits(num_tokens, num_tiles, target.num_sms, 8 * tile.depth)
    part = triton.cdiv(triton.cdiv(num_tokens, splits), tile.depth) * tile.depth
    gram_kernel[num_tiles, splits](
        out,
        x,
        other,
        weight,
        num_tokens,
        width,
        part,
        out.stride(0),
        *x.stride(),
        *other.stride(),
        0 if weight is None else weight.stride(0),
        BLOCK_D=tile.rows,
        BLOCK_T=tile.depth,
        HAS_WEIGHT=weight is not None,
        SPLIT=splits > 1,
        UPCAST=upcast,
        **tile.options(),
    )
