"""quadratic_form: the definition and the Triton kernel against float64."""

import pytest
import torch
from kernel_cases import (
    DEVICE,
    DTYPES,
    LAYOUTS,
    SHAPES,
    assert_as_good_as,
    far_apart,
    laid_out,
    positive_semidefinite,
    with_nan_above_diagonal,
)
from torch import Tensor

from gfwsvd_kernels import gram_accumulate, pack, quadform, quadratic_form, quadratic_form_scale, reference, tiles

TILE = tiles.Tile(16, 32, 16, 4, 2)


def triton(x: Tensor, A: Tensor) -> Tensor:
    return quadform.quadratic_form(x, A, tile=TILE)


def triton_scale(x: Tensor, A: Tensor, g: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return quadform.quadratic_form_scale(x, A, g, scale, tile=TILE)


IMPLEMENTATIONS = pytest.mark.parametrize("form", [quadratic_form, triton])
SCALING = pytest.mark.parametrize("form_scale", [quadratic_form_scale, triton_scale])


def oracle(x: Tensor, A: Tensor) -> Tensor:
    return ((x.double() @ A.double()) * x.double()).sum(1)


def rounded(x: Tensor, A: Tensor) -> Tensor:
    """With A in the dtype of x, and no other error: `(x @ A.to(x.dtype)) * x` rounds its products besides."""
    return oracle(x, A.to(x.dtype))


@IMPLEMENTATIONS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_row_has_its_quadratic_form_from_the_lower_triangle_alone(form, shape, dtype):
    num_tokens, width = SHAPES[shape]
    x, A = torch.randn(num_tokens, width, device=DEVICE).to(dtype), positive_semidefinite(width)
    q = form(x, with_nan_above_diagonal(A))
    assert q.dtype == torch.float32
    assert_as_good_as(rounded(x, A), q, oracle(x, A))


@IMPLEMENTATIONS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter_and_neighbours_in_memory_are_not_read(form, layout):
    x, A = torch.randn(37, 45, device=DEVICE), positive_semidefinite(45)
    q = form(laid_out(x, layout), laid_out(with_nan_above_diagonal(A), layout))
    assert_as_good_as(oracle(x, A), q, oracle(x, A))


@IMPLEMENTATIONS
def test_tokens_may_span_more_than_two_to_the_31_elements(form):
    x, A = far_apart(torch.randn(300, 20, device=DEVICE).half()), positive_semidefinite(20)
    assert_as_good_as(rounded(x, A), form(x, A), oracle(x, A))


def test_rows_too_far_apart_for_32_bit_offsets_are_refused_before_a_launch():
    x, far = torch.empty(4, 4, device="meta"), torch.empty(4, 2**23, device="meta").mT[:4]
    for arguments in ((far, x, x), (x, far, x), (x, x, far)):
        with pytest.raises(ValueError, match="must have strides below 8388608 elements on a GPU"):
            quadform.quadratic_form_scale(*arguments, 1.0)


@IMPLEMENTATIONS
@pytest.mark.parametrize("width", [1, 16, 45, SHAPES["many_tiles"][1]])
def test_a_packed_matrix_gives_the_same_bits(form, width):
    x, A = torch.randn(37, width, device=DEVICE), positive_semidefinite(width)
    assert torch.equal(form(x, pack(A)), form(x, A))


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_in_the_dtype_of_the_tokens_gives_its_own_form(form, dtype, shape):
    num_tokens, width = SHAPES[shape]
    x, A = torch.randn(num_tokens, width, device=DEVICE).to(dtype), positive_semidefinite(width).to(dtype)
    q = form(x, with_nan_above_diagonal(A))
    assert q.dtype == torch.float32
    assert_as_good_as(form(x.float(), A.float()), q, oracle(x, A))
    assert torch.equal(form(x, pack(A)), q)


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


@SCALING
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_scaled_by_the_root_of_the_form(form_scale, shape, dtype):
    num_tokens, width = SHAPES[shape]
    x, A = torch.randn(num_tokens, width, device=DEVICE).to(dtype), positive_semidefinite(width)
    g = torch.randn(num_tokens, 70, device=DEVICE).to(dtype)
    q, scaled = form_scale(x, with_nan_above_diagonal(A), g, 0.25)
    assert scaled.dtype == dtype and scaled.is_contiguous()
    assert_as_good_as(rounded(x, A), q, oracle(x, A))
    peer, exact = (form[:, None].mul(0.25).sqrt() * g.double() for form in (rounded(x, A), oracle(x, A)))
    assert_as_good_as(peer.to(dtype), scaled, exact)


@SCALING
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_the_scaled_side_do_not_matter(form_scale, layout):
    x, g, A = torch.randn(37, 20, device=DEVICE), torch.randn(37, 45, device=DEVICE), positive_semidefinite(20)
    _, scaled = form_scale(x, pack(A), laid_out(g, layout), 2.0)
    exact = oracle(x, A)[:, None].mul(2).sqrt() * g.double()
    assert_as_good_as(exact, scaled, exact)


@SCALING
def test_the_gram_matrix_of_scaled_rows_is_the_weighted_one(form_scale):
    x, g, A = torch.randn(60, 20, device=DEVICE), torch.randn(60, 33, device=DEVICE), positive_semidefinite(20)
    q, scaled = form_scale(x, A, g, 4.0)
    unweighted, weighted = torch.zeros(2, 33, 33, device=DEVICE)
    gram_accumulate(unweighted, scaled)
    gram_accumulate(weighted, g, weight=4 * q)
    exact = (4 * oracle(x, A) * g.double().mT) @ g.double()
    assert_as_good_as(weighted.tril(), unweighted.tril(), exact.tril())


@SCALING
def test_a_form_below_zero_gives_a_row_of_zeros_and_nan_stays_nan(form_scale):
    A = torch.tensor([[0.0, 1.0], [1.0, 0.0]], device=DEVICE)
    x = torch.tensor([[1.0, 2.0], [1.0, -2.0], [0.0, 0.0], [float("nan"), 1.0]], device=DEVICE)
    q, scaled = form_scale(x, A, torch.ones(4, 3, device=DEVICE), 4.0)
    assert q[:3].tolist() == [4.0, -4.0, 0.0] and q[3].isnan()
    assert scaled[:3].tolist() == [[4.0] * 3, [0.0] * 3, [0.0] * 3] and scaled[3].isnan().all()


@SCALING
def test_empty_sides_give_empty_results(form_scale):
    A, g = torch.eye(20, device=DEVICE), torch.ones(5, 7, device=DEVICE)
    q, scaled = form_scale(torch.empty(0, 20, device=DEVICE), A, g[:0], 1.0)
    assert q.shape == (0,) and scaled.shape == (0, 7)
    q, scaled = form_scale(torch.ones(5, 20, device=DEVICE), A, g[:, :0], 1.0)
    assert q.tolist() == [20.0] * 5 and scaled.shape == (5, 0)
    q, scaled = form_scale(torch.empty(5, 0, device=DEVICE), A[:0, :0], g, 1.0)
    assert q.tolist() == [0.0] * 5 and not scaled.any()


def test_the_definition_is_exact_in_float64_over_blocks_and_chunks():
    width = 2 * reference.BLOCK + 45
    x = torch.randn(reference.CHUNK + 9, width, dtype=torch.float64)
    A = torch.randn(width, width, dtype=torch.float64)
    A = A + A.mT
    torch.testing.assert_close(quadratic_form(x, A.tril()), oracle(x, A), rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(quadratic_form(x, pack(A)), oracle(x, A), rtol=1e-10, atol=1e-9)


def test_the_shipped_tiles_give_the_quadratic_form():
    for dtype, (num_tokens, width) in ((torch.float16, (130, 160)), (torch.float32, (70, 131))):
        x, A = torch.randn(num_tokens, width, device=DEVICE).to(dtype), positive_semidefinite(width)
        assert_as_good_as(rounded(x, A), quadform.quadratic_form(x, with_nan_above_diagonal(A)), oracle(x, A))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 45, 300])
def test_the_prepared_matrix_is_the_folded_lower_triangle_and_zeros_where_tiles_read_beyond_it(dtype, width):
    x, A = torch.empty(1, width, dtype=dtype, device=DEVICE), torch.randn(width, width, device=DEVICE)
    A += A.sign() * 1e-2  # no subnormal numbers of float16
    folded = (A.tril(-1) + A.diag().diag() / 2).to(dtype).float()
    for given in (with_nan_above_diagonal(A), pack(A), with_nan_above_diagonal(A).mT.contiguous().mT):
        matrix, power = quadform.prepared(given, x)
        assert matrix.dtype == dtype and (power is None) == (dtype != torch.float16)
        values = matrix.float() if power is None else matrix.float() * power[:, None]
        for first in range(0, width, quadform.SIDE):
            rows = slice(first, first + quadform.SIDE)
            assert torch.equal(values[rows, : rows.stop], folded[rows, : rows.stop])


def test_a_matrix_beyond_the_range_of_float16_keeps_its_precision():
    x, A = torch.randn(20, 50, device=DEVICE).half(), positive_semidefinite(50)
    for scale in (2.0**40, 2.0**-40):
        q, expected = triton(x, scale * A), triton(x, A)
        assert torch.equal(q, scale * expected)
    assert triton(x, 0 * A).tolist() == [0.0] * 20
