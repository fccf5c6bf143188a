"""The pivoted form: exact, well conditioned, and smaller."""

import pytest
import torch

from gfwsvd.pivot import LARGEST_COEFFICIENT, Pivoted, pivoted

SHAPES = [(6, 3, 5), (40, 39, 60), (200, 64, 100), (7, 1, 1)]


def product(form: Pivoted) -> torch.Tensor:
    return torch.cat((form.down, form.up @ form.down))[form.order()]


@pytest.mark.parametrize(("d_out", "rank", "d_in"), SHAPES)
def test_the_form_is_the_product_of_the_factors(d_out, rank, d_in):
    up, down = torch.randn(d_out, rank, dtype=torch.float64), torch.randn(rank, d_in, dtype=torch.float64)
    form = pivoted(up, down)
    assert form.down.shape == (rank, d_in) and form.up.shape == (d_out - rank, rank)
    torch.testing.assert_close(product(form), up @ down, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(form.down, (up @ down)[form.pivots], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("d_out", "rank", "d_in"), SHAPES)
def test_the_coefficients_are_small(d_out, rank, d_in):
    """Also where the factors are ill-conditioned, whose rows alone would make bad pivots."""
    up = torch.randn(d_out, rank, dtype=torch.float64) * torch.logspace(0, -6, rank, dtype=torch.float64)
    form = pivoted(up, torch.randn(rank, d_in, dtype=torch.float64))
    assert form.up.abs().max() <= LARGEST_COEFFICIENT + 1e-6


def test_the_order_puts_every_output_in_its_place():
    form = pivoted(torch.randn(9, 4, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64))
    order = form.order()
    assert order.dtype == torch.int32 and sorted(order.tolist()) == list(range(9))
    assert order[form.pivots].tolist() == [0, 1, 2, 3]
    rest = [output for output in range(9) if output not in form.pivots.tolist()]
    assert order[rest].tolist() == [4, 5, 6, 7, 8]


def test_factors_of_a_lower_rank_than_they_have_columns_stay_exact():
    up, down = torch.randn(30, 8, dtype=torch.float64), torch.randn(8, 20, dtype=torch.float64)
    up[:, 5:], down[5:] = 0, 0
    torch.testing.assert_close(product(pivoted(up, down)), up @ down, rtol=1e-9, atol=1e-9)


def test_small_coefficients_keep_half_precision_close():
    """The error of rounding is that of the format, some times over, at any rank."""
    u, s, vh = torch.linalg.svd(torch.randn(300, 200, dtype=torch.float64), full_matrices=False)
    for rank in (20, 100, 180):
        up, down = u[:, :rank] * s[:rank], vh[:rank]
        form = pivoted(up, down)
        rounded = Pivoted(form.down.bfloat16().double(), form.up.bfloat16().double(), form.pivots)
        assert (product(rounded) - up @ down).norm() < 8 * 2.0**-9 * (up @ down).norm()
