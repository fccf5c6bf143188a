"""Ranks by how far the compressed model is from the dense one: what errors cost, against derivatives in float64."""

import math
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import Reweighted

from gfwsvd.calibration import calibrate
from gfwsvd.compress import compress
from gfwsvd.errors import GfwsvdError
from gfwsvd.joint import measured
from gfwsvd.layers import LowRankLinear, dense_weight, find_linears
from gfwsvd.losses import next_token_loss
from gfwsvd.ranks import Candidate
from gfwsvd.refine import LIMIT, ROUND_TOKENS, STEP, error_costs, refined, rescaled
from gfwsvd.track import silent
from tiny_models import cut, random_tokens, tiny_model

BATCHES = [{"input_ids": part} for part in random_tokens(16, 12).split(4)]
LOSS = next_token_loss("empirical", 0)
NAMES = list(find_linears(tiny_model("llama")))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("batches", [BATCHES, [{**BATCHES[0], "attention_mask": torch.ones(4, 12).tril(8)}]])
def test_what_an_error_costs_is_half_the_derivative_of_the_loss_by_it(kind, batches):
    model = tiny_model(kind).double()
    linears, layers = find_linears(model), cut(model, 8)
    shares = {name: torch.zeros((), dtype=torch.float64, requires_grad=True) for name in layers}
    weights = {}
    for name, layer in layers.items():
        weight = layer.product() + shares[name] * (dense_weight(linears[name]).detach() - layer.product())
        weights[f"{name}.weight"] = weight.T if kind == "gpt2" else weight
    losses = torch.cat([LOSS(Reweighted(model, weights), batch) for batch in batches]).double()
    slopes = torch.autograd.grad(losses.mean(), list(shares.values()))

    see = error_costs(linears, layers)
    mean, costs = measured(model, layers, batches, LOSS, see=see, title="", track=silent)
    assert mean == pytest.approx(losses.mean().item(), rel=1e-9)
    assert {name: cost.item() for name, cost in costs.items()} == pytest.approx(
        {name: -slope.item() / 2 for name, slope in zip(shares, slopes, strict=True)}, rel=1e-4
    )


@given(
    costs=st.lists(st.floats(1e-6, 1e3), min_size=14, max_size=14),
    predicted=st.lists(st.floats(1e-6, 1e3), min_size=14, max_size=14),
    factor=st.floats(1e-3, 1e3),
)
def test_scales_go_halfway_to_the_ratios_and_no_common_factor_moves_them(costs, predicted, factor):
    one = dict.fromkeys(NAMES, 1.0)
    costs, predicted = dict(zip(NAMES, costs, strict=True)), dict(zip(NAMES, predicted, strict=True))
    scales = rescaled(one, costs, predicted)
    mean = sum(costs.values()) / sum(predicted.values())
    for name, scale in scales.items():
        ratio = min(max(costs[name] / predicted[name] / mean, 1 / LIMIT), LIMIT)
        assert math.log(scale) == pytest.approx(STEP * math.log(ratio), abs=1e-9)
    again = rescaled(one, {name: factor * cost for name, cost in costs.items()}, predicted)
    assert again == pytest.approx(scales, rel=1e-6)
    assert rescaled(scales, predicted, predicted) == pytest.approx({name: scales[name] ** 0.5 for name in NAMES})


def test_costs_that_are_noise_alone_move_nothing():
    scales = dict(zip(NAMES, range(1, 15), strict=True))
    assert rescaled(scales, dict.fromkeys(NAMES, -1.0), dict.fromkeys(NAMES, 1.0)) == scales
    assert rescaled(scales, dict.fromkeys(NAMES, 1.0), dict.fromkeys(NAMES, 0.0)) == scales


@pytest.fixture(scope="module")
def statistics():
    return calibrate(tiny_model("llama"), BATCHES)


def mean_divergence(model, dense):
    """From the logits, in float64."""
    means = []
    for batch in BATCHES:
        with torch.no_grad():
            found, wanted = (each(**batch).logits[:, :-1].double().log_softmax(-1) for each in (model, dense))
        means.append((wanted.exp() * (wanted - found)).sum(-1).mean().item())
    return sum(means) / len(means)


@pytest.mark.parametrize("method", ["gfwsvd", "kfac"])
def test_the_ranks_nearest_to_the_dense_model_are_taken_within_the_same_size(statistics, method):
    first, model, dense = tiny_model("llama"), tiny_model("llama"), tiny_model("llama")
    options = {"method": method, "keep": 0.5, "rank_multiple": 1, "statistics": statistics}
    before = compress(first, **options)
    report = compress(model, BATCHES, **options, rounds=3)
    assert len(report.round_losses) == 4 and len(set(report.round_losses)) > 1
    assert report.round_losses[0] == pytest.approx(mean_divergence(first, dense), rel=1e-4)
    assert mean_divergence(model, dense) == pytest.approx(min(report.round_losses), rel=1e-4)
    assert report.kept <= 0.5 and before.kept <= 0.5 and before.round_losses == []
    assert all(layer.loss_scale > 0 for layer in report.layers) and before.layers[0].loss_scale is None


@pytest.mark.parametrize("steps", ["rounds", "gains"])
def test_a_model_is_itself_again_after_a_loss_that_is_nan(statistics, steps):
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def loss(model, batch):
        low_rank = any(isinstance(module, LowRankLinear) for module in model.modules())
        return LOSS(model, batch) * (math.nan if low_rank else 1)

    with pytest.raises(GfwsvdError, match=r"loss of the compressed model is NaN or inf \(4 sequences\)"):
        compress(model, BATCHES, keep=0.5, statistics=statistics, loss=loss, **{steps: 1})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(type(module) is torch.nn.Linear for module in find_linears(model).values())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_only_as_many_batches_are_read_as_a_round_needs(statistics):
    seen = []

    def loss(model, batch):
        seen.append(batch["input_ids"].shape)
        return LOSS(model, batch)

    batches = [{"input_ids": random_tokens(2, ROUND_TOKENS // 128)}] * 100
    compress(tiny_model("llama"), batches, keep=0.5, statistics=statistics, loss=loss, rounds=1)
    assert len(seen) == 2 * 64


def test_the_layers_of_a_round_are_gone_before_the_next_are_built():
    model = tiny_model("llama")
    linears, made = find_linears(model), []
    candidates = {}
    for name, module in linears.items():
        spectrum = torch.linalg.svdvals(dense_weight(module).detach())
        candidates[name] = Candidate(*dense_weight(module).shape, spectrum)

    def build(ranks):
        assert not any(layer() for layer in made)
        layers = cut(model, ranks[NAMES[0]])
        made.extend(map(weakref.ref, layers.values()))
        return layers

    ranks = dict.fromkeys(NAMES, 8)
    found = refined(model, linears, candidates, BATCHES, rounds=2, allocate=lambda _: ranks, build=build, track=silent)
    assert len(made) == 3 * len(NAMES) and len(found.losses) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": -1}, "rounds must be a whole number from 0 on, got -1"),
        ({"rounds": 1, "ranks": "uniform"}, "uniform ranks of method gfwsvd are not: leave out the rounds"),
        ({"rounds": 1, "method": "svd_llm"}, "global ranks of method svd_llm are not: leave out the rounds"),
        ({"rounds": 1}, "rounds and gains measure the loss of the compressed model on batches: give some"),
    ],
)
def test_rounds_that_cannot_be_are_refused(statistics, options, message):
    with pytest.raises(GfwsvdError, match=message):
        compress(tiny_model("llama"), statistics=statistics, **options)
