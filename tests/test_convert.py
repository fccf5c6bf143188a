"""Checkpoints from and to other forms, against dense products in float64."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from gfwsvd import checkpoint
from gfwsvd.cli import app
from gfwsvd.compress import compress
from gfwsvd.convert import import_published, merge
from gfwsvd.errors import GfwsvdError
from gfwsvd.hf import save_pretrained
from gfwsvd.layers import dense_weight, find_linears
from tiny_models import random_tokens, tiny_model, word_tokenizer

transformers = pytest.importorskip("transformers")
CASES = [
    ("svd_llm", "llama"), ("svd_llm", "opt"), ("asvd", "opt"), ("asvd", "gpt2"), ("lems", "llama"), ("lems", "opt"),
    ("pifa", "llama"), ("pifa", "opt"),
]  # fmt: skip


def load(folder: Path, **options: object) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(random_tokens(2, 17)).logits


# ------------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_a_merged_model_has_the_products_rounded_once_and_no_trace_of_the_format(tmp_path, kind):
    model = tiny_model(kind)
    report = compress(model, method="svd", keep=0.6, ranks="uniform", rank_multiple=4)
    save_pretrained(model, tmp_path / "small", report=report, tokenizer=word_tokenizer())
    assert merge(str(tmp_path / "small"), tmp_path / "dense") == len(report.layers)
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    dense = load(tmp_path / "dense")
    assert type(dense.get_submodule(report.layers[0].name)) is type(
        tiny_model(kind).get_submodule(report.layers[0].name)
    )
    for layer in report.layers:
        exact = model.get_submodule(layer.name).product(torch.float64)
        assert torch.equal(dense_weight(dense.get_submodule(layer.name)), exact.float()), layer.name
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-4, atol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "dense")("w5")["input_ids"] == [5]


def test_a_merged_model_loads_in_a_process_without_gfwsvd(tmp_path):
    model = tiny_model("llama")
    save_pretrained(model, tmp_path / "small", report=compress(model, method="svd", keep=0.6, rank_multiple=4))
    merge(str(tmp_path / "small"), tmp_path / "dense")
    save_file({"x": random_tokens(2, 17), "logits": logits(model)}, tmp_path / "tokens")
    code = f"""
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
given = load_file({str(tmp_path / "tokens")!r})
model, info = AutoModelForCausalLM.from_pretrained({str(tmp_path / "dense")!r}, output_loading_info=True)
error = (model(given["x"]).logits - given["logits"]).abs().max().item()
print(any(info.values()), "gfwsvd" in sys.modules, error < 1e-4)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout == "False False True\n", done.stderr


def test_factors_in_bfloat16_are_rounded_once_to_the_dtype_that_is_asked_for(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base", dtype=torch.bfloat16)
    report = compress(model, method="svd", keep=0.6, rank_multiple=4)
    save_pretrained(model, tmp_path / "small", report=report)
    merge(str(tmp_path / "small"), tmp_path / "half")
    merge(str(tmp_path / "small"), tmp_path / "full", dtype="float32")
    name = report.layers[0].name
    exact = model.get_submodule(name).product(torch.float64)
    assert torch.equal(load_file(tmp_path / "half" / "model.safetensors")[f"{name}.weight"], exact.bfloat16())
    assert torch.equal(load_file(tmp_path / "full" / "model.safetensors")[f"{name}.weight"], exact.float())


def test_a_dense_model_is_not_merged(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    with pytest.raises(GfwsvdError, match="has no low-rank layers"):
        merge(str(tmp_path / "base"), tmp_path / "out")
    assert os.listdir(tmp_path) == ["base"]


# ------------------------------------------------------------------------------------------- what others have published


def published(layout: str, model: nn.Module, rank: int = 12) -> dict[str, torch.Tensor]:
    """Random factors for two of three layers of `model`, whose weights become their products, named as in `layout`."""
    generator = torch.Generator().manual_seed(3)
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    for index, (name, module) in enumerate(find_linears(model).items()):
        d_out, d_in = dense_weight(module).shape
        if index % 3 == 2:
            continue
        rows = d_out - rank if layout == "pifa" else d_out
        up = torch.randn(rows, rank, generator=generator) / 8
        down = torch.randn(rank, d_in, generator=generator) / 8
        exact = up.double() @ down.double()
        del tensors[f"{name}.weight"]
        bias = tensors.get(f"{name}.bias")
        match layout:
            case "svd_llm":
                stem = name.removesuffix("_proj")
                tensors |= {f"{stem}_u_proj.weight": up, f"{stem}_v_proj.weight": down}
                if bias is not None:  # of both factors, as its OPT has them
                    inner = torch.randn(rank, generator=generator)
                    tensors |= {f"{stem}_u_proj.bias": tensors.pop(f"{name}.bias"), f"{stem}_v_proj.bias": inner}
                    module.bias.data = (bias.double() + up.double() @ inner.double()).float()
                tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
            case "asvd":
                tensors |= {f"{name}.ALinear.weight": up, f"{name}.BLinear.weight": down}
                if bias is not None:
                    tensors[f"{name}.ALinear.bias"] = tensors.pop(f"{name}.bias")
            case "lems":
                tensors |= {f"{name}.mod_b.weight": up, f"{name}.mod_a.weight": down}
            case "pifa":
                pivots, rest = (
                    part.sort().values for part in torch.randperm(d_out, generator=generator).split([rank, rows])
                )
                tensors |= {f"{name}.ALinear.weight": up, f"{name}.BLinear.weight": down}
                tensors |= {f"{name}.false_idx": pivots, f"{name}.true_idx": rest}
                exact = torch.empty(d_out, d_in, dtype=torch.float64)
                exact[pivots], exact[rest] = down.double(), up.double() @ down.double()
        dense_weight(module).copy_(exact)
    prefix = "wrapped_model." if layout == "lems" else ""
    return {prefix + name: value for name, value in tensors.items()}


@pytest.fixture
def base(tmp_path_factory):
    """Makes the folder of a dense model, its tokenizer included."""

    def make(kind: str) -> str:
        folder = tmp_path_factory.mktemp("base") / kind
        tiny_model(kind).save_pretrained(folder)
        word_tokenizer().save_pretrained(folder)
        return str(folder)

    return make


def write(tensors: dict[str, torch.Tensor], folder: Path, form: str) -> Path:
    folder.mkdir()
    match form:
        case "safetensors":
            save_file({name: value.clone() for name, value in tensors.items()}, folder / "factors.safetensors")
            return folder / "factors.safetensors"
        case "state dict":
            torch.save({"state_dict": tensors}, folder / "factors.pt")
            return folder / "factors.pt"
        case "old pickle":
            torch.save(tensors, folder / "factors.bin", _use_new_zipfile_serialization=False)
            return folder / "factors.bin"
        case "folder":
            names = sorted(tensors)
            for number, part in enumerate((names[::2], names[1::2])):
                torch.save({name: tensors[name] for name in part}, folder / f"pytorch_model-{number}.bin")
    return folder


@pytest.mark.parametrize("form", ["safetensors", "state dict"])
@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_published_factors_give_the_logits_of_their_products(tmp_path, base, layout, kind, form):
    dense = tiny_model(kind)
    tensors = published(layout, dense)
    report = import_published(str(write(tensors, tmp_path / "in", form)), tmp_path / "out", base=base(kind))
    model, info = load(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)
    for name, module in find_linears(dense).items():
        layer = model.get_submodule(name)
        weight = dense_weight(layer) if type(layer) is type(module) else layer.product(torch.float64).float()
        assert torch.equal(weight, dense_weight(module)), name
    found = checkpoint.inspect(tmp_path / "out")
    assert found["provenance"] == {"model": kind, "converted_from": layout, "source": report.provenance["source"]}
    dense_layers = len(report.layers) // 3
    low_rank = {"pivoted" if layout == "pifa" else "lowrank": len(report.layers) - dense_layers}
    assert found["kinds"] == {**low_rank, "dense": dense_layers}
    for count in ("stored", "dense", "model_stored", "model_dense", "kept", "keep", "method"):
        assert found[count] == getattr(report, count), count
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("w5")["input_ids"] == [5]


@pytest.mark.parametrize("form", ["old pickle", "folder"])
def test_older_pickles_and_folders_of_shards_are_read(tmp_path, base, form):
    dense = tiny_model("llama")
    source = write(published("svd_llm", dense), tmp_path / "in", form)
    import_published(str(source), tmp_path / "out", base=base("llama"))
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(dense), rtol=1e-4, atol=1e-5)


def test_the_dtype_is_that_of_the_factors(tmp_path, base):
    tensors = {name: value.half() for name, value in published("svd_llm", tiny_model("llama")).items()}
    import_published(str(write(tensors, tmp_path / "in", "safetensors")), tmp_path / "out", base=base("llama"))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(
        stored["model.layers.0.self_attn.q_proj.up"], tensors["model.layers.0.self_attn.q_u_proj.weight"]
    )
    assert {value.dtype for value in stored.values()} == {torch.float16}


Q = "model.layers.0.self_attn.q"
UP, DOWN = f"{Q}_u_proj.weight", f"{Q}_v_proj.weight"
PIVOTS, REST = f"{Q}_proj.false_idx", f"{Q}_proj.true_idx"


def without(*names):
    return lambda tensors: {name: value for name, value in tensors.items() if name not in names}


def having(**changes):
    return lambda tensors: {**tensors, **changes}


def applied(name, function):
    return lambda tensors: {**tensors, name: function(tensors[name])}


BROKEN = {
    "a missing up factor": ("svd_llm", without(UP), f"tensor {UP} is missing"),
    "a missing down factor": ("svd_llm", without(DOWN), f"tensor {DOWN} is missing"),
    "a missing norm": ("svd_llm", without("model.norm.weight"), r"tensor model\.norm\.weight is missing"),
    "no pair of factors": ("svd_llm", lambda tensors: {"a.weight": torch.ones(3)}, "no pair of factors among the 1"),
    "a tensor too many": ("svd_llm", having(extra=torch.ones(3)), "the base model has no tensor extra"),
    "the dense weight too": (
        "svd_llm", having(**{f"{Q}_proj.weight": torch.ones(64, 64)}), f"no tensor {Q}_proj.weight, nor is it a factor",
    ),
    "factors of no layer": (
        "svd_llm", having(**{"model.x_u_proj.weight": torch.ones(3, 2), "model.x_v_proj.weight": torch.ones(2, 3)}),
        r"no linear layer for the factors model\.x_u_proj",
    ),
    "a transposed factor": ("svd_llm", applied(UP, lambda up: up.T.contiguous()), r"expected factors \(64, R\)"),
    "both transposed": (
        "svd_llm", lambda tensors: {k: v.T.contiguous() if k in (UP, DOWN) else v for k, v in tensors.items()},
        "both transposed",
    ),
    "a factor of integers": ("svd_llm", applied(UP, torch.Tensor.long), "should hold finite floating point numbers"),
    "a factor with NaN": ("svd_llm", applied(DOWN, lambda down: down / 0 * 0), "should hold finite floating point"),
    "a rank as large as the layer": (
        "svd_llm", having(**{UP: torch.ones(64, 64), DOWN: torch.ones(64, 64)}), "cannot be stored with rank 64",
    ),
    "an embedding of another size": (
        "svd_llm", having(**{"model.embed_tokens.weight": torch.ones(5, 64)}), r"base model, \(128, 64\), got \(5, 64",
    ),
    "a bias that the base has not": (
        "svd_llm", having(**{f"{Q}_u_proj.bias": torch.ones(64)}), f"the base model has no tensor {Q}_proj.bias",
    ),
    "a bias of another size": (
        "svd_llm", having(**{f"{Q}_v_proj.bias": torch.ones(64)}), "expected a bias of 12 numbers",
    ),
    "a pivot twice": (
        "pifa", applied(PIVOTS, lambda pivots: torch.cat((pivots[:1], pivots[:-1]))), "each once, the rest in order",
    ),
    "a pivot beyond the outputs": ("pifa", applied(PIVOTS, lambda pivots: pivots + 64), "each once, the rest in order"),
    "the rest in disorder": ("pifa", applied(REST, lambda rest: rest.flip(0)), "each once, the rest in order"),
    "pivots with a point": ("pifa", applied(PIVOTS, torch.Tensor.float), "expected the numbers of 64 outputs"),
    "too few pivots": ("pifa", applied(PIVOTS, lambda pivots: pivots[1:]), "expected the numbers of 64 outputs"),
    "no pivots": ("pifa", without(PIVOTS), f"tensor {PIVOTS} is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_factors_that_do_not_fit_are_refused_and_leave_nothing(tmp_path, base, case):
    layout, damage, message = BROKEN[case]
    source = write(damage(published(layout, tiny_model("llama"))), tmp_path / "in", "safetensors")
    with pytest.raises(GfwsvdError, match=message):
        import_published(str(source), tmp_path / "out", base=base("llama"))
    assert os.listdir(tmp_path) == ["in"]


def test_tied_tensors_have_to_agree(tmp_path, base):
    tensors = published("asvd", tiny_model("opt"))
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    with pytest.raises(GfwsvdError, match="are one tensor in the base model, and differ in the source"):
        import_published(str(write(tensors, tmp_path / "in", "safetensors")), tmp_path / "out", base=base("opt"))
    del tensors["lm_head.weight"]
    import_published(str(write(tensors, tmp_path / "again", "safetensors")), tmp_path / "out", base=base("opt"))


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.write_text, (self.target, "boom")


@pytest.mark.parametrize(
    "what", ["a whole model", "a bomb", "a plain pickle bomb", "a list", "numbers", "junk", "none"]
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickles_of_anything_but_tensors_are_refused_and_run_nothing(tmp_path, base, what):
    source = tmp_path / "model.pt"
    match what:
        case "a whole model":
            torch.save({"model": tiny_model("llama"), "tokenizer": word_tokenizer()}, source)
        case "a bomb":
            torch.save({"model": Bomb(tmp_path / "boom")}, source)
        case "a plain pickle bomb":
            source.write_bytes(pickle.dumps({UP: Bomb(tmp_path / "boom")}))
        case "a list":
            torch.save([torch.ones(3)], source)
        case "numbers":
            torch.save({UP: 3}, source)
        case "junk":
            source.write_bytes(bytes(range(256)))
    messages = {
        "a list": "should hold a state dict, tensors by name, got list",
        "numbers": "should hold tensors by name, got int",
        "none": "there is no file",
    }
    with pytest.raises(
        GfwsvdError, match=messages.get(what, r"whole pickled model is not read.*model\.state_dict\(\)")
    ):
        import_published(str(source), tmp_path / "out", base=base("llama"))
    assert not (tmp_path / "boom").exists() and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------ command line


def run(*arguments: object, status: int = 0):
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    assert result.exit_code == status, result.output + repr(result.exception)
    return result


def test_the_command_goes_both_ways(tmp_path, base):
    dense = tiny_model("llama")
    source = write(published("lems", dense), tmp_path / "in", "safetensors")
    result = run(source, "--base", base("llama"), "--out", tmp_path / "small", "--json")
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["method"] == "kfac" and found["provenance"]["converted_from"] == "lems" and found["kept"] < 1
    merged = run(tmp_path / "small", "--merge", "--out", tmp_path / "dense", "--json")
    assert json.loads(merged.stdout.splitlines()[-1])["merged_layers"] == found["kinds"]["lowrank"]
    torch.testing.assert_close(logits(load(tmp_path / "dense")), logits(dense), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [(), ("--merge", "--base", "x")])
def test_the_command_wants_one_direction(tmp_path, options):
    result = run("nowhere", "--out", tmp_path / "out", *options, status=1)
    assert "give either --merge" in result.stderr and list(tmp_path.iterdir()) == []


def test_a_folder_in_the_way_is_refused_before_any_work(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for options in (("--merge",), ("--base", "nowhere")):
        assert "is not empty" in run("nowhere", "--out", tmp_path, *options, status=1).stderr
    assert os.listdir(tmp_path) == ["notes.txt"]
