"""Evaluation against plain float64 formulas, on models that keep, cap, tie or untie their output embedding."""

import copy
import math
import sys

import pytest
import torch
from torch import nn

from gfwsvd.errors import GfwsvdError
from gfwsvd.evaluate import evaluate, generate_sample
from gfwsvd.logits import ReferenceLogits
from tiny_models import CAUSAL_KINDS, VOCABULARY, random_tokens, tiny_model


def noisy(model: nn.Module, scale: float = 0.02, *, seed: int = 1) -> nn.Module:
    """A copy of `model` with noise on all its parameters."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=scale)
    return other


def capped_model(cap: float = 0.5) -> nn.Module:
    """A tiny Gemma 2, which caps its logits; so low that the cap matters."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=128, initializer_range=0.2,
        final_logit_softcapping=cap, pad_token_id=0,
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


def naive(model: nn.Module, tokens: torch.Tensor, reference: nn.Module | None = None) -> tuple[float, float, float]:
    """Perplexity, KL and top-1 share from all logits in float64, by their definitions."""

    def predict(which: nn.Module) -> torch.Tensor:
        return which(input_ids=tokens).logits[:, :-1].double()

    with torch.no_grad():
        logits = predict(model)
        logs = logits - logits.exp().sum(-1, keepdim=True).log()
        losses = -logs.gather(-1, tokens[:, 1:, None])
        if reference is None:
            return math.exp(losses.mean()), math.nan, math.nan
        expected = predict(reference)
        expected_logs = expected - expected.exp().sum(-1, keepdim=True).log()
        kl = (expected_logs.exp() * (expected_logs - logs)).sum(-1).mean()
        return math.exp(losses.mean()), kl.item(), (logits.argmax(-1) == expected.argmax(-1)).double().mean().item()


@pytest.mark.parametrize("kind", CAUSAL_KINDS)
def test_evaluation_equals_the_definitions(kind):
    model = tiny_model(kind).double()
    other, tokens = noisy(model), random_tokens(5, 20)
    found = evaluate(other, tokens, reference=model, batch_size=2)
    perplexity, kl, top1 = naive(other, tokens, model)
    assert found.tokens == 5 * 19
    assert 0.01 < kl and 0.1 < top1 < 1, "an oracle at an end of its range proves little"
    torch.testing.assert_close(
        torch.tensor([found.perplexity, found.kl, found.top1], dtype=torch.float64),
        torch.tensor([perplexity, kl, top1], dtype=torch.float64),
        rtol=1e-10,
        atol=0,
    )


def strided(model: nn.Module, text: list[int], window: int, stride: int, reference: nn.Module) -> tuple[float, ...]:
    """Perplexity, KL, top-1 share and their number of tokens: window by window, those that were not seen before."""
    losses, distances, agreements, seen = [], [], [], 1
    for start in range(0, len(text) - window + 1, stride):
        ids = torch.tensor([text[start : start + window]])
        with torch.no_grad():
            all_logits, all_expected = model(ids).logits[0].double(), reference(ids).logits[0].double()
        for place in range(max(seen, start + 1), start + window):
            logits, expected = all_logits[place - 1 - start], all_expected[place - 1 - start]
            logs, expected_logs = logits - logits.exp().sum().log(), expected - expected.exp().sum().log()
            losses.append(-logs[text[place]].item())
            distances.append((expected_logs.exp() * (expected_logs - logs)).sum().item())
            agreements.append(float(logits.argmax() == expected.argmax()))
        seen = start + window
    count = len(losses)
    return math.exp(sum(losses) / count), sum(distances) / count, sum(agreements) / count, count


@pytest.mark.parametrize("kind", ["llama", "capped"])  # the second keeps no states but runs again
@pytest.mark.parametrize(("window", "stride"), [(10, 1), (10, 3), (10, 9), (10, 10), (7, 4), (2, 1), (29, 5)])
def test_strided_evaluation_equals_a_loop_over_tokens(kind, window, stride):
    model = (capped_model() if kind == "capped" else tiny_model(kind)).double()
    other, text = noisy(model), random_tokens(1, 29)[0]
    tokens = text.unfold(0, window, stride)
    *expected, count = strided(other, text.tolist(), window, stride, model)
    for reference in (model, ReferenceLogits(model, tokens, batch_size=3)):
        found = evaluate(other, tokens, stride=stride, reference=reference, batch_size=2)
        assert (found.tokens, found.window, found.stride) == (count, window, stride)
        assert (found.perplexity, found.kl, found.top1) == pytest.approx(tuple(expected), rel=1e-10)


def test_without_a_stride_windows_do_not_overlap_and_the_result_is_the_same_to_the_bit():
    model, tokens = tiny_model("llama"), random_tokens(5, 12)
    one, other = evaluate(model, tokens, batch_size=2), evaluate(model, tokens, stride=12, batch_size=2)
    assert one.perplexity == other.perplexity and (one.window, one.stride) == (other.window, other.stride) == (12, 12)


def test_a_shorter_stride_predicts_the_same_tokens_from_more():
    model, text = tiny_model("llama").double(), random_tokens(1, 60)[0]
    alone = evaluate(model, text.unfold(0, 20, 20))
    after = evaluate(model, text.unfold(0, 20, 10), stride=10)
    assert (alone.tokens, after.tokens) == (3 * 19, 59) and alone.perplexity != after.perplexity


@pytest.mark.parametrize(
    ("stride", "message"),
    [
        (0, "stride must be from 1 to the window's 8 tokens, got 0"),
        (9, "stride must be from 1 to the window's 8 tokens, got 9"),
        (4, "do not follow one another by a stride of 4 tokens"),
    ],
)
def test_a_stride_that_the_windows_do_not_have_is_refused(stride, message):
    with pytest.raises(GfwsvdError, match=message):
        evaluate(tiny_model("llama"), random_tokens(3, 8), stride=stride)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_perplexity_is_exp_of_the_loss_of_transformers(kind):
    model, tokens = tiny_model(kind), random_tokens(4, 24)
    loss = model(input_ids=tokens, labels=tokens).loss.item()
    assert evaluate(model, tokens).perplexity == pytest.approx(math.exp(loss), rel=1e-5)


def test_without_a_reference_there_is_neither_kl_nor_top1():
    found = evaluate(tiny_model("llama"), random_tokens(2, 8)).to_json()
    assert found.keys() == {"perplexity", "kl", "top1", "tokens", "window", "stride", "seconds"}
    assert found["kl"] is None and found["top1"] is None and found["seconds"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_model_is_at_no_distance_from_itself(dtype):
    model, tokens = tiny_model("llama").to(dtype), random_tokens(3, 16)
    found = evaluate(model, tokens, reference=model, batch_size=2)
    assert (found.kl, found.top1) == (0.0, 1.0)
    cached = evaluate(model, tokens, reference=ReferenceLogits(model, tokens, batch_size=2), batch_size=2)
    assert (cached.kl, cached.top1) == (0.0, 1.0)


def test_kl_is_that_of_the_reference_from_the_model():
    model, tokens = tiny_model("llama").double(), random_tokens(3, 16)
    other = noisy(model, 0.1)
    forth, back = evaluate(other, tokens, reference=model).kl, evaluate(model, tokens, reference=other).kl
    assert forth != pytest.approx(back, rel=1e-3)
    assert forth == pytest.approx(naive(other, tokens, model)[1], rel=1e-10)


def test_order_and_batching_of_windows_do_not_matter():
    model = tiny_model("qwen3").double()
    other, tokens = noisy(model), random_tokens(7, 12)
    base = evaluate(other, tokens, reference=model)
    shuffled = evaluate(other, tokens[torch.randperm(7)], reference=model, batch_size=3)
    for name in ("perplexity", "kl", "top1"):
        assert getattr(shuffled, name) == pytest.approx(getattr(base, name), rel=1e-12)


def test_float32_and_mixed_types_agree_with_float64():
    model, tokens = tiny_model("llama"), random_tokens(4, 16)
    other = noisy(model)
    exact = evaluate(copy.deepcopy(other).double(), tokens, reference=copy.deepcopy(model).double())
    for pair in [(other, model), (copy.deepcopy(other).double(), model), (other, copy.deepcopy(model).double())]:
        found = evaluate(pair[0], tokens, reference=pair[1])
        assert found.perplexity == pytest.approx(exact.perplexity, rel=1e-5)
        assert found.kl == pytest.approx(exact.kl, rel=1e-4)


@pytest.mark.parametrize("untied", [False, True])
def test_head_by_chunks_equals_whole_logits(untied, monkeypatch):
    model = tiny_model("gemma").double()
    if untied:
        model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    other, tokens = noisy(model), random_tokens(3, 16)
    module = sys.modules[evaluate.__module__]  # by name, gfwsvd.evaluate may be the function
    monkeypatch.setattr(module, "CHUNK_LOGITS", 7 * VOCABULARY)  # 7 does not divide 15 * 2
    chunked = evaluate(other, tokens, reference=ReferenceLogits(model, tokens), batch_size=2)
    monkeypatch.setattr("gfwsvd.logits._head_explains", lambda *_: False)
    reference = ReferenceLogits(model, tokens)
    whole = evaluate(other, tokens, reference=reference)
    assert not reference.cached
    for name in ("perplexity", "kl", "top1"):
        assert getattr(chunked, name) == pytest.approx(getattr(whole, name), rel=1e-12)
    assert chunked.kl > 0.01


def test_no_forward_makes_all_logits_twice():
    """After the look at the start of the first window, the head sees one position of a forward, and chunks."""
    model, tokens, sizes = tiny_model("llama"), random_tokens(6, 20), []
    model.register_forward_hook(lambda _, __, output: sizes.append(output.logits.shape[1]))
    evaluate(model, tokens, batch_size=2)
    assert sizes == [20, 1, 1, 1]


def test_cached_reference_never_runs_again_and_outlives_changes_of_the_model():
    model, tokens = tiny_model("llama").double(), random_tokens(4, 12)
    other = noisy(model)
    expected = evaluate(other, tokens, reference=model)
    reference = ReferenceLogits(model, tokens, batch_size=3)
    assert reference.cached
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    for _ in range(2):
        found = evaluate(other, tokens, reference=reference)
        assert (found.kl, found.top1) == (pytest.approx(expected.kl, rel=1e-12), expected.top1)


@pytest.mark.parametrize("cached", [False, True])
def test_capped_logits_are_evaluated_as_the_model_makes_them(cached):
    model, tokens = capped_model().double(), random_tokens(3, 16)
    other = noisy(model, 0.1)
    reference = ReferenceLogits(model, tokens) if cached else model
    found = evaluate(other, tokens, reference=reference, batch_size=2)
    perplexity, kl, top1 = naive(other, tokens, model)
    assert (found.perplexity, found.kl, found.top1) == pytest.approx((perplexity, kl, top1), rel=1e-10)
    model.config.final_logit_softcapping = None
    assert evaluate(model, tokens).perplexity != pytest.approx(perplexity, rel=1e-2), "the cap mattered"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cap_is_noticed_in_every_precision(dtype):
    model = capped_model(cap=5.0).to(dtype)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    assert not ReferenceLogits(model, random_tokens(2, 16)).cached
    model.config.final_logit_softcapping = None
    assert ReferenceLogits(model, random_tokens(2, 16)).cached


@pytest.mark.parametrize("change", ["replaced", "written"])
def test_a_reference_that_must_run_again_may_not_have_changed(change):
    model, tokens = capped_model(), random_tokens(2, 8)
    reference, other = ReferenceLogits(model, tokens), noisy(model)
    evaluate(other, tokens, reference=reference)
    layer = model.model.layers[0].mlp.up_proj
    if change == "replaced":
        model.set_submodule("model.layers.0.mlp.up_proj", copy.deepcopy(layer))
    else:
        with torch.no_grad():
            layer.weight.mul_(2)
    with pytest.raises(GfwsvdError, match="has changed since"):
        evaluate(other, tokens, reference=reference)


def test_the_model_is_left_as_it_was():
    model, tokens = tiny_model("gpt2"), random_tokens(2, 8)
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    first, second = evaluate(model, tokens, reference=model), evaluate(model, tokens)
    assert first.perplexity == second.perplexity, "dropout was off"
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())
    model(input_ids=tokens, labels=tokens).loss.backward()  # nothing that evaluation made hinders training


def test_modes_and_hooks_are_restored_after_an_error():
    model = tiny_model("llama").train()
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    with pytest.raises(GfwsvdError, match="the model's logits hold NaN or inf somewhere in the windows 0 to 0"):
        evaluate(model, random_tokens(2, 8))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_nan_in_the_reference_alone_is_an_error():
    model, tokens = tiny_model("llama"), random_tokens(2, 8)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight[5] = math.nan
    with pytest.raises(GfwsvdError, match="the model's or the reference's logits hold NaN"):
        evaluate(model, tokens, reference=broken)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (random_tokens(2, 1), "at least 2 tokens"),
        (random_tokens(2, 8)[0], r"windows must be \(N, S\)"),
        (random_tokens(2, 8)[:0], "N at least 1"),
        (random_tokens(2, 8).float(), "int64 or int32, got"),
        (random_tokens(2, 8) + VOCABULARY, f"the model's vocabulary has {VOCABULARY}"),
        (random_tokens(2, 8) - VOCABULARY, f"the model's vocabulary has {VOCABULARY}"),
        (random_tokens(1, 129), "the model takes 128 at most"),
    ],
)
def test_bad_windows_are_refused(tokens, message):
    with pytest.raises(GfwsvdError, match=message):
        evaluate(tiny_model("gpt2"), tokens)


def test_batch_size_below_one_is_refused():
    with pytest.raises(GfwsvdError, match="batch_size must be at least 1, got 0"):
        evaluate(tiny_model("llama"), random_tokens(2, 8), batch_size=0)


def test_another_vocabulary_is_refused():
    model, tokens = tiny_model("llama"), random_tokens(2, 8)
    larger = copy.deepcopy(model)
    larger.resize_token_embeddings(VOCABULARY + 8)
    with pytest.raises(GfwsvdError, match="the model predicts 128 tokens, the reference 136"):
        evaluate(model, tokens, reference=larger)
    with pytest.raises(GfwsvdError, match="cannot be compared with the reference: .*vocabulary has 128"):
        evaluate(larger, torch.full((2, 8), VOCABULARY + 1), reference=model)


def test_reference_logits_of_other_windows_are_refused():
    model = tiny_model("llama")
    reference = ReferenceLogits(model, random_tokens(2, 8))
    with pytest.raises(GfwsvdError, match="of other windows"):
        evaluate(model, random_tokens(2, 8, seed=1), reference=reference)


def test_a_model_that_predicts_no_next_token_is_refused():
    with pytest.raises(GfwsvdError, match="BertForMaskedLM predicts no next tokens"):
        evaluate(tiny_model("bert"), random_tokens(2, 8))


def test_progress_counts_every_batch():
    seen = []

    def track(items, description):
        for item in items:
            seen.append((item, description))
            yield item

    evaluate(tiny_model("llama"), random_tokens(5, 8), batch_size=2, track=track)
    assert seen == [(start, "evaluation: 5 windows") for start in (0, 2, 4)]


@pytest.mark.parametrize(
    ("kind", "tokenizer", "count", "message"),
    [("bert", "any", 4, "predicts no next"), ("llama", None, 4, "no tokenizer"), ("llama", "any", 0, "max_new_tokens")],
)
def test_bad_requests_for_a_sample_are_refused(kind, tokenizer, count, message):
    with pytest.raises(GfwsvdError, match=message):
        generate_sample(tiny_model(kind), tokenizer, "prompt", max_new_tokens=count)
