"""Fused models: the same outputs by fewer calls, in any model's own classes."""

import copy

import pytest
import torch
from torch import nn

from gfwsvd.calibration import calibrate
from gfwsvd.compress import compress
from gfwsvd.errors import GfwsvdError
from gfwsvd.fuse import GroupedLinear, GroupedOutput, fuse
from gfwsvd.layers import LowRankLinear
from gfwsvd.ranks import STORAGE
from gfwsvd_kernels import LowRankGroup
from tiny_models import KINDS, random_tokens, tiny_model

IDS = random_tokens(3, 10)


def _compressed(kind, *, storage="pivoted", keep=0.7, dtype=None, **options):
    model = tiny_model(kind)
    loss = None
    if kind == "bert":

        def loss(model, batch):
            return model(**batch).logits.logsumexp(-1).flatten()

    statistics = calibrate(model, [{"input_ids": random_tokens(6, 12)}], loss=loss)
    compress(model, statistics=statistics, keep=keep, rank_multiple=4, storage=storage, **options)
    return model.to(dtype)


def _logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_model_has_the_logits_of_the_model_as_it_was(kind, storage):
    model = _compressed(kind, storage=storage)
    expected = _logits(model)
    assert fuse(model) is model
    assert not any(isinstance(module, LowRankLinear) for module in model.modules())
    torch.testing.assert_close(_logits(model), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(_logits(model), expected, rtol=1e-4, atol=1e-4)  # again: nothing is left over


def test_layers_of_one_input_share_a_call_and_dense_ones_stay_out_of_it(monkeypatch):
    model = _compressed("llama", ranks="uniform", bounds={"0.self_attn.k_proj": (1, 1)})
    assert isinstance(model.model.layers[0].self_attn.k_proj, nn.Linear)
    fuse(model)
    calls = []
    forward = LowRankGroup.forward
    monkeypatch.setattr(LowRankGroup, "forward", lambda self, x: calls.append(self.layout) or forward(self, x))
    _logits(model)
    widths = [[projection.d_out for projection in layout.projections] for layout in calls]
    assert widths == [[64, 32], [64], [160, 160], [64], [64, 32, 32], [64], [160, 160], [64]]
    assert all(module.waiting is None for module in model.modules() if isinstance(module, GroupedLinear))


def test_a_layer_that_is_called_alone_or_with_another_input_computes_its_own():
    model = _compressed("llama", ranks="uniform")
    before = copy.deepcopy(model.model.layers[0].self_attn)
    attention = fuse(model).model.layers[0].self_attn
    assert isinstance(attention.v_proj, GroupedOutput)
    x, other = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
    with torch.no_grad():
        torch.testing.assert_close(attention.v_proj(x), before.v_proj(x), rtol=1e-4, atol=1e-5)
        attention.q_proj(x)
        torch.testing.assert_close(attention.k_proj(other), before.k_proj(other), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(attention.k_proj(x), before.k_proj(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_says_the_same_tokens(cache):
    model = _compressed("llama")
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    expected = model.generate(IDS, **options)
    assert torch.equal(fuse(model).generate(IDS, cache_implementation=cache, **options), expected)


def test_torch_compile_traces_a_fused_model_as_one_graph():
    model = fuse(_compressed("llama"))
    expected = _logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(_logits(compiled), expected, rtol=1e-4, atol=1e-4)


def test_a_copy_of_a_fused_model_has_groups_of_its_own():
    model = fuse(_compressed("llama"))
    expected = _logits(model)
    other = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, GroupedLinear):
            module.group.down.zero_()
    torch.testing.assert_close(_logits(other), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_fused_too(dtype):
    model = _compressed("llama", dtype=dtype)
    expected = _logits(model).double()
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-9
    assert (_logits(fuse(model)).double() - expected).norm() <= tolerance * expected.norm()


def test_models_without_low_rank_layers_are_refused():
    with pytest.raises(GfwsvdError, match="has no low-rank layers to fuse"):
        fuse(tiny_model("llama"))
    model = fuse(_compressed("llama"))
    with pytest.raises(GfwsvdError, match="fused only once"):
        fuse(model)


def test_a_fused_model_is_not_saved_in_part(tmp_path):
    with pytest.raises(GfwsvdError, match="for inference alone"):
        fuse(_compressed("llama")).save_pretrained(tmp_path / "fused")
    assert not list(tmp_path.rglob("*.safetensors"))
