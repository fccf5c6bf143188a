"""quadratic_form: the definition and the Triton kernel against float64."""

import pytest
import torch
from kernel_cases import (
    DEVICE,
    DTYPES,
    LAYOUTS,
    SHAPES,
    assert_as_good_as,
    laid_out,
    positive_semidefinite,
    with_nan_above_diagonal,
)
from torch import Tensor

from gfwsvd_kernels import quadform, quadratic_form, reference, tiles


def triton(x: Tensor, A: Tensor) -> Tensor:
    return quadform.quadratic_form(x, A, tile=tiles.Tile(16, 32, 16, 4, 2))


IMPLEMENTATIONS = pytest.mark.parametrize("form", [quadratic_form, triton])


def oracle(x: Tensor, A: Tensor) -> Tensor:
    return ((x.double() @ A.double()) * x.double()).sum(1)


@IMPLEMENTATIONS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_row_has_its_quadratic_form_from_the_lower_triangle_alone(form, shape, dtype):
    num_tokens, width = SHAPES[shape]
    x, A = torch.randn(num_tokens, width, device=DEVICE).to(dtype), positive_semidefinite(width)
    q = form(x, with_nan_above_diagonal(A))
    assert q.dtype == torch.float32
    peer = ((x @ A.to(dtype)).float() * x.float()).sum(1)
    assert_as_good_as(peer, q, oracle(x, A))


@IMPLEMENTATIONS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter_and_neighbours_in_memory_are_not_read(form, layout):
    x, A = torch.randn(37, 45, device=DEVICE), positive_semidefinite(45)
    q = form(laid_out(x, layout), laid_out(with_nan_above_diagonal(A), layout))
    assert_as_good_as(oracle(x, A), q, oracle(x, A))


@IMPLEMENTATIONS
def test_the_identity_gives_squared_norms(form):
    x = torch.randn(20, 50, device=DEVICE)
    torch.testing.assert_close(form(x, torch.eye(50, device=DEVICE)), x.square().sum(1))


@IMPLEMENTATIONS
def test_an_indefinite_matrix_keeps_its_signs(form):
    A = torch.tensor([[0.0, 1.0], [1.0, 0.0]], device=DEVICE)
    q = form(torch.tensor([[1.0, 2.0], [1.0, -2.0]], device=DEVICE), A)
    assert q.tolist() == [4.0, -4.0]


@IMPLEMENTATIONS
def test_no_tokens_give_no_values(form):
    assert form(torch.empty(0, 20, device=DEVICE), torch.eye(20, device=DEVICE)).shape == (0,)


@IMPLEMENTATIONS
def test_a_repeat_is_equal_bit_for_bit(form):
    x, A = torch.randn(37, 45, device=DEVICE), positive_semidefinite(45)
    assert torch.equal(form(x, A), form(x, A))


def test_the_definition_is_exact_in_float64_over_blocks_and_chunks():
    width = 2 * reference.BLOCK + 45
    x = torch.randn(reference.CHUNK + 9, width, dtype=torch.float64)
    A = torch.randn(width, width, dtype=torch.float64)
    A = A + A.mT
    torch.testing.assert_close(quadratic_form(x, A.tril()), oracle(x, A), rtol=1e-10, atol=1e-9)


def test_the_shipped_tiles_give_the_quadratic_form():
    for dtype, (num_tokens, width) in ((torch.float16, (130, 160)), (torch.float32, (70, 131))):
        x, A = torch.randn(num_tokens, width, device=DEVICE).to(dtype), positive_semidefinite(width)
        assert_as_good_as(oracle(x, A), quadform.quadratic_form(x, with_nan_above_diagonal(A)), oracle(x, A))


def test_a_matrix_as_two_bfloat16_numbers_is_good_to_sixteen_bits():
    """What the kernel makes of A where x is bfloat16, which the interpreter cannot run: its arithmetic by torch."""
    A = torch.randn(200, 200)
    high = A.bfloat16()
    low = (A - high.float()).bfloat16()
    error = (high.double() + low.double() - A.double()).abs() / A.abs()
    assert error.max() <= 2.0**-16
