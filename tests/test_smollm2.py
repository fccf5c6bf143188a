"""A real language model, read once for all tests here: it reads, answers, and is compressed, saved and loaded again."""

import copy
import math

import pytest
import torch
from test_evaluate import naive
from transformers import AutoModelForCausalLM

from gfwsvd.compress import compress
from gfwsvd.evaluate import evaluate, generate_sample
from gfwsvd.hf import save_pretrained
from gfwsvd.logits import ReferenceLogits
from gfwsvd.sources import load_model, load_text, token_batches, windows


@pytest.fixture(scope="module")
def loaded(smollm2):
    model, tokenizer, _ = load_model(str(smollm2))
    return model, tokenizer


def test_it_reads_english_and_survives_a_folder(loaded, tmp_path):
    model, tokenizer = loaded
    tokens = windows(load_text("pydoc:heldout"), tokenizer, window=128, limit=2)
    with torch.no_grad():
        out = model(tokens, labels=tokens)
    assert math.exp(out.loss) < 100  # 49152 for random weights
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    again, again_tokenizer, _ = load_model(str(tmp_path / "dense"))
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, out.logits)
    assert torch.equal(windows(load_text("pydoc:heldout"), again_tokenizer, window=128, limit=2), tokens)


def test_it_predicts_english_and_answers_as_a_chat(loaded):
    model, tokenizer = loaded[0], copy.deepcopy(loaded[1])
    tokens = windows(load_text("pydoc:heldout"), tokenizer, window=64, limit=1)
    reference = ReferenceLogits(model, tokens)
    perplexity = evaluate(model, tokens).perplexity
    assert perplexity < 200 and perplexity == pytest.approx(naive(model, tokens)[0], rel=1e-4)
    assert reference.cached
    answer = generate_sample(model, tokenizer, "What is the capital of France?", max_new_tokens=12)
    assert "Paris" in answer and "<|im" not in answer
    tokenizer.chat_template = None
    assert generate_sample(model, tokenizer, "The capital of France is", max_new_tokens=1) == " Paris"


def test_it_is_compressed_saved_and_reloaded(loaded, tmp_path):
    model, tokenizer = copy.deepcopy(loaded[0]), loaded[1]
    tokens = windows(load_text("pydoc:heldout"), tokenizer, window=256, limit=1)
    batches = token_batches(load_text("pydoc:calibration"), tokenizer, sequences=4, seq_len=128)
    dense = evaluate(model, tokens).perplexity
    report = compress(model, batches, keep=0.8, exclude=[r"layers\.(\d|1\d|2[0-7])\."])  # the last two blocks: quick
    assert report.kept <= 0.8 and len(report.layers) == 14
    found = evaluate(model, tokens).perplexity
    assert dense < found < 1.2 * dense, (dense, found)

    save_pretrained(model, tmp_path / "small", report=report, tokenizer=tokenizer)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(reloaded(tokens).logits, model(tokens).logits)
