"""The end of the paths of `lowrank_group` whose products lie in memory: outputs from products, z and bias.

In the pivoted form an output is either one of the products or an entry of z; `sources` in the table say which. With
silu_mul two projections make up one output.
"""

from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from gfwsvd_kernels.launch import Launcher
from gfwsvd_kernels.layout import Layout

OUT_BLOCK = tl.constexpr(512)  # outputs of a program
FINISH_T = tl.constexpr(8)  # its tokens, one after another


@triton.jit
def located(source_ptr, sums_ptr, z_ptr, outputs, mask, sums_width, z_width, PIVOTED: tl.constexpr):
    """Where outputs of the first token lie, and the distances to those of the next."""
    if PIVOTED:
        source = tl.load(source_ptr + outputs, mask=mask, other=0)
        ptrs = tl.where(source < 0, z_ptr - 1 - source, sums_ptr + source)
        steps = tl.where(source < 0, z_width, sums_width)
    else:
        ptrs = sums_ptr + outputs
        steps = sums_width
    return ptrs, steps


@triton.jit(do_not_specialize=["num_tokens", "sources_start"])
def finish_kernel(
    y_ptr, sums_ptr, z_ptr, bias_ptr, table_ptr, num_tokens, sums_width, z_width, out_width, sources_start,
    HAS_BIAS: tl.constexpr, PIVOTED: tl.constexpr, SILU_MUL: tl.constexpr,
):  # fmt: skip
    outputs = tl.program_id(0) * OUT_BLOCK + tl.arange(0, OUT_BLOCK)
    mask = outputs < out_width
    first = (tl.program_id(1) * FINISH_T).to(tl.int64)
    sums_ptr += first * sums_width
    z_ptr += first * z_width
    source_ptr = table_ptr + sources_start
    ptrs, steps = located(source_ptr, sums_ptr, z_ptr, outputs, mask, sums_width, z_width, PIVOTED)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + outputs, mask=mask, other=0.0).to(tl.float32)
    if SILU_MUL:
        others = out_width + outputs
        other_ptrs, other_steps = located(source_ptr, sums_ptr, z_ptr, others, mask, sums_width, z_width, PIVOTED)
        if HAS_BIAS:
            other_bias = tl.load(bias_ptr + others, mask=mask, other=0.0).to(tl.float32)
    y_ptrs = y_ptr + first * out_width + outputs
    for t in tl.static_range(FINISH_T):
        mask_t = outputs < tl.where(first + t < num_tokens, out_width, 0)
        found = tl.load(ptrs, mask=mask_t, other=0.0).to(tl.float32)
        ptrs += steps
        if HAS_BIAS:
            found += bias
        if SILU_MUL:
            other = tl.load(other_ptrs, mask=mask_t, other=0.0).to(tl.float32)
            other_ptrs += other_steps
            if HAS_BIAS:
                other += other_bias
            found *= tl.sigmoid(found) * other
        tl.store(y_ptrs, found.to(y_ptr.dtype.element_ty), mask=mask_t)
        y_ptrs += out_width


@cache
def _launcher(has_bias: bool, pivoted: bool, silu_mul: bool) -> Launcher:
    return Launcher(finish_kernel, {"HAS_BIAS": has_bias, "PIVOTED": pivoted, "SILU_MUL": silu_mul}, {"num_warps": 4})


def finish(y: Tensor, sums: Tensor, z: Tensor, bias: Tensor | None, table: Tensor, layout: Layout) -> None:
    """y (T, out_width) from the products `sums` (T, sums_width) and z (T, z_width)."""
    num_tokens = y.shape[0]
    grid = (-(-layout.out_width // OUT_BLOCK.value), -(-num_tokens // FINISH_T.value), 1)
    _launcher(bias is not None, layout.pivoted, layout.silu_mul)(
        grid, y, sums, z, bias, table, num_tokens, layout.sums_width, layout.z_width, layout.out_width,
        layout.sources_start,
    )  # fmt: skip
