"""The end of every path of `lowrank_group`: outputs from sums, z and bias, in the order and form of the caller.

In the pivoted form an output is either one of the sums or an entry of z; `source` in the table says which. With
silu_mul two projections make up one output. Also what the kernels share to find their way in the table.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfwsvd_kernels import layout
from gfwsvd_kernels.layout import FIELDS, Layout

NUM_FIELDS = tl.constexpr(len(FIELDS))
Z_START = tl.constexpr(FIELDS.index("z_start"))
RANK = tl.constexpr(FIELDS.index("rank"))
CHUNK = tl.constexpr(FIELDS.index("chunk"))
FIRST_PROGRAM = tl.constexpr(FIELDS.index("first_program"))
UP_START = tl.constexpr(FIELDS.index("up_start"))
PITCH = tl.constexpr(FIELDS.index("pitch"))
ACC_START = tl.constexpr(FIELDS.index("acc_start"))
OUT_START = tl.constexpr(FIELDS.index("out_start"))
D_OUT = tl.constexpr(FIELDS.index("d_out"))
FIRST_BLOCK = tl.constexpr(FIELDS.index("first_block"))
BOUNDS_START = tl.constexpr(FIELDS.index("bounds_start"))
SOURCE_START = tl.constexpr(FIELDS.index("source_start"))
OUT_BLOCK = tl.constexpr(layout.OUT_BLOCK)
ALIGN = tl.constexpr(layout.ALIGN)
FINISH_T = tl.constexpr(8)  # tokens, and
FINISH_O = tl.constexpr(64)  # outputs, that are finished at a time


@triton.jit
def projection_of(table_ptr, number, FIELD: tl.constexpr, NUM_PROJECTIONS: tl.constexpr):
    """The last projection whose FIELD, which grows from projection to projection, is at most `number`."""
    found = 0
    for i in tl.static_range(1, NUM_PROJECTIONS):
        found += (tl.load(table_ptr + i * NUM_FIELDS + FIELD) <= number).to(tl.int32)
    return found


@triton.jit
def values(
    record_ptr, table_ptr, sums_ptr, z_ptr, bias_ptr, offs_t, mask_t, offs_o, sums_width, rank,
    HAS_BIAS: tl.constexpr, PIVOTED: tl.constexpr,
):  # fmt: skip
    """(tokens, outputs) float32 of one projection, given its sums and z.

    What other programs wrote during this launch is read past the L1 cache.
    """
    mask_o = offs_o < tl.load(record_ptr + D_OUT)
    mask = mask_t[:, None] & mask_o[None, :]
    source = offs_o
    if PIVOTED:
        source = tl.load(table_ptr + tl.load(record_ptr + SOURCE_START) + offs_o, mask=mask_o, other=0)
        mask = mask & (source >= 0)[None, :]
    sums_ptr += offs_t[:, None] * sums_width + (tl.load(record_ptr + ACC_START) + source)[None, :]
    found = tl.load(sums_ptr, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    if PIVOTED:
        z_ptr += offs_t[:, None] * rank + (tl.load(record_ptr + Z_START) - 1 - source)[None, :]
        mask_z = mask_t[:, None] & (mask_o & (source < 0))[None, :]
        found += tl.load(z_ptr, mask=mask_z, other=0.0, cache_modifier=".cg").to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + tl.load(record_ptr + OUT_START) + offs_o, mask=mask_o, other=0.0)
        found += bias.to(tl.float32)[None, :]
    return found


@triton.jit
def finish(
    y_ptr, sums_ptr, z_ptr, bias_ptr, table_ptr, number, block, first_t, num_tokens, sums_width, rank, out_width,
    HAS_BIAS: tl.constexpr, PIVOTED: tl.constexpr, SILU_MUL: tl.constexpr,
):  # fmt: skip
    """For FINISH_T tokens, write a block of the outputs of projection `number`, or of both with SILU_MUL."""
    offs_t = first_t + tl.arange(0, FINISH_T)
    mask_t = offs_t < num_tokens
    record_ptr = table_ptr + number * NUM_FIELDS
    d_out = tl.load(record_ptr + D_OUT)
    start = tl.load(record_ptr + OUT_START)
    for o in range(0, OUT_BLOCK, FINISH_O):
        offs_o = block * OUT_BLOCK + o + tl.arange(0, FINISH_O)
        found = values(
            record_ptr, table_ptr, sums_ptr, z_ptr, bias_ptr, offs_t, mask_t, offs_o, sums_width, rank,
            HAS_BIAS, PIVOTED,
        )  # fmt: skip
        if SILU_MUL:
            found *= tl.sigmoid(found) * values(
                record_ptr + NUM_FIELDS, table_ptr, sums_ptr, z_ptr, bias_ptr, offs_t, mask_t, offs_o, sums_width, rank,
                HAS_BIAS, PIVOTED,
            )  # fmt: skip
        y_ptrs = y_ptr + offs_t[:, None] * out_width + (start + offs_o)[None, :]
        tl.store(y_ptrs, found.to(y_ptr.dtype.element_ty), mask=mask_t[:, None] & (offs_o < d_out)[None, :])


@triton.jit
def finish_blocks(
    y_ptr, sums_ptr, z_ptr, bias_ptr, table_ptr, first, step, num_blocks, num_tokens, sums_width, rank, out_width,
    NUM_PROJECTIONS: tl.constexpr, HAS_BIAS: tl.constexpr, PIVOTED: tl.constexpr, SILU_MUL: tl.constexpr,
):  # fmt: skip
    """Finish every `step`-th block from `first` on, and make its sums zero again for the next call."""
    offs_o = tl.arange(0, FINISH_O)
    zero = tl.full((FINISH_T, FINISH_O), 0.0, tl.float32)
    for of_all in range(first, num_blocks, step):
        number = 0 if SILU_MUL else projection_of(table_ptr, of_all, FIRST_BLOCK, NUM_PROJECTIONS)
        block = of_all - tl.load(table_ptr + number * NUM_FIELDS + FIRST_BLOCK)
        for t in range(0, num_tokens, FINISH_T):
            finish(
                y_ptr, sums_ptr, z_ptr, bias_ptr, table_ptr, number, block, t, num_tokens, sums_width, rank, out_width,
                HAS_BIAS, PIVOTED, SILU_MUL,
            )  # fmt: skip
            tl.debug_barrier()  # other threads may still read what this one is about to clear
            offs_t = t + tl.arange(0, FINISH_T)
            for i in tl.static_range(2 if SILU_MUL else 1):
                record_ptr = table_ptr + (number + i) * NUM_FIELDS
                bounds_ptr = table_ptr + tl.load(record_ptr + BOUNDS_START) + block
                stop = tl.load(bounds_ptr + 1)
                start = tl.load(record_ptr + ACC_START)
                for o in range(tl.load(bounds_ptr), stop, FINISH_O):
                    sums_ptrs = sums_ptr + offs_t[:, None] * sums_width + (start + o + offs_o)[None, :]
                    tl.store(sums_ptrs, zero, mask=(offs_t < num_tokens)[:, None] & (o + offs_o < stop)[None, :])


@triton.jit
def finish_kernel(
    y_ptr, sums_ptr, z_ptr, bias_ptr, table_ptr, num_tokens, sums_width, rank, out_width,
    NUM_PROJECTIONS: tl.constexpr, HAS_BIAS: tl.constexpr, PIVOTED: tl.constexpr, SILU_MUL: tl.constexpr,
):  # fmt: skip
    """Finish all blocks of products that lie in memory."""
    first_t = (tl.program_id(1) * FINISH_T).to(tl.int64)
    number = 0 if SILU_MUL else projection_of(table_ptr, tl.program_id(0), FIRST_BLOCK, NUM_PROJECTIONS)
    block = tl.program_id(0) - tl.load(table_ptr + number * NUM_FIELDS + FIRST_BLOCK)
    finish(
        y_ptr, sums_ptr, z_ptr, bias_ptr, table_ptr, number, block, first_t, num_tokens, sums_width, rank, out_width,
        HAS_BIAS, PIVOTED, SILU_MUL,
    )  # fmt: skip


def finish_products(y: Tensor, sums: Tensor, z: Tensor, bias: Tensor | None, table: Tensor, layout: Layout) -> None:
    """y (T, out_width) from the products z up of all projections, `sums` (T, acc_width), and z (T, rank)."""
    finish_kernel[layout.num_blocks, triton.cdiv(len(y), FINISH_T.value)](
        y,
        sums,
        z,
        bias,
        table,
        len(y),
        layout.acc_width,
        layout.rank,
        layout.out_width,
        NUM_PROJECTIONS=len(layout.projections),
        HAS_BIAS=bias is not None,
        PIVOTED=layout.pivoted,
        SILU_MUL=layout.silu_mul,
        num_warps=4,
    )


def workspace_parts(workspace: Tensor, layout: Layout, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The sums (float32), the counters (int32) and the room for z (`dtype`) in a workspace."""
    sums = workspace[: layout.sync_start].view(torch.float32)
    counters = workspace[layout.sync_start : layout.z_start]
    return sums, counters, workspace[layout.z_start :].view(dtype)
