"""Row-wise quadratic form q_t = x_tᵀ A x_t from the lower triangle of A, without a (T, D) temporary; rows scaled by it.

As A is symmetric, q_t = 2 x_tᵀ (tril(A, -1) + diag(A) / 2) x_t: half the products. A first pass writes that matrix in
the dtype of x (`prepared`). Then one program owns a block of tokens and a block of rows of it. It multiplies the tokens
with those rows up to the diagonal, in registers, then with the matching columns of x, and stores one partial sum a
token, 1 / BLOCK_I of the size of x. The last program to arrive at a block of tokens adds its partial sums in a fixed
order. Bound by the tensor cores: T D (D + 1) FLOP.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfwsvd_kernels import tiles
from gfwsvd_kernels.gram import descriptor, halves
from gfwsvd_kernels.rows import scaled_rows

GROUP_TOKENS = 8  # blocks of tokens that run side by side over the same rows of A, which stay in L2
BLOCK_PARTIAL = 16  # partial sums of a token that are added at once
BLOCK_PREPARED = 64
SIDE = 256  # the longest side of a tile: so far beyond the diagonal the prepared matrix is written


@triton.jit
def load_lower(a_ptr, first_i, first_j, width, stride_ai, stride_aj, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """A block of A in float32, zeros above the diagonal, and how far each entry is above it."""
    offs_i = tl.arange(0, BLOCK)
    offs_j = tl.arange(0, BLOCK)
    if PACKED:  # row i starts at i (i + 1) / 2
        a_ptr += first_i.to(tl.int64) * (first_i + 1) // 2 + first_j
        offs_a = (offs_i * first_i + offs_i * (offs_i + 1) // 2)[:, None] + offs_j[None, :]
    else:
        a_ptr += first_i.to(tl.int64) * stride_ai + first_j.to(tl.int64) * stride_aj
        offs_a = offs_i[:, None] * stride_ai + offs_j[None, :] * stride_aj
    above = first_j + offs_j[None, :] - (first_i + offs_i[:, None])
    a = tl.load(a_ptr + offs_a, mask=(offs_i < width - first_i)[:, None] & (above <= 0), other=0.0)
    return a.to(tl.float32), above


@triton.jit
def row_powers_kernel(
    power_ptr, a_ptr, width, stride_ai, stride_aj, BLOCK: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """The largest power of two that is no larger than the largest entry of a row, up to the diagonal."""
    first_i = tl.program_id(0) * BLOCK
    largest = tl.full((BLOCK,), 0.0, tl.float32)
    first_j = tl.full((), 0, tl.int32)
    for _ in range(0, tl.program_id(0) + 1):
        a, above = load_lower(a_ptr, first_i, first_j, width, stride_ai, stride_aj, BLOCK, PACKED)
        first_j += BLOCK
        largest = tl.maximum(largest, tl.max(tl.abs(a), axis=1))
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)  # so that its inverse is a normal number too
    offs_i = first_i + tl.arange(0, BLOCK)
    tl.store(power_ptr + offs_i, (exponent << 23).to(tl.float32, bitcast=True), mask=offs_i < width)


@triton.jit
def prepare_kernel(
    out_ptr, a_ptr, power_ptr, width, stride_o, stride_ai, stride_aj,
    BLOCK: tl.constexpr, SIDE: tl.constexpr, PACKED: tl.constexpr, HAS_POWER: tl.constexpr,
):  # fmt: skip
    """tril(A, -1) + diag(A) / 2, each row over its power of two if it has one; zeros up to a multiple of SIDE."""
    first_i = tl.program_id(0) * BLOCK
    first_j = tl.program_id(1) * BLOCK
    if first_j < (first_i // SIDE + 1) * SIDE:
        offs_i = tl.arange(0, BLOCK)
        offs_j = tl.arange(0, BLOCK)
        a, above = load_lower(a_ptr, first_i, first_j, width, stride_ai, stride_aj, BLOCK, PACKED)
        a = tl.where(above == 0, 0.5 * a, a)
        if HAS_POWER:
            power = tl.load(power_ptr + first_i + offs_i, mask=offs_i < width - first_i, other=1.0)
            a *= (1.0 / power)[:, None]
        out_ptr += first_i.to(tl.int64) * stride_o + first_j
        mask = (offs_i < width - first_i)[:, None] & (offs_j < width - first_j)[None, :]
        tl.store(out_ptr + offs_i[:, None] * stride_o + offs_j[None, :], a.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def row_sums(part, NTH: tl.constexpr, x_ptr, power_ptr, mask_t, width, stride_xt, stride_xd, HAS_POWER: tl.constexpr):
    """The sum of each row of part * x, where `part` is the nth of equal parts of a tile and x has `width` columns."""
    offs_t = tl.arange(0, part.shape[0])
    offs_i = NTH * part.shape[1] + tl.arange(0, part.shape[1])
    x_ptrs = x_ptr + (offs_t[:, None] * stride_xt + offs_i[None, :] * stride_xd)
    x = tl.load(x_ptrs, mask=mask_t[:, None] & (offs_i < width)[None, :], other=0.0)  # like part
    product = part * x.to(tl.float32)
    if HAS_POWER:
        product *= tl.load(power_ptr + offs_i, mask=offs_i < width, other=0.0)[None, :]
    return tl.sum(product, axis=1)


@triton.jit(do_not_specialize=["num_tokens"])
def quadratic_form_kernel(
    q_ptr,
    x_ptr,
    xs_ptr,
    a_ptr,
    power_ptr,
    partial_ptr,
    arrived_ptr,
    num_tokens,
    width,
    stride_xt,
    stride_xd,
    stride_ai,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_P: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    UPCAST: tl.constexpr,
    HAS_POWER: tl.constexpr,
):
    """`a_ptr` is of the prepared matrix; with DESCRIPTORS it is a tensor descriptor, and `xs_ptr` that of x."""
    num_rows = tl.cdiv(num_tokens, BLOCK_T)
    num_blocks = tl.cdiv(width, BLOCK_I)
    group = tl.program_id(0) // (GROUP * num_blocks)
    rows_here = tl.minimum(num_rows - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * num_blocks)
    row = group * GROUP + within % rows_here
    block = num_blocks - 1 - within // rows_here  # the longest rows first: the short ones fill the gaps at the end

    # 64-bit bases, 32-bit offsets within a tile: fewer registers (`tiles.check_strides` makes sure of them)
    first_t = row * BLOCK_T
    first_i = block * BLOCK_I
    offs_t = tl.arange(0, BLOCK_T)
    mask_t = offs_t < num_tokens - first_t
    x_ptr += first_t.to(tl.int64) * stride_xt
    acc = tl.full((BLOCK_T, BLOCK_I), 0.0, tl.float32)
    if DESCRIPTORS:  # which give zeros for what is outside of the tensors
        for j in range(0, first_i + BLOCK_I, BLOCK_J):
            x = xs_ptr.load([first_t, j])
            a = tl.trans(a_ptr.load([first_i, j]))
            if UPCAST:
                x = x.to(tl.float32)
                a = a.to(tl.float32)
            acc = tl.dot(x, a, acc)
    else:
        offs_i = tl.arange(0, BLOCK_I)
        offs_j = tl.arange(0, BLOCK_J)
        mask_i = offs_i < width - first_i
        xj_ptr = x_ptr
        a_ptr += first_i.to(tl.int64) * stride_ai
        for j in range(0, first_i + BLOCK_I, BLOCK_J):
            mask_j = offs_j < width - j
            x = tl.load(  # (BLOCK_T, BLOCK_J)
                xj_ptr + (offs_t[:, None] * stride_xt + offs_j[None, :] * stride_xd),
                mask=mask_t[:, None] & mask_j[None, :],
                other=0.0,
            )
            a = tl.load(  # (BLOCK_I, BLOCK_J)
                a_ptr + (offs_i[:, None] * stride_ai + offs_j[None, :]),
                mask=mask_i[:, None] & mask_j[None, :],
                other=0.0,
            )
            if UPCAST:
                x = x.to(tl.float32)
                a = a.to(tl.float32)
            acc = tl.dot(x, tl.trans(a), acc, input_precision="tf32x3")
            xj_ptr += BLOCK_J * stride_xd
            a_ptr += BLOCK_J
    x_ptr += first_i.to(tl.int64) * stride_xd
    if HAS_POWER:
        power_ptr += first_i
    left, right = halves(acc)  # in parts, so that x fits the registers beside them
    first, second = halves(left)
    third, fourth = halves(right)
    q = row_sums(first, 0, x_ptr, power_ptr, mask_t, width - first_i, stride_xt, stride_xd, HAS_POWER)
    q += row_sums(second, 1, x_ptr, power_ptr, mask_t, width - first_i, stride_xt, stride_xd, HAS_POWER)
    q += row_sums(third, 2, x_ptr, power_ptr, mask_t, width - first_i, stride_xt, stride_xd, HAS_POWER)
    q += row_sums(fourth, 3, x_ptr, power_ptr, mask_t, width - first_i, stride_xt, stride_xd, HAS_POWER)
    q *= 2.0
    tl.store(partial_ptr + block.to(tl.int64) * num_tokens + first_t + offs_t, q, mask=mask_t)

    tl.debug_barrier()  # every thread has stored before the program counts as arrived
    if tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel") == num_blocks - 1:
        q = tl.full((BLOCK_T,), 0.0, tl.float32)
        for first_p in range(0, num_blocks, BLOCK_P):
            offs_p = first_p + tl.arange(0, BLOCK_P)
            q += tl.sum(
                tl.load(  # (BLOCK_P, BLOCK_T); from L2, where other programs wrote
                    partial_ptr + offs_p.to(tl.int64)[:, None] * num_tokens + first_t + offs_t[None, :],
                    mask=(offs_p < num_blocks)[:, None] & mask_t[None, :],
                    other=0.0,
                    cache_modifier=".cg",
                ),
                axis=0,
            )
        tl.store(q_ptr + first_t + offs_t, q, mask=mask_t)


def prepared(A: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """tril(A, -1) + diag(A) / 2 in the dtype of x, each row over a power of two, and these powers.

    There are powers only where a float32 A becomes float16, whose range it may exceed. The rows start at multiples of
    16 bytes; above the diagonal, beyond the tiles on it, nothing is written.
    """
    width = x.shape[1]
    blocks = triton.cdiv(width, BLOCK_PREPARED)
    strides = A.stride() if A.ndim == 2 else (0, 1)
    power = None
    if x.dtype == torch.float16 and A.dtype == torch.float32:
        power = torch.empty(width, dtype=torch.float32, device=A.device)
        row_powers_kernel[(blocks,)](
            power, A, width, *strides, BLOCK=BLOCK_PREPARED, PACKED=A.ndim == 1,
            num_warps=8, num_stages=3, enable_fp_fusion=True,
        )  # fmt: skip
    dtype = torch.float32 if tiles.interpreted_bf16(x) else x.dtype  # the interpreter truncates to bfloat16
    out = torch.empty(width, -(-width // 16) * 16, dtype=dtype, device=A.device)
    tiles.check_strides(prepared=out)
    prepare_kernel[(blocks, blocks)](
        out, A, power, width, out.stride(0), *strides,
        BLOCK=BLOCK_PREPARED, SIDE=SIDE, PACKED=A.ndim == 1, HAS_POWER=power is not None,
        num_warps=4, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return out.to(x.dtype)[:, :width], power


def quadratic_form(
    x: Tensor, A: Tensor, *, target: tiles.Target | None = None, tile: tiles.Tile | None = None
) -> Tensor:
    num_tokens, width = x.shape
    if x.numel() == 0:
        return torch.zeros(num_tokens, dtype=torch.float32, device=x.device)
    tiles.check_strides(x=x, A=A)
    target = target or tiles.target(x.device)
    matrix, power = prepared(A, x)
    upcast = tiles.interpreted_bf16(x)
    tile = tile or tiles.tile("quadratic_form", target, torch.float32 if upcast else x.dtype, x, matrix)
    descriptors = x.dtype.itemsize == 2 and tiles.by_descriptors(target, x, matrix)
    num_rows, num_blocks = triton.cdiv(num_tokens, tile.rows), triton.cdiv(width, tile.cols)
    q = torch.empty(num_tokens, dtype=torch.float32, device=x.device)
    partial = torch.empty(num_blocks, num_tokens, dtype=torch.float32, device=x.device)
    arrived = torch.zeros(num_rows, dtype=torch.int32, device=x.device)
    quadratic_form_kernel[(num_rows * num_blocks,)](
        q,
        x,
        descriptor(x, (tile.rows, tile.depth)) if descriptors else x,
        descriptor(matrix, (tile.cols, tile.depth)) if descriptors else matrix,
        power,
        partial,
        arrived,
        num_tokens,
        width,
        *x.stride(),
        matrix.stride(0),
        BLOCK_T=tile.rows,
        BLOCK_I=tile.cols,
        BLOCK_J=tile.depth,
        BLOCK_P=BLOCK_PARTIAL,
        GROUP=GROUP_TOKENS,
        DESCRIPTORS=descriptors,
        UPCAST=upcast,
        HAS_POWER=power is not None,
        **tile.options(),
    )
    return q


def quadratic_form_scale(
    x: Tensor,
    A: Tensor,
    g: Tensor,
    scale: float,
    *,
    target: tiles.Target | None = None,
    tile: tiles.Tile | None = None,
) -> tuple[Tensor, Tensor]:
    tiles.check_strides(g=g)
    q = quadratic_form(x, A, target=target, tile=tile)
    return q, scaled_rows(g, q, scale, clamp=True)
