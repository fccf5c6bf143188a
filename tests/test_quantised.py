"""The benchmark of low rank and few bits: what is rounded, by how much, and how many bytes it takes."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the benchmarks are no part of the installed packages

from benchmarks import quantised
from gfwsvd.compress import compress
from gfwsvd.layers import LowRankLinear
from gfwsvd.whiten import Root
from tiny_models import tiny_model


@pytest.mark.parametrize(("bits", "most"), [("8", 127), ("4", 7)])
def test_no_number_moves_by_more_than_half_a_step(bits, most):
    matrix = torch.randn(6, 100)
    rounded, num_bytes = quantised.BITS[bits][0](matrix, 1)
    parts = matrix.split(quantised.GROUP if bits == "4" else 100, 1)
    for part, found in zip(parts, rounded.split([part.shape[1] for part in parts], 1), strict=True):
        step = part.abs().amax(1, keepdim=True) / most
        assert ((part - found).abs() <= 0.51 * step).all()  # the scale itself is rounded
        assert (found / step).unique().numel() <= 6 * (2 * most + 1)
    assert num_bytes == {"8": 600 + 2 * 6, "4": 6 * (50 + 2 * 2)}[bits]


def test_scales_of_two_factors_meet_between_them():
    matrix = torch.randn(7, 5)
    rounded, num_bytes = quantised.eight_bits(matrix, 0)
    scale = (matrix.double().abs().amax(0) * 128 / 127).bfloat16().float() / 128
    assert torch.equal((rounded / scale).round() * scale, rounded) and num_bytes == 35 + 2 * 5


def test_with_feedback_low_rank_and_dense_layers_are_rounded_to_four_bits_and_counted():
    model = tiny_model("llama")
    compress(model, method="svd", keep=0.7, ranks="uniform", storage="factors", bounds={"0.self_attn.k_proj": (1, 1)})
    dense, low = model.model.layers[0].self_attn.k_proj, model.model.layers[0].self_attn.q_proj
    before, asked = dense.weight.detach().clone(), []
    expected = low.in_bits(4).product()
    groups = 0
    for layer in quantised.layers(model):
        sizes = [layer.weight.shape, layer.up.shape] if isinstance(layer, LowRankLinear) else [layer.weight.shape]
        groups += sum(rows * (width // 2 + 2 * -(-width // 64)) for rows, width in sizes)
    assert quantised.feed_back(model, lambda name: asked.append(name) or Root("identity")) == groups
    assert len(asked) == 14 and torch.equal(low.product(), expected)
    moved, step = (dense.weight - before).abs(), before.abs().amax(1, keepdim=True) / 8
    assert (moved <= 1.01 * step).all() and moved.mean() > 0.1 * step.mean(), "a clipped number moves by a step at most"


def test_all_linear_layers_of_a_model_are_counted_and_rounded_and_no_other():
    model = tiny_model("llama")
    head = model.lm_head.weight.clone()
    compress(model, method="svd", keep=0.7, ranks="uniform", bounds={"0.self_attn.k_proj": (1, 1)})
    layers = [layer for layer in model.modules() if isinstance(layer, LowRankLinear)]
    dense = model.model.layers[0].self_attn.k_proj
    assert isinstance(dense, nn.Linear) and len(layers) == 13
    before = layers[0].up.detach().clone()
    sizes = [layer.weight.numel() + layer.up.numel() for layer in layers]
    orders = sum(layer.order.numel() for layer in layers if layer.order is not None)
    assert quantised.quantise(model, "16") == 2 * (sum(sizes) + dense.weight.numel() + orders)
    assert torch.equal(layers[0].up, before)
    assert quantised.quantise(model, "8") < 0.62 * 2 * (sum(sizes) + dense.weight.numel() + orders)
    error = (layers[0].up - before).norm() / before.norm()
    assert 0 < error < 0.02 and torch.equal(model.lm_head.weight, head)
