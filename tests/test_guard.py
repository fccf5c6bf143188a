"""The guard: metrics that cost held-out tokens more than simpler ones are not used."""

import pytest
import torch
from oracles import gradients_per_token
from torch import nn

from gfwsvd import collector, guard
from gfwsvd.calibration import calibrate
from gfwsvd.compress import compress
from gfwsvd.errors import GfwsvdError
from gfwsvd.factorize import decompose
from gfwsvd.guard import CHOICES, heldout_costs, judged_decomposition
from gfwsvd.layers import find_linears
from gfwsvd.methods import METHODS
from gfwsvd.statistics import LayerStatistics, accumulate_inputs, accumulate_outputs
from tiny_models import random_tokens, tiny_model

D_OUT, D_IN, RANK = 12, 16, 4
OPTIONS = {"rank": RANK, "damping": 1e-2, "name": "layer"}


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


def _judge(stats, *, guarded=True, method="kfac"):
    row = METHODS[method]
    weight = torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(3))
    metrics = row.left(stats, stats.num_tokens), row.right(stats)
    return weight, metrics, judged_decomposition(weight, metrics, stats, row, guard=guarded, **OPTIONS)


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
        assert rest.layers[name].heldout_x is None


def test_one_sequence_of_sixteen_is_held_out_where_gradients_are_collected(monkeypatch):
    monkeypatch.setattr(collector, "HELDOUT_TOKENS", 5)
    batches = [{"input_ids": random_tokens(32, 8)}]
    found = calibrate(tiny_model("llama"), batches)
    assert found.num_heldout == 2
    assert all(len(stats.heldout_g) == 4 for stats in found.layers.values())
    assert calibrate(tiny_model("llama"), batches, collect=["inputs"]).num_heldout == 0


def test_the_report_says_which_metrics_each_layer_was_factored_by_and_what_they_cost():
    batches = [{"input_ids": random_tokens(32, 16)}]
    report = compress(tiny_model("llama"), batches, keep=0.6, rank_multiple=1)
    assert len(report.layers) == len(find_linears(tiny_model("llama")))
    for layer in report.layers:
        assert list(layer.heldout_losses) in (["two-sided"], list(CHOICES))
        assert layer.metrics in CHOICES
        assert layer.heldout_losses[layer.metrics] <= layer.heldout_losses["two-sided"]
    assert not any(layer.heldout_losses for layer in compress(tiny_model("llama"), batches, guard=False).layers)


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
