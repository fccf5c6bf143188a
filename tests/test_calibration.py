"""Calibration: statistics of whole models, against autograd token by token."""

import pytest
import torch
from calibrations import LENGTHS, MATRICES, VECTORS, assert_same, cross_entropy, in_batches
from oracles import gradients_per_token, power_sweeps, symmetric

from gfwsvd.calibration import calibrate
from gfwsvd.statistics import UNITS
from tiny_models import random_tokens, tiny_model


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    ("kind", "name"), [("llama", "model.layers.0.self_attn.k_proj"), ("gpt2", "transformer.h.1.attn.c_proj")]
)
def test_statistics_are_those_of_the_gradients_of_each_token(unit, kind, name):
    ids = random_tokens(6, 5)
    model = tiny_model(kind).double()
    tokens = [gradients_per_token(model, name, batch, cross_entropy) for batch in in_batches(ids, 3)]
    samples = {
        "token": torch.cat([part.flatten(0, 1) for part in tokens]),
        "sequence": torch.cat([part.sum(1) for part in tokens]),
        "batch": torch.stack([part.sum((0, 1)) for part in tokens]),
    }[unit]
    left, right, fit = power_sweeps(samples, 2)

    found = calibrate(tiny_model(kind), in_batches(ids, 3), unit=unit, sweeps=2, clip=0).layers[name]
    scale = found.gradient_scale**2
    rows = torch.cat([part.flatten(0, 1) for part in tokens]).square().sum((0, 2))
    torch.testing.assert_close(found.fisher_rows.double() / scale, rows, rtol=1e-3, atol=1e-6 * rows.max().item())
    torch.testing.assert_close(symmetric(found.left), left, rtol=0, atol=1e-5)
    torch.testing.assert_close(symmetric(found.right), right, rtol=0, atol=1e-5)
    assert found.scale / scale == pytest.approx(fit, rel=1e-3)


def test_moments_are_those_of_inputs_and_output_gradients():
    ids = random_tokens(4, 6)
    model, name = tiny_model("opt"), "model.decoder.layers.1.fc2"
    seen = []

    def keep(module, arguments, output):
        output.retain_grad()
        seen.append((arguments[0], output))

    handle = model.get_submodule(name).register_forward_hook(keep)
    cross_entropy(model, {"input_ids": ids}).sum().backward()
    handle.remove()
    (x, y), found = seen[0], calibrate(tiny_model("opt"), in_batches(ids, 2)).layers[name]
    x, g = x.detach().flatten(0, -2).double(), y.grad.flatten(0, -2).double()
    assert found.num_tokens == 24
    torch.testing.assert_close(symmetric(found.input_moment), x.T @ x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.input_abs.double(), x.abs().sum(0), rtol=1e-4, atol=0)
    expected = g.T @ g
    torch.testing.assert_close(
        symmetric(found.output_moment) / found.gradient_scale**2, expected, rtol=1e-3, atol=1e-5 * expected.max().item()
    )


@pytest.mark.parametrize("unit", ["token", "sequence"])
@pytest.mark.parametrize("labels", ["empirical", "sampled"])
def test_statistics_do_not_depend_on_the_split_into_batches(unit, labels):
    ids = random_tokens(6, 8)
    whole = calibrate(tiny_model("llama"), in_batches(ids, 6), unit=unit, labels=labels)
    for size in (1, 4):
        split = calibrate(tiny_model("llama"), in_batches(ids, size), unit=unit, labels=labels)
        assert_same(split, whole)
        assert split.num_sequences == whole.num_sequences == 6
        assert split.data_sha256 == whole.data_sha256
    assert whole.num_losses == 6 * 7


def test_clipping_is_for_the_kronecker_factors_alone():
    ids = random_tokens(6, 8)
    clipped, whole = (calibrate(tiny_model("llama"), in_batches(ids, 3), clip=clip) for clip in (1.0, 0.0))
    for name, stats in clipped.layers.items():
        for shared in ("input_moment", "input_abs", "output_moment", "fisher_rows"):
            assert torch.equal(getattr(stats, shared), getattr(whole.layers[name], shared)), shared
        assert 0 < stats.trace < whole.layers[name].trace
    assert clipped.settings["clip"] == 1.0


def test_the_unit_batch_depends_on_the_split_into_batches():
    ids = random_tokens(6, 8)
    whole, split = (calibrate(tiny_model("llama"), in_batches(ids, size), unit="batch") for size in (6, 2))
    with pytest.raises(AssertionError):
        assert_same(whole, split, names=("left",))


@pytest.mark.parametrize("unit", ["token", "sequence"])
def test_statistics_do_not_depend_on_the_order_of_batches(unit):
    batches = in_batches(random_tokens(6, 8), 2)
    forward, backward = (calibrate(tiny_model("llama"), b, unit=unit) for b in (batches, batches[::-1]))
    assert_same(forward, backward)


def _padded(ids, side, *, garbage):
    width = max(LENGTHS) + 3
    padded, mask = torch.full((len(LENGTHS), width), garbage), torch.zeros(len(LENGTHS), width, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        where = slice(0, length) if side == "right" else slice(width - length, width)
        padded[row, where], mask[row, where] = ids[row, :length], 1
    return {"input_ids": padded, "attention_mask": mask}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("unit", ["token", "sequence"])
@pytest.mark.parametrize("labels", ["empirical", "sampled"])
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_padding_does_not_count(side, unit, labels, kind):
    ids = random_tokens(3, max(LENGTHS))
    alone = [{"input_ids": ids[row : row + 1, :length]} for row, length in enumerate(LENGTHS)]
    plain = calibrate(tiny_model(kind), alone, unit=unit, labels=labels)
    padded = calibrate(tiny_model(kind), [_padded(ids, side, garbage=77)], unit=unit, labels=labels)
    assert_same(padded, plain, tolerance=1e-3)
    assert plain.num_losses == sum(LENGTHS) - len(LENGTHS)
    assert all(stats.num_tokens == sum(LENGTHS) for stats in padded.layers.values())


def test_padding_does_not_count_for_the_unit_batch():
    ids = random_tokens(3, max(LENGTHS))
    first, second = (
        calibrate(tiny_model("llama"), [_padded(ids, side, garbage=garbage)], unit="batch")
        for side, garbage in (("left", 3), ("right", 99))
    )
    assert_same(first, second, tolerance=1e-3)


def test_targets_of_minus_100_predict_nothing():
    ids = random_tokens(2, 8)
    labels = ids.clone()
    labels[:, :5] = -100
    masked = calibrate(tiny_model("llama"), [{"input_ids": ids, "labels": labels}])

    def late(model, batch):
        return cross_entropy(model, batch)[:, 4:]

    by_hand = calibrate(tiny_model("llama"), [{"input_ids": ids}], loss=late)
    assert masked.num_losses == 2 * 3
    assert_same(masked, by_hand)


def test_batches_may_come_from_a_generator_though_they_are_read_several_times():
    batches = in_batches(random_tokens(4, 6), 2)
    assert_same(
        calibrate(tiny_model("llama"), iter(batches), sweeps=3), calibrate(tiny_model("llama"), batches, sweeps=3)
    )


def test_layers_with_the_same_input_share_its_moment_which_equals_their_own():
    batches = in_batches(random_tokens(4, 6), 2)
    together = calibrate(tiny_model("llama"), batches).layers
    attention, mlp = "model.layers.1.self_attn.", "model.layers.1.mlp."
    for group in ([attention + name for name in ("q_proj", "k_proj", "v_proj")], [mlp + "gate_proj", mlp + "up_proj"]):
        assert len({together[name].input_moment.data_ptr() for name in group}) == 1
        assert len({together[name].right.data_ptr() for name in group}) == len(group)
        for name in group:
            alone = calibrate(tiny_model("llama"), batches, exclude=[f"^(?!{name}$)"]).layers
            assert list(alone) == [name]
            torch.testing.assert_close(alone[name].input_moment, together[name].input_moment, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(alone[name].input_abs, together[name].input_abs, rtol=1e-5, atol=1e-5)
    others = {
        together[attention + "o_proj"].input_moment.data_ptr(),
        together[mlp + "down_proj"].input_moment.data_ptr(),
    }
    assert len(others) == 2


def test_inputs_alone_are_the_same_in_one_forward_pass():
    batches = in_batches(random_tokens(4, 6), 2)
    alone, full = calibrate(tiny_model("llama"), batches, collect=["inputs"]), calibrate(tiny_model("llama"), batches)
    assert alone.collected == {"inputs"} and len(alone.seconds) == 1
    for name, stats in alone.layers.items():
        torch.testing.assert_close(stats.input_moment, full.layers[name].input_moment, rtol=1e-5, atol=1e-5)
        assert stats.num_tokens == full.layers[name].num_tokens == 24
        assert stats.output_moment is stats.left is stats.right is stats.fisher_rows is None


@pytest.mark.parametrize("collect", [["inputs"], ["gradients"], ["kronecker"], ["inputs", "gradients"]])
def test_each_collection_holds_what_it_says(collect):
    found = calibrate(tiny_model("llama"), in_batches(random_tokens(2, 5), 2), collect=collect, sweeps=2)
    fields = {"inputs": ["input_moment", "input_abs"], "gradients": ["output_moment"], "kronecker": ["left", "right"]}
    for stats in found.layers.values():
        for what, names in fields.items():
            assert all((getattr(stats, name) is not None) == (what in collect) for name in names)
        assert stats.num_tokens == 10
    assert len(found.seconds) == (2 if "kronecker" in collect else 1)


@pytest.mark.parametrize("kind", ["llama", "opt"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(kind, reentrant):
    from transformers import OPTConfig, OPTForCausalLM

    batches = in_batches(random_tokens(4, 6), 2)
    model = tiny_model(kind)
    if kind == "opt":  # its layers drop functionally, which evaluation alone does not stop under checkpointing
        dropping = OPTForCausalLM(OPTConfig(**{**model.config.to_dict(), "dropout": 0.5, "layerdrop": 0.5}))
        dropping.load_state_dict(model.state_dict())
        model = dropping.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(calibrate(model, batches), calibrate(tiny_model(kind), batches))
    assert model.is_gradient_checkpointing


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float16, 0.02), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("unit", UNITS)
def test_models_of_other_dtypes_have_the_same_statistics_to_their_precision(dtype, tolerance, unit):
    batches = in_batches(random_tokens(4, 6), 2)
    found = calibrate(tiny_model("llama").to(dtype), batches, unit=unit)
    expected = calibrate(tiny_model("llama"), batches, unit=unit)
    for name, stats in found.layers.items():
        for matrix in MATRICES[2:]:
            difference = symmetric(getattr(stats, matrix)) - symmetric(getattr(expected.layers[name], matrix))
            assert difference.norm() < 2 * tolerance, f"{matrix} of {name}"
    assert_same(found, expected, tolerance=tolerance, names=("input_moment", "input_abs"), scales=False)
    stats = found.layers["model.layers.1.mlp.down_proj"]
    assert {getattr(stats, name).dtype for name in (*MATRICES, *VECTORS)} == {torch.float32}


@pytest.mark.parametrize("factor", [1e-6, 1e4])
def test_the_unit_of_the_loss_does_not_change_the_factors(factor):
    batches = in_batches(random_tokens(4, 6), 2)
    plain, sized = (
        calibrate(tiny_model("llama"), batches, loss=lambda model, batch, f=f: f * cross_entropy(model, batch))
        for f in (1.0, factor)
    )
    for name, stats in sized.layers.items():
        expected = plain.layers[name]
        torch.testing.assert_close(stats.left, expected.left, rtol=0, atol=1e-5)
        torch.testing.assert_close(stats.right, expected.right, rtol=0, atol=1e-5)
        ratio = (stats.scale / stats.gradient_scale**2) / (expected.scale / expected.gradient_scale**2)
        assert ratio == pytest.approx(factor**2, rel=1e-4)


def test_a_first_batch_without_gradient_does_not_settle_their_scale():
    ids = random_tokens(4, 6)

    def weighted(model, batch):
        return batch["weight"] * cross_entropy(model, batch).sum(1)

    batches = [
        {"input_ids": ids[:2], "weight": torch.zeros(2)},
        {"input_ids": ids[2:], "weight": torch.full((2,), 1e-12)},
    ]
    found = calibrate(tiny_model("llama"), batches, loss=weighted)
    expected = calibrate(tiny_model("llama"), [{"input_ids": ids[2:]}])
    for name, stats in found.layers.items():
        torch.testing.assert_close(stats.left, expected.layers[name].left, rtol=0, atol=1e-5)
