"""A model is as it was after calibration, and what cannot be calibrated is refused by name."""

import weakref

import pytest
import torch
from calibrations import assert_same, cross_entropy, in_batches
from torch import nn

from gfwsvd import collector, kronecker
from gfwsvd.batches import data_sha256
from gfwsvd.calibration import calibrate
from gfwsvd.errors import GfwsvdError
from tiny_models import random_tokens, tiny_model


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
    calibrate(model, in_batches(random_tokens(2, 5), 1))
    _assert_untouched(model, before)


def test_calibration_works_where_gradients_are_switched_off():
    batches = in_batches(random_tokens(4, 6), 2)
    with torch.no_grad():
        found = calibrate(tiny_model("llama"), batches)
    assert_same(found, calibrate(tiny_model("llama"), batches))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_activations_that_are_not_finite_name_the_layer(value):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = value
    before = _state(model)
    for collect in (["inputs"], ["kronecker"]):
        with pytest.raises(GfwsvdError, match=r"activations that enter layer model\.layers\.1\.mlp\.gate_proj"):
            calibrate(model, in_batches(random_tokens(2, 5), 1), collect=collect)
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
        calibrate(model, in_batches(random_tokens(2, 5), 1))
    _assert_untouched(model, before)
    handle.remove()


def test_a_loss_that_is_not_finite_is_refused():
    model = tiny_model("llama")
    before = _state(model)
    with pytest.raises(GfwsvdError, match="loss is NaN or inf"):
        calibrate(model, in_batches(random_tokens(2, 5), 1), loss=lambda m, b: cross_entropy(m, b) * torch.inf)
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
        calibrate(model, in_batches(random_tokens(4, 5), 1), track=track)
    _assert_untouched(model, before)


def test_no_scaled_gradient_outlives_its_layer(monkeypatch):
    references, most = [], []
    original = kronecker.Sweep.accumulate

    def accumulate(self, x, g, cu_seqlens):
        most.append(len({t.data_ptr() for t in (reference() for reference in references) if t is not None}))
        references.append(weakref.ref(g))
        original(self, x, g, cu_seqlens)

    monkeypatch.setattr(kronecker.Sweep, "accumulate", accumulate)
    calibrate(tiny_model("llama"), in_batches(random_tokens(4, 5), 2), sweeps=2)
    assert len(references) == 2 * 2 * 14
    assert max(most) == 0 and not any(reference() is not None for reference in references)


REFUSED = {
    "unit": ({"unit": "word"}, "unit must be one of token, sequence, batch, got 'word'"),
    "labels": ({"labels": "true"}, "labels must be one of empirical, sampled, got 'true'"),
    "collect": ({"collect": ["outputs"]}, "collect must be among .* got outputs"),
    "sweeps": ({"sweeps": 0}, "sweeps must be at least 1, got 0"),
    "clip": ({"clip": -1.0}, "clip must be a number of medians, or 0 for no limit, got -1.0"),
    "clip without end": ({"clip": float("inf")}, "clip must be a number of medians"),
    "labels of a loss": ({"labels": "sampled", "loss": cross_entropy}, "sample inside"),
    "exclude": ({"exclude": ["."]}, "no linear layer"),
    "constant loss": ({"loss": lambda model, batch: cross_entropy(model, batch).detach()}, "depends on the linear"),
    "number as loss": ({"loss": lambda model, batch: cross_entropy(model, batch).sum().item()}, "must be a tensor"),
    "loss beside the model": ({"loss": lambda model, batch: batch["input_ids"].float()}, "no linear layer of Llama"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_cannot_be_are_refused(case):
    settings, message = REFUSED[case]
    model = tiny_model("llama")
    before = _state(model)
    with pytest.raises(GfwsvdError, match=message):
        calibrate(model, in_batches(random_tokens(2, 5), 1), **settings)
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
        calibrate(tiny_model("bert"), in_batches(random_tokens(2, 5), 1))


def test_an_encoder_without_logits_needs_a_loss():
    with pytest.raises(GfwsvdError, match="BertModel gives no logits.*loss of your own"):
        calibrate(tiny_model("bert").bert, in_batches(random_tokens(2, 5), 1))


def test_layers_that_no_input_reaches_are_reported_and_left_out():
    model = tiny_model("bert")

    def loss(model, batch):
        return model.bert(input_ids=batch["input_ids"]).last_hidden_state.square().sum((1, 2))

    found = calibrate(model, in_batches(random_tokens(2, 5), 1), loss=loss)
    assert found.unreached == ("cls.predictions.transform.dense",)
    assert len(found.layers) == 12


def test_layers_that_no_gradient_reaches_are_refused_by_name():
    def loss(model, batch):
        return model(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states[1].square().sum((1, 2))

    with pytest.raises(GfwsvdError, match=r"no gradient comes to model\.layers\.1\.self_attn\.q_proj, .*exclude"):
        calibrate(tiny_model("llama"), in_batches(random_tokens(2, 5), 1), loss=loss)
    found = calibrate(tiny_model("llama"), in_batches(random_tokens(2, 5), 1), loss=loss, exclude=[r"layers\.1\."])
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
        calibrate(Strange(), in_batches(random_tokens(2, 5), 2), loss=lambda m, b: m(b["input_ids"]).sum(-1))


def test_data_sha256_is_that_of_the_rows():
    ids = random_tokens(4, 6)
    digest = data_sha256(in_batches(ids, 4))
    assert digest == data_sha256(in_batches(ids, 1))
    assert digest != data_sha256(in_batches(ids[:, :5], 4))
    assert digest != data_sha256(in_batches(ids.flip(0), 4))
    assert digest != data_sha256([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    halves = torch.randn(2, 3).bfloat16()
    assert data_sha256([{"x": halves}]) == data_sha256([{"x": halves[:1]}, {"x": halves[1:]}])
