"""The losses that calibration takes: sampled labels, and losses of a user's own, of encoders too."""

import pytest
import torch
from calibrations import LENGTHS, assert_same, cross_entropy, in_batches
from oracles import gradients_per_token, power_sweeps, symmetric
from torch import nn

from gfwsvd.calibration import calibrate
from gfwsvd.losses import next_token_loss
from tiny_models import random_tokens, tiny_model


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
    batches = in_batches(random_tokens(4, 6), 2)
    empirical, sampled, other = (
        calibrate(tiny_model("llama"), batches, labels=labels, seed=seed)
        for labels, seed in (("empirical", 0), ("sampled", 0), ("sampled", 1))
    )
    for first, second in ((empirical, sampled), (sampled, other)):
        with pytest.raises(AssertionError):
            assert_same(first, second, tolerance=0.01, names=("output_moment",))
    again = calibrate(tiny_model("llama"), batches, labels="sampled", seed=0)
    assert_same(again, sampled, tolerance=0)


def test_a_loss_of_ones_own_takes_the_place_of_the_next_token_loss():
    batches = in_batches(random_tokens(4, 6), 2)
    assert_same(calibrate(tiny_model("llama"), batches, loss=cross_entropy), calibrate(tiny_model("llama"), batches))


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
    assert_same(found, plain, tolerance=1e-3)
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
