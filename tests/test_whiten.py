"""Whitening: damped roots of metrics, and what happens where there is none."""

import numpy as np
import pytest
import torch
from oracles import nan_above, psd

from gfwsvd import whiten
from gfwsvd.errors import GfwsvdError
from gfwsvd.whiten import batch_size, root, roots

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
SIZE = 9
NAME = "the left metric of layer blocks.3.up_proj"
METRICS = {
    "identity": None,
    "diagonal": torch.arange(1.0, SIZE + 1),
    "cholesky": nan_above(psd(SIZE)),
    "float32": nan_above(psd(SIZE).float()),
    "eigh": nan_above(psd(SIZE, rank=4)),
}
DAMPING = {"eigh": 0.0}  # which leaves Cholesky a singular matrix


def _full(metric):
    if metric is None:
        return torch.eye(SIZE, dtype=torch.float64)
    if metric.dim() == 1:
        return torch.diag(metric.double())
    return metric.double().tril() + metric.double().tril(-1).T


@pytest.mark.parametrize("kind", METRICS)
def test_the_root_times_its_transpose_is_the_damped_metric(kind):
    metric, damping = METRICS[kind], DAMPING.get(kind, 0.03)
    found = root(metric, damping=damping, name=NAME)
    factor = found.times(torch.eye(SIZE, dtype=torch.float64))
    full = _full(metric)
    if metric is not None:  # the identity needs no damping
        full = full + damping * full.diagonal().mean() * torch.eye(SIZE, dtype=torch.float64)
    torch.testing.assert_close(factor @ factor.T, full, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", METRICS)
def test_solve_inverts_times(kind):
    found = root(METRICS[kind], damping=DAMPING.get(kind, 0.03), name=NAME)
    matrix = torch.randn(4, SIZE, dtype=torch.float64)
    rtol = 1e-8 if kind == "eigh" else 1e-11  # singular values a million times apart
    torch.testing.assert_close(found.solve(found.times(matrix)), matrix, rtol=rtol, atol=rtol)
    torch.testing.assert_close(found.times(found.solve(matrix)), matrix, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("kind", [kind for kind in METRICS if kind != "identity"])
def test_the_metric_is_not_modified(kind):
    metric = METRICS[kind].clone()
    root(metric, damping=DAMPING.get(kind, 0.03), name=NAME)
    torch.testing.assert_close(metric, METRICS[kind], rtol=0, atol=0, equal_nan=True)


def test_an_eigendecomposition_is_made_only_where_cholesky_refuses(monkeypatch):
    def refuse(*_):
        raise AssertionError("an eigendecomposition of a positive definite matrix")

    singular, definite = psd(SIZE, rank=4), psd(SIZE)
    assert root(singular, damping=0.0, name=NAME).route == "eigh"
    monkeypatch.setattr(torch.linalg, "eigh", refuse)
    assert root(definite, damping=0.0, name=NAME).route == "cholesky"
    assert root(singular, damping=1e-3, name=NAME).route == "cholesky"


@pytest.mark.parametrize("damping", [0.0, 1e-18])
def test_damping_reports_what_a_singular_metric_needed_beyond_the_argument(damping):
    metric = psd(SIZE, rank=4)
    found = root(metric, damping=damping, name=NAME)
    factor = found.times(torch.eye(SIZE, dtype=torch.float64))
    added = torch.linalg.eigvalsh(factor @ factor.T - metric)
    assert found.damping > damping
    reported = found.damping * metric.diagonal().mean()
    assert added.max() <= reported * (1 + 1e-3) + 1e-15
    assert added.max() >= 0.3 * reported
    assert np.isfinite(found.condition) and 1e11 < found.condition < 1e13


def test_damping_reports_the_argument_where_that_was_enough():
    for kind in ("diagonal", "cholesky"):
        assert root(METRICS[kind], damping=0.03, name=NAME).damping == 0.03


def _with_spectrum(values, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))
    return basis * torch.as_tensor(values, dtype=torch.float64) @ basis.T


SPECTRA = {
    "flat": torch.ones(40),
    "one large": torch.cat([torch.ones(199), torch.tensor([3.0])]),
    "one small": torch.cat([torch.ones(199), torch.tensor([1e-6])]),
    "geometric": torch.logspace(0, 9, 60),
    "linear": torch.linspace(1, 100, 100),
    "single": torch.tensor([2.0]),
}


@pytest.mark.parametrize("kind", SPECTRA)
def test_the_condition_is_estimated_within_a_factor_two(kind):
    metric = _with_spectrum(SPECTRA[kind])
    expected = np.linalg.cond(metric.numpy())
    assert expected / 2 < root(metric, damping=0.0, name=NAME).condition < expected * 2


def test_the_condition_is_seen_in_directions_without_mean_and_slope():
    direction = torch.zeros(SIZE, dtype=torch.float64)
    direction[:3] = torch.tensor([1.0, -2.0, 1.0]) / 6**0.5
    metric = torch.eye(SIZE, dtype=torch.float64) + 7 * torch.outer(direction, direction)
    assert 4 < root(metric, damping=0.0, name=NAME).condition < 16


def test_the_condition_of_a_diagonal_is_exact():
    assert root(torch.tensor([1.0, 4.0, 2.0]), damping=0.0, name=NAME).condition == 4


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12])
def test_roots_do_not_depend_on_the_scale_of_the_metric(scale):
    metric = psd(SIZE)
    small, plain = (root(metric * factor, damping=0.01, name=NAME) for factor in (scale, 1.0))
    torch.testing.assert_close(small.factor / scale**0.5, plain.factor, rtol=1e-12, atol=1e-14)
    assert small.condition == pytest.approx(plain.condition, rel=1e-9)


BROKEN = {
    "nan": (psd(SIZE).index_fill(0, torch.tensor(4), torch.nan), "finite"),
    "inf": (psd(SIZE).index_fill(1, torch.tensor(0), torch.inf), "finite"),
    "nan diagonal": (torch.tensor([1.0, torch.nan]), "finite"),
    "zero": (torch.zeros(SIZE, SIZE), "zeros only"),
    "zero diagonal": (torch.zeros(SIZE), "zeros only"),
    "negative": (-psd(SIZE), "singular"),
    "indefinite": (torch.diag(torch.tensor([1.0, 2.0, -0.5])), "not positive semi-definite"),
    "negative entry": (torch.tensor([1.0, 2.0, -0.5]), "singular"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_metric_without_a_root_is_refused_by_name(kind):
    metric, reason = BROKEN[kind]
    with pytest.raises(GfwsvdError, match=reason) as caught:
        root(metric, damping=1e-3, name=NAME)
    assert NAME in str(caught.value)


def test_a_diagonal_with_zeros_needs_damping():
    diagonal = torch.tensor([1.0, 0.0])
    with pytest.raises(GfwsvdError, match="raise damping"):
        root(diagonal, damping=0.0, name=NAME)
    assert root(diagonal, damping=0.1, name=NAME).route == "diagonal"


def test_the_damping_that_the_error_asks_for_is_enough():
    metric = torch.diag(torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64))
    with pytest.raises(GfwsvdError, match="raise damping above 6.0e-01"):
        root(metric, damping=0.0, name=NAME)
    with pytest.raises(GfwsvdError, match="raise damping above 6.0e-01"):
        root(metric, damping=0.1, name=NAME)
    assert root(metric, damping=0.61, name=NAME).route == "cholesky"


@pytest.mark.parametrize("damping", [-1e-3, float("nan"), float("inf")])
def test_a_damping_that_is_no_share_is_refused(damping):
    with pytest.raises(GfwsvdError, match="damping"):
        root(psd(SIZE), damping=damping, name=NAME)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_roots_found_together_are_those_found_alone(device):
    matrices = [psd(SIZE), 1e-6 * psd(SIZE).float(), psd(SIZE, rank=4), psd(SIZE) + torch.eye(SIZE)]
    names = [f"the left metric of layer {number}" for number in range(4)]
    metrics = [nan_above(matrix).to(device) for matrix in matrices]
    found = roots(metrics, damping=0.0, names=names)
    assert [each.route for each in found] == ["cholesky", "cholesky", "eigh", "cholesky"]
    for together, metric, name in zip(found, metrics, names, strict=True):
        alone = root(metric, damping=0.0, name=name)
        eye = torch.eye(SIZE, dtype=torch.float64, device=device)
        torch.testing.assert_close(together.times(eye), alone.times(eye), rtol=1e-12, atol=1e-12)
        assert (together.route, together.damping) == (alone.route, alone.damping)
        assert together.condition == pytest.approx(alone.condition, rel=1e-6)
    for metrics in ([None] * 4, [torch.arange(1.0, SIZE + number) for number in range(4)]):
        found = roots(metrics, damping=0.1, names=names)
        assert [each.route for each in found] == ["identity" if metrics[0] is None else "diagonal"] * 4


def test_a_metric_without_a_root_among_others_is_refused_by_its_own_name():
    for broken, reason in BROKEN.values():
        if broken.dim() == 2:
            metrics = [torch.eye(len(broken)), broken, torch.eye(len(broken))]
            with pytest.raises(GfwsvdError, match=f"^the second .*{reason}"):
                roots(metrics, damping=1e-3, names=["the first", "the second", "the third"])


def test_only_on_a_gpu_are_roots_found_together_and_of_wide_layers_one_by_one():
    assert batch_size(576, 1536, "cpu") == 1
    assert batch_size(4096, 4096, "cuda") == 1
    assert batch_size(576, 1536, "cuda") == 6
    assert 6 * (576**2 + 1536**2) <= whiten.BATCH_NUMBERS["cuda"]
