"""Peers written here, after published ideas: what others' kernels do, measurable without their packages.

`symmetric_product` computes one triangle of tiles of xᵀ x and writes each tile twice, as the kernels for Muon do.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

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
