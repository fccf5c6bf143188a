"""A compressed model as an adapter: what peft makes of it over the dense model, against products in float64."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from gfwsvd.adapter import residual_factors, rounding_error, write_adapter
from gfwsvd.cli import app
from gfwsvd.compress import compress
from gfwsvd.convert import in_bits
from gfwsvd.errors import GfwsvdError
from gfwsvd.hf import save_pretrained
from gfwsvd.layers import LowRankLinear, dense_weight
from tiny_models import random_tokens, tiny_model

transformers = pytest.importorskip("transformers")
NAME = "model.layers.1.mlp.up_proj"
LEFT_DENSE = "(o|out|c)_proj"  # of llama, opt, gpt2


def load(folder: Path, **options: object) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=random_tokens(2, 17)).logits


def write(folder: Path, kind: str = "llama", storage: str = "pivoted", dtype: torch.dtype = torch.float32) -> nn.Module:
    """Writes the dense model to `folder / "base"` and the compressed one, one kind of layers of it left dense, to
    `folder / "small"`, and returns it."""
    model = tiny_model(kind).to(dtype)
    model.save_pretrained(folder / "base")
    report = compress(model, method="svd", keep=0.8, storage=storage, rank_multiple=1, bounds={LEFT_DENSE: (1, 1)})
    save_pretrained(model, folder / "small", report=report)
    return model


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


def adapt(folder: Path, **options: object):
    return write_adapter(str(folder / "small"), folder / "adapter", base=str(folder / "base"), **options)


@pytest.mark.parametrize(
    "kind, storage", [("llama", "pivoted"), ("llama", "factors"), ("gpt2", "pivoted"), ("opt", "pivoted")]
)
def test_peft_makes_the_dense_model_the_compressed_one_and_back(tmp_path, kind, storage):
    peft = pytest.importorskip("peft", reason="peft is not installed: make install brings it")
    compressed = write(tmp_path, kind, storage)
    dense = load(tmp_path / "base")
    before = logits(dense)
    report = adapt(tmp_path)
    adapted = peft.PeftModel.from_pretrained(dense, tmp_path / "adapter")
    torch.testing.assert_close(logits(adapted), logits(compressed))
    assert (logits(adapted) - before).abs().max() > 0.1, "the compression makes a difference"
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), before)
    tuned = [name for name, module in dense.named_modules() if hasattr(module, "lora_A")]
    assert tuned == list(low_rank_layers(compressed)) == list(report.ranks)
    assert not any(re.search(LEFT_DENSE, name) for name in tuned)
    assert {value for name in tuned for value in dense.get_submodule(name).scaling.values()} == {1.0}


@pytest.mark.parametrize("storage", ["pivoted", "factors"])
@pytest.mark.parametrize("dtype, written", [("float32", None), ("bfloat16", None), ("bfloat16", "float32")])
def test_an_adapter_is_the_difference_up_to_its_own_rounding_and_that_of_the_factors(tmp_path, storage, dtype, written):
    compressed, dense = write(tmp_path, storage=storage, dtype=getattr(torch, dtype)), load(tmp_path / "base")
    report = adapt(tmp_path, dtype=written)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    numbers = 0
    for name, layer in low_rank_layers(compressed).items():
        b, a = (tensors.pop(f"base_model.model.{name}.lora_{leaf}.weight") for leaf in "BA")
        assert b.dtype == a.dtype == getattr(torch, written or dtype)
        assert len(a) == report.ranks[name] == min(dense_weight(dense.get_submodule(name)).shape) - layer.rank
        numbers += b.numel() + a.numel()
        product = layer.product(torch.float64)
        left = dense_weight(dense.get_submodule(name)).double() + b.double() @ a.double() - product
        rounding = rounding_error(LowRankLinear.from_factors(b, a))
        assert left.norm() < report.largest_error * product.norm() + rounding
        assert report.largest_error * product.norm() < torch.finfo(layer.weight.dtype).eps * 4 * product.norm()
    assert not tensors and numbers == report.numbers


def test_the_factors_of_a_difference_are_the_nearest_of_their_rank():
    residual = torch.randn(9, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    b, a, left_out = residual_factors(residual, 5)
    assert (residual - b @ a).norm().item() == pytest.approx(left_out, rel=1e-12)
    assert left_out == pytest.approx(torch.linalg.svdvals(residual)[5:].norm().item(), rel=1e-12)


@pytest.mark.parametrize("pivoted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_changes_a_product_by_a_third_to_all_of_what_is_expected_at_most(pivoted, dtype):
    generator = torch.Generator().manual_seed(1)
    up, down = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((90, 20), (20, 70)))
    order = torch.randperm(110, generator=generator).int() if pivoted else None
    exact = LowRankLinear.from_factors(up, down, order=order)
    rounded = LowRankLinear.from_factors(up.to(dtype), down.to(dtype), order=order)
    change = (rounded.product(torch.float64) - exact.product()).norm()
    assert 1 / 3 < change / rounding_error(rounded) < 1


@pytest.mark.parametrize("storage, dtype, change", [
    ("pivoted", torch.float32, 1e-5), ("factors", torch.float32, 1e-5), ("pivoted", torch.bfloat16, 0.1),
])  # fmt: skip
def test_a_checkpoint_that_was_trained_is_refused_with_the_layer_and_what_would_be_lost(
    tmp_path, storage, dtype, change
):
    model = tiny_model("llama").to(dtype)
    model.save_pretrained(tmp_path / "base")
    report = compress(model, method="svd", keep=0.8, ranks="uniform", storage=storage, rank_multiple=1)
    for leaf in ("up", "weight"):
        factor = getattr(model.get_submodule(NAME), leaf).data
        factor += change * factor.std() * torch.randn_like(factor)
    save_pretrained(model, tmp_path / "small", report=report)
    with pytest.raises(GfwsvdError, match=f"layer {NAME} .* explains .* trained or changed .* convert --merge"):
        adapt(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["base", "small"]


def test_factors_that_hold_nan_are_refused(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    report = compress(model, method="svd", keep=0.8, ranks="uniform")
    model.get_submodule(NAME).up.data[0, 0] = torch.nan
    save_pretrained(model, tmp_path / "small", report=report)
    with pytest.raises(GfwsvdError, match=f"layer {NAME}, .* holds NaN or inf"):
        adapt(tmp_path)


def _other_weight(model: nn.Module) -> None:
    model.get_submodule(NAME).weight.data[3, 5] += 0.01


def _other_norm(model: nn.Module) -> None:
    model.model.norm.weight.data[7] += 0.01


@pytest.mark.parametrize("change, message", [
    (_other_weight, f"layer {NAME} .* or is of another model"),
    (_other_norm, "tensor model.norm.weight of .* is not that of the compressed model"),
])  # fmt: skip
def test_a_base_that_differs_in_one_number_is_refused(tmp_path, change, message):
    write(tmp_path)
    model = tiny_model("llama")
    change(model)
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(GfwsvdError, match=message):
        adapt(tmp_path)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("base, message", [
    ("opt", "has no linear layer model.layers.0"),
    ("small", "has no linear layer model.layers.0"),
])  # fmt: skip
def test_a_base_with_other_layers_is_refused(tmp_path, base, message):
    write(tmp_path)
    tiny_model("opt").save_pretrained(tmp_path / "opt")
    with pytest.raises(GfwsvdError, match=message):
        write_adapter(str(tmp_path / "small"), tmp_path / "adapter", base=str(tmp_path / base))


def test_factors_in_eight_bits_are_refused(tmp_path):
    write(tmp_path)
    in_bits(str(tmp_path / "small"), tmp_path / "smaller", bits=8)
    with pytest.raises(GfwsvdError, match="q_proj are in 8 bits"):
        write_adapter(str(tmp_path / "smaller"), tmp_path / "adapter", base=str(tmp_path / "base"))


def test_a_dense_source_has_no_difference(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    with pytest.raises(GfwsvdError, match="has no low-rank layers"):
        write_adapter(str(tmp_path / "base"), tmp_path / "adapter", base=str(tmp_path / "base"))


# ------------------------------------------------------------------------------------------------------ command line


def run(*arguments: object, status: int = 0):
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    assert result.exit_code == status, result.output + repr(result.exception)
    return result


def test_the_command_replaces_an_adapter_and_no_other_folder(tmp_path):
    layers = low_rank_layers(write(tmp_path))
    options = [tmp_path / "small", "--lora", "--base", tmp_path / "base", "--out"]
    found = json.loads(run(*options, tmp_path / "out", "--json").stdout.splitlines()[-1])
    assert found["adapted_layers"] == len(layers) and found["largest_error"] < 1e-6
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == max(found["ranks"]) > min(found["ranks"])
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert "is not empty" in run(*options, tmp_path / "out", status=1).stderr
    run(*options, tmp_path / "out", "--overwrite")
    assert "has no adapter_config.json" in run(*options, tmp_path / "small", "--overwrite", status=1).stderr
    assert sorted(os.listdir(tmp_path / "out")) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("options", [("--lora",), ("--lora", "--merge"), ("--lora", "--merge", "--base", "x")])
def test_the_command_wants_the_base_of_an_adapter(tmp_path, options):
    result = run("nowhere", "--out", tmp_path / "out", *options, status=1)
    assert "--lora and --base MODEL" in " ".join(result.stderr.split()) and list(tmp_path.iterdir()) == []
