"""Gains of outputs: slopes and curvatures against float64, only what lowers the held-out loss, folded into factors."""

import itertools
import sys
from functools import partial

import pytest
import torch
from oracles import Reweighted, psd, symmetric

from gfwsvd import gains
from gfwsvd.calibration import calibrate
from gfwsvd.compress import compress
from gfwsvd.errors import GfwsvdError
from gfwsvd.gains import HELDOUT_TOKENS, STEP_TOKENS, fitted_gains, half_curvature, output_slopes
from gfwsvd.joint import measured, placed
from gfwsvd.layers import LowRankLinear, dense_weight, find_linears
from gfwsvd.losses import divergence, next_token_loss
from gfwsvd.methods import METHODS
from gfwsvd.metrics import objective
from gfwsvd.track import silent
from gfwsvd.work import open_work
from tiny_models import cut, random_tokens, tiny_model

COMPRESS = sys.modules["gfwsvd.compress"]  # which the package names the function in it by
BATCHES = [{"input_ids": part} for part in random_tokens(16, 12).split(4)]
PADDED = {**BATCHES[0], "attention_mask": torch.ones(4, 12).tril(8)}
LOSS = next_token_loss("empirical", 0)


@pytest.fixture(scope="module")
def statistics():
    return calibrate(tiny_model("llama"), BATCHES)


@pytest.fixture
def bold(monkeypatch):
    """Steps that show on a few tokens of a random model."""
    monkeypatch.setattr(COMPRESS, "spread", lambda lost: 10.0)
    monkeypatch.setattr(gains, "FIRST_RATE", 0.5)


def held_out_divergence(model):
    """Of a compressed tiny llama from the dense one, on the batches that are held out: the last two of four."""
    dense = tiny_model("llama")
    with torch.no_grad():
        found = []
        for batch in BATCHES[2:]:
            p, q = (m(**batch).logits[:, :-1].double().log_softmax(-1) for m in (dense, model))
            found.append((p.exp() * (p - q)).sum(-1).flatten())
    return torch.cat(found).mean().item()


@pytest.mark.parametrize("chunk_rows", [1, 5, 1000])
def test_the_divergence_is_that_of_the_predicted_tokens_and_nothing_flows_into_the_reference(chunk_rows, monkeypatch):
    model = tiny_model("llama").double()
    layers = cut(model, 8)
    rows = [(text, t) for text, t in itertools.product(range(4), range(11)) if PADDED["attention_mask"][text, t + 1]]
    at = tuple(torch.tensor(rows).T)
    with torch.no_grad():
        dense = model(**PADDED).logits[at].log_softmax(-1)
    with placed(model, layers):
        low_rank = model(**PADDED).logits[at].log_softmax(-1)
    expected = (dense.exp() * (dense - low_rank)).sum(-1)
    ups = [layer.up for layer in layers.values()]
    slopes = torch.autograd.grad(expected.sum(), ups)
    linears = find_linears(model)
    monkeypatch.setattr("gfwsvd.losses.CHUNK_LOGITS", chunk_rows * dense.shape[-1])
    with placed(model, layers):
        found = divergence(lambda model: placed(model, linears))(model, PADDED)
        assert all(model.get_submodule(name) is layer for name, layer in layers.items())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    found.sum().backward()
    assert all(module.weight.grad is None for module in linears.values())
    for up, slope in zip(ups, slopes, strict=True):
        torch.testing.assert_close(up.grad, slope, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("batches", [BATCHES, [PADDED]])
def test_slopes_are_the_derivatives_of_the_loss_by_the_gains(kind, batches):
    model = tiny_model(kind).double()
    layers = cut(model, 8)
    scales = {
        name: torch.ones(len(layer.up), dtype=torch.float64, requires_grad=True) for name, layer in layers.items()
    }
    weights = {f"{name}.weight": scales[name][:, None] * layer.product() for name, layer in layers.items()}
    weights = {name: weight.T if kind == "gpt2" else weight for name, weight in weights.items()}
    losses = torch.cat([LOSS(Reweighted(model, weights), batch) for batch in batches]).double()
    expected = torch.autograd.grad(losses.mean(), list(scales.values()))
    mean, found = measured(model, layers, batches, LOSS, see=output_slopes(layers), title="", track=silent)
    assert mean == pytest.approx(losses.mean().item(), rel=1e-9)
    for name, slopes in zip(scales, expected, strict=True):
        torch.testing.assert_close(found[name], slopes, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("left", [None, torch.rand(7, dtype=torch.float64), psd(7).tril()])
@pytest.mark.parametrize("right", [None, torch.rand(9, dtype=torch.float64), psd(9, seed=1).tril()])
def test_the_curvature_of_a_gain_is_the_objective_of_its_row(left, right):
    draw = torch.Generator().manual_seed(0)
    up, down = torch.randn(7, 3, generator=draw), torch.randn(3, 9, generator=draw)
    found = half_curvature(LowRankLinear.from_factors(up, down), left, right)
    for i in range(7):
        row = torch.zeros(7, 9, dtype=torch.float64)
        row[i] = (up.double() @ down.double())[i]
        assert found[i].item() == pytest.approx(objective(row, left, right), rel=1e-9)


def test_the_first_step_is_a_share_of_newtons_by_as_many_tokens_as_there_are():
    model = tiny_model("llama")
    linears, layers, again = find_linears(model), cut(model, 8), cut(model, 8)
    loss = divergence(lambda model: placed(model, linears))
    curvatures = {name: torch.rand(len(layer.up), dtype=torch.float64) for name, layer in layers.items()}
    fitted = fitted_gains(model, linears, layers, BATCHES, steps=1, curvatures=curvatures, deviation=0.2, track=silent)
    _, slopes = measured(model, again, BATCHES[:2], loss, see=output_slopes(again), title="", track=silent)
    newton = {name: -slopes[name] / (2 * curvatures[name] + 1 / (0.2**2 * 2 * 48)) for name in layers}
    shares = torch.cat([(fitted.gains[name] - 1) / newton[name] for name in layers])
    assert shares.std() < 1e-6 * shares.mean()
    assert (
        min(abs(shares.mean().item() - gains.FIRST_RATE * gains.SLOWER**tries) for tries in range(gains.TRIES)) < 1e-6
    )
    assert fitted.losses[1] < fitted.losses[0]


@pytest.mark.parametrize("method", ["gfwsvd", "kfac"])
def test_gains_lower_the_divergence_of_the_same_size_and_the_report_says_how_far(bold, statistics, method):
    plain, model = tiny_model("llama"), tiny_model("llama")
    options = {"method": method, "keep": 0.3, "rank_multiple": 1, "statistics": statistics}
    before = compress(plain, **options)
    report = compress(model, BATCHES, **options, gains=3)
    assert len(report.gain_losses) == 4 and before.gain_losses == []
    assert report.gain_losses[-1] < report.gain_losses[0]
    assert all(later <= earlier for earlier, later in itertools.pairwise(report.gain_losses))
    assert report.gain_losses[0] == pytest.approx(held_out_divergence(plain), rel=1e-4)
    assert report.gain_losses[-1] == pytest.approx(held_out_divergence(model), rel=1e-4)
    assert [layer.rank for layer in report.layers] == [layer.rank for layer in before.layers]
    assert report.stored == before.stored
    assert all((layer.gain > 0) == (layer.rank is not None) for layer in report.layers if layer.rank is not None)


@pytest.mark.parametrize("options", [{"storage": "factors"}, {"storage": "pivoted"}, {"storage": "factors", "bits": 8}])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gains_are_in_the_factors_and_biases_have_none(bold, kind, options):
    plain, model = tiny_model(kind), tiny_model(kind)
    options = {**options, "keep": 0.3, "statistics": calibrate(plain, BATCHES)}
    compress(plain, **options)
    compress(model, BATCHES[:2] * 2, **options, gains=2)  # what is held out is what they are fitted to
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    changed = 0.0
    for name, layer in layers.items():
        other = plain.get_submodule(name)
        before, after = other.product(torch.float64), layer.product(torch.float64)
        found = (after * before).sum(1) / before.square().sum(1)
        rounding = 2e-2 if "bits" in options else 1e-5
        assert (after - found[:, None] * before).norm() <= rounding * after.norm()
        assert layer.bias is None and other.bias is None or torch.equal(layer.bias, other.bias)
        changed = max(changed, (found - 1).abs().max().item())
    assert changed > 1e-3


def test_a_loss_of_ones_own_takes_the_place_of_the_divergence(bold, statistics):
    model = tiny_model("llama")

    def loss(model, batch):
        return model(**batch).logits.square().mean((1, 2))

    report = compress(model, BATCHES, keep=0.5, statistics=statistics, loss=loss, gains=2)
    with torch.no_grad():
        losses = torch.cat([loss(model, batch) for batch in BATCHES[2:]])
    assert report.gain_losses[-1] == pytest.approx(losses.mean().item(), rel=1e-4)
    assert report.gain_losses[-1] < report.gain_losses[0]


def test_each_step_is_on_further_text_and_the_end_is_held_out():
    """Batches of `n` tokens: the last ones are held out, the others make parts in their order, over and over."""
    model = tiny_model("llama")
    linears, layers = find_linears(model), cut(model, 8)
    batches = [{"input_ids": torch.full((1, 64), 3 + number)} for number in range(11)]
    batches = [{"input_ids": batch["input_ids"].repeat(STEP_TOKENS // 128, 1)} for batch in batches]  # two to a step
    seen, curvatures = [], {name: torch.ones(len(layer.up)) for name, layer in layers.items()}

    def loss(model, batch):
        seen.append((int(batch["input_ids"][0, 0]) - 3, torch.is_grad_enabled()))
        return LOSS(model, {"input_ids": batch["input_ids"][:1]})

    fitted_gains(
        model, linears, layers, batches, steps=6, curvatures=curvatures, deviation=0.2, loss=loss, track=silent
    )
    held_out = HELDOUT_TOKENS // (STEP_TOKENS // 2)
    assert {number for number, grad in seen if not grad} == set(range(11 - held_out, 11))
    fitted_on = [number for number, grad in seen if grad]
    assert fitted_on == [0, 1, 2, 3, 4, 5, 6, 7, 8] + [0, 1, 2, 3], "what is left over goes to the last part"


def test_gains_that_were_interrupted_go_on_after_their_last_step_to_the_same_bits(tmp_path):
    model = tiny_model("llama")
    linears = find_linears(model)
    curvatures = {name: torch.ones(len(layer.up)) for name, layer in cut(model, 8).items()}
    fit = partial(fitted_gains, model, linears, batches=BATCHES, steps=4, curvatures=curvatures, deviation=0.2)
    whole, layers = cut(model, 8), cut(model, 8)
    expected = fit(whole, track=silent)
    titles = []

    def until_the_third(items, title):
        titles.append(title)
        if title.startswith("gains, step 3 of 4,"):
            raise KeyboardInterrupt
        return items

    with pytest.raises(KeyboardInterrupt), open_work(tmp_path / "work", {}) as work:
        fit(layers, work=work, track=until_the_third)
    again = cut(model, 8)
    with open_work(tmp_path / "work", {}) as work:
        titles.clear()
        found = fit(again, work=work, track=lambda items, title: titles.append(title) or items)
        assert titles[0] == "gains, step 3 of 4"
        assert fit(cut(model, 8), work=work, track=until_the_third).losses == expected.losses, "nothing is left to do"
    assert found.losses == expected.losses and found.losses[-1] < found.losses[0]
    for name, layer in again.items():
        assert torch.equal(found.gains[name], expected.gains[name]) and torch.equal(layer.up, whole[name].up)


def test_gains_are_expected_as_far_from_one_as_outputs_are_from_the_dense_ones(statistics, monkeypatch):
    """By the error of each layer in the damped metrics over that of a layer of zeros, in float64."""
    given = []

    def spy(*arguments, deviation, **options):
        given.append(deviation)
        return fitted_gains(*arguments, deviation=deviation, **options)

    monkeypatch.setattr(COMPRESS, "fitted_gains", spy)
    model, dense, row = tiny_model("llama"), find_linears(tiny_model("llama")), METHODS["gfwsvd"]
    for keep in (0.4, 0.8):
        options = {"keep": keep, "statistics": statistics, "guard": False, "rank_multiple": 1}
        model = tiny_model("llama")
        compress(model, **options)
        lost = []
        for name, module in model.named_modules():
            if isinstance(module, LowRankLinear):
                stats, weight = statistics.layers[name], dense_weight(dense[name]).double()
                metrics = [symmetric(row.left(stats, statistics.num_losses)), symmetric(row.right(stats))]
                for metric in metrics:
                    metric.diagonal().add_(0.01 * metric.diagonal().mean())
                error = weight - module.product(torch.float64)
                lost.append(objective(error, *metrics) / objective(weight, *metrics))
        compress(tiny_model("llama"), BATCHES, gains=1, **options)
        assert given[-1] == pytest.approx((sum(lost) / len(lost)) ** 0.5, rel=1e-4)
    assert given[1] < 0.7 * given[0]


def test_a_model_that_stays_dense_has_no_gains(statistics):
    report = compress(tiny_model("llama"), BATCHES, keep=1.0, statistics=statistics, gains=1)
    assert report.gain_losses == [] and all(layer.kind == "dense" and layer.gain is None for layer in report.layers)


def test_one_batch_is_halved_into_what_is_fitted_to_and_what_is_held_out(statistics):
    both = [
        compress(tiny_model("llama"), given, keep=0.3, statistics=statistics, gains=2).gain_losses
        for given in (BATCHES[:1], [{"input_ids": half} for half in BATCHES[0]["input_ids"].split(2)])
    ]
    assert both[0] == both[1] and len(both[0]) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gains": -1}, "gains must be a whole number of steps from 0 on, got -1"),
        ({"gains": 1.5}, "gains must be a whole number"),
        ({"gains": 1, "method": "svd_llm"}, "those of method svd_llm do not: leave them out"),
        ({"gains": 1, "batches": None}, "rounds and gains measure the loss of the compressed model on batches"),
        (
            {"gains": 1, "batches": [{"input_ids": random_tokens(1, 12)}]},
            "at least 2 batches, or 2 sequences .*, got 1",
        ),
        ({"gains": 1, "batches": BATCHES[:1], "loss": LOSS}, "at least 2 batches, .* one of your own, got 1"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_the_model(statistics, options, message):
    model = tiny_model("llama")
    with pytest.raises(GfwsvdError, match=message):
        compress(model, **{"batches": BATCHES, "statistics": statistics, "keep": 0.5, **options})
    assert all(type(module) is torch.nn.Linear for module in find_linears(model).values())
