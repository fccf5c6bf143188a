"""Rows multiplied by the roots of their weights, in one pass: what weighted sums multiply.

The scaled rows are rounded to their dtype once, so that all tiles of a Gram matrix are of one rounded matrix. Bound by
memory: every row read once and written once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gfwsvd_kernels import tiles

BLOCK_ROWS, BLOCK_COLS = 16, 256


@triton.jit(do_not_specialize=["num_rows"])
def scale_rows_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    scale,
    num_rows,
    width,
    stride_o,
    stride_xt,
    stride_xd,
    stride_w,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CLAMP: tl.constexpr,
):
    """out[t] = sqrt(scale weight[t]) x[t]; with CLAMP no weight is below zero."""
    num_blocks = tl.cdiv(width, BLOCK_D)
    first_t = tl.program_id(0) // num_blocks * BLOCK_T
    first_d = tl.program_id(0) % num_blocks * BLOCK_D
    offs_t = tl.arange(0, BLOCK_T)
    offs_d = tl.arange(0, BLOCK_D)
    mask_t = offs_t < num_rows - first_t
    mask = mask_t[:, None] & (offs_d < width - first_d)[None, :]
    weight = scale * tl.load(weight_ptr + first_t.to(tl.int64) * stride_w + offs_t * stride_w, mask=mask_t, other=0.0)
    if CLAMP:
        weight = tl.where(weight < 0.0, 0.0, weight)  # NaN stays NaN
    x_ptr += first_t.to(tl.int64) * stride_xt + first_d.to(tl.int64) * stride_xd
    x = tl.load(x_ptr + (offs_t[:, None] * stride_xt + offs_d[None, :] * stride_xd), mask=mask, other=0.0)
    scaled = (x.to(tl.float32) * tl.sqrt(weight)[:, None]).to(out_ptr.dtype.element_ty)
    out_ptr += first_t.to(tl.int64) * stride_o + first_d
    tl.store(out_ptr + (offs_t[:, None] * stride_o + offs_d[None, :]), scaled, mask=mask)


def scaled_rows(
    x: Tensor, weight: Tensor, scale: float = 1.0, *, clamp: bool = False, pitch: int | None = None
) -> Tensor:
    """`sqrt(scale weight) x` in x's dtype, its rows `pitch` elements apart in memory, or else contiguous."""
    num_rows, width = x.shape
    pitch = width if pitch is None else pitch
    dtype = torch.float32 if tiles.interpreted_bf16(x) else x.dtype  # the interpreter truncates to bfloat16
    out = torch.empty(num_rows, pitch, dtype=dtype, device=x.device)[:, :width]
    tiles.check_strides(x=x, scaled=out)
    if x.numel():
        grid = triton.cdiv(num_rows, BLOCK_ROWS) * triton.cdiv(width, BLOCK_COLS)
        scale_rows_kernel[(grid,)](
            out, x, weight, float(scale), num_rows, width, out.stride(0), *x.stride(), weight.stride(0),
            BLOCK_T=BLOCK_ROWS, BLOCK_D=BLOCK_COLS, CLAMP=clamp, num_warps=4, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
    return out if dtype == x.dtype else _rounded(out, x.dtype, pitch)


def _rounded(values: Tensor, dtype: torch.dtype, pitch: int) -> Tensor:
    return torch.empty(len(values), pitch, dtype=dtype)[:, : values.shape[1]].copy_(values)
