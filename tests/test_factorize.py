"""The solver: nothing of the same rank is better, and the spectrum says how good it is."""

import pytest
import torch
from oracles import nan_above, psd, symmetric

from gfwsvd.errors import GfwsvdError
from gfwsvd.factorize import decompose
from gfwsvd.metrics import objective

SHAPES = {"tall": (11, 6), "wide": (6, 11), "square": (8, 8), "column": (5, 1), "row": (1, 5)}
METRICS = {
    "identity": lambda size: None,
    "diagonal": lambda size: torch.linspace(0.1, 3, size),
    "matrix": lambda size: nan_above(psd(size, seed=size)),
    "ill-conditioned": lambda size: nan_above(
        psd(size, seed=size) * torch.logspace(0, -8, size).outer(torch.logspace(0, -8, size))
    ),
}


def _case(shape, left_kind, right_kind):
    d_out, d_in = SHAPES[shape]
    return torch.randn(d_out, d_in), METRICS[left_kind](d_out), METRICS[right_kind](d_in)


def _damped(metric, damping):
    if metric is None or metric.dim() == 1:
        return metric if metric is None else metric.double() + damping * metric.double().mean()
    full = symmetric(metric)
    return full + damping * full.diagonal().mean() * torch.eye(len(full), dtype=torch.float64)


PAIRS = [("identity", "identity"), ("diagonal", "identity"), ("identity", "matrix"), ("matrix", "matrix")]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pair", [*PAIRS, ("ill-conditioned", "ill-conditioned")], ids="-".join)
def test_the_energy_of_the_tail_is_the_objective_of_the_error(shape, pair):
    weight, left, right = _case(shape, *pair)
    found = decompose(weight, left, right, damping=0.05, name="layer")
    total = found.spectrum.square().sum().item()
    for rank in range(min(weight.shape) + 1):
        up, down = found.factors(weight, rank)
        measured = objective(weight.double() - up @ down, _damped(left, 0.05), _damped(right, 0.05))
        assert measured == pytest.approx(found.spectrum[rank:].square().sum().item(), rel=1e-8, abs=1e-14 * total)


@pytest.mark.parametrize("shape", ["tall", "wide", "square"])
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_no_change_of_the_factors_lowers_the_objective(shape, pair):
    weight, left, right = _case(shape, *pair)
    up, down = decompose(weight, left, right, damping=0.0, name="layer").factors(weight, 3)

    def cost(up, down):
        return objective(weight.double() - up @ down, left, right)

    best = cost(up, down)
    for size in (1.0, 0.1, 1e-2, 1e-3):
        for _ in range(25):
            change_up, change_down = size * torch.randn_like(up), size * torch.randn_like(down)
            assert cost(up + change_up, down) >= best * (1 - 1e-12)
            assert cost(up, down + change_down) >= best * (1 - 1e-12)
            assert cost(up + change_up, down + change_down) >= best * (1 - 1e-12)
    gradients = torch.autograd.functional.jacobian(lambda a, b: _cost(weight, a, b, left, right), (up, down))
    assert all(gradient.abs().max() < 1e-11 * best for gradient in gradients)


def _cost(weight, up, down, left, right):
    """The objective as a differentiable tensor."""
    error = weight.double() - up @ down

    def full(metric, size):
        if metric is None:
            return torch.eye(size, dtype=torch.float64)
        return torch.diag(metric.double()) if metric.dim() == 1 else symmetric(metric)

    return torch.trace(error.T @ full(left, error.shape[0]) @ error @ full(right, error.shape[1]))


@pytest.mark.parametrize("shape", SHAPES)
def test_without_metrics_it_is_the_truncated_svd(shape):
    weight = torch.randn(SHAPES[shape])
    found = decompose(weight, None, None, damping=0.05, name="layer")
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    torch.testing.assert_close(found.spectrum, s, rtol=1e-12, atol=1e-12)
    for rank in range(1, len(s) + 1):
        up, down = found.factors(weight, rank)
        torch.testing.assert_close(up @ down, u[:, :rank] * s[:rank] @ vh[:rank], rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pair", [*PAIRS, ("ill-conditioned", "ill-conditioned")], ids="-".join)
def test_full_rank_reconstructs_the_weight(shape, pair):
    weight, left, right = _case(shape, *pair)
    up, down = decompose(weight, left, right, damping=0.01, name="layer").factors(weight, min(weight.shape))
    torch.testing.assert_close(up @ down, weight.double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", ["tall", "wide", "square"])
def test_a_weight_of_low_rank_is_reproduced_from_that_rank_on(shape):
    d_out, d_in = SHAPES[shape]
    weight = torch.randn(d_out, 2, dtype=torch.float64) @ torch.randn(2, d_in, dtype=torch.float64)
    found = decompose(weight, psd(d_out), psd(d_in), damping=0.0, name="layer")
    assert found.spectrum[2:].max() < 1e-7 * found.spectrum[0]
    for rank in (2, 3, min(d_out, d_in)):
        up, down = found.factors(weight, rank)
        assert torch.isfinite(up).all() and torch.isfinite(down).all()
        torch.testing.assert_close(up @ down, weight, rtol=0, atol=1e-11)


def test_a_weight_of_zeros_gives_factors_of_zeros():
    weight = torch.zeros(4, 6)
    found = decompose(weight, psd(4), psd(6), damping=0.0, name="layer")
    up, down = found.factors(weight, 3)
    assert found.spectrum.tolist() == [0, 0, 0, 0]
    assert not up.any() and not down.any()


@pytest.mark.parametrize("shape", ["tall", "wide"])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_columns_of_up_are_as_long_as_rows_of_down_whatever_the_scale_of_the_metrics(shape, scale):
    weight, left, right = _case(shape, "matrix", "matrix")
    up, down = decompose(weight, scale * left.double(), right, damping=0.01, name="layer").factors(weight, 4)
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1), rtol=1e-12, atol=0)
    assert 1e-2 < up.norm() < 1e2


@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_the_factors_at_a_smaller_rank_are_the_first_of_those_at_a_larger(shape):
    weight, left, right = _case(shape, "matrix", "matrix")
    found = decompose(weight, left, right, damping=0.01, name="layer")
    (up, down), (more_up, more_down) = found.factors(weight, 2), found.factors(weight, 5)
    torch.testing.assert_close(more_up[:, :2], up, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(more_down[:2], down, rtol=1e-12, atol=1e-13)


def test_the_scale_of_the_metrics_changes_the_spectrum_alone():
    weight, left, right = _case("wide", "matrix", "matrix")
    plain = decompose(weight, left, right, damping=0.01, name="layer")
    small = decompose(weight, left * 1e-24, right * 1e6, damping=0.01, name="layer")
    torch.testing.assert_close(small.spectrum * 1e9, plain.spectrum, rtol=1e-8, atol=0)
    first, second = (up @ down for up, down in (plain.factors(weight, 3), small.factors(weight, 3)))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weight_is_decomposed_in_float64_and_left_alone(dtype):
    weight = torch.randn(6, 9).to(dtype)
    before = weight.clone()
    found = decompose(weight, psd(6), psd(9), damping=0.0, name="layer")
    up, down = found.factors(weight, 6)
    assert torch.equal(weight, before)
    torch.testing.assert_close(up @ down, weight.double(), rtol=0, atol=1e-11)


def test_a_large_layer_of_ill_conditioned_metrics_comes_within_the_bound_of_the_exact_svd():
    """Conditions above 1e12, singular values down to 1e-8 of the first: the Gram matrix sees few of their squares."""

    def metric(size):
        spread = torch.randn(size, size, dtype=torch.float64) * torch.logspace(0, -4, size, dtype=torch.float64)
        return spread @ spread.T

    weight, left, right = torch.randn(576, 1536), metric(576), metric(1536)
    found = decompose(weight, left, right, damping=0.0, name="layer")
    assert found.left.condition > 1e12 and found.right.condition > 1e12
    exact = torch.linalg.svdvals(torch.linalg.cholesky(left).T @ weight.double() @ torch.linalg.cholesky(right))
    assert exact[-1] < 1e-7 * exact[0]
    bound = 576 * torch.finfo(torch.float64).eps * exact[0].item() ** 2
    assert (found.spectrum.square() - exact.square()).abs().max() <= bound
    for rank in (1, 64, 200, 400, 550):
        up, down = found.factors(weight, rank)
        least = exact[rank:].square().sum().item()
        assert objective(weight.double() - up @ down, left, right) == pytest.approx(least, rel=1e-7)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name(value):
    weight = torch.randn(4, 6)
    weight[1, 2] = value
    with pytest.raises(GfwsvdError, match=r"layer blocks\.7\.down"):
        decompose(weight, None, None, damping=0.0, name="blocks.7.down")


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_metric_without_root_is_refused_by_layer_and_side(side):
    metrics = {"left": psd(4), "right": psd(6), side: torch.zeros(4 if side == "left" else 6)}
    with pytest.raises(GfwsvdError, match=rf"{side} metric of layer blocks\.7\.down"):
        decompose(torch.randn(4, 6), **metrics, damping=0.01, name="blocks.7.down")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_metrics_read_from_disk_serve_a_weight_on_a_gpu(shape):
    weight = torch.randn(shape)
    left, right = (torch.diag(torch.rand(size) + 0.5) for size in shape)
    here = decompose(weight, left, right, damping=1e-2, name="layer")
    there = decompose(weight.cuda(), left, right, damping=1e-2, name="layer")
    torch.testing.assert_close(there.spectrum.cpu(), here.spectrum)
    (up, down), expected = there.factors(weight.cuda(), 4), here.factors(weight, 4)
    torch.testing.assert_close((up @ down).cpu(), expected[0] @ expected[1])
