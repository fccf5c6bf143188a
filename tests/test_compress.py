"""Compression of models in memory: all or nothing, and as good as predicted."""

import copy
import itertools
import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from gfwsvd.calibration import calibrate
from gfwsvd.compress import compress
from gfwsvd.errors import GfwsvdError
from gfwsvd.latency import LatencyTable
from gfwsvd.layers import LowRankLinear, dense_weight, find_linears, fingerprint
from gfwsvd.methods import METHODS
from gfwsvd.metrics import objective
from gfwsvd.outcome import CompressionReport
from gfwsvd.ranks import RANKS, STORAGE
from gfwsvd.track import silent
from tiny_models import VOCABULARY, random_tokens, tiny_model

compress_module = sys.modules["gfwsvd.compress"]  # the package exports the function under the same name
BATCHES = [{"input_ids": part} for part in random_tokens(16, 12).split(8)]


@pytest.fixture(scope="module")
def statistics():
    """Of the tiny llama, for all methods."""
    return calibrate(tiny_model("llama"), BATCHES)


@pytest.fixture(scope="module")
def gpt2_statistics():
    return calibrate(tiny_model("gpt2"), BATCHES)


def _logits(model, ids=BATCHES[0]["input_ids"]):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(("method", "ranks"), list(itertools.product(METHODS, RANKS)))
@pytest.mark.parametrize("storage", STORAGE)
def test_the_compressed_model_is_the_dense_one_with_the_products_of_the_factors(
    kind, method, ranks, storage, statistics, gpt2_statistics
):
    model = tiny_model(kind)
    stats = statistics if kind == "llama" else gpt2_statistics
    options = {"method": method, "ranks": ranks, "keep": 0.6, "rank_multiple": 4, "storage": storage}
    report = compress(model, **options, statistics=stats)
    dense = tiny_model(kind)
    originals = find_linears(dense)
    for layer in report.layers:
        module = model.get_submodule(layer.name)
        assert isinstance(module, LowRankLinear) == (layer.kind != "dense")
        if layer.kind != "dense":
            assert module.rank == layer.rank and module.rank % 4 == 0
            pivots = storage == "pivoted" and layer.rank**2 > layer.d_out
            assert module.kind == layer.kind == ("pivoted" if pivots else "lowrank")
            with torch.no_grad():
                dense_weight(originals[layer.name]).copy_(module.product())
            assert (module.bias is None) == (originals[layer.name].bias is None)
    torch.testing.assert_close(_logits(model), _logits(dense), rtol=1e-3, atol=1e-3)
    assert any(layer.kind != "dense" for layer in report.layers)


@pytest.mark.parametrize(("method", "ranks"), list(itertools.product(METHODS, RANKS)))
@pytest.mark.parametrize("storage", STORAGE)
def test_the_report_counts_what_the_model_holds(method, ranks, storage, statistics):
    model = tiny_model("llama")
    dense = sum(parameter.numel() for parameter in model.parameters())
    linears = sum(dense_weight(module).numel() for module in find_linears(model).values())
    options = {"method": method, "ranks": ranks, "keep": 0.7, "rank_multiple": 2, "storage": storage}
    report = compress(model, **options, statistics=statistics)
    stored = sum(
        tensor.numel()
        for layer in report.layers
        for name, tensor in model.get_submodule(layer.name).state_dict().items()
        if name != "bias"
    )
    assert (report.stored, report.dense) == (stored, linears)
    assert report.stored == sum(layer.stored for layer in report.layers)
    assert report.kept == stored / linears <= report.keep == 0.7
    assert (report.model_dense, report.model_stored) == (dense, dense - linears + stored)
    held = {id(tensor): tensor.numel() for tensor in model.state_dict(keep_vars=True).values()}  # shared ones once
    assert report.model_stored == sum(held.values())
    assert report.predicts_loss == (method in ("fwsvd", "kfac", "gfwsvd"))
    assert [layer.name for layer in report.layers] == list(find_linears(tiny_model("llama")))


@pytest.mark.parametrize("method", METHODS)
def test_the_predicted_loss_of_a_layer_is_the_objective_of_its_error(method, statistics):
    model, row = tiny_model("llama"), METHODS[method]
    weights = {name: dense_weight(module) for name, module in find_linears(tiny_model("llama")).items()}
    report = compress(model, method=method, keep=0.5, rank_multiple=2, statistics=statistics, damping=0.0, guard=False)
    for layer in report.layers:
        if layer.kind == "dense":
            assert layer.predicted_loss == 0 and layer.rank is None and layer.reason
            continue
        module, stats = model.get_submodule(layer.name), statistics.layers[layer.name]
        error = weights[layer.name].double() - module.product(torch.float64)
        measured = objective(error, row.left(stats, statistics.num_losses), row.right(stats))
        assert layer.predicted_loss == pytest.approx(measured, rel=1e-3)
        assert (layer.reason == "") == (layer.kind == "pivoted")


def test_the_report_holds_how_sound_the_numbers_are(statistics):
    report = compress(tiny_model("llama"), keep=0.7, statistics=statistics, damping=0.03, guard=False)
    for layer in report.layers:
        assert layer.damping_left == layer.damping_right == 0.03
        assert 1 < layer.condition_left < 1e3 and 1 < layer.condition_right < 1e3
        assert 0 <= layer.convergence < 1
        assert 0 <= layer.kronecker_residual < 1
        assert layer.spectrum == sorted(layer.spectrum, reverse=True)
        assert layer.spectrum_index[0] == 0 and layer.spectrum_index[-1] == min(layer.d_in, layer.d_out) - 1
        assert len(layer.spectrum) == len(layer.spectrum_index) <= 64
    without = compress(tiny_model("llama"), keep=0.7, method="kfac", statistics=statistics)
    assert all(layer.convergence is layer.kronecker_residual is None for layer in without.layers)


@pytest.mark.parametrize("method", METHODS)
def test_the_report_survives_json(method, statistics):
    report = compress(tiny_model("llama"), method=method, keep=0.7, statistics=statistics)
    text = json.dumps(report.to_json(), allow_nan=False)
    assert CompressionReport.from_json(json.loads(text)) == report
    assert json.dumps(CompressionReport.from_json(json.loads(text)).to_json()) == text


@pytest.mark.parametrize("values", [{}, {"layers": []}, {"layers": [3]}, {"layers": [{"name": "x"}]}, []])
def test_json_that_is_no_report_is_refused(values):
    with pytest.raises(GfwsvdError, match="not a compression report"):
        CompressionReport.from_json(values)


def test_all_layers_dense_leaves_the_model_as_it_was(statistics):
    model = tiny_model("llama")
    before = dict(model.named_modules())
    report = compress(model, keep=1, statistics=statistics)
    assert report.kept == 1 and {layer.kind for layer in report.layers} == {"dense"}
    assert dict(model.named_modules()) == before


def test_calibrating_first_or_on_the_way_is_the_same(statistics):
    first, second = tiny_model("llama"), tiny_model("llama")
    report = compress(first, BATCHES, keep=0.7)
    again = compress(second, keep=0.7, statistics=statistics)
    assert [layer.rank for layer in report.layers] == [layer.rank for layer in again.layers]
    torch.testing.assert_close(_logits(first), _logits(second), rtol=1e-4, atol=1e-4)
    assert report.provenance["data_sha256"] == again.provenance["data_sha256"] == statistics.data_sha256


def test_a_method_collects_only_what_it_needs(monkeypatch):
    collected = []
    original = compress_module.calibrate

    def spy(*arguments, collect, **settings):
        collected.append(set(collect))
        return original(*arguments, collect=collect, **settings)

    monkeypatch.setattr(compress_module, "calibrate", spy)
    for method in METHODS:
        compress(tiny_model("llama"), BATCHES, method=method, keep=0.8)
    assert dict(zip(METHODS, collected, strict=True)) == {
        "svd": set(),
        "fwsvd": {"gradients"},
        "asvd": {"inputs"},
        "svd_llm": {"inputs"},
        "kfac": {"inputs", "gradients"},
        "gfwsvd": {"kronecker"},
    }


def test_plain_svd_needs_no_batches():
    model = tiny_model("llama")
    report = compress(model, method="svd", keep=0.5, ranks="uniform", rank_multiple=1)
    name = report.layers[0].name
    u, s, vh = torch.linalg.svd(dense_weight(find_linears(tiny_model("llama"))[name]).double(), full_matrices=False)
    rank = report.layers[0].rank
    layer = model.get_submodule(name)
    torch.testing.assert_close(layer.product(torch.float64), u[:, :rank] * s[:rank] @ vh[:rank], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_new_layers_have_the_dtype_mode_and_bias_of_the_old(dtype):
    model = tiny_model("gpt2").to(dtype).train()
    biases = {name: module.bias.clone() for name, module in find_linears(model).items()}
    report = compress(model, BATCHES, keep=0.5, rank_multiple=4)
    for layer in report.layers:
        module = model.get_submodule(layer.name)
        assert module.training and module.bias.dtype == dtype
        assert torch.equal(module.bias, biases[layer.name])
        assert all(parameter.dtype == dtype for parameter in module.parameters())
    assert torch.isfinite(_logits(model)).all()


@pytest.mark.parametrize("trainable", [False, True])
def test_new_layers_are_trained_where_the_old_were(trainable, statistics):
    model = tiny_model("llama").requires_grad_(trainable)
    compress(model, keep=0.6, statistics=statistics)
    assert {parameter.requires_grad for parameter in model.parameters()} == {trainable}


def test_ranks_reach_up_to_where_dense_is_smaller(statistics):
    model = tiny_model("llama")
    report = compress(model, keep=0.999, ranks="uniform", rank_multiple=1, statistics=statistics)
    for layer in report.layers:
        assert model.get_submodule(layer.name).rank == layer.rank
        assert layer.stored < layer.dense <= layer.stored + layer.d_in + layer.d_out


def test_a_loss_in_another_unit_gives_the_same_float16_model():
    """The scale of the metrics cancels in the product of the factors: it must not push one of them out of range."""
    plain, small = (tiny_model("llama").half() for _ in range(2))
    for model, factor in ((plain, 1.0), (small, 1e-12)):

        def loss(model, batch, factor=factor):
            logits = model(input_ids=batch["input_ids"]).logits[:, :-1].float()
            return factor * nn.functional.cross_entropy(logits.mT, batch["input_ids"][:, 1:], reduction="none")

        reference = tiny_model("llama")
        statistics = calibrate(reference, BATCHES, loss=loss)
        statistics.model_sha256 = fingerprint(find_linears(model))
        compress(model, keep=0.6, rank_multiple=2, statistics=statistics)
    torch.testing.assert_close(_logits(small), _logits(plain), rtol=0, atol=0.05)


def test_excluded_and_unreached_layers_stay(statistics):
    model = tiny_model("llama")
    report = compress(model, BATCHES, keep=0.6, exclude=["down_proj"])
    assert not any("down_proj" in layer.name for layer in report.layers)
    assert isinstance(model.model.layers[0].mlp.down_proj, nn.Linear)
    assert report.dense < sum(layer.d_in * layer.d_out for layer in statistics.layers.values())


@pytest.mark.parametrize("ranks", RANKS)
def test_bounds_hold_in_the_model_and_stand_in_the_report(ranks, statistics):
    bounds = {"down_proj": (1, 1), r"layers\.1\.mlp": (0.3, 0.6), "q_proj": (0.0, 0.4)}
    model = tiny_model("llama")
    report = compress(model, keep=0.7, ranks=ranks, rank_multiple=2, bounds=bounds, statistics=statistics)
    assert report.kept <= 0.7
    for layer in report.layers:
        matching = [list(bound) for pattern, bound in bounds.items() if re.search(pattern, layer.name)]
        assert layer.bound == (matching[-1] if matching else None)
        low, high = layer.bound or (0, 1)
        assert low <= layer.stored / layer.dense <= high
    kept = next(layer for layer in report.layers if layer.name == "model.layers.0.mlp.down_proj")
    assert kept.kind == "dense" and kept.reason == "its bound asks for it"
    assert CompressionReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_two_factors_in_place_of_a_pivoted_layer_keep_its_bound():
    """Weights of rank 3, as below: rounding makes two factors the better form wherever a bound lets them be."""
    model = tiny_model("llama").bfloat16()
    with torch.no_grad():
        for module in find_linears(model).values():
            u, s, vh = torch.linalg.svd(dense_weight(module).float(), full_matrices=False)
            module.weight.copy_(u[:, :3] * s[:3] @ vh[:3])
    report = compress(model, method="svd", keep=0.7, ranks="uniform", rank_multiple=2, bounds={"self_attn": (0.67, 1)})
    assert any(layer.kind == "lowrank" for layer in report.layers)
    for layer in report.layers:
        assert layer.bound is None or layer.stored >= 0.67 * layer.dense


def _halving(model):
    """A table by which a low-rank layer takes time with its rank, half that of dense at 8, and MLPs gain nothing."""
    shapes = {tuple(dense_weight(module).shape) for module in find_linears(model).values()}
    us = {
        (d_out, d_in): {
            "dense": {0: 100.0},
            **dict.fromkeys(("lowrank", "pivoted"), {8: 50.0, 64: 120.0} if 160 not in (d_out, d_in) else {64: 100.0}),
        }
        for d_out, d_in in shapes
    }
    return LatencyTable("hand-made", "float32", 1, torch.__version__, us)


def test_a_latency_table_makes_keep_a_share_of_time(statistics):
    model = tiny_model("llama")
    latency = _halving(model)
    report = compress(model, keep=0.9, rank_multiple=2, latency=latency, statistics=statistics)
    us = [latency.time((x.d_out, x.d_in), x.kind, x.rank or 0) for x in report.layers]
    assert report.time_kept == pytest.approx(sum(us) / 1400) and 0.85 < report.time_kept <= 0.9
    assert report.kept == report.stored / report.dense != report.time_kept
    assert {layer.kind for layer in report.layers if "mlp" in layer.name} == {"dense"}
    assert {layer.reason for layer in report.layers if "mlp" in layer.name} == {"no rank costs less"}
    assert report.provenance["latency"] == latency.about()
    assert CompressionReport.from_json(json.loads(json.dumps(report.to_json()))) == report
    assert compress(tiny_model("llama"), keep=0.9, statistics=statistics).time_kept is None


# --------------------------------------------------------------------------------------------------- what goes wrong


class _Failing(LowRankLinear):
    made = 0

    @classmethod
    def from_factors(cls, *arguments):
        _Failing.made += 1
        if _Failing.made == 9:
            raise MemoryError("no room for the ninth")
        return LowRankLinear.from_factors(*arguments)


@pytest.mark.parametrize("failure", ["metric", "weight", "memory", "interrupt"])
def test_a_failure_leaves_all_layers(failure, statistics, monkeypatch):
    model = tiny_model("llama")
    modules, values = dict(model.named_modules()), {name: value.clone() for name, value in model.state_dict().items()}
    stats, track = copy.deepcopy(statistics), silent
    last = "model.layers.1.mlp.down_proj"
    expected = GfwsvdError
    if failure == "metric":
        stats.layers[last].right.zero_()
    if failure == "weight":
        with torch.no_grad():
            model.get_submodule(last).weight[1, 1] = values[f"{last}.weight"][1, 1] = torch.inf
        stats.model_sha256 = fingerprint(find_linears(model))
    if failure == "memory":
        monkeypatch.setattr("gfwsvd.solve.LowRankLinear", _Failing)
        _Failing.made, expected = 0, MemoryError
    if failure == "interrupt":

        def track(items, description):
            yield from items[: len(items) - 1]
            raise KeyboardInterrupt

        expected = KeyboardInterrupt
    with pytest.raises(expected) as caught:
        compress(model, keep=0.3, ranks="uniform", rank_multiple=1, statistics=stats, track=track)
    assert failure not in ("metric", "weight") or last in str(caught.value)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


REFUSED = {
    "keep": ({"keep": 0}, "keep must be"),
    "large keep": ({"keep": 80}, "for 20 % fewer"),
    "nan keep": ({"keep": float("nan")}, "keep must be"),
    "method": ({"method": "pca"}, "method must be one of svd, fwsvd, .* got 'pca'"),
    "ranks": ({"ranks": "best"}, "ranks must be one of uniform, global, got 'best'"),
    "storage": ({"storage": "int8"}, "storage must be one of pivoted, factors, got 'int8'"),
    "multiple": ({"rank_multiple": 0}, "rank multiple must be at least 1"),
    "damping": ({"damping": -1.0}, "damping must be"),
    "unit": ({"unit": "word"}, "unit must be"),
    "budget": ({"keep": 0.01}, "smallest ranks"),
    "bound": ({"bounds": {"q_proj": (0.9, 0.5)}}, "0 <= low <= high <= 1"),
    "pattern": ({"bounds": {"gate_up": (0.5, 1)}}, "'gate_up' matches none of the 14 layers"),
    "bounds beyond keep": ({"keep": 0.5, "bounds": {"mlp": (1, 1)}}, "within the bounds need: 0.7"),
    "shape": ({"latency": LatencyTable("hand-made", "float32", 1, "", {})}, "latency table has no layer of"),
    "uniform latency": (
        {"ranks": "uniform", "latency": LatencyTable("hand-made", "float32", 1, "", {})},
        "a latency table serves global ranks, got uniform",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_out_of_range_are_refused_before_the_model_changes(case):
    settings, message = REFUSED[case]
    model = tiny_model("llama")
    before = dict(model.named_modules())
    with pytest.raises(GfwsvdError, match=message):
        compress(model, BATCHES, **settings)
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize(
    "case", ["keep", "method", "ranks", "multiple", "damping", "bound", "pattern", "shape", "uniform latency"]
)
def test_arguments_out_of_range_are_refused_before_calibration(case, monkeypatch):
    def calibrated(*_, **__):
        raise AssertionError("calibrated first")

    monkeypatch.setattr(compress_module, "calibrate", calibrated)
    with pytest.raises(GfwsvdError):
        compress(tiny_model("llama"), BATCHES, **REFUSED[case][0])


def test_a_method_that_needs_calibration_asks_for_it():
    with pytest.raises(GfwsvdError, match="method gfwsvd needs calibration: give batches or statistics"):
        compress(tiny_model("llama"))


def test_statistics_that_lack_what_the_method_needs_are_refused():
    inputs = calibrate(tiny_model("llama"), BATCHES, collect=["inputs"])
    with pytest.raises(GfwsvdError, match="gfwsvd needs the statistics kronecker; these hold inputs"):
        compress(tiny_model("llama"), statistics=inputs)
    assert compress(tiny_model("llama"), method="svd_llm", keep=0.7, statistics=inputs).kept <= 0.7


def test_statistics_of_another_model_are_refused(statistics):
    for other in (tiny_model("gpt2"), tiny_model("qwen3"), tiny_model("llama", seed=1)):
        before = dict(other.named_modules())
        with pytest.raises(GfwsvdError, match="another model"):
            compress(other, statistics=statistics)
        assert dict(other.named_modules()) == before


def test_a_compressed_model_is_not_compressed_again_with_the_old_statistics(statistics):
    model = tiny_model("llama")
    compress(model, keep=0.6, statistics=statistics)
    with pytest.raises(GfwsvdError, match="low-rank layers already"):
        compress(model, keep=0.6, statistics=statistics)


# ------------------------------------------------------------------------------------------- a model that has learnt


def _chain(sequences, length, *, seed):
    """Texts of a Markov chain over the vocabulary."""
    transitions = (2 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(9))).softmax(-1)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (sequences, 1), generator=generator)
    for _ in range(length - 1):
        ids = torch.cat([ids, torch.multinomial(transitions[ids[:, -1]], 1, generator=generator)], 1)
    return ids


@pytest.fixture(scope="module")
def learnt():
    """A tiny llama that has learnt a Markov chain, texts of it, and its statistics on them."""
    model = tiny_model("llama").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(120):
        ids = _chain(16, 32, seed=step)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    ids = _chain(64, 32, seed=1000)
    return model.eval(), ids, calibrate(model, [{"input_ids": part} for part in ids.split(16)])


def _loss(model, ids):
    return nn.functional.cross_entropy(_logits(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


def _increase(learnt, **settings):
    """Nats per token by which a compression raises the loss: predicted, and measured on the calibration texts."""
    model, ids, statistics = learnt
    compressed = copy.deepcopy(model)
    report = compress(compressed, **{"statistics": statistics, "rank_multiple": 2, "storage": "factors", **settings})
    return sum(layer.predicted_loss for layer in report.layers), _loss(compressed, ids) - _loss(model, ids)


@pytest.mark.parametrize("method", ["kfac", "gfwsvd"])
def test_the_predicted_loss_is_that_measured_within_a_small_factor(method, learnt):
    pairs = torch.tensor([_increase(learnt, method=method, keep=keep) for keep in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)])
    predicted, measured = pairs.T
    assert (measured.diff() > 0).all() and measured[-1] > 20 * measured[0], "the cases span the interesting range"
    assert ((predicted / measured > 1 / 4) & (predicted / measured < 2)).all(), pairs
    assert torch.corrcoef(pairs.log().T)[0, 1] > 0.97


@pytest.mark.parametrize("method", ["kfac", "gfwsvd"])
def test_the_predicted_loss_orders_layers_as_measured(method, learnt):
    model, _, statistics = learnt
    linears, pairs = find_linears(model), []
    for name, stats in statistics.layers.items():
        alone = replace(statistics, layers={name: stats}, model_sha256=fingerprint({name: linears[name]}))
        for keep in (0.6, 0.3):
            pairs.append(_increase(learnt, method=method, keep=keep, ranks="uniform", statistics=alone))
    ranks = torch.tensor(pairs).argsort(0).argsort(0).double()
    assert torch.corrcoef(ranks.T)[0, 1] > 0.85, pairs


def test_methods_that_see_the_loss_beat_those_that_do_not(learnt):
    _, plain = _increase(learnt, method="svd", keep=0.8)
    for method in ("fwsvd", "kfac", "gfwsvd"):
        assert _increase(learnt, method=method, keep=0.8)[1] < plain / 3
    assert _increase(learnt, method="svd_llm", keep=0.8)[1] < plain


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(("keep", "share"), [(0.8, 0.6), (0.5, 0.95)])
def test_pivoted_storage_loses_less_than_two_factors_of_the_same_size(ranks, keep, share, learnt):
    """Less so in small layers of low ranks, where the order of the outputs counts."""
    pivoted, factors = (
        _increase(learnt, method="gfwsvd", keep=keep, ranks=ranks, storage=storage) for storage in STORAGE
    )
    assert pivoted[0] < share * factors[0] and pivoted[1] < share * factors[1]


def test_a_layer_whose_rounding_outweighs_its_ranks_is_stored_as_two_factors_and_says_so():
    """Weights of rank 3 lose nothing in either form but by rounding, which is less for two factors."""
    model = tiny_model("llama").bfloat16()
    with torch.no_grad():
        for module in find_linears(model).values():
            u, s, vh = torch.linalg.svd(dense_weight(module).float(), full_matrices=False)
            module.weight.copy_(u[:, :3] * s[:3] @ vh[:3])
    rounded = {name: dense_weight(module).double() for name, module in find_linears(model).items()}
    report = compress(model, method="svd", keep=0.7, ranks="uniform", rank_multiple=2)
    found = {layer.name: layer for layer in report.layers}
    for name, layer in found.items():
        module = model.get_submodule(name)
        assert layer.kind == module.kind and layer.stored == module.stored <= 0.7 * layer.dense
        assert ("rounding would lose more" in layer.reason) == (layer.kind == "lowrank")
        total = (module.product(torch.float64) - rounded[name]).square().sum().item()
        assert total <= (layer.predicted_loss**0.5 + layer.rounding_loss**0.5) ** 2 * (1 + 1e-6)
    assert {layer.kind for layer in found.values()} == {"lowrank", "pivoted"}  # by the rounding of each


def test_rounding_is_reported_in_half_precision_alone(statistics):
    report = compress(tiny_model("llama"), keep=0.6, statistics=statistics)
    assert {layer.rounding_loss for layer in report.layers} == {None}
    half = compress(tiny_model("llama").bfloat16(), BATCHES, keep=0.6)
    for layer in half.layers:
        assert layer.kind == "dense" or 0 < layer.rounding_loss < 0.05 * layer.predicted_loss


@pytest.mark.parametrize("method", ["kfac", "gfwsvd"])
def test_global_ranks_beat_uniform_ones(method, learnt):
    shared, uniform = (_increase(learnt, method=method, keep=0.7, ranks=ranks) for ranks in ("global", "uniform"))
    assert shared[0] < uniform[0] and shared[1] < 0.8 * uniform[1]
