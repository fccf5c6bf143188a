"""The guard: metrics that cost held-out tokens more than simpler ones are not used."""

from functools import partial

import pytest
import torch
from oracles import gradients_per_token, symmetric
from torch import nn
from typer.testing import CliRunner

from gfwsvd import collector, guard
from gfwsvd.calibration import calibrate
from gfwsvd.cli import app
from gfwsvd.cli_app import summary
from gfwsvd.compress import compress
from gfwsvd.errors import GfwsvdError
from gfwsvd.factorize import decompose
from gfwsvd.folders import read_json, sealed, write_json
from gfwsvd.guard import CHOICES, chosen_metrics, heldout_costs, judged_decomposition
from gfwsvd.hf import save_pretrained
from gfwsvd.layers import find_linears
from gfwsvd.methods import METHODS
from gfwsvd.outcome import read_report
from gfwsvd.output import print_values
from gfwsvd.statistics import LayerStatistics, accumulate_inputs, accumulate_outputs
from gfwsvd.store import JSON_NAME, load_statistics, save_statistics
from tiny_models import random_tokens, tiny_model

D_OUT, D_IN, RANK = 12, 16, 4
OPTIONS = {"damping": 1e-2, "name": "layer"}


def _root(size, seed, decay):
    """A mixing matrix of directions that matter unequally, in the reverse order where `decay` is negative."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return turn * torch.logspace(*((0, -decay) if decay > 0 else (decay, 0)), size, dtype=torch.float64)


def _stats(tokens, roots, *, heldout_roots=None, seed=0):
    """Of tokens drawn from one distribution, with held-out ones of the same or of another."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count, pair):
        x, g = (torch.randn(count, len(root), generator=generator, dtype=torch.float64) @ root.T for root in pair)
        return x.float(), g.float()

    stats = LayerStatistics(D_IN, D_OUT, gradient_scale=1.0)
    x, g = draw(tokens, roots)
    offsets = torch.arange(0, tokens + 1, max(1, tokens // 8))
    accumulate_inputs(stats, x, offsets)
    accumulate_outputs(stats, x, g, offsets)
    stats.num_tokens, stats.num_parts = tokens, len(offsets) - 1
    stats.heldout_x, stats.heldout_g = (rows.bfloat16() for rows in draw(2000, heldout_roots or roots))
    return stats


def _judge(stats, *, guarded=True, method="kfac", rank=RANK):
    row = METHODS[method]
    weight = torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(3))
    metrics = row.left(stats, stats.num_tokens), row.right(stats)
    first = decompose(weight, *metrics, **OPTIONS)
    changed = partial(chosen_metrics, metrics=metrics, stats=stats, row=row)
    judged = judged_decomposition(weight, first, stats, row, metrics=changed, guard=guarded, rank=rank, **OPTIONS)
    return weight, metrics, judged


def test_metrics_that_hold_for_held_out_tokens_are_kept():
    weight, metrics, judged = _judge(_stats(4000, (_root(D_IN, 0, 2), _root(D_OUT, 1, 2))))
    assert judged.choice == "two-sided"
    assert torch.equal(judged.found.spectrum, decompose(weight, *metrics, damping=1e-2, name="layer").spectrum)
    assert judged.losses.keys() == {"two-sided"}, "what is as good as predicted is not factored again"


def test_metrics_that_are_best_are_kept_also_where_all_are_tried(monkeypatch):
    monkeypatch.setattr(guard, "SUSPICION", 0.0)
    judged = _judge(_stats(4000, (_root(D_IN, 0, 2), _root(D_OUT, 1, 2))))[-1]
    assert judged.choice == "two-sided"
    assert judged.losses["two-sided"] < judged.losses["input-only"] < judged.losses["plain"]


@pytest.mark.parametrize(
    ("wrong", "expected"), [((False, True), {"input-only"}), ((True, True), {"plain"})], ids=["left", "both"]
)
def test_a_metric_of_other_directions_than_the_held_out_tokens_have_is_not_used(wrong, expected):
    """As where gradients differ in kind from text to text."""
    right, left = _root(D_IN, 0, 2), _root(D_OUT, 1, 2)
    other = _root(D_IN, 0, -2 if wrong[0] else 2), _root(D_OUT, 1, -2 if wrong[1] else 2)
    weight, _, judged = _judge(_stats(4000, other, heldout_roots=(right, left)))
    assert judged.choice in expected
    up, down = judged.found.factors(weight, RANK)
    plain = decompose(weight, None, None, damping=0.0, name="layer").factors(weight, RANK)
    if "plain" in expected:
        torch.testing.assert_close(up @ down, plain[0] @ plain[1], rtol=1e-4, atol=1e-4)


def test_few_tokens_are_shrunk_or_dropped():
    losses = {}
    for tokens in (8, 16):
        judged = _judge(_stats(tokens, (_root(D_IN, 0, 0.3), _root(D_OUT, 1, 0.3))))[-1]
        assert judged.choice != "two-sided"
        losses[tokens] = judged.losses
        assert judged.losses[judged.choice] < 0.9 * judged.losses["two-sided"]


def test_without_guard_or_held_out_tokens_or_for_one_sided_methods_nothing_is_judged():
    stats = _stats(8, (_root(D_IN, 0, 0.3), _root(D_OUT, 1, 0.3)))
    assert _judge(stats, guarded=False)[-1].losses == {}
    assert _judge(stats, method="svd_llm")[-1].losses == {}
    stats.heldout_x = stats.heldout_g = None
    judged = _judge(stats)[-1]
    assert judged.losses == {} and judged.choice == "two-sided"


def test_at_rank_zero_the_error_is_the_whole_weight_by_any_metrics():
    stats = _stats(8, (_root(D_IN, 0, 0.3), _root(D_OUT, 1, 0.3)))
    weight, _, judged = _judge(stats, rank=0)
    assert judged.choice == "two-sided"
    assert judged.losses == {"two-sided": heldout_costs(weight.double(), stats).mean().item()}


@pytest.mark.parametrize("seed", [1, 3])
def test_few_tokens_of_a_metric_near_the_identity_are_best_shrunk(seed):
    judged = _judge(_stats(24, (_root(D_IN, 0, 0.5), _root(D_OUT, 1, 0.5)), seed=seed))[-1]
    assert judged.choice == "shrunk"
    others = [loss for choice, loss in judged.losses.items() if choice != "shrunk"]
    assert judged.losses["shrunk"] < 0.95 * min(others), "the identity alone is not as good"


@pytest.mark.parametrize("method", ["kfac", "gfwsvd"])
def test_each_side_is_shrunk_by_the_share_that_its_own_noise_asks_for_and_keeps_its_trace(method):
    """By the formula of Ledoit and Wolf, in float64 on full matrices."""
    stats, row = _stats(24, (_root(D_IN, 0, 0.5), _root(D_OUT, 1, 1))), METHODS[method]
    stats.left, stats.right = stats.output_moment, stats.input_moment
    stats.trace, stats.squared_parts = 1.0, {**stats.squared_parts}
    for factor, moment in (("left", "output_moment"), ("right", "input_moment")):
        stats.squared_parts[factor] = stats.squared_parts[moment]
    metrics = row.left(stats, stats.num_tokens), row.right(stats)
    shares = []
    for metric, matrix, shrunk in zip(
        metrics, row.matrices, chosen_metrics("shrunk", metrics, stats, row), strict=True
    ):
        exact = symmetric(getattr(stats, matrix))
        parts, energy = stats.num_parts, exact.square().sum()
        noise = (stats.squared_parts[matrix] - energy / parts) * parts / (parts - 1)
        sphere = torch.eye(len(exact)).double() * exact.trace() / len(exact)
        shares.append((noise / (exact - sphere).square().sum()).item())
        expected = ((1 - shares[-1]) * exact + shares[-1] * sphere) * (metric.double().trace() / exact.trace())
        torch.testing.assert_close(shrunk.double(), expected, rtol=1e-5, atol=1e-6 * expected.max().item())
        assert shrunk.double().trace().item() == pytest.approx(metric.double().trace().item(), rel=1e-6)
    assert 0.1 < min(shares) < 0.9 * max(shares) < 0.9, "neither side could take the other's share"


def test_what_has_no_known_noise_is_not_shrunk():
    stats, row = _stats(24, (_root(D_IN, 0, 0.5), _root(D_OUT, 1, 1))), METHODS["kfac"]
    stats.squared_parts = {}
    metrics = row.left(stats, stats.num_tokens), row.right(stats)
    assert all(map(torch.equal, chosen_metrics("shrunk", metrics, stats, row), metrics))


def test_gains_that_a_sequence_shares_count_once_however_many_tokens_it_has():
    generator, certain = torch.Generator().manual_seed(0), []
    for gains in torch.randn(50, 4, generator=generator, dtype=torch.float64) + 1:
        certain.append(bool(gains.mean() > 2 * gains.std() / 4**0.5))
        assert guard._is_certain(gains, []) == guard._is_certain(gains.repeat_interleave(100), [100] * 4) == certain[-1]
    assert 5 < sum(certain) < 45


def test_chance_among_sequences_of_any_lengths_is_rarely_certain():
    """A mean of zero is two standard errors above it in 2 % of the cases, in a few more with eight sequences."""
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 10, 20, 30, 30, 40, 50, 60]
    by_sequence, by_token = 0, 0
    for _ in range(400):
        shared = torch.randn(len(lengths), generator=generator).repeat_interleave(torch.tensor(lengths))
        gains = shared + torch.randn(sum(lengths), generator=generator)
        by_sequence += guard._is_certain(gains, lengths)
        by_token += guard._is_certain(gains, [])
    assert 0.005 < by_sequence / 400 < 0.1 < 0.25 < by_token / 400


def test_a_gain_that_one_sequence_alone_has_changes_no_metrics():
    stats = _stats(24, (_root(D_IN, 0, 0.5), _root(D_OUT, 1, 0.5)), seed=1)
    weight, metrics, judged = _judge(stats)
    assert judged.choice == "shrunk", "as single tokens"
    first = decompose(weight, *metrics, damping=1e-2, name="layer")
    costs = []
    for found in (first, judged.found):
        up, down = found.factors(weight, RANK)
        costs.append(heldout_costs(weight.double() - up @ down, stats))
    order = (costs[0] - costs[1]).argsort()
    stats.heldout_x, stats.heldout_g = stats.heldout_x[order], stats.heldout_g[order]
    stats.heldout_lengths = [1000, 1000]
    judged = _judge(stats)[-1]
    assert judged.choice == "two-sided" and judged.losses["shrunk"] < judged.losses["two-sided"]


def _cross_entropy(model, batch):
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    return nn.functional.cross_entropy(logits.mT, batch["input_ids"][:, 1:], reduction="none")


def test_the_held_out_cost_is_the_second_order_increase_of_the_loss_of_each_token():
    ids = random_tokens(10, 6)
    name, model = "model.layers.1.mlp.up_proj", tiny_model("llama")
    stats = calibrate(model, [{"input_ids": part} for part in ids.split(4)], heldout=3).layers[name]
    samples = gradients_per_token(tiny_model("llama").double(), name, {"input_ids": ids[-3:]}, _cross_entropy)
    error = torch.randn(stats.d_out, stats.d_in, dtype=torch.float64)
    expected = 0.5 * (samples * error).sum((2, 3)).square().flatten()
    torch.testing.assert_close(heldout_costs(error, stats), expected, rtol=0.1, atol=0.02 * expected.max().item())


def test_held_out_sequences_are_in_no_sum_and_the_same_for_any_split_into_batches():
    ids = random_tokens(20, 8)
    held = calibrate(tiny_model("llama"), [{"input_ids": part} for part in ids.split(3)], heldout=4)
    rest = calibrate(tiny_model("llama"), [{"input_ids": ids[:16]}], heldout=0)
    again = calibrate(tiny_model("llama"), [{"input_ids": part} for part in ids.split(7)], heldout=4)
    assert (held.num_sequences, held.num_heldout, held.num_losses) == (16, 4, 16 * 7)
    assert held.data_sha256 == again.data_sha256 != rest.data_sha256
    for name, stats in held.layers.items():
        for field in ("left", "right", "input_moment", "output_moment"):
            expected = getattr(rest.layers[name], field)
            if field == "output_moment":
                expected = expected * (stats.gradient_scale / rest.layers[name].gradient_scale) ** 2
            assert (getattr(stats, field) - expected).norm() < 1e-4 * expected.norm()
        assert stats.heldout_x.shape == (32, stats.d_in)
        assert torch.equal(stats.heldout_x, again.layers[name].heldout_x)
        assert stats.heldout_lengths == again.layers[name].heldout_lengths == [8] * 4
        assert rest.layers[name].heldout_x is None


def test_one_sequence_of_sixteen_is_held_out_where_gradients_are_collected(monkeypatch):
    monkeypatch.setattr(collector, "HELDOUT_TOKENS", 5)
    batches = [{"input_ids": random_tokens(32, 8)}]
    found = calibrate(tiny_model("llama"), batches)
    assert found.num_heldout == 2
    assert all(len(stats.heldout_g) == 4 for stats in found.layers.values())
    assert calibrate(tiny_model("llama"), batches, collect=["inputs"]).num_heldout == 0


def test_each_held_out_sequence_is_known_by_the_tokens_it_has_without_padding(monkeypatch):
    monkeypatch.setattr(collector, "HELDOUT_TOKENS", 12)
    mask = torch.ones(5, 8, dtype=torch.int64)
    mask[-1, 5:] = mask[-2, 7:] = 0
    found = calibrate(tiny_model("llama"), [{"input_ids": random_tokens(5, 8), "attention_mask": mask}], heldout=3)
    for stats in found.layers.values():
        assert stats.heldout_lengths == [4, 3, 2], "every second token of 8, 7 and 5"
        assert len(stats.heldout_x) == len(stats.heldout_g) == 9


def test_statistics_from_before_the_lengths_were_kept_load_and_count_single_tokens(tmp_path):
    statistics = calibrate(tiny_model("llama"), [{"input_ids": random_tokens(5, 8)}], heldout=2)
    save_statistics(statistics, tmp_path / "stats")
    described = read_json(tmp_path / "stats" / JSON_NAME)
    for entry in described["layers"].values():
        assert entry.pop("heldout_lengths") == [8, 8]
    described.pop("seal")
    write_json(tmp_path / "stats" / JSON_NAME, sealed(described))
    found = load_statistics(tmp_path / "stats")[0]
    for name, stats in found.layers.items():
        assert stats.heldout_lengths == []
        assert torch.equal(stats.heldout_g, statistics.layers[name].heldout_g)


def test_the_report_says_which_metrics_each_layer_was_factored_by_and_what_they_cost():
    batches = [{"input_ids": random_tokens(32, 16)}]
    report = compress(tiny_model("llama"), batches, keep=0.6, rank_multiple=1)
    assert len(report.layers) == len(find_linears(tiny_model("llama")))
    for layer in report.layers:
        assert list(layer.heldout_losses) in (["two-sided"], list(CHOICES))
        assert layer.metrics in CHOICES
        assert layer.heldout_losses[layer.metrics] <= layer.heldout_losses["two-sided"]
    assert sum(report.metrics.values()) == len(report.layers) and report.unjudged is None


@pytest.fixture(scope="module")
def few():
    """Statistics of too few sequences to hold one out."""
    return calibrate(tiny_model("llama"), [{"input_ids": random_tokens(8, 8)}])


def test_without_held_out_tokens_report_and_summary_say_so_unless_the_guard_is_off(few, tmp_path, capsys):
    model = tiny_model("llama")
    report = compress(model, statistics=few)
    told = "no held-out tokens to judge metrics by, so all are two-sided: expected one of 16 sequences, got none of 8; "
    assert report.guard and report.metrics is None and report.unjudged.startswith(told)
    save_pretrained(model, tmp_path / "out", report=report)
    assert read_report(tmp_path / "out").unjudged == report.unjudged == report.to_json()["unjudged"]
    print_values(summary(report, tmp_path), json_output=False)
    inspected = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")]).stdout
    for shown in (capsys.readouterr().out, inspected):
        assert told + "calibrate on 16 sequences or more" in " ".join(shown.split())


@pytest.mark.parametrize("options", [{"guard": False}, {"method": "svd_llm"}])
def test_where_the_guard_is_off_or_has_nothing_to_choose_nothing_is_said(few, options, tmp_path):
    report = compress(tiny_model("llama"), statistics=few, **options)
    assert report.unjudged is report.metrics is summary(report, tmp_path)["unjudged"] is None


def test_summary_inspection_and_card_count_the_metrics_chosen(few, tmp_path, capsys):
    model = tiny_model("llama")
    report = compress(model, statistics=few)
    for number, layer in enumerate(report.layers[:-1]):
        layer.metrics = "shrunk" if number in (3, 7) else "two-sided"
        layer.heldout_losses = {"two-sided": 2.0, "shrunk": 1.0}
    assert report.metrics == {"two-sided": 11, "shrunk": 2} and report.unjudged is None
    save_pretrained(model, tmp_path / "out", report=report)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| layers by two-sided metrics | 11 |" in card and "| layers by shrunk metrics | 2 |" in card
    print_values(summary(report, tmp_path), json_output=False)
    inspected = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")]).stdout
    for shown in (capsys.readouterr().out, inspected):
        assert "metrics two-sided 11, shrunk 2" in " ".join(shown.split())


def test_batches_of_a_users_loss_are_never_cut():
    """Their rows may belong together, as the two sides of pairs do."""
    sizes: list[int] = []

    def loss(model, batch):
        sizes.append(len(batch["input_ids"]))
        return _cross_entropy(model, batch).flatten()

    for rows, heldout, held in (((6, 6, 6, 4), None, 0), ((6, 6, 4, 2), 3, 2), ((6, 6, 4, 2), 6, 6)):
        sizes.clear()
        batches = [{"input_ids": random_tokens(n, 8, seed=n)} for n in rows]
        found = calibrate(tiny_model("llama"), batches, loss=loss, heldout=heldout)
        assert found.num_heldout == held and found.num_sequences == sum(rows) - held
        assert set(sizes) == set(rows)


@pytest.mark.parametrize("heldout", [-1, 6, 7])
def test_holding_out_all_or_less_than_none_is_refused(heldout):
    with pytest.raises(GfwsvdError, match="heldout must be from 0 to less than the 6 sequences"):
        calibrate(tiny_model("llama"), [{"input_ids": random_tokens(6, 8)}], heldout=heldout)


def test_sweeps_end_once_no_factor_turns_by_more_than_the_tolerance():
    batches = [{"input_ids": random_tokens(6, 8)}]
    free = calibrate(tiny_model("llama"), batches, sweeps=6)
    turns = [max(stats.convergence[n] for stats in free.layers.values()) for n in range(6)]
    assert turns[0] > turns[3]
    found = calibrate(tiny_model("llama"), batches, sweeps=6, tolerance=turns[3])
    first = next(n for n, turn in enumerate(turns) if turn <= turns[3]) + 1
    assert len(found.seconds) == first < 6


def test_calibration_goes_on_from_earlier_statistics_and_refuses_those_of_another_model():
    batches = [{"input_ids": random_tokens(6, 8)}]
    cold = calibrate(tiny_model("llama"), batches, sweeps=3)
    warm = calibrate(tiny_model("llama"), batches, start=calibrate(tiny_model("llama"), batches, sweeps=2))
    for name, stats in warm.layers.items():
        assert (stats.left - cold.layers[name].left).norm() < 1e-4
        assert stats.trace == pytest.approx(cold.layers[name].trace, rel=1e-4)
    assert warm.settings["start"] == cold.data_sha256
    with pytest.raises(GfwsvdError, match="the statistics to start from have no Kronecker factors of layer"):
        calibrate(tiny_model("llama"), batches, start=calibrate(tiny_model("gpt2"), batches))
    with pytest.raises(GfwsvdError, match="the statistics to start from have no Kronecker factors of layer"):
        calibrate(tiny_model("llama"), batches, start=calibrate(tiny_model("llama"), batches, collect=["inputs"]))
