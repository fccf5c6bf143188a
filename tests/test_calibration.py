"""Calibration: statistics of whole models, against autograd token by token, and the model left as it was."""

import weakref

import pytest
import torch
from oracles import gradients_per_token, power_sweeps, symmetric
from torch import nn

from gfwsvd import collector, kronecker
from gfwsvd.calibration import calibrate, data_sha256
from gfwsvd.errors import GfwsvdError
from gfwsvd.losses import next_token_loss
from gfwsvd.statistics import UNITS
from tiny_models import random_tokens, tiny_model

MATRICES = ("input_moment", "output_moment", "left", "right")
VECTORS = ("input_abs", "fisher_rows")


def _batches(ids, size):
    return [{"input_ids": part} for part in ids.split(size)]


def _cross_entropy(model, batch):
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    return nn.functional.cross_entropy(logits.mT, batch["input_ids"][:, 1:], reduction="none")


def _assert_same(first, second, *, tolerance=1e-4, names=(*MATRICES, *VECTORS), scales=True):
    """All statistics agree, relative to the size of each, gradient scales undone."""
    assert list(first.layers) == list(second.layers)
    assert first.num_losses == second.num_losses
    for layer, expected in second.layers.items():
        found = first.layers[layer]
        assert found.num_tokens == expected.num_tokens
        for name in names:
            full = symmetric if name in MATRICES else torch.Tensor.double
            a, b = full(getattr(found, name)), full(getattr(expected, name))
            if name in ("output_moment", "fisher_rows"):
                a, b = a / found.gradient_scale**2, b / expected.gradient_scale**2
            assert (a - b).norm() <= tolerance * b.norm(), f"{name} of {layer}"
        if scales:
            scale = expected.scale / expected.gradient_scale**2
            assert found.scale / found.gradient_scale**2 == pytest.approx(scale, rel=tolerance)


# ---------------------------------------------------------------------------------------------- against plain autograd


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    ("kind", "name"), [("llama", "model.layers.0.self_attn.k_proj"), ("gpt2", "transformer.h.1.attn.c_proj")]
)
def test_statistics_are_those_of_the_gradients_of_each_token(unit, kind, name):
    ids = random_tokens(6, 5)
    model = tiny_model(kind).double()
    tokens = [gradients_per_token(model, name, batch, _cross_entropy) for batch in _batches(ids, 3)]
    samples = {
        "token": torch.cat([part.flatten(0, 1) for part in tokens]),
        "sequence": torch.cat([part.sum(1) for part in tokens]),
        "batch": torch.stack([part.sum((0, 1)) for part in tokens]),
    }[unit]
    left, right, fit = power_sweeps(samples, 2)

    found = calibrate(tiny_model(kind), _batches(ids, 3), unit=unit, sweeps=2, clip=0).layers[name]
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
    _cross_entropy(model, {"input_ids": ids}).sum().backward()
    handle.remove()
    (x, y), found = seen[0], calibrate(tiny_model("opt"), _batches(ids, 2)).layers[name]
    x, g = x.detach().flatten(0, -2).double(), y.grad.flatten(0, -2).double()
    assert found.num_tokens == 24
    torch.testing.assert_close(symmetric(found.input_moment), x.T @ x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.input_abs.double(), x.abs().sum(0), rtol=1e-4, atol=0)
    expected = g.T @ g
    torch.testing.assert_close(
        symmetric(found.output_moment) / found.gradient_scale**2, expected, rtol=1e-3, atol=1e-5 * expected.max().item()
    )


# ------------------------------------------------------------------------------------------------- batches and padding


@pytest.mark.parametrize("unit", ["token", "sequence"])
@pytest.mark.parametrize("labels", ["empirical", "sampled"])
def test_statistics_do_not_depend_on_the_split_into_batches(unit, labels):
    ids = random_tokens(6, 8)
    whole = calibrate(tiny_model("llama"), _batches(ids, 6), unit=unit, labels=labels)
    for size in (1, 4):
        split = calibrate(tiny_model("llama"), _batches(ids, size), unit=unit, labels=labels)
        _assert_same(split, whole)
        assert split.num_sequences == whole.num_sequences == 6
        assert split.data_sha256 == whole.data_sha256
    assert whole.num_losses == 6 * 7


def test_clipping_is_for_the_kronecker_factors_alone():
    ids = random_tokens(6, 8)
    clipped, whole = (calibrate(tiny_model("llama"), _batches(ids, 3), clip=clip) for clip in (1.0, 0.0))
    for name, stats in clipped.layers.items():
        for shared in ("input_moment", "input_abs", "output_moment", "fisher_rows"):
            assert torch.equal(getattr(stats, shared), getattr(whole.layers[name], shared)), shared
        assert 0 < stats.trace < whole.layers[name].trace
    assert clipped.settings["clip"] == 1.0


def test_the_unit_batch_depends_on_the_split_into_batches():
    ids = random_tokens(6, 8)
    whole, split = (calibrate(tiny_model("llama"), _batches(ids, size), unit="batch") for size in (6, 2))
    with pytest.raises(AssertionError):
        _assert_same(whole, split, names=("left",))


@pytest.mark.parametrize("unit", ["token", "sequence"])
def test_statistics_do_not_depend_on_the_order_of_batches(unit):
    batches = _batches(random_tokens(6, 8), 2)
    forward, backward = (calibrate(tiny_model("llama"), b, unit=unit) for b in (batches, batches[::-1]))
    _assert_same(forward, backward)


LENGTHS = (4, 9, 6)


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
    _assert_same(padded, plain, tolerance=1e-3)
    assert plain.num_losses == sum(LENGTHS) - len(LENGTHS)
    assert all(stats.num_tokens == sum(LENGTHS) for stats in padded.layers.values())


def test_padding_does_not_count_for_the_unit_batch():
    ids = random_tokens(3, max(LENGTHS))
    first, second = (
        calibrate(tiny_model("llama"), [_padded(ids, side, garbage=garbage)], unit="batch")
        for side, garbage in (("left", 3), ("right", 99))
    )
    _assert_same(first, second, tolerance=1e-3)


def test_targets_of_minus_100_predict_nothing():
    ids = random_tokens(2, 8)
    labels = ids.clone()
    labels[:, :5] = -100
    masked = calibrate(tiny_model("llama"), [{"input_ids": ids, "labels": labels}])

    def late(model, batch):
        return _cross_entropy(model, batch)[:, 4:]

    by_hand = calibrate(tiny_model("llama"), [{"input_ids": ids}], loss=late)
    assert masked.num_losses == 2 * 3
    _assert_same(masked, by_hand)


def test_batches_may_come_from_a_generator_though_they_are_read_several_times():
    batches = _batches(random_tokens(4, 6), 2)
    _assert_same(
        calibrate(tiny_model("llama"), iter(batches), sweeps=3), calibrate(tiny_model("llama"), batches, sweeps=3)
    )


def test_layers_with_the_same_input_share_its_moment_which_equals_their_own():
    batches = _batches(random_tokens(4, 6), 2)
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
    batches = _batches(random_tokens(4, 6), 2)
    alone, full = calibrate(tiny_model("llama"), batches, collect=["inputs"]), calibrate(tiny_model("llama"), batches)
    assert alone.collected == {"inputs"} and len(alone.seconds) == 1
    for name, stats in alone.layers.items():
        torch.testing.assert_close(stats.input_moment, full.layers[name].input_moment, rtol=1e-5, atol=1e-5)
        assert stats.num_tokens == full.layers[name].num_tokens == 24
        assert stats.output_moment is stats.left is stats.right is stats.fisher_rows is None


@pytest.mark.parametrize("collect", [["inputs"], ["gradients"], ["kronecker"], ["inputs", "gradients"]])
def test_each_collection_holds_what_it_says(collect):
    found = calibrate(tiny_model("llama"), _batches(random_tokens(2, 5), 2), collect=collect, sweeps=2)
    fields = {"inputs": ["input_moment", "input_abs"], "gradients": ["output_moment"], "kronecker": ["left", "right"]}
    for stats in found.layers.values():
        for what, names in fields.items():
            assert all((getattr(stats, name) is not None) == (what in collect) for name in names)
        assert stats.num_tokens == 10
    assert len(found.seconds) == (2 if "kronecker" in collect else 1)


# ----------------------------------------------------------------------------------------------- checkpointing, dtypes


@pytest.mark.parametrize("kind", ["llama", "opt"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(kind, reentrant):
    from transformers import OPTConfig, OPTForCausalLM

    batches = _batches(random_tokens(4, 6), 2)
    model = tiny_model(kind)
    if kind == "opt":  # its layers drop functionally, which evaluation alone does not stop under checkpointing
        dropping = OPTForCausalLM(OPTConfig(**{**model.config.to_dict(), "dropout": 0.5, "layerdrop": 0.5}))
        dropping.load_state_dict(model.state_dict())
        model = dropping.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    _assert_same(calibrate(model, batches), calibrate(tiny_model(kind), batches))
    assert model.is_gradient_checkpointing


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float16, 0.02), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("unit", UNITS)
def test_models_of_other_dtypes_have_the_same_statistics_to_their_precision(dtype, tolerance, unit):
    batches = _batches(random_tokens(4, 6), 2)
    found = calibrate(tiny_model("llama").to(dtype), batches, unit=unit)
    expected = calibrate(tiny_model("llama"), batches, unit=unit)
    for name, stats in found.layers.items():
        for matrix in MATRICES[2:]:
            difference = symmetric(getattr(stats, matrix)) - symmetric(getattr(expected.layers[name], matrix))
            assert difference.norm() < 2 * tolerance, f"{matrix} of {name}"
    _assert_same(found, expected, tolerance=tolerance, names=("input_moment", "input_abs"), scales=False)
    stats = found.layers["model.layers.1.mlp.down_proj"]
    assert {getattr(stats, name).dtype for name in (*MATRICES, *VECTORS)} == {torch.float32}


@pytest.mark.parametrize("factor", [1e-6, 1e4])
def test_the_unit_of_the_loss_does_not_change_the_factors(factor):
    batches = _batches(random_tokens(4, 6), 2)
    plain, sized = (
        calibrate(tiny_model("llama"), batches, loss=lambda model, batch, f=f: f * _cross_entropy(model, batch))
        for f in (1.0, factor)
    )
    for name, stats in sized.layers.items():
        expected = plain.layers[name]
        torch.testing.assert_close(stats.left, expected.left, rtol=0, atol=1e-5)
        torch.testing.assert_close(stats.right, expected.right, rtol=0, atol=1e-5)
        ratio = (stats.scale / stats.gradient_scale**2) / (expected.scale / expected.gradient_scale**2)
        assert ratio == pytest.approx(factor**2, rel=1e-4)


# ------------------------------------------------------------------------------------------------------ sampled labels


def test_a_first_batch_without_gradient_does_not_settle_their_scale():
    ids = random_tokens(4, 6)

    def weighted(model, batch):
        return batch["weight"] * _cross_entropy(model, batch).sum(1)

    batches = [
        {"input_ids": ids[:2], "weight": torch.zeros(2)},
        {"input_ids": ids[2:], "weight": torch.full((2,), 1e-12)},
    ]
    found = calibrate(tiny_model("llama"), batches, loss=weighted)
    expected = calibrate(tiny_model("llama"), [{"input_ids": ids[2:]}])
    for name, stats in found.layers.items():
        torch.testing.assert_close(stats.left, expected.layers[name].left, rtol=0, atol=1e-5)


def _sampled(logits, ids, *, seed=0, mask=None):
    """The labels that the loss draws for a model with these logits, read off its gradient."""

    class Fixed(nn.Module):
        def forward(self, input_ids, **_):
            return type("Output", (), {"logits": self.logits})

    model = Fixed()
    model.logits = logits.clone().requires_grad_()
    batch = {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}
    next_token_loss("sampled", seed)(model, batch).sum().backward()
    return model.logits.grad.argmin(-1)[:, :-1]  # softmax minus one-hot is negative at the label alone


def test_sampled_labels_follow_the_distribution_of_the_model():
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1, 0.0])
    ids = random_tokens(40, 251)
    drawn = _sampled(probabilities.log().clamp(min=-1e30).expand(40, 251, 5), ids)
    counts = torch.bincount(drawn.flatten(), minlength=5).double()
    expected = probabilities.double() * drawn.numel()
    assert counts[4] == 0
    chi_square = ((counts - expected).square() / expected)[:4].sum().item()
    assert chi_square < 16.27, "exceeded by one seed in a thousand with three degrees of freedom"
    pairs = torch.bincount((5 * drawn[:, :-1] + drawn[:, 1:]).flatten(), minlength=25).double().reshape(5, 5)[:4, :4]
    independent = torch.outer(probabilities[:4], probabilities[:4]).double() * pairs.sum()
    assert ((pairs - independent).square() / independent).sum() < 37.7, (
        "the same with fifteen: neighbours are independent"
    )


def test_sampled_labels_depend_on_the_seed_and_the_text_alone():
    ids, logits = random_tokens(4, 60), torch.zeros(4, 60, 7)
    plain = _sampled(logits, ids)
    assert torch.equal(plain, _sampled(logits, ids))
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(_sampled(logits, ids[order]), plain[order])
    assert torch.equal(_sampled(logits[:1], ids[1:2]), plain[1:2])
    assert not torch.equal(plain, _sampled(logits, ids, seed=1))
    assert not torch.equal(plain[0], plain[1]), "each text has labels of its own"


def test_sampled_labels_give_another_fisher_than_those_of_the_data():
    batches = _batches(random_tokens(4, 6), 2)
    empirical, sampled, other = (
        calibrate(tiny_model("llama"), batches, labels=labels, seed=seed)
        for labels, seed in (("empirical", 0), ("sampled", 0), ("sampled", 1))
    )
    for first, second in ((empirical, sampled), (sampled, other)):
        with pytest.raises(AssertionError):
            _assert_same(first, second, tolerance=0.01, names=("output_moment",))
    again = calibrate(tiny_model("llama"), batches, labels="sampled", seed=0)
    _assert_same(again, sampled, tolerance=0)


# ----------------------------------------------------------------------------------------------------- losses of users


def test_a_loss_of_ones_own_takes_the_place_of_the_next_token_loss():
    batches = _batches(random_tokens(4, 6), 2)
    _assert_same(calibrate(tiny_model("llama"), batches, loss=_cross_entropy), calibrate(tiny_model("llama"), batches))


def test_batches_may_hold_one_label_for_each_sequence():
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification(tiny_model("bert").config).eval()
    batch = {"input_ids": random_tokens(4, 6), "labels": torch.tensor([0, 1, 1, 0])}

    def loss(model, batch):
        logits = model(input_ids=batch["input_ids"]).logits
        return nn.functional.cross_entropy(logits, batch["labels"], reduction="none")

    found = calibrate(model, [batch], loss=loss, unit="sequence")
    assert found.num_losses == found.num_sequences == 4
    assert found.layers["classifier"].num_tokens == 4, "a pooled layer has one row for each sequence"
    assert found.layers["bert.encoder.layer.0.intermediate.dense"].num_tokens == 24


def _pairs(model, batch):
    """Embeddings of norm one of the even and the odd texts, padding aside, (B / 2, D) each."""
    hidden, mask = model.bert(**batch).last_hidden_state, batch["attention_mask"][..., None]
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).unflatten(0, (-1, 2)).unbind(1)


def _contrastive(model, batch):
    first, second = _pairs(model, batch)
    return nn.functional.cross_entropy(20 * first @ second.T, torch.arange(len(first)), reduction="none")


def _distance(model, batch):
    first, second = _pairs(model, batch)
    return (first - second).square().sum(-1)


def _padded_pairs(ids, lengths):
    mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.where(mask.bool(), ids, 77), "attention_mask": mask}


@pytest.mark.parametrize("unit", ["token", "sequence"])
@pytest.mark.parametrize("name", ["attention.self.key", "output.dense"])
def test_statistics_of_an_encoder_are_those_of_the_gradients_of_its_own_loss(unit, name):
    name = f"bert.encoder.layer.0.{name}"
    batches = [_padded_pairs(random_tokens(6, 7, seed=seed), (7, 3, 5, 6, 2, 4)) for seed in (1, 2)]
    model = tiny_model("bert").double()
    tokens = torch.cat([gradients_per_token(model, name, batch, _contrastive) for batch in batches])
    left, right, fit = power_sweeps(tokens.flatten(0, 1) if unit == "token" else tokens.sum(1), 2)

    found = calibrate(tiny_model("bert"), batches, unit=unit, sweeps=2, clip=0, loss=_contrastive, exclude=["^cls"])
    assert found.num_losses == 6
    layer = found.layers[name]
    scale = layer.gradient_scale**2
    rows = tokens.flatten(0, 1).square().sum((0, 2))
    torch.testing.assert_close(layer.fisher_rows.double() / scale, rows, rtol=1e-3, atol=1e-6 * rows.max().item())
    torch.testing.assert_close(symmetric(layer.left), left, rtol=0, atol=1e-5)
    torch.testing.assert_close(symmetric(layer.right), right, rtol=0, atol=1e-5)
    assert layer.scale / scale == pytest.approx(fit, rel=1e-3)


@pytest.mark.parametrize("unit", ["token", "sequence"])
def test_padding_does_not_count_for_a_users_loss(unit):
    ids = random_tokens(6, max(LENGTHS) + 3)
    alone = [_padded_pairs(ids[2 * n : 2 * n + 2, :length], [length] * 2) for n, length in enumerate(LENGTHS)]
    padded = [_padded_pairs(ids, [length for length in LENGTHS for _ in range(2)])]
    plain, found = (
        calibrate(tiny_model("bert"), batches, unit=unit, loss=_distance, exclude=["^cls"])
        for batches in (alone, padded)
    )
    _assert_same(found, plain, tolerance=1e-3)
    assert all(stats.num_tokens == 2 * sum(LENGTHS) for stats in found.layers.values())


@pytest.mark.parametrize("collect", [["inputs"], ["inputs", "gradients"]])
def test_batches_in_the_form_of_a_users_loss_serve_every_collection(collect):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    batch = {"first": torch.randn(3, 6), "second": torch.randn(3, 6)}

    def loss(model, batch):
        return (model(batch["first"]) - model(batch["second"])).square().sum(-1)

    found = calibrate(model, [batch], collect=collect, loss=loss).layers["0"]
    inputs = torch.cat([batch["first"], batch["second"]]).double()
    assert found.num_tokens == 6
    assert torch.allclose(symmetric(found.input_moment), inputs.T @ inputs, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------------- what goes wrong


def _state(model):
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [(name, module.training, len(module._forward_hooks)) for name, module in model.named_modules()],
        [(name, parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()],
        model.config.use_cache,
    )


def _assert_untouched(model, before):
    values, *rest = _state(model)
    assert rest == list(before[1:])
    assert all(torch.equal(value, before[0][name]) or value.isnan().any() for name, value in values.items())


def test_calibration_leaves_the_model_as_it_was():
    model = tiny_model("llama").train()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = _state(model)
    calibrate(model, _batches(random_tokens(2, 5), 1))
    _assert_untouched(model, before)


def test_calibration_works_where_gradients_are_switched_off():
    batches = _batches(random_tokens(4, 6), 2)
    with torch.no_grad():
        found = calibrate(tiny_model("llama"), batches)
    _assert_same(found, calibrate(tiny_model("llama"), batches))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_activations_that_are_not_finite_name_the_layer(value):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = value
    before = _state(model)
    for collect in (["inputs"], ["kronecker"]):
        with pytest.raises(GfwsvdError, match=r"activations that enter layer model\.layers\.1\.mlp\.gate_proj"):
            calibrate(model, _batches(random_tokens(2, 5), 1), collect=collect)
        _assert_untouched(model, before)


class _BadBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * torch.nan


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_that_are_not_finite_name_the_layer(checkpointing):
    model = tiny_model("llama")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": True})
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: _BadBackward.apply(*args))
    before = _state(model)
    with pytest.raises(GfwsvdError, match=r"gradients that leave layer model\.layers\.1\.mlp\.(up|gate)_proj"):
        calibrate(model, _batches(random_tokens(2, 5), 1))
    _assert_untouched(model, before)
    handle.remove()


def test_a_loss_that_is_not_finite_is_refused():
    model = tiny_model("llama")
    before = _state(model)
    with pytest.raises(GfwsvdError, match="loss is NaN or inf"):
        calibrate(model, _batches(random_tokens(2, 5), 1), loss=lambda m, b: _cross_entropy(m, b) * torch.inf)
    _assert_untouched(model, before)


@pytest.mark.parametrize("where", ["forward", "backward", "batches"])
def test_an_interruption_leaves_the_model_as_it_was(where, monkeypatch):
    model, calls = tiny_model("llama").train(), []
    before = _state(model)

    def interrupted(*_):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt

    def track(items, description):
        for item in items:
            yield item
            if where == "batches":
                raise KeyboardInterrupt

    if where == "forward":
        original = collector.Collector._see_input
        monkeypatch.setattr(collector.Collector, "_see_input", lambda *a: interrupted() or original(*a))
    if where == "backward":
        monkeypatch.setattr(kronecker.Sweep, "accumulate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, _batches(random_tokens(4, 5), 1), track=track)
    _assert_untouched(model, before)


def test_no_scaled_gradient_outlives_its_layer(monkeypatch):
    references, most = [], []
    original = kronecker.Sweep.accumulate

    def accumulate(self, x, g, cu_seqlens):
        most.append(len({t.data_ptr() for t in (reference() for reference in references) if t is not None}))
        references.append(weakref.ref(g))
        original(self, x, g, cu_seqlens)

    monkeypatch.setattr(kronecker.Sweep, "accumulate", accumulate)
    calibrate(tiny_model("llama"), _batches(random_tokens(4, 5), 2), sweeps=2)
    assert len(references) == 2 * 2 * 14
    assert max(most) == 0 and not any(reference() is not None for reference in references)


REFUSED = {
    "unit": ({"unit": "word"}, "unit must be one of token, sequence, batch, got 'word'"),
    "labels": ({"labels": "true"}, "labels must be one of empirical, sampled, got 'true'"),
    "collect": ({"collect": ["outputs"]}, "collect must be among .* got outputs"),
    "sweeps": ({"sweeps": 0}, "sweeps must be at least 1, got 0"),
    "clip": ({"clip": -1.0}, "clip must be a number of medians, or 0 for no limit, got -1.0"),
    "clip without end": ({"clip": float("inf")}, "clip must be a number of medians"),
    "labels of a loss": ({"labels": "sampled", "loss": _cross_entropy}, "sample inside"),
    "exclude": ({"exclude": ["."]}, "no linear layer"),
    "constant loss": ({"loss": lambda model, batch: _cross_entropy(model, batch).detach()}, "depends on the linear"),
    "number as loss": ({"loss": lambda model, batch: _cross_entropy(model, batch).sum().item()}, "must be a tensor"),
    "loss beside the model": ({"loss": lambda model, batch: batch["input_ids"].float()}, "no linear layer of Llama"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_cannot_be_are_refused(case):
    settings, message = REFUSED[case]
    model = tiny_model("llama")
    before = _state(model)
    with pytest.raises(GfwsvdError, match=message):
        calibrate(model, _batches(random_tokens(2, 5), 1), **settings)
    _assert_untouched(model, before)


def test_no_batches_are_refused_where_something_is_collected():
    with pytest.raises(GfwsvdError, match="at least one batch"):
        calibrate(tiny_model("llama"), [])
    assert len(calibrate(tiny_model("llama"), [], collect=[]).layers) == 14


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": random_tokens(2, 1)},
        {"input_ids": random_tokens(2, 5), "attention_mask": torch.zeros(2, 5, dtype=torch.long)},
    ],
    ids=["one token", "all padding"],
)
def test_batches_that_predict_nothing_are_refused(batch):
    with pytest.raises(GfwsvdError, match="sequence of two tokens"):
        calibrate(tiny_model("llama"), [batch])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize(
    "ids, message", [(random_tokens(1, 129), "takes 128 at most"), (random_tokens(2, 5) + 128, "has 128")]
)
def test_tokens_that_the_model_does_not_take_are_refused(kind, ids, message):
    with pytest.raises(GfwsvdError, match=message):
        calibrate(tiny_model(kind), [{"input_ids": random_tokens(2, 5)}, {"input_ids": ids}])


def test_a_masked_language_model_needs_a_loss():
    with pytest.raises(GfwsvdError, match="BertForMaskedLM gives no logits of next tokens.*loss of your own"):
        calibrate(tiny_model("bert"), _batches(random_tokens(2, 5), 1))


def test_an_encoder_without_logits_needs_a_loss():
    with pytest.raises(GfwsvdError, match="BertModel gives no logits.*loss of your own"):
        calibrate(tiny_model("bert").bert, _batches(random_tokens(2, 5), 1))


def test_layers_that_no_input_reaches_are_reported_and_left_out():
    model = tiny_model("bert")

    def loss(model, batch):
        return model.bert(input_ids=batch["input_ids"]).last_hidden_state.square().sum((1, 2))

    found = calibrate(model, _batches(random_tokens(2, 5), 1), loss=loss)
    assert found.unreached == ("cls.predictions.transform.dense",)
    assert len(found.layers) == 12


def test_layers_that_no_gradient_reaches_are_refused_by_name():
    def loss(model, batch):
        return model(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states[1].square().sum((1, 2))

    with pytest.raises(GfwsvdError, match=r"no gradient comes to model\.layers\.1\.self_attn\.q_proj, .*exclude"):
        calibrate(tiny_model("llama"), _batches(random_tokens(2, 5), 1), loss=loss)
    found = calibrate(tiny_model("llama"), _batches(random_tokens(2, 5), 1), loss=loss, exclude=[r"layers\.1\."])
    assert len(found.layers) == 7


class Strange(nn.Module):
    """A layer that sees a number of rows that is no multiple of the sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.odd = nn.Embedding(128, 8), nn.Linear(8, 8)

    def forward(self, input_ids):
        return self.odd(self.embedding(input_ids).flatten(0, 1)[1:])


def test_a_layer_whose_rows_are_no_tokens_is_refused_by_name():
    with pytest.raises(GfwsvdError, match="layer odd sees 9 rows in a batch of 2 sequences"):
        calibrate(Strange(), _batches(random_tokens(2, 5), 2), loss=lambda m, b: m(b["input_ids"]).sum(-1))


def test_data_sha256_is_that_of_the_rows():
    ids = random_tokens(4, 6)
    digest = data_sha256(_batches(ids, 4))
    assert digest == data_sha256(_batches(ids, 1))
    assert digest != data_sha256(_batches(ids[:, :5], 4))
    assert digest != data_sha256(_batches(ids.flip(0), 4))
    assert digest != data_sha256([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    halves = torch.randn(2, 3).bfloat16()
    assert data_sha256([{"x": halves}]) == data_sha256([{"x": halves[:1]}, {"x": halves[1:]}])
