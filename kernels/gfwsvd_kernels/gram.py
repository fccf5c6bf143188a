"""Weighted symmetric rank-T update: lower triangle of out += xᵀ diag(w) y, in place, in float32.

A persistent grid of programs shares the (tile, step of tokens) pairs equally. A program walks the steps of one tile
with the products in registers, adds them to `out`, and goes on to its next tile; `plan.Plan` says which steps are
whose. There is no workspace and nobody waits. Weights are multiplied onto the rows by a pass of their own.

On compute capability 9.0 and later the copy engine (TMA) loads half-precision tiles through tensor descriptors: the
loop then holds neither addresses nor masks. Rows that it cannot read, and float32, are loaded by threads.

Bound by the tensor cores for T and D in the thousands: T D (D + 1) FLOP against (T + D / 2) D elements moved. Sharing
steps instead of tiles is stream-K (Osama et al., arXiv:2301.03598), here in an order in which programs read the same
tokens at the same time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gfwsvd_kernels import tiles
from gfwsvd_kernels.plan import gram_plan
from gfwsvd_kernels.rows import scaled_rows

WEIGHTED_BYTES = 2**28  # of weighted rows in memory at once


@triton.jit
def in_triangle(nth):
    """(row, col) of the nth place of a triangle, row by row."""
    row = ((tl.sqrt(8.0 * nth + 1.0) - 1.0) / 2.0).to(tl.int32)  # may be off by one in the last place
    row = tl.where(row * (row + 1) // 2 > nth, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= nth, row + 1, row)
    return row, nth - row * (row + 1) // 2


@triton.jit
def place(tile, edge, PER_ROW: tl.constexpr, PER_COL: tl.constexpr, GROUP: tl.constexpr):
    """(row, col) of a tile: PER_COL x PER_ROW tiles make up a square, GROUP x GROUP squares a block.

    Blocks follow each other row by row of the triangle, `edge` squares wide, and tiles within them column by column, so
    that tiles that are computed at the same time share rows and columns.
    """
    nth = tile // (PER_ROW * PER_COL)
    band = in_triangle(nth)[0] // GROUP
    first = band * GROUP
    within = nth - first * (first + 1) // 2
    height = tl.minimum(edge - first, GROUP)
    block = within // (height * GROUP)
    below, right = in_triangle(within - band * height * GROUP)
    inside = within - block * height * GROUP
    row = first + tl.where(block < band, inside % height, below)
    col = tl.where(block < band, block * GROUP + inside // height, first + right)
    part = tile % (PER_ROW * PER_COL)
    return row * PER_COL + part // PER_ROW, col * PER_ROW + part % PER_ROW


@triton.jit
def halves(part):
    """The left and the right half of the columns."""
    return tl.split(tl.permute(tl.reshape(part, (part.shape[0], 2, part.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def add_lower(out_ptr, part, first_i, first_j, width, stride_or, PACKED: tl.constexpr):
    """Add to the lower triangle a part of a tile, the first of whose entries is that at (first_i, first_j)."""
    offs_i = tl.arange(0, part.shape[0])
    offs_j = tl.arange(0, part.shape[1])
    # Above the diagonal -0.0 is added, which changes no normal number: masking by entries would cost registers and the
    # vectors. In a packed triangle such an entry is one of a later row.
    part = tl.where(first_j + offs_j[None, :] <= first_i + offs_i[:, None], part, -0.0)
    if PACKED:  # row i starts at i (i + 1) / 2
        base = first_i.to(tl.int64) * (first_i + 1) // 2
        rows = offs_i * first_i + offs_i * (offs_i + 1) // 2
    else:
        base = first_i.to(tl.int64) * stride_or
        rows = offs_i * stride_or
    mask = (offs_i < width - first_i)[:, None] & (offs_j < width - first_j)[None, :]
    tl.atomic_add(out_ptr + base + (rows[:, None] + (first_j + offs_j)[None, :]), part, mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=["num_tokens", "waves", "rest", "steps", "share", "span"])
def gram_kernel(
    out_ptr,
    x_ptr,
    y_ptr,
    num_tokens,
    width,
    waves,
    rest,
    steps,
    share,
    span,
    stride_or,
    stride_xt,
    stride_xd,
    stride_yt,
    stride_yd,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PACKED: tl.constexpr,
    UPCAST: tl.constexpr,
    SPLIT_BF16: tl.constexpr,
):
    """With DESCRIPTORS, `x_ptr` and `y_ptr` are tensor descriptors."""
    PER_COL: tl.constexpr = tl.constexpr(max(BLOCK_J // BLOCK_I, 1))
    PER_ROW: tl.constexpr = tl.constexpr(max(BLOCK_I // BLOCK_J, 1))
    QUARTER: tl.constexpr = BLOCK_J // 4
    offs_t = tl.arange(0, BLOCK_T)
    offs_i = tl.arange(0, BLOCK_I)
    offs_j = tl.arange(0, BLOCK_J)
    edge = tl.cdiv(width, BLOCK_I * PER_COL)

    # `plan.Plan.segments`, in the words of a kernel
    program = tl.program_id(0)
    shared_from = waves * tl.num_programs(0)
    num_blocks = steps // share * rest
    tail = steps % share
    begin = (program - num_blocks) * span
    end = tl.minimum(begin + span, rest * tail)
    if program < num_blocks:
        segments = waves + 1
    elif begin < end:
        segments = waves + tl.cdiv(end, tail) - begin // tail
    else:
        segments = waves
    # What does not change from segment to segment, such as addresses, is computed again: kept, it would spill
    for segment in tl.range(0, segments, disable_licm=True):
        if segment < waves:
            tile = segment * tl.num_programs(0) + program
            first = 0
            count = steps
        elif program < num_blocks:
            tile = shared_from + program % rest
            first = program // rest * share
            count = share
        else:
            nth = begin // tail + segment - waves
            skipped = tl.maximum(begin - nth * tail, 0)
            tile = shared_from + nth
            first = steps - tail + skipped
            count = tl.minimum(end - nth * tail, tail) - skipped

        row, col = place(tile, edge, PER_ROW, PER_COL, GROUP)
        first_i = row * BLOCK_I
        first_j = col * BLOCK_J
        acc = tl.full((BLOCK_I, BLOCK_J), 0.0, tl.float32)
        if DESCRIPTORS:  # which give zeros for what is outside of the tensors
            for t in range(first * BLOCK_T, (first + count) * BLOCK_T, BLOCK_T):
                x = x_ptr.load([t, first_i])
                y = y_ptr.load([t, first_j])
                if UPCAST:
                    x = x.to(tl.float32)
                    y = y.to(tl.float32)
                acc = tl.dot(tl.trans(x), y, acc)
        else:
            # 64-bit bases, 32-bit offsets within a tile: fewer registers (`tiles.check_strides` makes sure of them)
            mask_i = offs_i < width - first_i
            mask_j = offs_j < width - first_j
            tokens = tl.minimum(count * BLOCK_T, num_tokens - first * BLOCK_T)
            first_t = (first * BLOCK_T).to(tl.int64)
            xs_ptr = x_ptr + first_t * stride_xt + first_i.to(tl.int64) * stride_xd
            ys_ptr = y_ptr + first_t * stride_yt + first_j.to(tl.int64) * stride_yd
            for t in range(0, tokens, BLOCK_T):
                mask_t = offs_t < tokens - t
                x = tl.load(  # (BLOCK_T, BLOCK_I)
                    xs_ptr + (offs_t[:, None] * stride_xt + offs_i[None, :] * stride_xd),
                    mask=mask_t[:, None] & mask_i[None, :],
                    other=0.0,
                )
                y = tl.load(  # (BLOCK_T, BLOCK_J)
                    ys_ptr + (offs_t[:, None] * stride_yt + offs_j[None, :] * stride_yd),
                    mask=mask_t[:, None] & mask_j[None, :],
                    other=0.0,
                )
                if UPCAST:
                    x = x.to(tl.float32)
                    y = y.to(tl.float32)
                if SPLIT_BF16:
                    # y as the sum of three bfloat16 numbers, which is exact: as good as tf32x3, and half its time
                    high = y.to(tl.bfloat16)
                    rest_of_y = y - high.to(tl.float32)
                    middle = rest_of_y.to(tl.bfloat16)
                    low = (rest_of_y - middle.to(tl.float32)).to(tl.bfloat16)
                    acc = tl.dot(tl.trans(x), high, acc)
                    acc = tl.dot(tl.trans(x), middle, acc)
                    acc = tl.dot(tl.trans(x), low, acc)
                else:
                    acc = tl.dot(tl.trans(x), y, acc, input_precision="tf32x3")
                xs_ptr += BLOCK_T * stride_xt
                ys_ptr += BLOCK_T * stride_yt

        left, right = halves(acc)  # in parts, so that addresses and masks fit the registers
        a, b = halves(left)
        c, d = halves(right)
        add_lower(out_ptr, a, first_i, first_j, width, stride_or, PACKED)
        add_lower(out_ptr, b, first_i, first_j + QUARTER, width, stride_or, PACKED)
        add_lower(out_ptr, c, first_i, first_j + 2 * QUARTER, width, stride_or, PACKED)
        add_lower(out_ptr, d, first_i, first_j + 3 * QUARTER, width, stride_or, PACKED)


def descriptor(matrix: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """What the copy engine must know to move blocks of a matrix; what is outside of it reads as zero."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), list(block))


def gram_accumulate(
    out: Tensor,
    x: Tensor,
    weight: Tensor | None = None,
    other: Tensor | None = None,
    *,
    target: tiles.Target | None = None,
    tile: tiles.Tile | None = None,
) -> None:
    """Launch. `other` may have another dtype than x here: both are then multiplied in float32, or as well as that."""
    num_tokens, width = x.shape
    if num_tokens == 0 or width == 0:
        return
    target = target or tiles.target(x.device)
    if weight is None:
        _accumulate(out, x, x if other is None else other, target, tile)
        return
    pitch = -(-width // 16) * 16  # rows that start at multiples of 16 bytes
    chunk = max(WEIGHTED_BYTES // (pitch * x.element_size()) // 64 * 64, 64)
    for first in range(0, num_tokens, chunk):
        tokens = slice(first, first + chunk)
        scaled = scaled_rows(x[tokens], weight[tokens], pitch=pitch)
        other_scaled = scaled if other is None else scaled_rows(other[tokens], weight[tokens], pitch=pitch)
        _accumulate(out, scaled, other_scaled, target, tile)


def _accumulate(out: Tensor, x: Tensor, other: Tensor, target: tiles.Target, tile: tiles.Tile | None) -> None:
    num_tokens, width = x.shape
    tiles.check_strides(out=out, x=x, other=other)
    split_bf16 = (x.dtype, other.dtype) == (torch.bfloat16, torch.float32) and not tiles.interpreted_bf16(x)
    upcast = not split_bf16 and (x.dtype != other.dtype or tiles.interpreted_bf16(x))
    dtype = torch.float32 if split_bf16 or upcast else x.dtype
    tile = tile or tiles.tile("gram_split" if split_bf16 else "gram", target, dtype, x, other)
    plan = gram_plan(tile, target, num_tokens, width)
    half = x.dtype.itemsize == other.dtype.itemsize == 2  # TF32 products would need their operands the other way round
    descriptors = half and tiles.by_descriptors(target, x, other)
    left, right = (tile.depth, tile.rows), (tile.depth, tile.cols)
    gram_kernel[(plan.programs,)](
        out,
        descriptor(x, left) if descriptors else x,
        descriptor(other, right) if descriptors else other,
        num_tokens,
        width,
        plan.waves,
        plan.rest,
        plan.steps,
        plan.share,
        plan.span,
        0 if out.ndim == 1 else out.stride(0),
        *x.stride(),
        *other.stride(),
        BLOCK_I=tile.rows,
        BLOCK_J=tile.cols,
        BLOCK_T=tile.depth,
        GROUP=tile.group,
        DESCRIPTORS=descriptors,
        PACKED=out.ndim == 1,
        UPCAST=upcast,
        SPLIT_BF16=split_bf16,
        **tile.options(),
    )
