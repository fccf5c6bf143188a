"""A few tokens through a group of low-rank projections in two launches, on tensor cores: z = x downᵀ, then all outputs.

As in `skinny.py` a program owns some rows of a factor and the second launch begins while the first still runs. Weights
are the left operand of `mma`, tokens the right one. Both are copied to shared memory by threads, 16 bytes at a time,
several steps ahead. Warps share the columns of the rows of a program among them, one chunk of 64 each in turn; their
sums meet in shared memory at the end, in a fixed order, so the result repeats bit for bit. Pivots are written by the
first launch; with an activation the second one reads them from z, for it makes whole outputs of both projections.

Bound by reading the weights once, and the tokens once a program from L2.
"""

from functools import cache

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra import cuda

from gfwsvd_kernels import tiles
from gfwsvd_kernels.launch import Launcher
from gfwsvd_kernels.layout import ALIGN, FIELDS, Layout, Operands

NUM_FIELDS = gl.constexpr(len(FIELDS))
Z_START = gl.constexpr(FIELDS.index("z_start"))
PITCH = gl.constexpr(FIELDS.index("pitch"))
ROWS = gl.constexpr(FIELDS.index("rows"))
UP_START = gl.constexpr(FIELDS.index("up_start"))
PLACES_START = gl.constexpr(FIELDS.index("places_start"))
SUMS_START = gl.constexpr(FIELDS.index("sums_start"))
# Renamed in Triton 3.7
copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
LANES = gl.constexpr(ALIGN)  # elements of a load
CHUNK = gl.constexpr(64)  # columns that one warp multiplies in a step: eight for each of four lanes, twice


@gluon.constexpr_function
def mma_layout(split, across):
    """Of (split, rows, tokens) sums: `split` warps share the columns, `across` the rows."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[split, across, 1], instr_shape=[1, 16, 8])


@gluon.constexpr_function
def copy_layout(split, across):
    """Of (split, rows or tokens, CHUNK) as it is copied: 16 bytes a lane, 128 of a row side by side."""
    return gl.BlockedLayout([1, 1, 8], [1, 4, 8], [split, across, 1], [2, 1, 0])


@gluon.constexpr_function
def row_layout(split, across):
    """Of the rows of a block as they are copied."""
    return gl.SliceLayout(0, gl.SliceLayout(2, copy_layout(split, across)))


@gluon.constexpr_function
def sums_layout(split, across, rows):
    """Of (split, rows, tokens) with all of `split` in one thread, and neighbours in memory side by side."""
    down = min(split * across, rows // 16)
    return gl.BlockedLayout([split, 1, 1], [1, 16, 2], [1, down, split * across // down], [1, 2, 0])


@gluon.constexpr_function
def found_layout(split, across, rows):
    """Of (rows, tokens): the same without `split`."""
    down = min(split * across, rows // 16)
    return gl.BlockedLayout([1, 1], [16, 2], [down, split * across // down], [0, 1])


@gluon.jit
def in_loads(width):
    """A width that is a multiple of LANES, in a way that the compiler sees."""
    return width // LANES * LANES


@gluon.jit
def products(
    x_ptrs, weight_ptrs, mask_t, mask_o, offs_k, width, num_columns,
    SPLIT: gl.constexpr, ACROSS: gl.constexpr, STEP: gl.constexpr, DEPTH: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """(split, rows, tokens) float32, of (split, rows, CHUNK) weights and (split, tokens, CHUNK) tokens.

    Their columns `offs_k`, and every STEP further ones up to `num_columns`, where they are below `width`. `DEPTH` steps
    are in shared memory or on their way there.
    """
    MMA: gl.constexpr = mma_layout(SPLIT, ACROSS)
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0])
    BLOCK_O: gl.constexpr = weight_ptrs.shape[1]
    BLOCK_T: gl.constexpr = x_ptrs.shape[1]
    dtype: gl.constexpr = weight_ptrs.dtype.element_ty
    weights = gl.allocate_shared_memory(dtype, [DEPTH, SPLIT, BLOCK_O, CHUNK], SHARED)
    tokens = gl.allocate_shared_memory(dtype, [DEPTH, SPLIT, BLOCK_T, CHUNK], SHARED)
    for i in gl.static_range(DEPTH - 1):
        copy(weights.index(i), weight_ptrs + i * STEP, mask=mask_o & (offs_k < width - i * STEP))
        async_copy.commit_group()
    if DEPENDENT:
        cuda.gdc_wait()
    for i in gl.static_range(DEPTH - 1):
        copy(tokens.index(i), x_ptrs + i * STEP, mask=mask_t & (offs_k < width - i * STEP))
        async_copy.commit_group()
    sums = gl.zeros([SPLIT, BLOCK_O, BLOCK_T], gl.float32, MMA)
    slot = 0
    free = DEPTH - 1
    for k in range(0, num_columns, STEP):
        async_copy.wait_group(DEPTH - 2)
        left = weights.index(slot).load(gl.DotOperandLayout(0, MMA, 2))
        right = tokens.index(slot).permute([0, 2, 1]).load(gl.DotOperandLayout(1, MMA, 2))
        ahead = k + (DEPTH - 1) * STEP
        mask = offs_k < width - ahead
        copy(weights.index(free), weight_ptrs + ahead, mask=mask_o & mask)
        copy(tokens.index(free), x_ptrs + ahead, mask=mask_t & mask)
        async_copy.commit_group()
        sums = mma_v2(left, right, sums)
        free = slot
        slot = gl.where(slot == DEPTH - 1, 0, slot + 1)
    async_copy.wait_group(0)
    return sums


@gluon.jit
def load_bias(bias_ptr, places, mask_o, HAS_BIAS: gl.constexpr):
    """Of outputs `places`, float32; zeros if there is none."""
    LAYOUT: gl.constexpr = places.type.layout
    if HAS_BIAS:
        bias = gl.load(bias_ptr + places, mask=mask_o, other=0.0).to(gl.float32)
    else:
        bias = gl.zeros([places.shape[0]], gl.float32, LAYOUT)
    return bias


@gluon.jit
def row_products(
    x_ptr, weight_ptr, first, num_rows, num_tokens, width, stride_x,
    SPLIT: gl.constexpr, ACROSS: gl.constexpr, BLOCK_O: gl.constexpr, BLOCK_T: gl.constexpr,
    DEPTH: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """(rows, tokens) float32: rows `first` and on of a weight, of pitch `width`, times the tokens."""
    width = in_loads(width)
    stride_x = in_loads(stride_x)
    COPY: gl.constexpr = copy_layout(SPLIT, ACROSS)
    w = gl.arange(0, SPLIT, layout=gl.SliceLayout(1, gl.SliceLayout(2, COPY)))
    offs_o = first + gl.arange(0, BLOCK_O, layout=gl.SliceLayout(0, gl.SliceLayout(2, COPY)))
    offs_t = gl.arange(0, BLOCK_T, layout=gl.SliceLayout(0, gl.SliceLayout(2, COPY)))
    offs_c = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, gl.SliceLayout(1, COPY)))
    offs_k = w[:, None, None] * CHUNK + offs_c[None, None, :]
    weight_ptrs = weight_ptr + (offs_o[None, :, None].to(gl.int64) * width + offs_k)
    x_ptrs = x_ptr + (offs_t[None, :, None] * stride_x + offs_k)
    sums = products(
        x_ptrs, weight_ptrs, (offs_t < num_tokens)[None, :, None], (offs_o < num_rows)[None, :, None], offs_k, width,
        width, SPLIT, ACROSS, SPLIT * CHUNK, DEPTH, DEPENDENT,
    )  # fmt: skip
    found = gl.sum(gl.convert_layout(sums, sums_layout(SPLIT, ACROSS, BLOCK_O)), 0)
    return gl.convert_layout(found, found_layout(SPLIT, ACROSS, BLOCK_O))


@gluon.jit(do_not_specialize=["num_tokens", "d_in", "z_width", "out_width"])
def few_down_kernel(
    z_ptr,
    y_ptr,
    x_ptr,
    down_ptr,
    bias_ptr,
    table_ptr,
    num_tokens,
    d_in,
    z_width,
    out_width,
    NUM_PROJECTIONS: gl.constexpr,
    SPLIT: gl.constexpr,
    ACROSS: gl.constexpr,
    BLOCK_O: gl.constexpr,
    BLOCK_T: gl.constexpr,
    DEPTH: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    PIVOTED: gl.constexpr,
    DEPENDENT: gl.constexpr,
):
    if DEPENDENT:
        cuda.gdc_launch_dependents()
    FOUND: gl.constexpr = found_layout(SPLIT, ACROSS, BLOCK_O)
    first = gl.program_id(0) * BLOCK_O
    offs_o = first + gl.arange(0, BLOCK_O, layout=gl.SliceLayout(1, FOUND))
    offs_t = gl.arange(0, BLOCK_T, layout=gl.SliceLayout(0, FOUND))
    mask_o = offs_o < z_width
    mask_t = (offs_t < num_tokens)[None, :]
    if PIVOTED:
        places = gl.load(table_ptr + NUM_PROJECTIONS * NUM_FIELDS + offs_o, mask=mask_o, other=-1)
        mask_y = places >= 0
        bias = load_bias(bias_ptr, places, mask_y, HAS_BIAS)
    z = row_products(
        x_ptr, down_ptr, first, z_width, num_tokens, d_in, d_in, SPLIT, ACROSS, BLOCK_O, BLOCK_T, DEPTH, DEPENDENT
    )
    rounded = z.to(z_ptr.dtype.element_ty)
    gl.store(z_ptr + (offs_t[None, :] * z_width + offs_o[:, None]), rounded, mask=mask_t & mask_o[:, None])
    if PIVOTED:
        y = (rounded.to(gl.float32) + bias[:, None]).to(y_ptr.dtype.element_ty)
        gl.store(y_ptr + (offs_t[None, :] * out_width + places[:, None]), y, mask=mask_t & mask_y[:, None])


@gluon.jit(do_not_specialize=["num_tokens", "z_width", "out_width"])
def few_up_kernel(
    y_ptr,
    z_ptr,
    up_ptr,
    bias_ptr,
    table_ptr,
    num_tokens,
    z_width,
    out_width,
    NUM_PROJECTIONS: gl.constexpr,
    SPLIT: gl.constexpr,
    ACROSS: gl.constexpr,
    BLOCK_O: gl.constexpr,
    BLOCK_T: gl.constexpr,
    DEPTH: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    DEPENDENT: gl.constexpr,
):
    if DEPENDENT:
        cuda.gdc_launch_dependents()
    record_ptr = table_ptr
    before = 0
    total = 0
    for i in gl.static_range(NUM_PROJECTIONS):
        if gl.program_id(0) >= total:
            record_ptr = table_ptr + i * NUM_FIELDS
            before = total
        total += gl.cdiv(gl.load(table_ptr + i * NUM_FIELDS + ROWS), BLOCK_O)
    FOUND: gl.constexpr = found_layout(SPLIT, ACROSS, BLOCK_O)
    num_rows = gl.load(record_ptr + ROWS)
    first = (gl.program_id(0) - before) * BLOCK_O
    offs_o = first + gl.arange(0, BLOCK_O, layout=gl.SliceLayout(1, FOUND))
    offs_t = gl.arange(0, BLOCK_T, layout=gl.SliceLayout(0, FOUND))
    mask_o = offs_o < num_rows
    places = gl.load(table_ptr + gl.load(record_ptr + PLACES_START) + offs_o, mask=mask_o, other=0)
    bias = load_bias(bias_ptr, places, mask_o, HAS_BIAS)
    z_start = gl.multiple_of(gl.load(record_ptr + Z_START), LANES)
    pitch = gl.load(record_ptr + PITCH)
    up_start = gl.multiple_of(gl.load(record_ptr + UP_START), LANES)
    y = row_products(
        z_ptr + z_start, up_ptr + up_start, first, num_rows, num_tokens, pitch, z_width,
        SPLIT, ACROSS, BLOCK_O, BLOCK_T, DEPTH, DEPENDENT,
    )  # fmt: skip
    y = (y + bias[:, None]).to(y_ptr.dtype.element_ty)
    mask = (offs_t < num_tokens)[None, :] & mask_o[:, None]
    gl.store(y_ptr + (offs_t[None, :] * out_width + places[:, None]), y, mask=mask)


@gluon.jit
def whole(
    products_of_rows, z_ptr, bias_ptr, source_ptr, start, offs_o, offs_t, mask, z_width,
    HAS_BIAS: gl.constexpr, PIVOTED: gl.constexpr,
):  # fmt: skip
    """(outputs, tokens) float32 from the products of their rows, pivots and bias; `start` is the projection's first."""
    found = products_of_rows
    if PIVOTED:
        sources = gl.load(source_ptr + start + offs_o[:, None] + 0 * offs_t[None, :], mask=mask, other=0)
        z_ptrs = z_ptr + (offs_t[None, :] * z_width - 1 - sources)
        found += gl.load(z_ptrs, mask=mask & (sources < 0), other=0.0).to(gl.float32)
    if HAS_BIAS:
        bias_ptrs = bias_ptr + start + offs_o[:, None] + 0 * offs_t[None, :]
        found += gl.load(bias_ptrs, mask=mask, other=0.0).to(gl.float32)
    return found


@gluon.jit(do_not_specialize=["num_tokens", "z_width", "out_width", "sources_start"])
def few_silu_mul_kernel(
    y_ptr,
    z_ptr,
    up_ptr,
    bias_ptr,
    table_ptr,
    num_tokens,
    z_width,
    out_width,
    sources_start,
    SPLIT: gl.constexpr,
    ACROSS: gl.constexpr,
    BLOCK_O: gl.constexpr,
    BLOCK_T: gl.constexpr,
    DEPTH: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    PIVOTED: gl.constexpr,
    DEPENDENT: gl.constexpr,
):
    """silu(y_0) y_1: half of the warps multiply the rows of each projection that make a block of outputs.

    Pivots have no row; they are read from z in the end.
    """
    if DEPENDENT:
        cuda.gdc_launch_dependents()
    COPY: gl.constexpr = copy_layout(SPLIT, ACROSS)
    FOUND: gl.constexpr = found_layout(SPLIT, ACROSS, BLOCK_O)
    HALF: gl.constexpr = SPLIT // 2
    z_width = in_loads(z_width)
    first = gl.program_id(0) * BLOCK_O
    w = gl.arange(0, SPLIT, layout=gl.SliceLayout(1, gl.SliceLayout(2, COPY)))
    offs_o = first + gl.arange(0, BLOCK_O, layout=gl.SliceLayout(0, gl.SliceLayout(2, COPY)))
    offs_t = gl.arange(0, BLOCK_T, layout=gl.SliceLayout(0, gl.SliceLayout(2, COPY)))
    offs_c = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, gl.SliceLayout(1, COPY)))
    offs_k = (w % HALF)[:, None, None] * CHUNK + offs_c[None, None, :]
    record_ptrs = table_ptr + w // HALF * NUM_FIELDS
    z_start = gl.multiple_of(gl.load(record_ptrs + Z_START), [LANES])[:, None, None]
    pitch = gl.multiple_of(gl.load(record_ptrs + PITCH), [LANES])[:, None, None]
    up_start = gl.multiple_of(gl.load(record_ptrs + UP_START), [LANES])[:, None, None]
    rows = offs_o[None, :] + gl.zeros([SPLIT, 1], gl.int32, gl.SliceLayout(2, COPY))
    mask_o = rows < out_width
    if PIVOTED:
        source_ptrs = table_ptr + sources_start + ((w // HALF * out_width)[:, None] + rows)
        sources = gl.load(source_ptrs, mask=mask_o, other=-1)
        mask_o = sources >= 0
        rows = sources - gl.load(record_ptrs + SUMS_START)[:, None]
    sums = products(
        z_ptr + (offs_t[None, :, None] * z_width + (z_start + offs_k)),
        up_ptr + (up_start + rows[:, :, None].to(gl.int64) * pitch + offs_k),
        (offs_t < num_tokens)[None, :, None], mask_o[:, :, None], offs_k, pitch,
        gl.maximum(gl.load(table_ptr + PITCH), gl.load(table_ptr + NUM_FIELDS + PITCH)),
        SPLIT, ACROSS, HALF * CHUNK, DEPTH, DEPENDENT,
    )  # fmt: skip
    sums = gl.convert_layout(sums, sums_layout(SPLIT, ACROSS, BLOCK_O))
    both = gl.sum(gl.reshape(sums, (2, HALF, BLOCK_O, BLOCK_T)), 1)
    gate, other = gl.split(gl.permute(both, (1, 2, 0)))
    offs_o = first + gl.arange(0, BLOCK_O, layout=gl.SliceLayout(1, FOUND))
    offs_t = gl.arange(0, BLOCK_T, layout=gl.SliceLayout(0, FOUND))
    mask_o = offs_o < out_width
    mask = (offs_t < num_tokens)[None, :] & mask_o[:, None]
    source_ptr = table_ptr + sources_start
    gate = whole(
        gl.convert_layout(gate, FOUND), z_ptr, bias_ptr, source_ptr, 0, offs_o, offs_t, mask, z_width,
        HAS_BIAS, PIVOTED,
    )  # fmt: skip
    other = whole(
        gl.convert_layout(other, FOUND), z_ptr, bias_ptr, source_ptr, out_width, offs_o, offs_t, mask, z_width,
        HAS_BIAS, PIVOTED,
    )  # fmt: skip
    y = gate / (1.0 + gl.exp(-gate)) * other
    gl.store(y_ptr + (offs_t[None, :] * out_width + offs_o[:, None]), y.to(y_ptr.dtype.element_ty), mask=mask)


def takes(x: Tensor, operands: Operands) -> bool:
    """Whether `few` can be told to multiply this: half-precision factors whose rows start on 16 bytes, on a GPU."""
    tensors = x, operands.down, operands.up
    return (
        x.dtype.itemsize == 2
        and operands.scales is None
        and x.device.type != "cpu"
        and x.shape[1] % ALIGN == 0
        and all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
    )


@cache
def _launchers(
    layout: Layout, target: tiles.Target, block: int, has_bias: bool, shapes: tuple[tiles.Few, tiles.Few] | None
) -> tuple[tuple[Launcher, int], tuple[Launcher, int]]:
    """Of both kernels, each with its number of programs."""
    dependent = target.arch >= 90
    of_all = {"BLOCK_T": block, "HAS_BIAS": has_bias, "DEPENDENT": dependent}
    options = {"enable_fp_fusion": True} | ({"launch_pdl": True} if dependent else {})
    count: dict[str, int | bool] = {"NUM_PROJECTIONS": len(layout.projections)}
    writes_pivots = {"PIVOTED": layout.pivoted and not layout.silu_mul}
    down = ("down", few_down_kernel, [layout.z_width], count | writes_pivots)
    up = ("up", few_up_kernel, [p.rows for p in layout.projections], count)
    if layout.silu_mul:
        up = ("silu_mul", few_silu_mul_kernel, [layout.out_width], {"PIVOTED": layout.pivoted})
    found = []
    for given, (name, kernel, rows, own) in zip(shapes or (None, None), (down, up), strict=True):
        shape = given or tiles.few_shape(name, target, block, sum(rows))
        blocks = {"SPLIT": shape.split, "ACROSS": shape.across, "BLOCK_O": shape.rows, "DEPTH": shape.depth}
        launcher = Launcher(kernel, of_all | own | blocks, options | {"num_warps": shape.split * shape.across})
        found.append((launcher, sum(-(-one // shape.rows) for one in rows)))
    return found[0], found[1]


def few(
    x: Tensor,
    operands: Operands,
    layout: Layout,
    *,
    target: tiles.Target | None = None,
    shapes: tuple[tiles.Few, tiles.Few] | None = None,
) -> Tensor:
    """y (T, out_width) of x (T, D_IN) that `takes` says yes to, T at most `FEW_TOKENS`, whose rows are contiguous.

    D_IN is a multiple of 8. `shapes` are those of the table unless given.
    """
    down, up, bias, table, _ = operands
    num_tokens, d_in = x.shape
    z = x.new_empty(num_tokens, layout.z_width)
    y = x.new_empty(num_tokens, layout.out_width)
    (down_launcher, down_programs), (up_launcher, up_programs) = _launchers(
        layout, target or tiles.known_target(x.device), tiles.few_block(num_tokens), bias is not None, shapes
    )
    sizes = (num_tokens, layout.z_width, layout.out_width)
    down_launcher((down_programs, 1, 1), z, y, x, down, bias, table, num_tokens, d_in, *sizes[1:])
    if up_programs:
        sources = (layout.sources_start,) if layout.silu_mul else ()
        up_launcher((up_programs, 1, 1), y, z, up, bias, table, *sizes, *sources)
    return y
