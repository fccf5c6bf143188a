"""Metrics: what an error costs, from lower triangles."""

import itertools

import pytest
import torch
from oracles import gradient_samples, kronecker_tokens, nan_above, nearest_kronecker, psd, rearranged, symmetric

from gfwsvd.metrics import (
    inner,
    kronecker_residual,
    mean_diagonal,
    multiply,
    norm,
    objective,
    packed_diagonal,
    shrinkage,
    width,
)
from gfwsvd_kernels import pack

D_OUT, D_IN = 5, 7


def test_shrinkage_is_the_share_of_the_identity_with_the_least_expected_distance_to_the_truth():
    """In 40 dimensions, where one draw is as noisy as another."""
    generator, size = torch.Generator().manual_seed(0), 40
    truth = psd(size)
    root = torch.linalg.cholesky(truth)
    draws = root @ torch.randn(300, size, 2 * size, dtype=torch.float64, generator=generator)
    found = draws @ draws.mT / (2 * size)
    noise = (found - truth).square().sum((1, 2)).mean()
    spheres = found.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(size)
    shares = torch.linspace(0, 1, 101, dtype=torch.float64)
    distances = [((1 - s) * found + s * spheres - truth).square().sum((1, 2)).mean() for s in shares]
    chosen = [shrinkage(matrix, (noise / matrix.square().sum()).item()) for matrix in found]
    best = shares[torch.stack(distances).argmin()].item()
    assert 0.2 < best < 0.8
    assert sum(chosen) / len(chosen) == pytest.approx(best, abs=0.02)


def test_shrinkage_of_pure_chance_and_of_the_identity_leaves_the_identity():
    assert shrinkage(psd(5), 1.0) == 1
    assert shrinkage(torch.eye(5), 0.0) == 1
    assert shrinkage(psd(5), 0.0) == 0


@pytest.mark.parametrize("size", [1, 2, 513, 1500])  # the last in two pieces
def test_norm_inner_product_width_and_diagonal_of_packed_triangles_are_those_of_the_full_matrices(size):
    first, second = torch.randn(2, size, size)
    expected = (symmetric(first) * symmetric(second)).sum().item()
    packed = [pack(nan_above(matrix)) for matrix in (first, second)]
    assert inner(*packed) == pytest.approx(expected, rel=1e-10, abs=1e-8)
    assert norm(packed[0]) == pytest.approx(symmetric(first).norm().item(), rel=1e-12)
    assert width(packed[0]) == size
    assert torch.equal(packed_diagonal(packed[0]), first.diagonal())


def test_norm_of_large_and_tiny_float32_entries_neither_overflows_nor_vanishes():
    assert norm(torch.full((6,), 1e30)) == pytest.approx(3e30, rel=1e-6)
    assert norm(torch.full((6,), 1e-30)) == pytest.approx(3e-30, rel=1e-6)


def test_norm_of_nan_is_nan_rather_than_zero():
    assert torch.isnan(torch.tensor(norm(torch.tensor([torch.nan]))))


def test_mean_diagonal_of_every_kind_of_metric():
    matrix = psd(D_IN)
    assert mean_diagonal(None) == 1
    assert mean_diagonal(torch.tensor([1.0, 3.0])) == 2
    assert mean_diagonal(nan_above(matrix)) == pytest.approx(matrix.trace().item() / D_IN)


METRICS = {
    "identity": lambda size: (None, torch.eye(size, dtype=torch.float64)),
    "diagonal": lambda size: (torch.arange(1.0, size + 1), torch.diag(torch.arange(1.0, size + 1).double())),
    "matrix": lambda size: (nan_above(psd(size, seed=size)), psd(size, seed=size)),
}


@pytest.mark.parametrize(("left_kind", "right_kind"), list(itertools.product(METRICS, METRICS)))
def test_objective_is_the_trace_it_stands_for(left_kind, right_kind):
    (left, full_left), (right, full_right) = METRICS[left_kind](D_OUT), METRICS[right_kind](D_IN)
    error = torch.randn(D_OUT, D_IN)
    expected = torch.trace(error.double().T @ full_left @ error.double() @ full_right).item()
    assert objective(error, left, right) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", METRICS)
def test_multiply_is_the_product_with_the_full_metric(kind):
    metric, full = METRICS[kind](D_OUT)
    matrix = torch.randn(D_OUT, 3, dtype=torch.float64)
    torch.testing.assert_close(multiply(metric, matrix), full @ matrix, rtol=1e-12, atol=0)


def _sketched(block, probes, *, seed):
    """What `kronecker_residual` is given, for a dense rearranged block."""
    generator = torch.Generator().manual_seed(seed)
    outer = torch.randn(2, D_OUT, probes, generator=generator, dtype=torch.float64)
    inside = torch.randn(2, D_IN, probes, generator=generator, dtype=torch.float64)
    rows = torch.einsum("am,bm->mab", *outer).reshape(probes, -1)
    columns = torch.einsum("cm,dm->mcd", *inside).reshape(probes, -1)
    return rows @ block @ columns.T, rows, columns


def test_kronecker_residual_estimates_the_missed_energy_without_bias():
    x, g = torch.randn(30, D_IN), torch.randn(30, D_OUT)
    samples = gradient_samples(x, g, torch.tensor([0, 30]), "token")
    left, right, scale = nearest_kronecker(samples)
    block = rearranged(samples)
    missed = block.square().sum().item() - scale**2
    estimates = []
    for seed in range(400):
        sketch, rows, columns = _sketched(block, 32, seed=seed)
        residual = kronecker_residual(sketch, scale, rows @ left.flatten(), columns @ right.flatten())
        estimates.append(scale**2 * residual / (1 - residual))  # undoes the ratio, which is monotone but not linear
    estimates = torch.tensor(estimates, dtype=torch.float64)
    standard_error = estimates.std() / len(estimates) ** 0.5
    assert standard_error < 0.05 * missed, "too noisy to notice a bias"
    assert abs(estimates.mean() - missed) < 3 * standard_error


def test_kronecker_residual_is_zero_for_an_exactly_kronecker_block():
    x, g, _, _ = kronecker_tokens(D_OUT, D_IN)
    samples = gradient_samples(x, g, torch.tensor([0, len(x)]), "token")
    left, right, scale = nearest_kronecker(samples)
    sketch, rows, columns = _sketched(rearranged(samples), 32, seed=0)
    assert kronecker_residual(sketch, scale, rows @ left.flatten(), columns @ right.flatten()) < 1e-24


def test_kronecker_residual_of_nothing_is_zero():
    assert kronecker_residual(torch.zeros(3, 3), 0.0, torch.ones(3), torch.ones(3)) == 0
