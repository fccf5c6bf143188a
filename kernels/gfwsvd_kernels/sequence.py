"""The sequence-unit step: out += sum_s g_sᵀ (K_s g_s), K_s = x_s A x_sᵀ, over sequences of any lengths.

Four kernels and no gradient G_s: y = x A (`linear.py`); the blocks K_s = y_s x_sᵀ, computed for a panel of tokens
at a time so that the workspace is bounded; e = K g, each tile of tokens walking only the tokens of its sequences; and
the triangle of gᵀ e (`gram.gram_accumulate`). All of it in float32 where A is given: the sum is positive semi-definite
only as far as K is.

Bound by the tensor cores: per sequence 2 S (D_IN² + S (D_IN + D_OUT) + D_OUT² / 2) FLOP.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfwsvd_kernels import gram, tiles
from gfwsvd_kernels.linear import linear
from gfwsvd_kernels.reference import symmetrize

PANEL_ELEMENTS = 2**26  # of the float32 workspace for K: 256 MB
PANEL_ROWS = 256  # at least: fewer would leave SMs idle, and 256 rows of a million tokens are still 1 GB


@triton.jit
def scores_kernel(
    scores_ptr,
    y_ptr,
    x_ptr,
    start_ptr,
    stop_ptr,
    panel_start,
    panel_stop,
    num_tokens,
    width,
    stride_yt,
    stride_yd,
    stride_xt,
    stride_xd,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """scores[m - panel_start, n] = y_m x_nᵀ, for the tiles in which some m and n share a sequence."""
    first_m = panel_start + tl.program_id(0) * BLOCK_M
    first_n = tl.program_id(1) * BLOCK_N
    start = tl.load(start_ptr + first_m)
    stop = tl.load(stop_ptr + tl.minimum(first_m + BLOCK_M, panel_stop) - 1)
    if (first_n < stop) & (first_n + BLOCK_N > start):
        # 64-bit bases, 32-bit offsets within a tile: fewer registers (`tiles.check_strides` makes sure of them)
        offs_m = tl.arange(0, BLOCK_M)
        offs_n = tl.arange(0, BLOCK_N)
        offs_d = tl.arange(0, BLOCK_D)
        mask_m = offs_m < panel_stop - first_m
        mask_n = offs_n < num_tokens - first_n
        y_ptr += first_m.to(tl.int64) * stride_yt
        x_ptr += first_n.to(tl.int64) * stride_xt
        acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
        for d in range(0, width, BLOCK_D):
            mask_d = offs_d < width - d
            y = tl.load(  # (BLOCK_M, BLOCK_D)
                y_ptr + (offs_m[:, None] * stride_yt + offs_d[None, :] * stride_yd),
                mask=mask_m[:, None] & mask_d[None, :],
                other=0.0,
            )
            x = tl.load(  # (BLOCK_N, BLOCK_D)
                x_ptr + (offs_n[:, None] * stride_xt + offs_d[None, :] * stride_xd),
                mask=mask_n[:, None] & mask_d[None, :],
                other=0.0,
            )
            y_ptr += BLOCK_D * stride_yd
            x_ptr += BLOCK_D * stride_xd
            if UPCAST:
                y = y.to(tl.float32)
                x = x.to(tl.float32)
            acc = tl.dot(y, tl.trans(x), acc, input_precision="tf32x3")
        scores_ptr += (first_m - panel_start).to(tl.int64) * num_tokens + first_n
        scores_ptrs = scores_ptr + (offs_m[:, None] * num_tokens + offs_n[None, :])
        tl.store(scores_ptrs, acc, mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def apply_kernel(
    e_ptr,
    scores_ptr,
    g_ptr,
    start_ptr,
    stop_ptr,
    panel_start,
    panel_stop,
    num_tokens,
    width,
    stride_gt,
    stride_gd,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """e_m = sum of scores[m, n] g_n over the tokens n of the sequence of m."""
    first_m = panel_start + tl.program_id(0) * BLOCK_M
    first_o = tl.program_id(1) * BLOCK_O
    first_n = tl.load(start_ptr + first_m)
    stop_n = tl.load(stop_ptr + tl.minimum(first_m + BLOCK_M, panel_stop) - 1)
    offs_m = tl.arange(0, BLOCK_M)
    offs_o = tl.arange(0, BLOCK_O)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < panel_stop - first_m
    mask_o = offs_o < width - first_o
    start_m = tl.load(start_ptr + first_m + offs_m, mask=mask_m, other=0)
    stop_m = tl.load(stop_ptr + first_m + offs_m, mask=mask_m, other=0)
    scores_ptr += (first_m - panel_start).to(tl.int64) * num_tokens + first_n
    g_ptr += first_n.to(tl.int64) * stride_gt + first_o.to(tl.int64) * stride_gd
    acc = tl.full((BLOCK_M, BLOCK_O), 0.0, tl.float32)
    for n in range(first_n, stop_n, BLOCK_N):
        scores = tl.load(  # (BLOCK_M, BLOCK_N); outside a sequence nothing was ever written
            scores_ptr + (offs_m[:, None] * num_tokens + offs_n[None, :]),
            mask=(n + offs_n[None, :] >= start_m[:, None]) & (n + offs_n[None, :] < stop_m[:, None]),
            other=0.0,
        )
        g = tl.load(  # (BLOCK_N, BLOCK_O)
            g_ptr + (offs_n[:, None] * stride_gt + offs_o[None, :] * stride_gd),
            mask=(offs_n < stop_n - n)[:, None] & mask_o[None, :],
            other=0.0,
        )
        acc = tl.dot(scores, g.to(tl.float32), acc, input_precision="tf32x3")
        scores_ptr += BLOCK_N
        g_ptr += BLOCK_N * stride_gt
    e_ptrs = e_ptr + first_m.to(tl.int64) * width + first_o + (offs_m[:, None] * width + offs_o[None, :])
    tl.store(e_ptrs, acc, mask=mask_m[:, None] & mask_o[None, :])


def block_diagonal_product(
    y: Tensor,
    x: Tensor,
    g: Tensor,
    cu_seqlens: Tensor,
    *,
    target: tiles.Target | None = None,
    tile: tiles.Tile | None = None,
) -> Tensor:
    """e (T, D_OUT) float32 with e_s = (y_s x_sᵀ) g_s for every sequence s."""
    num_tokens, d_in = x.shape
    d_out = g.shape[1]
    target = target or tiles.target(x.device)
    upcast = x.dtype != y.dtype or tiles.interpreted_bf16(x)
    # The sequence of each token, found on the device: nothing waits for cu_seqlens to come to the host.
    tokens = torch.arange(num_tokens, device=x.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens, tokens, right=True)
    start, stop = cu_seqlens[sequence - 1].int(), cu_seqlens[sequence].int()

    e = torch.empty(num_tokens, d_out, dtype=torch.float32, device=x.device)
    panel = min(num_tokens, max(PANEL_ELEMENTS // num_tokens, PANEL_ROWS))
    scores = torch.empty(panel, num_tokens, dtype=torch.float32, device=x.device)
    tiles.check_strides(y=y, x=x, g=g, scores=scores)
    scores_dtype = torch.float32 if upcast else x.dtype
    scores_tile = tile or tiles.tile("scores", target, scores_dtype, y, x, scores)
    apply_tile = tile or tiles.tile("apply", target, torch.float32, scores, g, e)
    for panel_start in range(0, num_tokens, panel):
        panel_stop = min(panel_start + panel, num_tokens)
        grid = triton.cdiv(panel_stop - panel_start, scores_tile.rows), triton.cdiv(num_tokens, scores_tile.cols)
        scores_kernel[grid](
            scores,
            y,
            x,
            start,
            stop,
            panel_start,
            panel_stop,
            num_tokens,
            d_in,
            *y.stride(),
            *x.stride(),
            BLOCK_M=scores_tile.rows,
            BLOCK_N=scores_tile.cols,
            BLOCK_D=scores_tile.depth,
            UPCAST=upcast,
            **scores_tile.options(),
        )
        grid = triton.cdiv(panel_stop - panel_start, apply_tile.rows), triton.cdiv(d_out, apply_tile.cols)
        apply_kernel[grid](
            e,
            scores,
            g,
            start,
            stop,
            panel_start,
            panel_stop,
            num_tokens,
            d_out,
            *g.stride(),
            BLOCK_M=apply_tile.rows,
            BLOCK_O=apply_tile.cols,
            BLOCK_N=apply_tile.depth,
            **apply_tile.options(),
        )
    return e


def sequence_unit_step(
    out: Tensor,
    x: Tensor,
    g: Tensor,
    A: Tensor | None,
    cu_seqlens: Tensor,
    *,
    target: tiles.Target | None = None,
    tile: tiles.Tile | None = None,
) -> None:
    if x.numel() == 0 or g.numel() == 0:
        return
    y = x if A is None else linear(x, symmetrize(A), target=target, tile=tile)
    e = block_diagonal_product(y, x, g, cu_seqlens, target=target, tile=tile)
    gram.gram_accumulate(out, g, other=e, target=target, tile=tile)
