"""Shapes, layouts, oracles and error bounds that the tests of the kernels share."""

import torch
from torch import Tensor

from gfwsvd_kernels import tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU the Triton kernels run in Triton's interpreter
# The interpreter gets products of bfloat16 wrong, so there the kernels multiply bfloat16 in float32.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# name -> (tokens, width): around the tiles of 16 that the tests give the kernels, and on a GPU beyond the shipped ones;
# the interpreter takes its time for every tile
SHAPES = {
    "one_element": (1, 1),
    "one_token": (1, 45),
    "odd": (37, 45),
    "one_tile": (16, 16),
    "exact_tiles": (64, 48),
    "many_tiles": (90, 150) if DEVICE == "cuda" else (50, 70),
}
LAYOUTS = ("contiguous", "transposed", "sliced", "every_other")


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same matrix with other strides, its surroundings in memory filled with NaN."""
    rows, cols = values.shape
    if layout == "contiguous":
        return values
    if layout == "transposed":
        return values.mT.contiguous().mT
    if layout == "sliced":
        view = values.new_full((rows + 2, cols + 5), float("nan"))[1:-1, 3:-2]
    else:
        view = values.new_full((2 * rows, 3 * cols), float("nan"))[::2, ::3]
    return view.copy_(values)


def far_apart(values: Tensor) -> Tensor:
    """The same matrix with the widest rows that a launcher takes; 300 of them span more than 2**31 elements."""
    stride = 2**23 - 16
    span = torch.empty(len(values) * stride, dtype=values.dtype, device=values.device)  # mostly never touched
    return span.as_strided(values.shape, (stride, 1)).copy_(values)


def positive_semidefinite(width: int) -> Tensor:
    factor = torch.randn(width, width + 3, dtype=torch.float64)
    return (factor @ factor.mT / width).float().to(DEVICE)


def with_nan_above_diagonal(A: Tensor) -> Tensor:
    return A.masked_fill(torch.ones_like(A, dtype=torch.bool).triu(1), float("nan"))


def assert_as_good_as(peer: Tensor, actual: Tensor, oracle: Tensor, *, truncation: float = 0.0) -> None:
    """The error of `actual` is at most twice that of `peer`, which torch computed in the same dtype, plus rounding.

    `truncation` is what the sums of `actual` may lose besides, relative to the norm of the oracle.
    """
    assert actual.shape == oracle.shape
    for norm in (torch.linalg.vector_norm, lambda error: torch.linalg.vector_norm(error, ord=float("inf"))):
        bound = 2 * norm(peer.double() - oracle) + (2e-6 + truncation) * norm(oracle)
        assert norm(actual.double() - oracle) <= bound


def least_eigenvalue(lower: Tensor) -> float:
    """Relative to the largest, of the symmetric matrix with this lower triangle."""
    eigenvalues = torch.linalg.eigvalsh(lower.double(), UPLO="L")
    return (eigenvalues[0] / eigenvalues[-1]).item()


def truncation_bound(products: int, num_tokens: int) -> float:
    """What truncation may add to the error of a sum over tokens on the tensor cores, relative to the sum's norm.

    Tensor cores truncate when they add to an accumulator, where other units round (Fasi, Higham, Mikaitis and Pranesh,
    PeerJ Computer Science 2021). So the errors of an instruction for 16 tokens, at most 2**-24 of the accumulator on
    average, all have one sign and add up.
    """
    return products * -(-num_tokens // 16) * 2.0**-24


def places(tile: tiles.Tile, width: int) -> list[tuple[int, int]]:
    """(first row, first column) of the tiles of the Gram kernel by their numbers, as `gram.place` has them."""
    side, group = max(tile.rows, tile.cols), tile.group
    edge = -(-width // side)
    squares = []
    for first in range(0, edge, group):
        band = range(first, min(first + group, edge))
        squares += [(i, j) for left in range(0, first, group) for j in range(left, left + group) for i in band]
        squares += [(i, j) for i in band for j in range(first, i + 1)]
    return [
        (i * side + part_i, j * side + part_j)
        for i, j in squares
        for part_i in range(0, side, tile.rows)
        for part_j in range(0, side, tile.cols)
    ]
