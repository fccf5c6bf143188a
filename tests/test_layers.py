"""The compressed layer, and which layers of a model it can stand for."""

import pytest
import torch
from torch import nn

from gfwsvd.errors import GfwsvdError
from gfwsvd.layers import LowRankLinear, dense_weight, find_linears, is_linear
from gfwsvd.pivot import pivoted
from tiny_models import tiny_model


@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_is_the_dense_layer_of_the_product_of_its_factors(bias):
    up, down = torch.randn(6, 3), torch.randn(3, 5)
    layer = LowRankLinear.from_factors(up, down, torch.randn(6) if bias else None)
    x = torch.randn(2, 4, 5)
    dense = torch.nn.functional.linear(x, up @ down, layer.bias)
    torch.testing.assert_close(layer(x), dense, rtol=1e-5, atol=1e-5)
    assert (layer.in_features, layer.out_features, layer.rank) == (5, 6, 3)


def test_the_layer_takes_its_factors_as_they_are_and_copies_the_bias():
    up, down, bias = torch.randn(6, 3), torch.randn(3, 5), nn.Parameter(torch.randn(6))
    layer = LowRankLinear.from_factors(up, down, bias)
    assert torch.equal(layer.up, up) and torch.equal(layer.weight, down) and torch.equal(layer.bias, bias)
    assert layer.bias is not bias and layer.bias.data_ptr() != bias.data_ptr()
    assert all(parameter.is_contiguous() and not parameter.is_meta for parameter in layer.parameters())


@pytest.mark.parametrize("bias", [False, True])
def test_an_empty_layer_of_the_same_sizes_takes_the_state_of_another(bias):
    source = LowRankLinear.from_factors(torch.randn(6, 3), torch.randn(3, 5), torch.randn(6) if bias else None)
    target = LowRankLinear(5, 6, 3, bias=bias)
    target.load_state_dict(source.state_dict())
    x = torch.randn(4, 5)
    assert torch.equal(target(x), source(x))


@pytest.mark.parametrize("bias", [False, True])
def test_a_pivoted_layer_is_the_dense_layer_of_its_product(bias):
    form = pivoted(torch.randn(6, 3), torch.randn(3, 5))
    up, down = form.up.float(), form.down.float()
    layer = LowRankLinear.from_factors(up, down, torch.randn(6) if bias else None, form.order())
    x = torch.randn(2, 4, 5)
    dense = torch.nn.functional.linear(x, layer.product(), layer.bias)
    torch.testing.assert_close(layer(x), dense, rtol=1e-5, atol=1e-5)
    assert (layer.in_features, layer.out_features, layer.rank, layer.kind) == (5, 6, 3, "pivoted")
    assert layer.stored == 3 * 5 + 3 * 3 + 6
    other = LowRankLinear(5, 6, 3, pivoted=True, bias=bias)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    layer(x).square().sum().backward()
    assert layer.weight.grad.abs().min() > 0 and layer.up.grad.abs().min() > 0


def test_a_pivoted_layer_needs_an_output_besides_its_pivots():
    with pytest.raises(GfwsvdError, match="below out_features if pivoted, got rank 4 for 5 -> 4"):
        LowRankLinear(5, 4, 4, pivoted=True)
    assert LowRankLinear(5, 4, 4).rank == 4


def test_a_dense_reader_of_its_weight_meets_the_wrong_shape():
    layer = LowRankLinear(5, 6, 3)
    with pytest.raises(RuntimeError, match="size mismatch"):
        nn.Linear(5, 6).load_state_dict({"weight": layer.weight, "bias": layer.bias})


@pytest.mark.parametrize("rank", [0, -1, 6])
def test_a_rank_that_the_sizes_do_not_allow_is_refused(rank):
    with pytest.raises(GfwsvdError, match=f"rank {rank} for 5 -> 9"):
        LowRankLinear(5, 9, rank)


def test_dense_weight_is_a_view_of_outputs_by_inputs():
    gpt2 = tiny_model("gpt2")
    attention = gpt2.transformer.h[0].attn.c_attn
    assert tuple(dense_weight(attention).shape) == (192, 64)
    assert dense_weight(attention).data_ptr() == attention.weight.data_ptr()
    linear = nn.Linear(3, 7)
    assert tuple(dense_weight(linear).shape) == (7, 3)
    x = torch.randn(2, 64)
    torch.testing.assert_close(attention(x), x @ dense_weight(attention).T + attention.bias)


def test_a_subclass_of_linear_is_not_taken_for_one():
    assert not is_linear(nn.modules.linear.NonDynamicallyQuantizableLinear(3, 3))
    assert not is_linear(nn.Bilinear(2, 2, 2))
    assert not is_linear(nn.Conv1d(2, 2, 1)), "torch's convolution is not transformers' Conv1D"


COUNTS = {"llama": 14, "qwen3": 14, "mistral": 14, "gemma": 14, "gpt2": 8, "opt": 12, "bert": 13}


@pytest.mark.parametrize("kind", COUNTS)
def test_every_linear_layer_but_the_head_is_found(kind):
    model = tiny_model(kind)
    found = find_linears(model)
    assert len(found) == COUNTS[kind]
    assert model.get_output_embeddings() not in found.values()
    assert all(model.get_submodule(name) is module for name, module in found.items())
    assert list(found) == [name for name, _ in model.named_modules() if name in found], "in the model's order"


def test_exclude_searches_names_with_regular_expressions():
    model = tiny_model("llama")
    found = find_linears(model, exclude=[r"layers\.0\.", "[qkvo]_proj$"])
    assert list(found) == [f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")]
    with pytest.raises(GfwsvdError, match="no linear layer.*outside the excluded names"):
        find_linears(model, exclude=["proj"])


def test_exclude_takes_patterns_from_a_generator():
    found = find_linears(tiny_model("llama"), exclude=(pattern for pattern in ["mlp"]))
    assert len(found) == 8


def test_one_string_as_exclude_is_refused_rather_than_read_letter_by_letter():
    with pytest.raises(GfwsvdError, match="exclude must be a list"):
        find_linears(tiny_model("llama"), exclude="q_proj")


def test_a_pattern_that_is_none_is_refused():
    with pytest.raises(GfwsvdError, match="regular expressions.*'\\('"):
        find_linears(tiny_model("llama"), exclude=["("])


def test_a_model_without_linears_is_refused():
    with pytest.raises(GfwsvdError, match="Embedding has no linear layer"):
        find_linears(nn.Embedding(3, 4))


class Shared(nn.Module):
    """`twice` is one module under two names, `first` and `second` are two modules with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(8, 8)
        self.again = self.twice
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.embedding, self.projection = nn.Embedding(16, 8), nn.Linear(8, 16)
        self.projection.weight = self.embedding.weight
        self.own = nn.Linear(8, 8)


def test_layers_that_share_their_weight_are_left_out():
    assert list(find_linears(Shared())) == ["own"]


def test_a_linear_that_is_the_whole_model_has_no_place_to_put_another_in():
    with pytest.raises(GfwsvdError, match="no linear layer"):
        find_linears(nn.Linear(8, 8))
