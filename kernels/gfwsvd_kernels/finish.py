"""The end of the paths of `lowrank_group` whose products lie in memory: outputs from products, z and bias.

In the pivoted form an output is either one of the products or an entry of z; `source` in the table says which. With
silu_mul two projections make up one output.
"""

import triton
import triton.language as tl
from torch import Tensor

from gfwsvd_kernels import layout
from gfwsvd_kernels.layout import FIELDS, Layout

NUM_FIELDS = tl.constexpr(len(FIELDS))
Z_START = tl.constexpr(FIELDS.index("z_start"))
SUMS_START = tl.constexpr(FIELDS.index("sums_start"))
OUT_START = tl.constexpr(FIELDS.index("out_start"))
D_OUT = tl.constexpr(FIELDS.index("d_out"))
FIRST_BLOCK = tl.constexpr(FIELDS.index("first_block"))
SOURCE_START = tl.constexpr(FIELDS.index("source_start"))
OUT_BLOCK = tl.constexpr(layout.OUT_BLOCK)
FINISH_T = tl.constexpr(8)  # tokens of a program


@triton.jit
def values(
    record_ptr, table_ptr, sums_ptr, z_ptr, bias_ptr, offs_t, mask_t, offs_o, sums_width, z_width,
    HAS_BIAS: tl.constexpr, PIVOTED: tl.constexpr,
):  # fmt: skip
    """(tokens, outputs) float32 of one projection, given the products and z."""
    mask_o = offs_o < tl.load(record_ptr + D_OUT)
    mask = mask_t[:, None] & mask_o[None, :]
    source = offs_o
    if PIVOTED:
        source = tl.load(table_ptr + tl.load(record_ptr + SOURCE_START) + offs_o, mask=mask_o, other=0)
        mask = mask & (source >= 0)[None, :]
    sums_ptr += offs_t[:, None] * sums_width + (tl.load(record_ptr + SUMS_START) + source)[None, :]
    found = tl.load(sums_ptr, mask=mask, other=0.0).to(tl.float32)
    if PIVOTED:
        z_ptr += offs_t[:, None] * z_width + (tl.load(record_ptr + Z_START) - 1 - source)[None, :]
        mask_z = mask_t[:, None] & (mask_o & (source < 0))[None, :]
        found += tl.load(z_ptr, mask=mask_z, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + tl.load(record_ptr + OUT_START) + offs_o, mask=mask_o, other=0.0)
        found += bias.to(tl.float32)[None, :]
    return found


@triton.jit(do_not_specialize=["num_tokens"])
def finish_kernel(
    y_ptr, sums_ptr, z_ptr, bias_ptr, table_ptr, num_tokens, sums_width, z_width, out_width,
    NUM_PROJECTIONS: tl.constexpr, HAS_BIAS: tl.constexpr, PIVOTED: tl.constexpr, SILU_MUL: tl.constexpr,
):  # fmt: skip
    offs_t = (tl.program_id(1) * FINISH_T).to(tl.int64) + tl.arange(0, FINISH_T)
    mask_t = offs_t < num_tokens
    number = 0
    for i in tl.static_range(1, 1 if SILU_MUL else NUM_PROJECTIONS):
        number += (tl.load(table_ptr + i * NUM_FIELDS + FIRST_BLOCK) <= tl.program_id(0)).to(tl.int32)
    record_ptr = table_ptr + number * NUM_FIELDS
    block = tl.program_id(0) - tl.load(record_ptr + FIRST_BLOCK)
    offs_o = block * OUT_BLOCK + tl.arange(0, OUT_BLOCK)
    found = values(
        record_ptr, table_ptr, sums_ptr, z_ptr, bias_ptr, offs_t, mask_t, offs_o, sums_width, z_width,
        HAS_BIAS, PIVOTED,
    )  # fmt: skip
    if SILU_MUL:
        found *= tl.sigmoid(found) * values(
            record_ptr + NUM_FIELDS, table_ptr, sums_ptr, z_ptr, bias_ptr, offs_t, mask_t, offs_o, sums_width, z_width,
            HAS_BIAS, PIVOTED,
        )  # fmt: skip
    start = 0 if SILU_MUL else tl.load(record_ptr + OUT_START)
    y_ptrs = y_ptr + offs_t[:, None] * out_width + (start + offs_o)[None, :]
    mask_o = offs_o < tl.load(record_ptr + D_OUT)
    tl.store(y_ptrs, found.to(y_ptr.dtype.element_ty), mask=mask_t[:, None] & mask_o[None, :])


def finish(y: Tensor, sums: Tensor, z: Tensor, bias: Tensor | None, table: Tensor, layout: Layout) -> None:
    """y (T, out_width) from the products `sums` (T, sums_width) and z (T, z_width)."""
    finish_kernel[layout.num_blocks, triton.cdiv(len(y), FINISH_T.value)](
        y,
        sums,
        z,
        bias,
        table,
        len(y),
        layout.sums_width,
        layout.z_width,
        layout.out_width,
        NUM_PROJECTIONS=len(layout.projections),
        HAS_BIAS=bias is not None,
        PIVOTED=layout.pivoted,
        SILU_MUL=layout.silu_mul,
        num_warps=4,
    )
