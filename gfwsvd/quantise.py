"""Factors in eight bits: whole numbers and one scale for each inner dimension, of `down` and of `up`.

Both scales meet between the factors, where each is one number a token and inner dimension: `z = s_down (Q_down x)`,
`y = Q_up (s_up z)`. A number q stands for the fraction q / 128 of its scale, so that sums in float16 stay as small as
they are with the factors themselves.
"""

import torch
from torch import Tensor

from gfwsvd_kernels.layout import UNIT

from .errors import GfwsvdError

BITS = (8,)  # that factors may be rounded to
_MOST = 127  # of a rounded number: both signs have the same


def eight_bits(up: Tensor, down: Tensor, *, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The factors `up (N, R)` and `down (R, D_IN)` rounded to the nearest numbers of their scales.

    The scales are rounded to bfloat16 whatever `dtype` is, so that a model which changes its dtype keeps their values.
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
    scale = largest.bfloat16().to(dtype).clamp_min(torch.finfo(dtype).smallest_normal)
    steps = matrix / (UNIT * scale.double().unsqueeze(dim))
    return steps.round().clamp(-_MOST, _MOST).to(torch.int8), scale


def check_bits(bits: int | None) -> None:
    """GfwsvdError unless `bits` is one of `BITS`, or None for factors in the dtype of the model."""
    if bits is not None and bits not in BITS:
        raise GfwsvdError(
            f"bits must be {', '.join(map(str, BITS))}, or be left out for the model's dtype, got {bits!r}"
        )


def check_scales(name: str, scales: Tensor) -> None:
    """GfwsvdError unless all scales of the layer `name` are finite and positive."""
    if not bool(((scales > 0) & scales.isfinite()).all()):
        raise GfwsvdError(
            f"{name}.scales should be finite and above zero; the file was changed, copy the folder again or compress "
            "anew"
        )
