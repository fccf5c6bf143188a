"""Two factors in four bits: groups of a row share a scale, and later numbers make up for the errors of earlier ones.

An error N in the rows of a matrix costs `tr(N right Nᵀ)`. With `right = C Cᵀ`, C a lower triangle, that is the sum of
squares of `N C`, whose column j holds the errors of the columns from j on. So from the last column to the first each
number is rounded to what cancels the errors that are made already (the nearest plane of Babai, 1986, which GPTQ, ICLR
2023, comes to by another road).
"""

import torch
from torch import Tensor

from .quantise import GROUP, MOST_OF_FOUR, eight_bits, grouped_numbers, pack, smallest_scale
from .whiten import Root

_DAMPING = 1e-8  # of the mean diagonal of down right downᵀ, whose factor has full rank then


def whole_numbered(
    up: Tensor, down: Tensor, right: Root, *, bits: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """`up`, `down` and scales in `bits`: by `eight_bits`, or by `four_bits` and the metric `right`."""
    up, down = up.double(), down.double()
    return eight_bits(up, down, dtype=dtype) if bits == 8 else four_bits(up, down, right, dtype=dtype)


def four_bits(up: Tensor, down: Tensor, right: Root, *, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The factors `up (D_OUT, R)` and `down (R, D_IN)`, in float64, as whole numbers of four bits.

    The inner dimensions are first turned by an orthogonal matrix, the same for all layers of one rank, so that each is
    worth the mean of all and no step is as wide as the largest asks for. Then `down` is rounded by the metric `right`,
    `up` is fitted to it in closed form, `up down right dᵀ (d right dᵀ)⁻¹` for the rounded d, and rounded by the metric
    `d right dᵀ`.

    Args:
        right: of the metric over inputs, the one that the layer was factored by or the identity.
        dtype: of the scales, a floating-point one.

    Returns:
        up and down in uint8, two numbers a byte, and the scales of all groups in one vector, those of down first
        (`quantise.py`).
    """
    turn = _rotation(down.shape[0]).to(down)
    up, down = up @ turn.T, turn @ down
    down_steps, down_scales = rounded(down, right.unit_triangle(), dtype=dtype)
    weighed = right.times(grouped_numbers(down_steps, down_scales, torch.float64))
    gram = weighed @ weighed.T
    gram.diagonal().add_(_DAMPING * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny)
    factor = torch.linalg.cholesky(gram)
    fitted = torch.cholesky_solve(weighed @ (right.times(down).T @ up.T), factor).T
    up_steps, up_scales = rounded(fitted, factor / factor.diagonal(), dtype=dtype)
    return pack(up_steps), pack(down_steps), torch.cat((down_scales.flatten(), up_scales.flatten()))


def rounded(matrix: Tensor, triangle: Tensor | None, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The numbers of `matrix (N, D)`, float64, as steps of -7 to 8 in int8, and the scales (N, groups) in `dtype`.

    A scale is the number of largest magnitude in its group, with its sign, rounded to bfloat16: the range has one step
    more on one side, which is that of the number that needs it.

    Args:
        triangle: (D, D), lower, with a diagonal of ones: what an error in a row costs the columns before it
            (`Root.unit_triangle`); None to round each number to the nearest.
    """
    wanted = matrix.clone()  # minus what the errors of later columns have done already
    steps = torch.empty_like(matrix, dtype=torch.int8)
    scales = []
    for start in reversed(range(0, matrix.shape[1], GROUP)):
        group, exact = wanted[:, start : start + GROUP], matrix[:, start : start + GROUP]
        largest = group.gather(1, group.abs().argmax(1, keepdim=True))
        small = smallest_scale(dtype)
        scale = torch.where(largest.abs() < small, small, largest.bfloat16().to(dtype).double())
        errors = torch.empty_like(exact)
        for column in reversed(range(group.shape[1])):
            step = (MOST_OF_FOUR * group[:, column] / scale[:, 0]).round().clamp(1 - MOST_OF_FOUR, MOST_OF_FOUR)
            errors[:, column] = step * scale[:, 0] / MOST_OF_FOUR - exact[:, column]
            steps[:, start + column] = step
            if triangle is not None:
                before = triangle[start + column, start : start + column]
                group[:, :column] -= torch.outer(errors[:, column], before)
        if triangle is not None:
            wanted[:, :start] -= errors @ triangle[start : start + GROUP, :start]
        scales.append(scale.to(dtype))
    return steps, torch.cat(scales[::-1], 1)


def _rotation(rank: int) -> Tensor:
    """An orthogonal matrix (rank, rank) without any structure of the factors, float64, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64, generator=generator)).Q
