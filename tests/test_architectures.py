"""The architectures the project answers for: calibrated, compressed, and still themselves."""

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer

from gfwsvd.calibration import calibrate
from gfwsvd.compress import compress
from gfwsvd.errors import GfwsvdError
from gfwsvd.hf import save_pretrained
from gfwsvd.layers import LowRankLinear, find_linears
from tiny_models import CAUSAL_KINDS, KINDS, random_tokens, tiny_model

IDS = random_tokens(16, 24)
BATCHES = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in IDS.split(8)]


def _predictions(model, ids):
    """Logits of the predicted positions: the next token, or where a masked language model must find the hidden ones."""
    if model.config.model_type != "bert":
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1]
    hidden = torch.arange(ids.shape[1]) % 5 == 2
    return model(input_ids=ids.masked_fill(hidden, 3), attention_mask=torch.ones_like(ids)).logits[:, hidden]


def _loss_of_sampled_labels(model, batch):
    """Cross-entropy with labels drawn from the model, the same at every call."""
    logits = _predictions(model, batch["input_ids"])
    generator = torch.Generator().manual_seed(int(batch["input_ids"].sum()))
    labels = torch.multinomial(logits.detach().softmax(-1).flatten(0, 1), 1, generator=generator)
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 0], reduction="none")


@pytest.fixture(scope="module")
def statistics():
    """Of every kind of tiny model."""
    return {kind: calibrate(tiny_model(kind), BATCHES, loss=_loss_of_sampled_labels) for kind in KINDS}


def _divergence(reference, model):
    """Mean KL divergence of the model's predictions from the reference's, in nats per predicted token."""
    with torch.no_grad():
        first, second = (_predictions(m, IDS).log_softmax(-1) for m in (reference, model))
    return (first.exp() * (first - second)).sum(-1).mean().item()


@pytest.mark.parametrize("kind", KINDS)
def test_a_compressed_model_keeps_its_budget_and_runs(kind, statistics):
    model = tiny_model(kind)
    report = compress(model, method="gfwsvd", keep=0.7, rank_multiple=2, statistics=statistics[kind])
    assert 0.69 < report.kept <= 0.7
    assert {layer.name for layer in report.layers} == set(find_linears(tiny_model(kind)))
    compressed = [name for name, module in model.named_modules() if isinstance(module, LowRankLinear)]
    assert compressed == [layer.name for layer in report.layers if layer.kind != "dense"]
    assert len(compressed) > 2
    assert torch.isfinite(_predictions(model, IDS)).all()
    assert all(layer.predicted_loss >= 0 for layer in report.layers)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["gfwsvd", "kfac"])
@pytest.mark.parametrize("keep", [0.97, 0.8])
def test_with_labels_of_the_model_the_predicted_loss_is_the_divergence_from_the_dense_model(
    kind, method, keep, statistics
):
    """The Fisher of the model's own labels is the curvature of that divergence, whether the model has learnt or not."""
    model = tiny_model(kind)
    report = compress(model, method=method, keep=keep, rank_multiple=1, statistics=statistics[kind])
    predicted, measured = sum(layer.predicted_loss for layer in report.layers), _divergence(tiny_model(kind), model)
    assert 1 / 4 < predicted / measured < 2, (predicted, measured)


@pytest.mark.parametrize("kind", KINDS)
def test_less_kept_is_more_lost(kind, statistics):
    predicted, measured = [], []
    for keep in (0.9, 0.7, 0.5):
        model = tiny_model(kind)
        report = compress(model, keep=keep, rank_multiple=2, statistics=statistics[kind])
        predicted.append(sum(layer.predicted_loss for layer in report.layers))
        measured.append(_divergence(tiny_model(kind), model))
    assert predicted == sorted(predicted) and predicted[0] < predicted[-1] / 2
    assert measured == sorted(measured) and measured[0] < measured[-1] / 2


@pytest.mark.parametrize("kind", CAUSAL_KINDS)
def test_a_compressed_model_generates_with_its_cache(kind, statistics):
    model = tiny_model(kind)
    compress(model, keep=0.7, rank_multiple=2, statistics=statistics[kind])
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    cached, plain = (model.generate(IDS[:2, :5], use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt2"])
@pytest.mark.parametrize("unit", ["sequence", "batch"])
def test_other_units_of_the_fisher_do_as_well(kind, unit):
    model = tiny_model(kind)
    report = compress(model, BATCHES, keep=0.9, rank_multiple=2, unit=unit, labels="sampled")
    assert report.provenance["settings"]["unit"] == unit
    worse = tiny_model(kind)
    compress(worse, method="svd", keep=0.9, rank_multiple=2)
    assert _divergence(tiny_model(kind), model) < _divergence(tiny_model(kind), worse)


# ------------------------------------------------------------------------------------------- a real encoder

SENTENCES = (
    ("A cat sleeps on the warm windowsill.", "The cat is napping by the window."),
    ("The stock market fell sharply on Monday.", "Share prices dropped at the start of the week."),
    ("She plays the violin in an orchestra.", "A woman performs with her violin on stage."),
    ("It rained all night in the mountains.", "Heavy rain came down over the hills until morning."),
    ("The engineer repaired the broken bridge.", "A damaged bridge was fixed by an engineer."),
    ("Children are playing football in the park.", "Kids kick a ball on the grass."),
)


@pytest.fixture(scope="module")
def encoder(minilm):
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    both = tokenizer([text for pair in SENTENCES for text in pair], padding=True, return_tensors="pt")
    return lambda: AutoModel.from_pretrained(minilm).eval(), dict(both)


def _embeddings(model, batch):
    hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def _contrastive_loss(model, batch):
    """Each sentence must find its pair among all others of the batch."""
    first, second = _embeddings(model, batch).unflatten(0, (-1, 2)).unbind(1)
    return nn.functional.cross_entropy(20 * first @ second.T, torch.arange(len(first)), reduction="none")


def test_a_real_encoder_with_a_loss_of_its_user(encoder, tmp_path):
    load, batch = encoder
    model = load()
    with pytest.raises(GfwsvdError, match=r"no gradient comes to pooler\.dense.*exclude"):
        calibrate(model, [batch], loss=_contrastive_loss)
    statistics = calibrate(model, [batch], loss=_contrastive_loss, exclude=["pooler"], unit="sequence")
    assert len(statistics.layers) == 36 and statistics.num_losses == len(SENTENCES)
    assert all(stats.num_tokens == batch["attention_mask"].sum() for stats in statistics.layers.values())

    with torch.no_grad():
        reference = _embeddings(model, batch)
        report = compress(model, keep=0.9, statistics=statistics)
        plain = load()
        compress(plain, method="svd", keep=0.9, exclude=["pooler"])
        kept, lost = ((_embeddings(m, batch) * reference).sum(-1).mean().item() for m in (model, plain))
        losses = [_contrastive_loss(m, batch).mean().item() for m in (load(), model, plain)]
    assert report.kept <= 0.9 and not any("pooler" in layer.name for layer in report.layers)
    assert losses[1] - losses[0] < 0.5 * (losses[2] - losses[0]), (losses, kept, lost)

    save_pretrained(model, tmp_path / "small", report=report)
    with torch.no_grad():
        assert torch.equal(_embeddings(AutoModel.from_pretrained(tmp_path / "small"), batch), _embeddings(model, batch))
