"""Up to 64 tokens through a group of low-rank projections in one launch of as many programs as fit on the GPU at once.

The programs share out the columns of z = x downᵀ, meet at a barrier, and share out the columns of up. Every sum is made
by one program in one order, so the result repeats bit for bit. Pivoted outputs go through the float32 sums in the
workspace, and after a second barrier the programs share out the blocks of outputs to finish (`finish.py`).

Bound by reading the weights once, sum of R (D_IN + PITCH) elements, and by the barrier, where memory is idle.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfwsvd_kernels import tiles
from gfwsvd_kernels.finish import (
    ACC_START,
    ALIGN,
    D_OUT,
    NUM_FIELDS,
    OUT_START,
    PITCH,
    RANK,
    UP_START,
    Z_START,
    finish_blocks,
    workspace_parts,
)
from gfwsvd_kernels.layout import Layout, Operands


@triton.jit
def grid_barrier(counters_ptr):
    """Wait until all programs are here. Of the two counters, of arrivals and departures, both are zero in the end."""
    tl.debug_barrier()  # what all threads of this program wrote is then released by the one that arrives
    arrived = tl.atomic_add(counters_ptr, 1, sem="acq_rel") + 1
    while arrived != tl.num_programs(0):
        arrived = tl.atomic_add(counters_ptr, 0, sem="acquire")
    if tl.atomic_add(counters_ptr + 1, 1, sem="acq_rel") == tl.num_programs(0) - 1:  # nobody waits any more
        tl.store(counters_ptr, 0)
        tl.store(counters_ptr + 1, 0)
    tl.debug_barrier()


@triton.jit
def expanded(
    record_ptr, z_ptr, up_ptr, offs_o, mask_o, offs_t, mask_t, rank,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(BLOCK_T, BLOCK_O) float32: z of a projection times columns of its up."""
    own_rank = tl.load(record_ptr + RANK)
    pitch = tl.multiple_of(tl.load(record_ptr + PITCH), ALIGN)
    up_ptr += tl.multiple_of(tl.load(record_ptr + UP_START), ALIGN)
    z_ptr += tl.load(record_ptr + Z_START)
    y = tl.full((BLOCK_T, BLOCK_O), 0.0, tl.float32)
    for r in range(0, own_rank, BLOCK_I):
        offs_r = r + tl.arange(0, BLOCK_I)
        mask_r = offs_r < own_rank
        z = tl.load(  # (BLOCK_T, BLOCK_I), past the L1 cache: other programs wrote it
            z_ptr + (offs_t[:, None] * rank + offs_r[None, :]),
            mask=mask_t[:, None] & mask_r[None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        up = tl.load(  # (BLOCK_I, BLOCK_O)
            up_ptr + (offs_r[:, None] * pitch + offs_o[None, :]), mask=mask_r[:, None] & mask_o[None, :], other=0.0
        )
        if UPCAST:
            up = up.to(tl.float32)
        y = tl.dot(z, up, y, input_precision="tf32x3")
    return y


@triton.jit
def projection_tile(table_ptr, unit, BLOCK_O: tl.constexpr, NUM_PROJECTIONS: tl.constexpr):
    """Which projection, and which BLOCK_O columns of its up, unit `unit` is, all projections in a row."""
    number = 0
    first = 0
    total = 0
    for i in tl.static_range(NUM_PROJECTIONS):
        number = tl.where(unit >= total, i, number)
        first = tl.where(unit >= total, total, first)
        total += tl.cdiv(tl.load(table_ptr + i * NUM_FIELDS + PITCH), BLOCK_O)
    return number, unit - first


@triton.jit
def with_bias(y, bias_ptr, offs, mask, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def persistent_kernel(
    y_ptr,
    x_ptr,
    down_ptr,
    up_ptr,
    bias_ptr,
    table_ptr,
    sums_ptr,
    z_ptr,
    barriers_ptr,
    num_tokens,
    d_in,
    rank,
    sums_width,
    out_width,
    num_blocks,
    num_units,
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
    offs_t = tl.arange(0, BLOCK_T)
    mask_t = offs_t < num_tokens
    for unit in range(tl.program_id(0), tl.cdiv(rank, BLOCK_R), tl.num_programs(0)):
        offs_r = unit * BLOCK_R + tl.arange(0, BLOCK_R)
        mask_r = offs_r < rank
        z = tl.full((BLOCK_T, BLOCK_R), 0.0, tl.float32)
        for i in range(0, d_in, BLOCK_I):
            offs_i = i + tl.arange(0, BLOCK_I)
            mask_i = offs_i < d_in
            x = tl.load(  # (BLOCK_T, BLOCK_I)
                x_ptr + (offs_t[:, None] * d_in + offs_i[None, :]), mask=mask_t[:, None] & mask_i[None, :], other=0.0
            )
            down = tl.load(  # (BLOCK_R, BLOCK_I)
                down_ptr + (offs_r[:, None].to(tl.int64) * d_in + offs_i[None, :]),
                mask=mask_r[:, None] & mask_i[None, :],
                other=0.0,
            )
            if UPCAST:
                x = x.to(tl.float32)
                down = down.to(tl.float32)
            z = tl.dot(x, tl.trans(down), z, input_precision="tf32x3")
        z_ptrs = z_ptr + offs_t[:, None] * rank + offs_r[None, :]
        tl.store(z_ptrs, z.to(z_ptr.dtype.element_ty), mask=mask_t[:, None] & mask_r[None, :])

    grid_barrier(barriers_ptr)

    PAIRED: tl.constexpr = SILU_MUL and not PIVOTED  # a unit is some columns of both projections
    for unit in range(tl.program_id(0), num_units, tl.num_programs(0)):
        number, tile = projection_tile(table_ptr, unit, BLOCK_O, 1 if PAIRED else NUM_PROJECTIONS)
        record_ptr = table_ptr + number * NUM_FIELDS
        offs_o = tile * BLOCK_O + tl.arange(0, BLOCK_O)
        mask_o = offs_o < tl.load(record_ptr + PITCH)
        y = expanded(record_ptr, z_ptr, up_ptr, offs_o, mask_o, offs_t, mask_t, rank, BLOCK_T, BLOCK_O, BLOCK_I, UPCAST)
        if PIVOTED:
            sums_ptrs = sums_ptr + offs_t[:, None] * sums_width + (tl.load(record_ptr + ACC_START) + offs_o)[None, :]
            tl.store(sums_ptrs, y, mask=mask_t[:, None] & mask_o[None, :])
        else:
            start = tl.load(record_ptr + OUT_START)
            mask_o = offs_o < tl.load(record_ptr + D_OUT)  # without the padding
            y = with_bias(y, bias_ptr, start + offs_o, mask_o, HAS_BIAS)
            if PAIRED:
                other_ptr = record_ptr + NUM_FIELDS
                other = expanded(
                    other_ptr, z_ptr, up_ptr, offs_o, mask_o, offs_t, mask_t, rank, BLOCK_T, BLOCK_O, BLOCK_I, UPCAST
                )
                y *= tl.sigmoid(y)
                y *= with_bias(other, bias_ptr, tl.load(other_ptr + OUT_START) + offs_o, mask_o, HAS_BIAS)
            y_ptrs = y_ptr + offs_t[:, None] * out_width + (start + offs_o)[None, :]
            tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask_t[:, None] & mask_o[None, :])
    if PIVOTED:
        grid_barrier(barriers_ptr + 2)
        finish_blocks(
            y_ptr, sums_ptr, z_ptr, bias_ptr, table_ptr, tl.program_id(0), tl.num_programs(0), num_blocks, num_tokens,
            sums_width, rank, out_width, NUM_PROJECTIONS, HAS_BIAS, PIVOTED, SILU_MUL,
        )  # fmt: skip


def persistent(
    x: Tensor,
    operands: Operands,
    layout: Layout,
    *,
    target: tiles.Target | None = None,
    tile: tiles.Tile | None = None,
) -> Tensor:
    """y (T, out_width) of x (T, D_IN), T at most `SOME_TOKENS`, whose rows are contiguous."""
    num_tokens, d_in = x.shape
    upcast = tiles.interpreted_bf16(x)
    stored = torch.float32 if upcast else x.dtype  # the interpreter truncates to bfloat16
    y = torch.empty(num_tokens, layout.out_width, dtype=stored, device=x.device)
    target = target or tiles.target(x.device)
    tile = tile or tiles.tile("persistent", target, stored, x, operands.down)
    sums, counters, z = workspace_parts(operands.workspace, layout, stored)
    # Columns of z that a program computes at a time: the fewest that tensor cores take, or twice as many, which read x
    # half as often, where there are enough for all SMs
    ranks, per_sm = 16, tile.per_sm
    if num_tokens > 16 and layout.rank >= 32 * target.num_sms:
        ranks, per_sm = 32, 1
    sharing = layout.projections[:1] if layout.silu_mul and not layout.pivoted else layout.projections
    num_units = sum(triton.cdiv(projection.pitch, tile.cols) for projection in sharing)
    most = max(num_units, triton.cdiv(layout.rank, ranks))
    # The interpreter runs one program to its end before the next: only one can pass the barrier
    programs = min(per_sm * target.num_sms, most) if x.device.type != "cpu" else 1
    persistent_kernel[(programs,)](
        y,
        x,
        operands.down,
        operands.up,
        operands.bias,
        operands.table,
        sums,
        z,
        counters[layout.num_blocks :],
        num_tokens,
        d_in,
        layout.rank,
        layout.acc_width,
        layout.out_width,
        layout.num_blocks,
        num_units,
        NUM_PROJECTIONS=len(layout.projections),
        BLOCK_T=max(tile.rows, triton.next_power_of_2(num_tokens)),
        BLOCK_R=ranks,
        BLOCK_I=tile.depth,
        BLOCK_O=tile.cols,
        HAS_BIAS=operands.bias is not None,
        PIVOTED=layout.pivoted,
        SILU_MUL=layout.silu_mul,
        UPCAST=upcast,
        launch_cooperative_grid=True,
        **tile.options(),
    )
    return y.to(x.dtype)
