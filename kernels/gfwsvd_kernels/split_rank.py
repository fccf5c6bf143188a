"""Up to 8 tokens through a group of low-rank projections in one launch that splits the rank.

A program owns a slice of the rank of one projection: it computes that slice of z = x downᵀ and adds z times its rows of
up to the float32 sums in the workspace. It asks for the first columns of up before it computes z, so that memory stays
busy in between. The last programs to arrive, one for each block of outputs, wait for those few that are still under
way, then finish the outputs (`finish.py`) and clear the sums. Every weight is read once, in rows as they lie in memory.

Bound by reading the weights, sum of R (D_IN + PITCH) elements; the additions travel in L2, programs x PITCH x T words.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfwsvd_kernels import tiles
from gfwsvd_kernels.finish import (
    ACC_START,
    ALIGN,
    CHUNK,
    FIRST_PROGRAM,
    NUM_FIELDS,
    PITCH,
    RANK,
    UP_START,
    Z_START,
    finish_blocks,
    projection_of,
    workspace_parts,
)
from gfwsvd_kernels.layout import Layout, Operands


@triton.jit
def up_tile(up_ptr, step, num_steps, turn, pitch, offs_r, mask_r, BLOCK_O: tl.constexpr):
    """Columns of up in step `step` of `num_steps`, which begin at step `turn`; zeros behind the last step."""
    offs_o = (step + turn) % num_steps * BLOCK_O + tl.arange(0, BLOCK_O)
    mask_o = offs_o < tl.where(step < num_steps, pitch, 0)
    return tl.load(  # (BLOCK_R, BLOCK_O)
        up_ptr + (offs_r[:, None] * pitch + offs_o[None, :]), mask=mask_r[:, None] & mask_o[None, :], other=0.0
    )


@triton.jit
def split_rank_kernel(
    y_ptr,
    x_ptr,
    down_ptr,
    up_ptr,
    bias_ptr,
    table_ptr,
    sums_ptr,
    tickets_ptr,
    z_ptr,
    num_tokens,
    d_in,
    rank,
    sums_width,
    out_width,
    num_blocks,
    finishers,
    NUM_PROJECTIONS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PIVOTED: tl.constexpr,
    SILU_MUL: tl.constexpr,
    UPCAST: tl.constexpr,
):
    number = projection_of(table_ptr, tl.program_id(0), FIRST_PROGRAM, NUM_PROJECTIONS)
    record_ptr = table_ptr + number * NUM_FIELDS
    chunk = tl.load(record_ptr + CHUNK)
    turn = tl.program_id(0) - tl.load(record_ptr + FIRST_PROGRAM)
    first_r = turn * chunk
    first_z = tl.load(record_ptr + Z_START) + first_r
    offs_t = tl.arange(0, BLOCK_T)
    offs_r = tl.arange(0, BLOCK_R)
    mask_t = offs_t < num_tokens
    mask_r = (offs_r < chunk) & (offs_r < tl.load(record_ptr + RANK) - first_r)
    pitch = tl.multiple_of(tl.load(record_ptr + PITCH), ALIGN)
    num_steps = tl.maximum(tl.cdiv(pitch, BLOCK_O), 1)  # a projection of pivots alone has no up
    up_ptr += tl.multiple_of(tl.load(record_ptr + UP_START), ALIGN) + first_r * pitch
    up = up_tile(up_ptr, 0, num_steps, turn, pitch, offs_r, mask_r, BLOCK_O)
    next_up = up_tile(up_ptr, 1, num_steps, turn, pitch, offs_r, mask_r, BLOCK_O)

    z = tl.full((BLOCK_T, BLOCK_R), 0.0, tl.float32)
    down_ptr += first_z.to(tl.int64) * d_in
    for i in range(0, d_in, BLOCK_I):
        offs_i = i + tl.arange(0, BLOCK_I)
        mask_i = offs_i < d_in
        x = tl.load(  # (BLOCK_T, BLOCK_I)
            x_ptr + (offs_t[:, None] * d_in + offs_i[None, :]), mask=mask_t[:, None] & mask_i[None, :], other=0.0
        )
        down = tl.load(  # (BLOCK_R, BLOCK_I)
            down_ptr + (offs_r[:, None] * d_in + offs_i[None, :]), mask=mask_r[:, None] & mask_i[None, :], other=0.0
        )
        if UPCAST:
            x = x.to(tl.float32)
            down = down.to(tl.float32)
        z = tl.dot(x, tl.trans(down), z, input_precision="tf32x3")
    z = z.to(z_ptr.dtype.element_ty)
    if PIVOTED:
        z_ptrs = z_ptr + offs_t[:, None] * rank + (first_z + offs_r)[None, :]
        tl.store(z_ptrs, z, mask=mask_t[:, None] & mask_r[None, :])

    sums_start = tl.multiple_of(tl.load(record_ptr + ACC_START), ALIGN)
    for step in range(0, num_steps):
        after_next = up_tile(up_ptr, step + 2, num_steps, turn, pitch, offs_r, mask_r, BLOCK_O)
        y = tl.dot(z, up.to(z.dtype), input_precision="tf32x3")  # (BLOCK_T, BLOCK_O)
        offs_o = (step + turn) % num_steps * BLOCK_O + tl.arange(0, BLOCK_O)
        sums_ptrs = sums_ptr + offs_t[:, None] * sums_width + (sums_start + offs_o)[None, :]
        tl.atomic_add(sums_ptrs, y, mask=mask_t[:, None] & (offs_o < pitch)[None, :], sem="relaxed")
        up = next_up
        next_up = after_next

    # All threads have added before one says so, and whoever finishes sees what all have added
    tl.debug_barrier()
    ticket = tl.atomic_add(tickets_ptr, 1, sem="acq_rel") - (tl.num_programs(0) - finishers)
    if ticket >= 0:
        arrived = tl.atomic_add(tickets_ptr, 0, sem="acquire")
        while arrived != tl.num_programs(0):
            arrived = tl.atomic_add(tickets_ptr, 0, sem="acquire")
        tl.debug_barrier()
        finish_blocks(
            y_ptr, sums_ptr, z_ptr, bias_ptr, table_ptr, ticket, finishers, num_blocks, num_tokens, sums_width, rank,
            out_width, NUM_PROJECTIONS, HAS_BIAS, PIVOTED, SILU_MUL,
        )  # fmt: skip
        if tl.atomic_add(tickets_ptr + 1, 1, sem="acq_rel") == finishers - 1:  # nobody waits any more
            tl.store(tickets_ptr, 0)
            tl.store(tickets_ptr + 1, 0)


def split_rank(
    x: Tensor,
    operands: Operands,
    layout: Layout,
    *,
    target: tiles.Target | None = None,
    tile: tiles.Tile | None = None,
) -> Tensor:
    """y (T, out_width) of x (T, D_IN), T at most `FEW_TOKENS`, whose rows are contiguous."""
    num_tokens, d_in = x.shape
    upcast = tiles.interpreted_bf16(x)
    stored = torch.float32 if upcast else x.dtype  # the interpreter truncates to bfloat16
    y = torch.empty(num_tokens, layout.out_width, dtype=stored, device=x.device)
    target = target or tiles.target(x.device)
    tile = tile or tiles.tile("split_rank", target, stored, x, operands.down)
    sums, counters, z = workspace_parts(operands.workspace, layout, stored)
    # Fewer wait than fit on the GPU, whatever its size. In the interpreter, which runs one after the other, none does
    finishers = min(layout.num_blocks, layout.num_programs, target.num_sms) if x.device.type != "cpu" else 1
    ranks = max(16, triton.next_power_of_2(max(p.chunk for p in layout.projections)))
    split_rank_kernel[(layout.num_programs,)](
        y,
        x,
        operands.down,
        operands.up,
        operands.bias,
        operands.table,
        sums,
        counters[layout.num_blocks :],
        z,
        num_tokens,
        d_in,
        layout.rank,
        layout.acc_width,
        layout.out_width,
        layout.num_blocks,
        finishers,
        NUM_PROJECTIONS=len(layout.projections),
        BLOCK_T=tile.rows,
        BLOCK_R=ranks,
        BLOCK_I=16 * tile.depth // ranks,  # the same bytes in a step, however many ranks they are of
        BLOCK_O=16 * tile.cols // ranks,
        HAS_BIAS=operands.bias is not None,
        PIVOTED=layout.pivoted,
        SILU_MUL=layout.silu_mul,
        UPCAST=upcast,
        **tile.options(),
    )
    return y.to(x.dtype)
