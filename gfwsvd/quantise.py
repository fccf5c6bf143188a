"""Factors in few bits: whole numbers and their scales.

In eight bits there is one scale for each inner dimension, of `down` and of `up`. Both meet between the factors, where
each is one number a token and inner dimension: `z = s_down (Q_down x)`, `y = Q_up (s_up z)`. A number q stands for the
fraction q / 128 of its scale, so that sums in float16 stay as small as they are with the factors themselves.

In four bits, of two factors only, each `GROUP` numbers of a row of either factor share a scale, the last group of a row
may be shorter, and a number q of -7 to 8 stands for q / 8 of it. A byte holds 8 - q of two neighbours of a row, the
first in the lower half. How they are rounded: `feedback.py`.

The scales have the values of bfloat16 in any dtype, so that a model which changes its dtype keeps them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gfwsvd_kernels.layout import UNIT

from .errors import GfwsvdError

GROUP = 64
MOST_OF_FOUR = 8  # -8 is none of the numbers: a scale has the sign that its largest number needs
_MOST = 127  # of a rounded number of eight bits: both signs have the same

Shapes = dict[str, tuple[int, ...]]


class Form(NamedTuple):
    """How factors are stored in some bits.

    Attributes:
        dtype, stored_as: of both factors, in torch and in safetensors.
        in_byte: numbers of a row of `down` that an element holds.
        pivots: whether a pivoted layer can be stored so.
        signed: whether scales may be negative.
        shapes: of `weight`, `up` and `scales`, by the rows of `up`, the rank and d_in.
        factors: `up` and `down` in a dtype, from the three tensors.
    """

    dtype: torch.dtype
    stored_as: str
    in_byte: int
    pivots: bool
    signed: bool
    shapes: Callable[[int, int, int], Shapes]
    factors: Callable[[Tensor, Tensor, Tensor, torch.dtype], tuple[Tensor, Tensor]]


def eight_bits(up: Tensor, down: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The factors `up (N, R)` and `down (R, D_IN)` rounded to the nearest numbers of their scales.

    No number moves by more than half a step, which is `UNIT` of its scale.

    Args:
        dtype: of the scales, a floating-point one.

    Returns:
        up and down in int8, and the scales (2, R), those of down first.
    """
    up_steps, up_scale = whole_numbers(up, 0, dtype=dtype)
    down_steps, down_scale = whole_numbers(down, 1, dtype=dtype)
    return up_steps, down_steps, torch.stack((down_scale, up_scale))


def whole_numbers(matrix: Tensor, dim: int, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The numbers of a `matrix` as steps in int8, detached, and in `dtype` the scale of all along `dim`, a vector."""
    matrix = matrix.detach().double()
    largest = matrix.abs().amax(dim) / (_MOST * UNIT)
    scale = largest.bfloat16().to(dtype).clamp_min(smallest_scale(dtype))
    steps = matrix / (UNIT * scale.double().unsqueeze(dim))
    return steps.round().clamp(-_MOST, _MOST).to(torch.int8), scale


def pack(steps: Tensor) -> Tensor:
    """Steps of -7 to 8 (N, D) as bytes (N, (D + 1) // 2), zeros where D is odd."""
    halves = (MOST_OF_FOUR - F.pad(steps, (0, steps.shape[1] % 2))).to(torch.uint8)
    return halves[:, ::2] | halves[:, 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    """The steps in int8 of `pack`, (N, 2 W) of bytes (N, W)."""
    return MOST_OF_FOUR - torch.stack((packed & 15, packed >> 4), 2).flatten(1).to(torch.int8)


def grouped_numbers(steps: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What steps (N, D) of four bits and their scales (N, groups) stand for, in `dtype`."""
    wide = scales.to(dtype).repeat_interleave(GROUP, 1)[:, : steps.shape[1]]
    return steps * (wide / MOST_OF_FOUR)


def _eight_bit_factors(up: Tensor, down: Tensor, scales: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    down_scale, up_scale = UNIT * scales.to(dtype)
    return up.to(dtype) * up_scale, down.to(dtype) * down_scale[:, None]


def _four_bit_factors(up: Tensor, down: Tensor, scales: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rank, down_steps = len(down), unpack(down)
    down_scales, up_scales = scales.split([rank * _groups(down_steps.shape[1]), len(up) * _groups(rank)])
    up_steps = unpack(up)[:, :rank]
    return (
        grouped_numbers(up_steps, up_scales.view(len(up), -1), dtype),
        grouped_numbers(down_steps, down_scales.view(rank, -1), dtype),
    )


def _eight_bit_shapes(rows: int, rank: int, d_in: int) -> Shapes:
    return {"weight": (rank, d_in), "up": (rows, rank), "scales": (2, rank)}


def _four_bit_shapes(rows: int, rank: int, d_in: int) -> Shapes:
    scales = rank * _groups(d_in) + rows * _groups(rank)
    return {"weight": (rank, (d_in + 1) // 2), "up": (rows, (rank + 1) // 2), "scales": (scales,)}


def _groups(width: int) -> int:
    return -(-width // GROUP)


BITS = {  # that factors may be rounded to
    8: Form(torch.int8, "I8", 1, True, False, _eight_bit_shapes, _eight_bit_factors),
    4: Form(torch.uint8, "U8", 2, False, True, _four_bit_shapes, _four_bit_factors),
}


def factor_shapes(bits: int | None, rows: int, rank: int, d_in: int) -> Shapes:
    """Of `weight` and `up`, and in few bits of `scales`, where `up` has so many rows."""
    return {"weight": (rank, d_in), "up": (rows, rank)} if bits is None else BITS[bits].shapes(rows, rank, d_in)


def smallest_scale(dtype: torch.dtype) -> float:
    """Of a group of zeros."""
    return torch.finfo(dtype).smallest_normal


def check_bits(bits: int | None) -> None:
    """GfwsvdError unless `bits` is one of `BITS`, or None for factors in the dtype of the model."""
    if bits is not None and bits not in BITS:
        raise GfwsvdError(
            f"bits must be {' or '.join(map(str, BITS))}, or be left out for the model's dtype, got {bits!r}"
        )


def check_form(name: str, bits: int | None, *, d_in: int, pivoted: bool) -> None:
    """GfwsvdError unless the layer `name` of d_in inputs can be stored in `bits`."""
    check_bits(bits)
    if bits is None:
        return
    if pivoted and not BITS[bits].pivots:
        raise GfwsvdError(
            f"factors in {bits} bits are two, got {name} in the pivoted form: compress with --storage factors "
            '(storage="factors"), or take 8 bits'
        )
    if d_in % BITS[bits].in_byte:
        raise GfwsvdError(f"a byte holds two inputs in {bits} bits, but {name} has {d_in}: exclude it, or take 8 bits")


def check_scales(name: str, scales: Tensor, bits: int) -> None:
    """GfwsvdError unless all scales of the layer `name` are finite and above zero, or in a signed form no zeros."""
    signed = BITS[bits].signed
    if not bool((((scales.abs() if signed else scales) > 0) & scales.isfinite()).all()):
        raise GfwsvdError(
            f"{name}.scales should be finite and {'not' if signed else 'above'} zero; the file was changed, copy the "
            "folder again or compress anew"
        )
