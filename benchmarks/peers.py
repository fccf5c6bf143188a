"""Peers written here, after published ideas: what others' kernels do, measurable without their packages.

`symmetric_product` computes one triangle of tiles of xᵀ x and writes each tile twice, as the kernels for Muon do.
`two_launch_group` is a group of projections in two launches, z for all of them and then all outputs with the activation
in the epilogue, so that nothing wider than the outputs goes through memory (the streaming of FlashSVD, AAAI 2026). Both
are plain tiled products; neither was tuned on a GPU.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfwsvd_kernels.layout import Layout
from gfwsvd_kernels.lowrank import linear
from gfwsvd_kernels.tiles import interpreted_bf16


@triton.jit
def symmetric_kernel(
    out_ptr, x_ptr, num_tokens, width, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, UPCAST: tl.constexpr
):
    row, col = tl.program_id(0), tl.program_id(1)
    if row < col:
        return
    offs_i = row * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_j = col * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_t = tl.arange(0, BLOCK_T)
    acc = tl.full((BLOCK_D, BLOCK_D), 0.0, tl.float32)
    for t in range(0, num_tokens, BLOCK_T):
        mask_t = (offs_t < num_tokens - t)[:, None]
        x_ptrs = x_ptr + (offs_t[:, None] * width + offs_i[None, :])
        y_ptrs = x_ptr + (offs_t[:, None] * width + offs_j[None, :])
        x = tl.load(x_ptrs, mask=mask_t & (offs_i < width)[None, :], other=0.0)
        y = tl.load(y_ptrs, mask=mask_t & (offs_j < width)[None, :], other=0.0)
        x_ptr += BLOCK_T * width
        if UPCAST:
            x = x.to(tl.float32)
            y = y.to(tl.float32)
        acc = tl.dot(tl.trans(x), y, acc, input_precision="tf32x3")
    mask = (offs_i < width)[:, None] & (offs_j < width)[None, :]
    tl.store(out_ptr + offs_i[:, None].to(tl.int64) * width + offs_j[None, :], acc, mask=mask)
    if row != col:
        tl.store(out_ptr + offs_j[:, None].to(tl.int64) * width + offs_i[None, :], tl.trans(acc), mask=tl.trans(mask))


def symmetric_product(x: Tensor) -> Tensor:
    """xᵀ x (D, D) float32, both triangles, of x (T, D) with contiguous rows."""
    num_tokens, width = x.shape
    out = torch.empty(width, width, dtype=torch.float32, device=x.device)
    half = x.dtype.itemsize == 2
    block, depth, warps, stages = (128, 64, 8, 4) if half else (64, 32, 4, 3)
    edge = triton.cdiv(width, block)
    symmetric_kernel[edge, edge](
        out, x, num_tokens, width, block, depth, interpreted_bf16(x),
        num_warps=warps, num_stages=stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out


@triton.jit
def products(
    z_ptr, up_ptr, record_ptr, offs_t, offs_o, mask_t, rank,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr, ALIGN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(BLOCK_T, BLOCK_O): z of one projection times some columns of its up."""
    z_ptr += tl.multiple_of(tl.load(record_ptr), ALIGN)
    own_rank = tl.load(record_ptr + 1)
    up_ptr += tl.multiple_of(tl.load(record_ptr + 2), 8)
    pitch = tl.multiple_of(tl.load(record_ptr + 3), 8)
    offs_r = tl.arange(0, BLOCK_R)
    acc = tl.full((BLOCK_T, BLOCK_O), 0.0, tl.float32)
    for r in range(0, own_rank, BLOCK_R):
        mask_r = offs_r < own_rank - r
        z_ptrs = z_ptr + offs_t[:, None].to(tl.int64) * rank + (r + offs_r)[None, :]
        z = tl.load(z_ptrs, mask=mask_t[:, None] & mask_r[None, :], other=0.0)
        up_ptrs = up_ptr + (r + offs_r)[:, None] * pitch + offs_o[None, :]
        up = tl.load(up_ptrs, mask=mask_r[:, None] & (offs_o < pitch)[None, :], other=0.0)
        if UPCAST:
            z = z.to(tl.float32)
            up = up.to(tl.float32)
        acc = tl.dot(z, up, acc, input_precision="tf32x3")
    return acc


@triton.jit
def expand_kernel(
    y_ptr, z_ptr, up_ptr, records_ptr, num_tokens, rank, out_width,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr, ALIGN: tl.constexpr, UPCAST: tl.constexpr,
    SILU_MUL: tl.constexpr,
):  # fmt: skip
    record_ptr = records_ptr + tl.program_id(0) * 7
    first = tl.multiple_of(tl.load(record_ptr + 4), BLOCK_O)
    offs_t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_o = first + tl.arange(0, BLOCK_O)
    mask_t = offs_t < num_tokens
    y = products(
        z_ptr, up_ptr, record_ptr, offs_t, offs_o, mask_t, rank, BLOCK_T, BLOCK_O, BLOCK_R, ALIGN, UPCAST
    )  # fmt: skip
    if SILU_MUL:
        record_ptr += tl.num_programs(0) * 7
        other = products(
            z_ptr, up_ptr, record_ptr, offs_t, offs_o, mask_t, rank, BLOCK_T, BLOCK_O, BLOCK_R, ALIGN, UPCAST
        )  # fmt: skip
        y = y * tl.sigmoid(y) * other
    y_ptrs = y_ptr + offs_t[:, None].to(tl.int64) * out_width + (tl.load(record_ptr + 5) + offs_o)[None, :]
    mask = mask_t[:, None] & (offs_o < tl.load(record_ptr + 6))[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


@cache
def _records(layout: Layout, block: int, device: torch.device) -> Tensor:
    """What a program of the second launch must know: (z, rank, up, pitch, first column, first output, D_OUT)."""
    rows = [
        (
            r["z_start"],
            r["rank"],
            r["up_start"],
            r["pitch"],
            first,
            0 if layout.silu_mul else r["out_start"],
            r["d_out"],
        )
        for r in layout.records()
        for first in range(0, r["d_out"], block)
    ]
    return torch.tensor(rows, dtype=torch.int32).to(device)


def two_launch_group(x: Tensor, down: Tensor, up: Tensor, layout: Layout) -> Tensor:
    """y (T, out_width) of x (T, D_IN) with a group that has no pivots and no bias."""
    z = linear(x, down, None, out_dtype=x.dtype)
    upcast = interpreted_bf16(x)
    y = torch.empty(len(x), layout.out_width, dtype=torch.float32 if upcast else x.dtype, device=x.device)
    half = x.dtype.itemsize == 2
    few = (16, 64, 128 if half else 64)
    rows, block, depth = few if len(x) <= 16 else (64, 128, 64) if half else (64, 64, 32)
    records = _records(layout, block, x.device)
    num_blocks = len(records) // (2 if layout.silu_mul else 1)
    expand_kernel[num_blocks, triton.cdiv(len(x), rows)](
        y, z, up, records, len(x), layout.rank, layout.out_width,
        rows, block, depth, 1 if any(p.rank % 8 for p in layout.projections) else 8, upcast, layout.silu_mul,
        num_warps=4, num_stages=4, enable_fp_fusion=True,
    )  # fmt: skip
    return y.to(x.dtype)
