"""Factors in eight bits: rounding, the layer, checkpoints that hold them, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracles import is_exact_product
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import gfwsvd
from gfwsvd.cli import app
from gfwsvd.compress import compress
from gfwsvd.convert import in_bits, merge
from gfwsvd.errors import GfwsvdError
from gfwsvd.hf import inspect, save_pretrained
from gfwsvd.latency import LatencyTable
from gfwsvd.layers import LowRankLinear, dense_weight
from gfwsvd.metrics import objective
from gfwsvd.outcome import CompressionReport
from gfwsvd.pivot import pivoted
from gfwsvd.quantise import UNIT, eight_bits
from gfwsvd.solve import blank_layer
from gfwsvd.tune import tune
from tiny_models import random_tokens, tiny_model, word_tokenizer

transformers = pytest.importorskip("transformers")
Q = "model.layers.0.self_attn.q_proj"


def layer(*, pivots: bool = False, bias: bool = True, dtype: torch.dtype = torch.float64) -> LowRankLinear:
    """A random layer of 9 outputs, 7 inputs and 4 ranks whose rows are of very different sizes, in eight bits."""
    generator = torch.Generator().manual_seed(0)
    up, down, biases = (torch.randn(*size, generator=generator).double() for size in ((9, 4), (4, 7), (9,)))
    up, down, order = up * torch.tensor([1e-3, 1, 30, 0.1]), down * torch.tensor([[5], [1e-2], [1], [0.3]]), None
    if pivots:
        form = pivoted(up, down)
        up, down, order = form.up, form.down, form.order()
    up, down, scales = eight_bits(up, down, dtype=dtype)
    return LowRankLinear.from_factors(up, down, biases.to(dtype) if bias else None, order, scales)


def small(**options: object) -> tuple[nn.Module, CompressionReport]:
    """A compressed tiny Llama with layers of every kind, and its report."""
    model = tiny_model("llama")
    bounds = {"0.self_attn.k_proj": (1.0, 1.0), "up_proj": (0.0, 0.2)}  # dense, and of too few ranks for pivots
    return model, compress(model, method="svd", keep=0.6, ranks="uniform", rank_multiple=2, bounds=bounds, **options)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> tuple[Path, nn.Module, CompressionReport]:
    folder = tmp_path_factory.mktemp("quantised") / "small"
    model, report = small(bits=8)
    save_pretrained(model, folder, report=report, tokenizer=word_tokenizer(), max_shard_size="50KB")
    return folder, model, report


def load(folder: Path, **options: object) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(random_tokens(2, 17)).logits


# ------------------------------------------------------------------------------------------------------------ the layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_number_moves_by_more_than_half_a_step_of_its_row_or_column(dtype):
    up, down = torch.randn(50, 6) * torch.logspace(-3, 1, 6), torch.randn(6, 300) * torch.logspace(1, -3, 6)[:, None]
    up_steps, down_steps, scales = eight_bits(up, down, dtype=dtype)
    assert scales.dtype == dtype and torch.equal(scales.double(), scales.bfloat16().double()), "the same in every dtype"
    steps = UNIT * scales.double()
    assert ((up_steps * steps[1] - up.double()).abs() <= steps[1] / 2).all()
    assert ((down_steps * steps[0, :, None] - down.double()).abs() <= steps[0, :, None] / 2).all()
    largest = torch.stack((down.abs().amax(1), up.abs().amax(0))).double()
    assert (steps <= 1.005 * largest / 127).all(), "no step is larger than it has to be"


def test_a_row_of_zeros_stays_one_and_has_a_scale_above_zero():
    up, down, scales = eight_bits(torch.zeros(5, 2), torch.zeros(2, 3), dtype=torch.float16)
    assert not up.any() and not down.any() and (scales > 0).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("pivots", [False, True])
def test_the_layer_is_the_dense_layer_of_its_rounded_factors(pivots, bias):
    low = layer(pivots=pivots, bias=bias)
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    up = low.up.double() * low.scales[1] / 128
    down = low.weight.double() * low.scales[0, :, None] / 128
    rows = torch.cat((down, up @ down))[low.order] if pivots else up @ down
    torch.testing.assert_close(low(x), F.linear(x, rows, low.bias), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(low.product(), rows, rtol=1e-12, atol=1e-12)
    assert low.bits == 8 and low.stored == sum(t.numel() for name, t in low.state_dict().items() if name != "bias")


def test_sums_of_whole_numbers_do_not_leave_the_range_of_float16():
    low = layer(dtype=torch.float16)
    x = 200 * low.weight[:1].sign().half()
    assert F.linear(x, low.weight.half()).isinf().any(), "without the unit one would"
    exact = F.linear(x.double(), low.product(torch.float64), low.bias.double())
    torch.testing.assert_close(low(x).double(), exact, rtol=1e-2, atol=1.0)


def test_another_dtype_changes_neither_the_factors_nor_what_the_scales_say():
    low = layer()
    before = {name: tensor.clone() for name, tensor in low.state_dict().items() if name != "bias"}
    low.bfloat16()
    assert low.up.dtype == low.weight.dtype == torch.int8 and low.scales.dtype == low.dtype == torch.bfloat16
    low.double()
    assert all(torch.equal(low.state_dict()[name], tensor) for name, tensor in before.items())


# ---------------------------------------------------------------------------------------------------------- checkpoints


def test_the_reloaded_model_gives_bit_equal_logits_and_tells_its_bytes(original):
    folder, model, report = original
    kinds = {(entry.kind, entry.bits) for entry in report.layers}
    assert kinds == {("pivoted", 8), ("lowrank", 8), ("dense", None)}
    assert torch.equal(logits(load(folder)), logits(model))
    found = inspect(folder)
    assert found["format_version"] == 2 and found["model_bytes"] == report.model_bytes < report.model_dense_bytes
    for count in ("stored", "dense", "model_stored", "model_dense"):
        assert found[count] == getattr(report, count), count
    tensors = [tensor for file in folder.glob("*.safetensors") for tensor in load_file(file).values()]
    assert found["model_bytes"] == sum(tensor.nbytes for tensor in tensors)
    assert all(entry["bits"] == (None if entry["kind"] == "dense" else 8) for entry in found["layers"])
    assert f"| bytes of the whole model | {report.model_bytes} |" in (folder / "README.md").read_text()


def test_a_block_that_is_read_from_the_disk_when_it_is_used_gives_bit_equal_logits(original, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    assert torch.equal(logits(load(original[0], device_map=places, offload_folder=str(tmp_path))), logits(original[1]))


def test_a_dtype_asked_for_leaves_the_factors_whole_numbers_and_saving_again_keeps_them(original, tmp_path):
    half = load(original[0], dtype=torch.bfloat16)
    low = half.get_submodule(Q)
    assert low.up.dtype == low.weight.dtype == torch.int8 and low.scales.dtype == torch.bfloat16
    half.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(half))


def test_the_report_says_what_rounding_adds_to_the_objective():
    model, report = small(bits=8)
    for entry in report.layers:
        if entry.bits:
            u, s, v = torch.linalg.svd(dense_weight(tiny_model("llama").get_submodule(entry.name)).double())
            exact = (u[:, : entry.rank] * s[: entry.rank]) @ v[: entry.rank]
            found = objective(model.get_submodule(entry.name).product(torch.float64) - exact, None, None)
            assert entry.rounding_loss == pytest.approx(found, rel=1e-4)
            assert 0 < found < 1e-3 * exact.square().sum().item(), "eight bits of a layer are a few percent at most"


def test_a_layer_before_its_numbers_has_the_tensors_of_the_built_one():
    model, report = small(bits=8)
    dense = tiny_model("llama")
    for entry in report.layers:
        if entry.bits:
            form = {"pivoted": entry.kind == "pivoted", "bits": 8}
            blank = blank_layer(dense.get_submodule(entry.name), entry.rank, **form).state_dict()
            built = model.get_submodule(entry.name).state_dict()
            assert {k: (v.shape, v.dtype) for k, v in blank.items()} == {
                k: (v.shape, v.dtype) for k, v in built.items()
            }


def test_merged_they_are_the_exact_product_and_fused_the_same_function(original, tmp_path):
    folder, model, _ = original
    merge(str(folder), tmp_path / "dense")
    assert is_exact_product(load(tmp_path / "dense"), model)
    torch.testing.assert_close(logits(gfwsvd.fuse(load(folder))), logits(model), rtol=1e-4, atol=1e-4)


def test_convert_rounds_the_factors_of_a_checkpoint(tmp_path):
    model, report = small()
    save_pretrained(model, tmp_path / "small", report=report)
    arguments = ["convert", str(tmp_path / "small"), "--bits", "8", "--out", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["bits"] == 8 and told["model_bytes"] == inspect(tmp_path / "out")["model_bytes"] < report.model_bytes
    rounded, before = load(tmp_path / "out").get_submodule(Q), model.get_submodule(Q)
    for found, expected in zip(
        (rounded.up, rounded.weight, rounded.scales),
        eight_bits(before.up, before.weight, dtype=torch.float32),
        strict=True,
    ):
        assert torch.equal(found, expected)
    with pytest.raises(GfwsvdError, match="in eight or four bits already"):
        in_bits(str(tmp_path / "out"), tmp_path / "again", bits=8)


def test_compress_takes_the_bits(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    arguments = [str(tmp_path / "model"), "--method", "svd", "--keep", "0.6", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["compress", *arguments, "--bits", "8"])
    assert result.exit_code == 0, result.output
    assert {entry["bits"] for entry in inspect(tmp_path / "out")["layers"] if entry["rank"]} == {8}
    result = CliRunner().invoke(app, ["compress", *arguments, "--bits", "3", "--overwrite"])
    assert result.exit_code == 1 and "bits must be 8" in " ".join(result.output.split())


# ------------------------------------------------------------------------------------------------------------- refusals


def changed(original: Path, folder: Path, *, entry: dict | None = None, version: int = 2, scales: object = "") -> Path:
    """A copy in one file, without the manifest whose digests would tell of the change first."""
    load(original).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = version
    layers = config["quantization_config"]["layers"]
    layers[Q] = {key: value for key, value in (layers[Q] | (entry or {})).items() if value != "lost"}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    if scales is None:
        del tensors[f"{Q}.scales"]
    elif not isinstance(scales, str):
        tensors[f"{Q}.scales"] = scales(tensors[f"{Q}.scales"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entry": {"bits": 3}}, "bits 8, or 4 of kind 'lowrank', or none"),
        ({"entry": {"bits": True}}, "bits 8, or 4 of kind 'lowrank', or none"),
        ({"entry": {"bits": None}}, "bits 8, or 4 of kind 'lowrank', or none"),
        ({"entry": {"group": 64}}, "bits 8, or 4 of kind 'lowrank', or none"),
        ({"version": 1}, "format_version 2, bits 8, or"),
        ({"entry": {"bits": "lost"}}, r"should be of type BF16, F16, F32, F64, got I8"),
        ({"scales": None}, r"scales is missing"),
        ({"scales": lambda old: old[:, :-1].contiguous()}, r"scales should be \(2, \d+\)"),
        ({"scales": lambda old: old.to(torch.int8)}, r"scales should be of type BF16, F16, F32, F64, got I8"),
        ({"scales": lambda old: old.float() * float("nan")}, r"scales should be finite and above zero"),
        ({"scales": torch.zeros_like}, r"scales should be finite and above zero"),
        ({"scales": lambda old: -old}, r"scales should be finite and above zero"),
    ],
)
def test_a_checkpoint_that_says_something_else_is_refused(original, tmp_path, change, message):
    with pytest.raises(GfwsvdError, match=message):
        load(changed(original[0], tmp_path / "changed", **change))


def test_a_report_of_other_bits_is_not_that_of_the_model(original, tmp_path):
    _, report = small()
    with pytest.raises(GfwsvdError, match="in 8 bits in the model and pivoted of rank"):
        save_pretrained(load(original[0]), tmp_path / "out", report=report)


def test_what_cannot_be_done_in_eight_bits_says_so(original, tmp_path):
    tokens = random_tokens(2, 8)
    with pytest.raises(GfwsvdError, match="cannot be trained: tune those in the model's dtype, then convert"):
        tune(load(original[0]), tokens, tokens, tmp_path / "work")
    table = LatencyTable.__new__(LatencyTable)
    with pytest.raises(GfwsvdError, match="no times of factors in 8 bits"):
        compress(tiny_model("llama"), method="svd", latency=table, bits=8)
    with pytest.raises(GfwsvdError, match="bits must be 8 or 4, or be left out for the model's dtype, got 5"):
        compress(tiny_model("llama"), method="svd", bits=5)
    shutil.copytree(original[0], tmp_path / "bare")
    (tmp_path / "bare" / "gfwsvd.json").unlink()
    with pytest.raises(GfwsvdError, match="it was saved again"):
        in_bits(str(tmp_path / "bare"), tmp_path / "out", bits=8)
