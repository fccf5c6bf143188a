"""Statistics of one layer: the power iteration against the dense singular value decomposition."""

import pytest
import torch
from oracles import gradient_samples, kronecker_tokens, nearest_kronecker, power_sweeps, rearranged, symmetric

from gfwsvd.kronecker import Sweep
from gfwsvd.statistics import (
    UNITS,
    LayerStatistics,
    accumulate_inputs,
    accumulate_outputs,
    clip_tokens,
    power_of_two_scale,
)
from gfwsvd_kernels import pack

D_OUT, D_IN = 5, 7
OFFSETS = torch.tensor([0, 9, 10, 10, 31, 40])  # sequences of many lengths, one of them empty


def _tokens(seed=0):
    """Tokens of uneven size that depend on each other, so that no unit is like another."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.rand(40, 1, generator=generator) * 3
    x = size * torch.randn(40, D_IN, generator=generator) + 0.5
    g = torch.randn(40, D_OUT, generator=generator) * torch.linspace(2, 0.2, D_OUT) + 0.3 * x[:, :D_OUT]
    return x, g


def _chunks(x, g, offsets, parts):
    """The same tokens in parts that end where sequences end."""
    bounds = torch.linspace(0, len(offsets) - 1, parts + 1).round().long().tolist()
    for first, last in zip(bounds[:-1], bounds[1:], strict=True):
        rows = slice(int(offsets[first]), int(offsets[last]))
        yield x[rows], g[rows], offsets[first : last + 1] - offsets[first]


def _swept(x, g, *, unit, sweeps, offsets=None, parts=1, sketch_seed=None):
    offsets = OFFSETS if offsets is None else offsets
    stats, sketch = LayerStatistics(x.shape[1], g.shape[1]), None
    for number in range(sweeps):
        sweep = Sweep(stats, unit=unit, sketch_seed=sketch_seed if number == 0 else None)
        for chunk in _chunks(x, g, offsets, parts):
            sweep.accumulate(*chunk)
        sketch = sweep.finish() or sketch
    if sketch is not None:
        stats.kronecker_residual = sketch.residual(stats)
    return stats


@pytest.mark.parametrize("unit", UNITS)
def test_the_power_iteration_ends_at_the_nearest_kronecker_product(unit):
    x, g = _tokens()
    left, right, scale = nearest_kronecker(gradient_samples(x, g, OFFSETS, unit))
    stats = _swept(x, g, unit=unit, sweeps=40)
    torch.testing.assert_close(symmetric(stats.left), left, rtol=0, atol=1e-5)
    torch.testing.assert_close(symmetric(stats.right), right, rtol=0, atol=1e-5)
    assert stats.scale == pytest.approx(scale, rel=1e-5)
    assert stats.convergence[-1] < 1e-3 < stats.convergence[0]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("sweeps", [1, 2, 3])
def test_each_sweep_is_one_step_of_both_factors_from_the_previous_pair(unit, sweeps):
    x, g = _tokens()
    left, right, scale = power_sweeps(gradient_samples(x, g, OFFSETS, unit), sweeps)
    stats = _swept(x, g, unit=unit, sweeps=sweeps)
    torch.testing.assert_close(symmetric(stats.left), left, rtol=0, atol=1e-6)
    torch.testing.assert_close(symmetric(stats.right), right, rtol=0, atol=1e-6)
    if sweeps == 1:  # where the trace says more
        scale = stats.trace / (left.trace() * right.trace()).item()
    assert stats.scale == pytest.approx(scale, rel=1e-5)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("sweeps", [1, 2, 8])
def test_both_factors_are_positive_semi_definite_and_of_norm_one(unit, sweeps):
    stats = _swept(*_tokens(), unit=unit, sweeps=sweeps)
    for factor in (stats.left, stats.right):
        values = torch.linalg.eigvalsh(symmetric(factor))
        assert values[0] > -1e-6 * values[-1]
        assert values[-1] > 0
        assert symmetric(factor).norm() == pytest.approx(1, rel=1e-6)


def test_convergence_is_the_sine_of_the_turn_of_the_right_factor():
    x, g = _tokens()
    samples = gradient_samples(x, g, OFFSETS, "token")
    rights = [torch.eye(D_IN, dtype=torch.float64) / D_IN**0.5, *(power_sweeps(samples, n)[1] for n in (1, 2))]
    expected = [(1 - (a * b).sum().item() ** 2) ** 0.5 for a, b in zip(rights[:-1], rights[1:], strict=True)]
    assert _swept(x, g, unit="token", sweeps=2).convergence == pytest.approx(expected, rel=1e-3)


def test_fisher_rows_are_the_sums_of_squared_gradients_of_the_weight_rows():
    x, g = _tokens()
    stats = LayerStatistics(D_IN, D_OUT)
    for rows in (slice(0, 13), slice(13, 40)):
        accumulate_outputs(stats, x[rows], g[rows], torch.tensor([0, len(x[rows])]))
    expected = gradient_samples(x, g, OFFSETS, "token").square().sum((0, 2))
    torch.testing.assert_close(stats.fisher_rows.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("unit", UNITS)
def test_the_trace_is_the_sum_of_squared_norms_of_the_gradient_samples(unit):
    x, g = _tokens()
    expected = gradient_samples(x, g, OFFSETS, unit).square().sum().item()
    for sweeps in (1, 3):
        assert _swept(x, g, unit=unit, sweeps=sweeps).trace == pytest.approx(expected, rel=1e-5)


def test_clipping_limits_a_token_to_so_many_medians_of_its_sequence():
    x, g = _tokens()
    g[4] = 0  # predicts nothing
    clipped = clip_tokens(x, g, OFFSETS, clip=1.5)
    before, after = (x.norm(dim=1) * rows.norm(dim=1) for rows in (g, clipped))
    for start, stop in zip(OFFSETS[:-1].tolist(), OFFSETS[1:].tolist(), strict=True):
        if start < stop:
            positive = before[start:stop][before[start:stop] > 0]
            limit = 1.5 * positive.median()
            torch.testing.assert_close(after[start:stop], before[start:stop].clamp(max=limit))
    assert 0 < (after < 0.999 * before).sum() < 20
    torch.testing.assert_close(clipped * g.norm(dim=1)[:, None], g * clipped.norm(dim=1)[:, None])  # directions stay


def test_clipping_of_zero_and_of_very_much_changes_nothing():
    x, g = _tokens()
    assert clip_tokens(x, g, OFFSETS, clip=0) is g
    assert torch.equal(clip_tokens(x, g, OFFSETS, clip=1e6), g)
    assert torch.equal(clip_tokens(x, torch.zeros_like(g), OFFSETS, clip=3), torch.zeros_like(g))


@pytest.mark.parametrize("unit", ["token", "sequence"])
@pytest.mark.parametrize("parts", [2, 5])
def test_streaming_in_parts_equals_all_at_once(unit, parts):
    x, g = _tokens()
    whole = _swept(x, g, unit=unit, sweeps=3, sketch_seed=1)
    streamed = _swept(x, g, unit=unit, sweeps=3, parts=parts, sketch_seed=1)
    torch.testing.assert_close(streamed.left, whole.left, rtol=0, atol=1e-6)
    torch.testing.assert_close(streamed.right, whole.right, rtol=0, atol=1e-6)
    assert streamed.scale == pytest.approx(whole.scale, rel=1e-5)
    assert streamed.kronecker_residual == pytest.approx(whole.kronecker_residual, rel=1e-4)


def test_sequences_of_one_token_make_the_units_token_and_sequence_the_same():
    x, g = _tokens()
    token = _swept(x, g, unit="token", sweeps=3)
    sequence = _swept(x, g, unit="sequence", sweeps=3, offsets=torch.arange(41))
    torch.testing.assert_close(sequence.left, token.left, rtol=0, atol=1e-6)
    torch.testing.assert_close(sequence.right, token.right, rtol=0, atol=1e-6)


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("sweeps", [1, 2])
def test_where_the_fisher_block_is_exactly_kronecker_it_is_kfac(parts, sweeps):
    x, g, left, right = kronecker_tokens(D_OUT, D_IN)
    x, g = x.float(), g.float()
    stats = _swept(x, g, unit="token", sweeps=sweeps, offsets=torch.arange(len(x) + 1), parts=parts, sketch_seed=0)
    accumulate_inputs(stats, x, OFFSETS)
    accumulate_outputs(stats, x, g, OFFSETS)
    kfac = torch.kron(symmetric(stats.output_moment), symmetric(stats.input_moment)) / len(x)
    gfwsvd = stats.scale * torch.kron(symmetric(stats.left), symmetric(stats.right))
    torch.testing.assert_close(gfwsvd, torch.kron(left, right), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(gfwsvd, kfac, rtol=1e-4, atol=1e-3)
    assert stats.kronecker_residual < 1e-9


@pytest.mark.parametrize("unit", UNITS)
def test_the_residual_estimates_the_share_that_the_fit_misses(unit):
    x, g = _tokens()
    samples = gradient_samples(x, g, OFFSETS, unit)
    *_, scale = nearest_kronecker(samples)
    missed = rearranged(samples).square().sum().item() - scale**2
    stats = _swept(x, g, unit=unit, sweeps=8)
    sweeps = [Sweep(LayerStatistics(D_IN, D_OUT), unit=unit, sketch_seed=seed) for seed in range(100)]
    for sweep in sweeps:
        sweep.accumulate(x, g, OFFSETS)
    residuals = torch.tensor([sweep.sketch.residual(stats) for sweep in sweeps], dtype=torch.float64)
    estimates = scale**2 * residuals / (1 - residuals)  # the ratio undone: what is left has no bias
    standard_error = estimates.std() / len(estimates) ** 0.5
    assert standard_error < 0.15 * missed, "too noisy to notice a bias"
    assert abs(estimates.mean() - missed) < 3 * standard_error


@pytest.mark.parametrize("factor", [1e-6, 1e-18, 1e4, 1e12])
@pytest.mark.parametrize("unit", UNITS)
def test_gradients_of_any_size_give_the_same_factors_once_scaled(unit, factor):
    x, g = _tokens()
    plain = _swept(x, g * power_of_two_scale(g), unit=unit, sweeps=3)
    sized = _swept(x, (g * factor) * power_of_two_scale(g * factor), unit=unit, sweeps=3)
    torch.testing.assert_close(sized.left, plain.left, rtol=0, atol=1e-6)
    torch.testing.assert_close(sized.right, plain.right, rtol=0, atol=1e-6)
    unscaled = plain.scale / power_of_two_scale(g) ** 2, sized.scale / power_of_two_scale(g * factor) ** 2
    assert unscaled[1] / unscaled[0] == pytest.approx(factor**2, rel=1e-5)


@pytest.mark.parametrize("size", [1e-30, 1e-6, 0.7, 1.0, 3.0, 1e4, 1e25])
def test_the_gradient_scale_is_a_power_of_two_that_brings_the_mean_square_near_one(size):
    g = size * torch.randn(200, 6)
    scale = power_of_two_scale(g)
    assert torch.frexp(torch.tensor(scale, dtype=torch.float64))[0] == 0.5, "multiplying by it rounds nothing"
    assert 0.5 < (g.double() * scale).square().mean().sqrt() < 2


def test_the_trace_is_the_sum_of_all_squared_gradients():
    x, g = _tokens()
    for unit in UNITS:
        expected = gradient_samples(x, g, OFFSETS, unit).square().sum().item()
        assert _swept(x, g, unit=unit, sweeps=2, parts=1).trace == pytest.approx(expected, rel=1e-5)


def test_gradients_of_zero_are_not_scaled():
    assert power_of_two_scale(torch.zeros(3, 4)) == 1


def test_gradients_of_zero_leave_factors_of_zero_rather_than_nan():
    x, g = _tokens()
    stats = _swept(x, torch.zeros_like(g), unit="token", sweeps=2, sketch_seed=0)
    assert not stats.left.any() and not stats.right.any()
    assert stats.scale == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("unit", UNITS)
def test_half_precision_tokens_are_accumulated_in_float32(unit, dtype):
    x, g = (values.to(dtype) for values in _tokens())
    half = _swept(x, g, unit=unit, sweeps=2)
    full = _swept(x.float(), g.float(), unit=unit, sweeps=2)
    assert half.left.dtype == half.right.dtype == torch.float32
    torch.testing.assert_close(half.left, full.left, rtol=0, atol=1e-6)
    torch.testing.assert_close(half.right, full.right, rtol=0, atol=1e-6)


def test_moments_are_plain_sums_over_tokens():
    x, g = _tokens()
    stats = LayerStatistics(D_IN, D_OUT)
    for part in (slice(0, 13), slice(13, 40)):
        offsets = torch.tensor([0, 4, len(x[part])])
        accumulate_inputs(stats, x[part], offsets)
        accumulate_outputs(stats, x[part], g[part], offsets)
    torch.testing.assert_close(symmetric(stats.input_moment), x.double().T @ x.double(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(symmetric(stats.output_moment), g.double().T @ g.double(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(stats.input_abs.double(), x.double().abs().sum(0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("unit", UNITS)
def test_the_noise_of_a_matrix_is_the_variance_of_a_sum_of_its_sequences(unit):
    """On average over probes of the estimate, here over many widths of the same tokens with zeros beside."""
    x, g = _tokens()
    offsets = OFFSETS if unit != "batch" else OFFSETS[[0, -1]]
    spans = list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
    samples = gradient_samples(x, g, offsets, unit)
    left, right, _ = power_sweeps(samples, 1)
    groups = samples.split([b - a for a, b in spans if a < b] if unit == "token" else 1)
    inputs, outputs = x.double(), g.double()
    exact = {
        "input_moment": [inputs[a:b].T @ inputs[a:b] for a, b in spans],
        "output_moment": [outputs[a:b].T @ outputs[a:b] for a, b in spans],
        "left": [torch.einsum("nac,cd,nbd->ab", group, right, group) for group in groups],
        "right": [torch.einsum("nac,ab,nbd->cd", group, left, group) for group in groups],
    }
    found = {name: [] for name in exact}
    for extra in range(200):
        wide_x, wide_g = (torch.cat((rows, torch.zeros(len(rows), extra)), 1) for rows in (x, g))
        stats = _swept(wide_x, wide_g, unit=unit, sweeps=2, offsets=offsets)
        accumulate_inputs(stats, wide_x, offsets)
        accumulate_outputs(stats, wide_x, wide_g, offsets)
        for name, estimates in found.items():
            size = sum(exact[name]).norm().item() if name in ("left", "right") else 1.0  # of a factor, to norm one
            estimates.append(stats.squared_parts[name] * size**2)
    for name, parts in exact.items():
        expected = sum(part.norm() ** 2 for part in parts).item()
        estimates = torch.tensor(found[name], dtype=torch.float64)
        standard_error = estimates.std().item() / len(estimates) ** 0.5
        assert standard_error < 0.05 * expected
        assert abs(estimates.mean().item() - expected) < 4 * standard_error, name


def test_noise_is_zero_where_all_sequences_are_the_same_and_one_over_their_number_where_they_share_nothing():
    eye = pack(torch.eye(4))
    stats = LayerStatistics(4, 4, input_moment=4 * eye, num_parts=4, squared_parts={"input_moment": 4 * 4.0})
    assert stats.noise("input_moment") == 0
    stats = LayerStatistics(4, 4, input_moment=eye, num_parts=4, squared_parts={"input_moment": 4 * 1.0})
    assert stats.noise("input_moment") == pytest.approx(1)  # each part a square of its own: all of it is chance
    assert stats.noise("right") is None
    assert (
        LayerStatistics(4, 4, input_moment=eye, num_parts=1, squared_parts={"input_moment": 4}).noise("input_moment")
        is None
    )


def test_a_warm_start_goes_on_where_the_earlier_sweeps_ended():
    x, g = _tokens()
    cold = _swept(x, g, unit="token", sweeps=3)
    begun = _swept(x, g, unit="token", sweeps=2)
    stats = LayerStatistics(D_IN, D_OUT, left=begun.left, right=begun.right)
    sweep = Sweep(stats, unit="token")
    sweep.accumulate(x, g, OFFSETS)
    sweep.finish()
    torch.testing.assert_close(stats.left, cold.left, rtol=0, atol=1e-6)
    torch.testing.assert_close(stats.right, cold.right, rtol=0, atol=1e-6)
    assert stats.trace == pytest.approx(cold.trace, rel=1e-6)
    assert stats.scale == pytest.approx(cold.scale, rel=1e-5)
    assert stats.convergence == pytest.approx(cold.convergence[-1:], rel=1e-2)


def test_online_weighs_by_what_came_before_anew_whenever_the_tokens_have_doubled():
    x, g = _tokens()
    stats = LayerStatistics(D_IN, D_OUT)
    sweep = Sweep(stats, unit="token", online=True)
    left, right = torch.zeros(D_OUT, D_OUT).double(), torch.zeros(D_IN, D_IN).double()
    weigh_left, weigh_right = torch.eye(D_OUT).double(), torch.eye(D_IN).double()
    for start, stop, renews in ((0, 10, False), (10, 20, True), (20, 25, True), (25, 40, False)):
        if renews:
            weigh_left, weigh_right = (m * len(m) ** 0.5 / m.norm() for m in (left, right))
        part, grad = x[start:stop].double(), g[start:stop].double()
        left += torch.einsum("ti,ij,tj,ta,tb->ab", part, weigh_right, part, grad, grad)
        right += torch.einsum("ta,ab,tb,ti,tj->ij", grad, weigh_left, grad, part, part)
        sweep.accumulate(x[start:stop], g[start:stop], torch.tensor([0, stop - start]))
    sweep.finish()
    torch.testing.assert_close(symmetric(stats.left), left / left.norm(), rtol=0, atol=1e-5)
    torch.testing.assert_close(symmetric(stats.right), right / right.norm(), rtol=0, atol=1e-5)


def test_online_the_scale_is_that_of_the_best_fit_by_its_factors():
    x, g = _tokens()
    samples = gradient_samples(x, g, OFFSETS, "token")
    scales = []
    for seed in range(200):
        stats = LayerStatistics(D_IN, D_OUT)
        sweep = Sweep(stats, unit="token", online=True, sketch_seed=seed)
        for chunk in _chunks(x, g, OFFSETS, 4):
            sweep.accumulate(*chunk)
        sweep.finish()
        scales.append(stats.scale)
    left, right = symmetric(stats.left), symmetric(stats.right)
    expected = torch.einsum("nac,nbd,ab,cd->", samples, samples, left, right).item()
    scales = torch.tensor(scales, dtype=torch.float64)
    assert abs(scales.mean().item() - expected) < 4 * scales.std().item() / len(scales) ** 0.5


def test_a_sweep_without_tokens_leaves_the_layer_as_it_was():
    stats = LayerStatistics(D_IN, D_OUT)
    assert Sweep(stats, unit="token", sketch_seed=0).finish() is None
    assert stats == LayerStatistics(D_IN, D_OUT)
