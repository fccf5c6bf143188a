"""One or two tokens through a group of low-rank projections in two launches: z = x downᵀ for all, then all outputs.

A program owns some rows of a factor, which lie in memory as they are read. The second launch begins while the first
still runs (programmatic dependent launch, on Hopper and later): its programs ask for their first weights, and only then
wait for z. So memory is busy all the time, and no sum is shared: the result repeats bit for bit. Pivoted outputs, which
are entries of z, are written by the first launch, all others with bias and activation by the second.

Bound by reading the weights once, sum of R (D_IN + D_OUT) elements, or with pivots R (D_IN + D_OUT - R).
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from gfwsvd_kernels import tiles
from gfwsvd_kernels.finish import finish
from gfwsvd_kernels.launch import Launcher
from gfwsvd_kernels.layout import ALIGN, FIELDS, UNIT, Layout, Operands

NUM_FIELDS = tl.constexpr(len(FIELDS))
Z_START = tl.constexpr(FIELDS.index("z_start"))
PITCH = tl.constexpr(FIELDS.index("pitch"))
ROWS = tl.constexpr(FIELDS.index("rows"))
UP_START = tl.constexpr(FIELDS.index("up_start"))
PLACES_START = tl.constexpr(FIELDS.index("places_start"))
SUMS_START = tl.constexpr(FIELDS.index("sums_start"))
LANES = tl.constexpr(ALIGN)
SCALE_UNIT = tl.constexpr(UNIT)


@triton.jit
def weights(weight_ptr, offs_o, mask_o, i, width, pitch, BLOCK_I: tl.constexpr):
    """(BLOCK_O, BLOCK_I): columns i, i + 1, ... of some rows; zeros from column `width` on."""
    offs_i = i + tl.arange(0, BLOCK_I)
    return tl.load(
        weight_ptr + (offs_o[:, None].to(tl.int64) * pitch + offs_i[None, :]),
        mask=mask_o[:, None] & (offs_i < width)[None, :],
        other=0,
        eviction_policy="evict_first",
    )


@triton.jit
def row_products(
    x_ptr, scale_ptr, weight_ptr, offs_o, mask_o, num_tokens, width, pitch, stride_x,
    BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, SCALED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """For each of BLOCK_T tokens (BLOCK_O,) float32: x, or with SCALED x times its scales, times some rows of a weight.

    Multiplied without tensor cores, for whose operands the weights would have to change places between registers. Two
    steps of weights are always under way.
    """
    weight = weights(weight_ptr, offs_o, mask_o, 0, width, pitch, BLOCK_I)
    next_weight = weights(weight_ptr, offs_o, mask_o, BLOCK_I, width, pitch, BLOCK_I)
    if DEPENDENT:
        cuda.gdc_wait()
    zeros = tl.full((offs_o.shape[0], BLOCK_I), 0.0, tl.float32)
    sums = (zeros,) * BLOCK_T
    for i in range(0, width, BLOCK_I):
        after_next = weights(weight_ptr, offs_o, mask_o, i + 2 * BLOCK_I, width, pitch, BLOCK_I)
        offs_i = i + tl.arange(0, BLOCK_I)
        added = ()
        for t in tl.static_range(BLOCK_T):
            x = tl.load(x_ptr + t * stride_x + offs_i, mask=offs_i < tl.where(num_tokens > t, width, 0), other=0.0)
            x = x.to(tl.float32)
            if SCALED:
                x *= load_scales(scale_ptr, offs_i, offs_i < width)
            added += (sums[t] + weight.to(tl.float32) * x[None, :],)  # type: ignore[assignment]
        sums = added
        weight = next_weight
        next_weight = after_next
    found = ()
    for t in tl.static_range(BLOCK_T):
        found += (tl.sum(sums[t], axis=1),)  # type: ignore[assignment]
    return found


@triton.jit
def load_scales(scale_ptr, offs, mask):
    """What whole numbers are multiples of, float32."""
    return SCALE_UNIT * tl.load(scale_ptr + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_bias(bias_ptr, places, mask_o, HAS_BIAS: tl.constexpr):
    """Of outputs `places`, float32; zeros if there is none."""
    if HAS_BIAS:
        bias = tl.load(bias_ptr + places, mask=mask_o, other=0.0).to(tl.float32)
    else:
        bias = tl.full((places.shape[0],), 0.0, tl.float32)
    return bias


@triton.jit(do_not_specialize=["num_tokens"])
def down_kernel(
    z_ptr,
    y_ptr,
    x_ptr,
    down_ptr,
    bias_ptr,
    scale_ptr,
    table_ptr,
    num_tokens,
    d_in,
    z_width,
    out_width,
    NUM_PROJECTIONS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    PIVOTED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        cuda.gdc_launch_dependents()
    offs_o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    mask_o = offs_o < z_width
    if PIVOTED:
        places = tl.load(table_ptr + NUM_PROJECTIONS * NUM_FIELDS + offs_o, mask=mask_o, other=-1)
        mask_y = places >= 0
        bias = load_bias(bias_ptr, places, mask_y, HAS_BIAS)
    z = row_products(
        x_ptr, x_ptr, down_ptr, offs_o, mask_o, num_tokens, d_in, d_in, d_in, BLOCK_T, BLOCK_I, False, DEPENDENT
    )  # fmt: skip
    for t in tl.static_range(BLOCK_T):
        if num_tokens > t:
            value = z[t]
            if HAS_SCALES:
                value *= load_scales(scale_ptr, offs_o, mask_o)
            rounded = value.to(z_ptr.dtype.element_ty)
            tl.store(z_ptr + t * z_width + offs_o, rounded, mask=mask_o)
            if PIVOTED:
                y = (rounded.to(tl.float32) + bias).to(y_ptr.dtype.element_ty)
                tl.store(y_ptr + t * out_width + places, y, mask=mask_y)


@triton.jit(do_not_specialize=["num_tokens"])
def up_kernel(
    y_ptr,
    z_ptr,
    up_ptr,
    bias_ptr,
    scale_ptr,
    table_ptr,
    num_tokens,
    z_width,
    out_width,
    d_out,
    NUM_PROJECTIONS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    SILU_MUL: tl.constexpr,
    IN_PLACE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        cuda.gdc_launch_dependents()
    record_ptr = table_ptr
    first = 0
    total = 0
    for i in tl.static_range(1 if SILU_MUL else NUM_PROJECTIONS):
        here = tl.program_id(0) >= total
        record_ptr = tl.where(here, table_ptr + i * NUM_FIELDS, record_ptr)
        first = tl.where(here, total, first)
        total += tl.cdiv(tl.load(table_ptr + i * NUM_FIELDS + ROWS), BLOCK_O)
    offs_o = (tl.program_id(0) - first) * BLOCK_O + tl.arange(0, BLOCK_O)
    mask_o = offs_o < tl.load(record_ptr + ROWS)
    if IN_PLACE:
        places = tl.load(table_ptr + tl.load(record_ptr + PLACES_START) + offs_o, mask=mask_o, other=0)
    else:
        places = tl.load(record_ptr + SUMS_START) + offs_o
    pitch = tl.multiple_of(tl.load(record_ptr + PITCH), LANES)
    start = tl.multiple_of(tl.load(record_ptr + UP_START), LANES)
    z_start = tl.multiple_of(tl.load(record_ptr + Z_START), LANES)
    bias = load_bias(bias_ptr, places, mask_o, HAS_BIAS)
    if SILU_MUL:
        other_ptr = record_ptr + NUM_FIELDS
        other_pitch = tl.multiple_of(tl.load(other_ptr + PITCH), LANES)
        other_start = tl.multiple_of(tl.load(other_ptr + UP_START), LANES)
        other_z = tl.multiple_of(tl.load(other_ptr + Z_START), LANES)
        other_bias = load_bias(bias_ptr, d_out + places, mask_o, HAS_BIAS)
    y = row_products(
        z_ptr + z_start, scale_ptr + z_start, up_ptr + start, offs_o, mask_o, num_tokens, pitch, pitch, z_width,
        BLOCK_T, BLOCK_I, HAS_SCALES, DEPENDENT,
    )  # fmt: skip
    if SILU_MUL:
        other = row_products(
            z_ptr + other_z, scale_ptr + other_z, up_ptr + other_start, offs_o, mask_o, num_tokens, other_pitch,
            other_pitch, z_width, BLOCK_T, BLOCK_I, HAS_SCALES, False,
        )  # fmt: skip
    for t in tl.static_range(BLOCK_T):
        value = y[t] + bias
        if SILU_MUL:
            value = value * tl.sigmoid(value) * (other[t] + other_bias)
        if num_tokens > t:
            tl.store(y_ptr + t * out_width + places, value.to(y_ptr.dtype.element_ty), mask=mask_o)


@cache
def _launchers(
    layout: Layout,
    target: tiles.Target,
    dtype: torch.dtype,
    num_tokens: int,
    has_bias: bool,
    has_scales: bool,
    dependent: bool,
    tile: tiles.Tile | None,
) -> tuple[tuple[Launcher, int], tuple[Launcher, int]]:
    """Of both kernels, each with its number of programs."""
    # An activation of pivots needs both of its projections, z and products: a third launch finishes
    finishes = layout.silu_mul and layout.pivoted
    silu_mul = layout.silu_mul and not finishes
    flags: dict[str, int | bool] = {"NUM_PROJECTIONS": len(layout.projections)}
    flags |= {"HAS_BIAS": has_bias and not finishes, "HAS_SCALES": has_scales, "DEPENDENT": dependent}
    sharing = layout.projections[:1] if silu_mul else layout.projections
    kernels = (
        (down_kernel, [layout.z_width], {"PIVOTED": layout.pivoted and not finishes}),
        (up_kernel, [p.rows for p in sharing], {"SILU_MUL": silu_mul, "IN_PLACE": not finishes}),
    )
    found = []
    for kernel, rows, own in kernels:
        whole = tiles.SKINNY_WHOLE[target.arch][num_tokens] if has_scales else None
        chosen = tile or whole or tiles.skinny_tile(target, dtype, num_tokens, sum(rows))
        blocks = {"BLOCK_T": chosen.cols, "BLOCK_O": chosen.rows, "BLOCK_I": chosen.depth}
        options = chosen.options() | ({"launch_pdl": True} if dependent else {})
        num_programs = sum(-(-count // chosen.rows) for count in rows)
        found.append((Launcher(kernel, flags | own | blocks, options), num_programs))
    return found[0], found[1]


def skinny(
    x: Tensor,
    operands: Operands,
    layout: Layout,
    *,
    target: tiles.Target | None = None,
    tile: tiles.Tile | None = None,
) -> Tensor:
    """y (T, out_width) of x (T, D_IN), T at most `SKINNY_TOKENS`, whose rows are contiguous."""
    down, up, bias, table, scales = operands
    # What stands for no scales is never read
    of_down, of_up = (x, x) if scales is None else scales
    num_tokens, d_in = x.shape
    stored = torch.float32 if tiles.interpreted_bf16(x) else x.dtype  # the interpreter truncates to bfloat16
    z = x.new_empty(num_tokens, layout.z_width, dtype=stored)
    y = x.new_empty(num_tokens, layout.out_width, dtype=stored)
    finishes = layout.silu_mul and layout.pivoted
    products = x.new_empty(num_tokens, layout.sums_width, dtype=stored) if finishes else y
    target = target or tiles.known_target(x.device)
    dependent = target.arch >= 90 and x.device.type != "cpu"
    (down_launcher, down_programs), (up_launcher, up_programs) = _launchers(
        layout, target, x.dtype, num_tokens, bias is not None, scales is not None, dependent, tile
    )
    down_launcher(
        (down_programs, 1, 1), z, y, x, down, bias, of_down, table, num_tokens, d_in, layout.z_width, layout.out_width
    )
    if up_programs:
        up_launcher(
            (up_programs, 1, 1), products, z, up, bias, of_up, table, num_tokens, layout.z_width, products.shape[1],
            layout.projections[0].d_out,
        )  # fmt: skip
    if finishes:
        finish(y, products, z, bias, table, layout)
    return y.to(x.dtype)
