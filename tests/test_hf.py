"""Checkpoints through transformers: bit-equal round trips, loud failures, nothing half-written."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from gfwsvd.compress import compress
from gfwsvd.errors import GfwsvdError
from gfwsvd.hf import inspect, save_pretrained
from gfwsvd.layers import LowRankLinear, dense_weight, find_linears
from gfwsvd.outcome import CompressionReport, LayerReport
from gfwsvd.pivot import pivoted
from tiny_models import VOCABULARY, random_tokens, tiny_model

transformers = pytest.importorskip("transformers")
KINDS = ("llama", "gpt2", "opt")


def compress_by_hand(model: nn.Module) -> CompressionReport:
    """Gives two layers of three their best factors, of ranks 8 and 12, the latter pivoted; the third stays dense."""
    layers = []
    for index, (name, module) in enumerate(find_linears(model).items()):
        weight = dense_weight(module)
        d_out, d_in = weight.shape
        dense = d_out * d_in
        if index % 3 == 2:
            layers.append(LayerReport(name, "dense", d_in, d_out, None, dense, dense))
            continue
        rank = 8 + 4 * (index % 2)
        u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
        up, down, order = u[:, :rank] * s[:rank], v[:rank], None
        if index % 2:
            form = pivoted(up, down)
            up, down, order = form.up, form.down, form.order()
        layer = LowRankLinear.from_factors(up.to(weight.dtype), down.to(weight.dtype), module.bias, order)
        model.set_submodule(name, layer)
        layers.append(LayerReport(name, layer.kind, d_in, d_out, rank, layer.stored, dense))
    stored, dense = (sum(getattr(layer, count) for layer in layers) for count in ("stored", "dense"))
    numbers = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()) if tensor.dim())
    return CompressionReport(
        method="svd",
        keep=0.5,
        kept=stored / dense,
        ranks="uniform",
        rank_multiple=4,
        storage="pivoted",
        damping=0.0,
        stored=stored,
        dense=dense,
        model_stored=numbers,
        model_dense=numbers - stored + dense,
        predicts_loss=False,
        seconds=0.0,
        layers=layers,
        provenance={"seed": 0},
    )


def saved(folder: Path, kind: str = "llama", **options: object) -> nn.Module:
    """A compressed model, which `folder` then holds."""
    model = tiny_model(kind)
    report = compress_by_hand(model)
    save_pretrained(model, folder, report=report, **options)
    return model


def load(folder: Path, **options: object) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(random_tokens(2, 17)).logits


# -------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("kind", KINDS)
def test_the_reloaded_model_gives_bit_equal_logits(tmp_path, kind):
    model = saved(tmp_path / "out", kind)
    reloaded, info = load(tmp_path / "out", output_loading_info=True)
    assert torch.equal(logits(reloaded), logits(model))
    assert not any(info.values()), info
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert {name: type(module).__name__ for name, module in reloaded.named_modules()} == kinds


def test_a_bfloat16_model_comes_back_bit_equal(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", dtype=torch.bfloat16)
    save_pretrained(model, tmp_path / "out", report=compress_by_hand(model))
    reloaded = load(tmp_path / "out")
    assert {parameter.dtype for parameter in reloaded.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(reloaded), logits(model))


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, "disk"])
def test_device_maps_give_bit_equal_logits(tmp_path, device_map):
    model = saved(tmp_path / "out")
    options: dict[str, object] = {"device_map": device_map}
    if device_map == "disk":  # one block is read from the disk whenever it is used
        places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
        options = {"device_map": places, "offload_folder": str(tmp_path / "offload")}
    assert torch.equal(logits(load(tmp_path / "out", **options)), logits(model))


def test_a_real_report_fits_the_checkpoint(tmp_path):
    model = tiny_model("llama")
    report = compress(model, method="svd", keep=0.5, ranks="uniform", rank_multiple=4)
    save_pretrained(model, tmp_path / "out", report=report)
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))
    manifest = json.loads((tmp_path / "out" / "gfwsvd.json").read_text())
    assert CompressionReport.from_json(manifest["report"]) == report
    found = inspect(tmp_path / "out")
    for count in ("stored", "dense", "model_stored", "model_dense", "keep", "kept", "method", "provenance"):
        assert found[count] == getattr(report, count), count


def test_shards_give_bit_equal_logits(tmp_path):
    model = saved(tmp_path / "out", max_shard_size="50KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))
    assert inspect(tmp_path / "out")["model_stored"] == sum(tensor.numel() for tensor in model.state_dict().values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shard", ["5GB", "50KB"])
def test_transformers_saves_a_compressed_model_again(tmp_path, kind, shard):
    model = saved(tmp_path / "out", kind)
    load(tmp_path / "out").save_pretrained(tmp_path / "reloaded", max_shard_size=shard)
    model.save_pretrained(tmp_path / "in memory", max_shard_size=shard)
    for name in ("reloaded", "in memory"):
        assert torch.equal(logits(load(tmp_path / name)), logits(model))


def test_a_model_without_its_head_loads_and_saves_again(tmp_path):
    model = saved(tmp_path / "out")
    with torch.no_grad():
        expected = model.model(random_tokens(2, 17)).last_hidden_state
    base = transformers.AutoModel.from_pretrained(tmp_path / "out")
    base.save_pretrained(tmp_path / "base")
    for found in (base, transformers.AutoModel.from_pretrained(tmp_path / "base")):
        with torch.no_grad():
            assert torch.equal(found(random_tokens(2, 17)).last_hidden_state, expected)


def test_an_encoder_comes_back_bit_equal(tmp_path):
    model = saved(tmp_path / "out", "bert")
    reloaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(reloaded), logits(model))


def test_tied_embeddings_stay_tied_and_are_stored_once(tmp_path):
    saved(tmp_path / "out", "gpt2")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    reloaded = load(tmp_path / "out")
    assert reloaded.lm_head.weight is reloaded.transformer.wte.weight


def test_generation_config_and_tokenizer_survive(tmp_path, word_tokenizer):
    model = tiny_model("llama")
    model.generation_config.max_new_tokens = 7
    model.generation_config.repetition_penalty = 1.5
    save_pretrained(model, tmp_path / "out", report=compress_by_hand(model), tokenizer=word_tokenizer)
    assert load(tmp_path / "out").generation_config.to_dict() == model.generation_config.to_dict()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("w3 w5 w99")["input_ids"] == [3, 5, 99]
    assert tokenizer.chat_template == word_tokenizer.chat_template


def test_generate_works_as_in_memory(tmp_path):
    model = saved(tmp_path / "out")
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    prompt = random_tokens(2, 5)
    assert torch.equal(load(tmp_path / "out").generate(prompt, **options), model.generate(prompt, **options))


def test_the_reloaded_model_can_be_trained(tmp_path):
    saved(tmp_path / "out")
    model = load(tmp_path / "out")
    transformers.trainer_utils.validate_quantization_for_training(model)  # what Trainer asks
    tokens = random_tokens(2, 9)
    model.train()(tokens, labels=tokens).loss.backward()
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert layer.weight.grad.abs().sum() > 0 and layer.up.grad.abs().sum() > 0


@pytest.fixture
def word_tokenizer():
    """A tokenizer of words w0, w1, ... with their own numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    return tokenizer


# ---------------------------------------------------------------------------------------------------- other processes


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


COMPARE = """
model = AutoModelForCausalLM.from_pretrained(folder)
print(torch.equal(model(load_file(folder + "/../tokens")["x"]).logits, load_file(folder + "/../tokens")["logits"]))
"""


@pytest.mark.parametrize("order", ["gfwsvd first", "without gfwsvd, then with"])
def test_a_fresh_process_loads_the_model_with_gfwsvd_and_fails_without(tmp_path, order):
    model = saved(tmp_path / "out")
    save_file({"x": random_tokens(2, 17), "logits": logits(model)}, tmp_path / "tokens")
    code = f"import torch, sys\nfrom safetensors.torch import load_file\nfolder = {str(tmp_path / 'out')!r}\n"
    if order == "gfwsvd first":
        code += "import gfwsvd\nassert 'transformers' not in sys.modules\n"
        code += "from transformers import AutoModelForCausalLM\n" + COMPARE
        assert run_python(code) == "True\n"
    else:
        code += """
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(folder)
except RuntimeError as error:
    print("refused", "gfwsvd" in sys.modules)
import gfwsvd
"""
        assert run_python(code + COMPARE) == "refused False\nTrue\n"


def test_importing_the_module_itself_registers_too(tmp_path):
    code = "import gfwsvd.hf\nfrom transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table\n"
    assert run_python(code + "print(table['gfwsvd'].__name__)") == "GfwsvdQuantizer\n"


# ---------------------------------------------------------------------------------------------------------- bad input

UP = "model.layers.0.self_attn.q_proj.up"
WEIGHT = "model.layers.0.self_attn.q_proj.weight"


ORDER = "model.layers.0.self_attn.k_proj.order"  # of a pivoted layer


@pytest.mark.parametrize("order", [[0] * 32, [*range(31), 32], [*range(31), -1]])
def test_an_order_that_is_none_is_refused_before_it_is_used_as_an_index(tmp_path, order):
    saved(tmp_path / "out")
    change_tensors(tmp_path / "out", **{ORDER: torch.tensor(order, dtype=torch.int32)})
    (tmp_path / "out" / "gfwsvd.json").unlink()  # its digest would tell first
    with pytest.raises(GfwsvdError, match=rf"{ORDER} should hold each of 0 to 31 once"):
        load(tmp_path / "out")


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    file = folder / "model.safetensors"
    tensors = {**load_file(file), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file, metadata={"format": "pt"})


def change_config(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def change_manifest(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / "gfwsvd.json").read_text())
    (folder / "gfwsvd.json").write_text(json.dumps(manifest | changes))


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def flip(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: change_tensors(folder, **{UP: None}), rf"tensor {UP} is missing from .*model\.safetensors"),
        (lambda folder: change_tensors(folder, **{WEIGHT: None}), rf"tensor {WEIGHT} is missing"),
        (lambda folder: change_tensors(folder, **{UP: torch.ones(64, 7)}), rf"{UP} should be \(64, 8\).*got \(64, 7\)"),
        (lambda folder: change_tensors(folder, **{WEIGHT: torch.ones(8, 63)}), rf"{WEIGHT} should be \(8, 64\)"),
        (cut, r"model\.safetensors is not a whole safetensors file"),
        (flip, r"model\.safetensors is not the file that was written there"),
        (lambda folder: (folder / "gfwsvd.json").write_text('{"sha'), r"gfwsvd\.json is not JSON"),
        (lambda folder: change_manifest(folder, sha256={}), r"gfwsvd\.json is not what was written there"),
        (lambda folder: change_config(folder, lambda section: section.update(format_version=3)), "format_version 1"),
        (lambda folder: change_config(folder, lambda section: section.pop("layers")), "object `layers`"),
        (
            lambda folder: change_config(folder, lambda section: section["layers"][UP[:-3]].update(kind="sparse")),
            f"layer {UP[:-3]}: expected kind",
        ),
        (
            lambda folder: change_config(folder, lambda section: section["layers"][UP[:-3]].update(rank=9)),
            rf"{WEIGHT} should be \(9, 64\)",
        ),
        (
            lambda folder: change_config(folder, lambda section: section["layers"].pop(UP[:-3])),
            f"{UP} is the factor of a low-rank layer, but config.json lists",
        ),
        (
            lambda folder: change_config(folder, lambda section: section["layers"].update(nowhere={"kind": "dense"})),
            "LlamaForCausalLM has no layer nowhere",
        ),
        (
            lambda folder: change_config(
                folder, lambda section: section["layers"].update({"model.norm": {"kind": "dense"}})
            ),
            r"model\.norm is no linear layer here, but LlamaRMSNorm",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path, damage, message):
    saved(tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(GfwsvdError, match=message):
        load(tmp_path / "out")


def test_a_missing_shard_is_refused(tmp_path):
    saved(tmp_path / "out", max_shard_size="50KB")
    shard = sorted((tmp_path / "out").glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises((GfwsvdError, OSError), match=shard.name):
        load(tmp_path / "out")
    with pytest.raises(GfwsvdError, match=f"{shard.name} is missing"):
        inspect(tmp_path / "out")


def test_a_report_of_another_model_is_refused(tmp_path):
    model = tiny_model("llama")
    report = compress_by_hand(model)
    with pytest.raises(GfwsvdError, match="the report is not of this model: layer model.layers.0.self_attn.q_proj"):
        save_pretrained(tiny_model("llama"), tmp_path / "out", report=report)
    report.layers[0].rank = 9
    with pytest.raises(GfwsvdError, match="is lowrank of rank 8 in the model and lowrank of rank 9 in the report"):
        save_pretrained(model, tmp_path / "out", report=report)
    assert os.listdir(tmp_path) == []


def test_a_rank_that_gives_the_down_factor_the_dense_shape_is_refused(tmp_path):
    model = tiny_model("llama")
    report = compress_by_hand(model)
    layer = LowRankLinear(64, 64, 64, bias=False)
    model.set_submodule("model.layers.0.self_attn.q_proj", layer)
    report.layers[0].rank = 64
    with pytest.raises(GfwsvdError, match="as many inner dimensions as outputs"):
        save_pretrained(model, tmp_path / "out", report=report)


def test_a_model_of_another_quantization_is_refused_and_one_from_gguf_is_not(tmp_path):
    class Other:
        class quantization_config:
            quant_method = "other"

        def remove_quantization_config(self, model):
            del model.hf_quantizer, model.config.quantization_config

    model = tiny_model("llama")
    report = compress_by_hand(model)
    model.hf_quantizer, model.config.quantization_config = Other(), {"quant_method": "other"}
    with pytest.raises(GfwsvdError, match="quantized by other"):
        save_pretrained(model, tmp_path / "out", report=report)
    assert os.listdir(tmp_path) == []
    Other.quantization_config.quant_method = "gguf"
    save_pretrained(model, tmp_path / "out", report=report)
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_a_generation_config_that_transformers_refuses_leaves_nothing(tmp_path):
    model = tiny_model("llama")
    model.generation_config.temperature = 0.5  # contradicts do_sample=False
    with pytest.raises(GfwsvdError, match="(?s)transformers cannot save this LlamaForCausalLM.*temperature"):
        save_pretrained(model, tmp_path / "out", report=compress_by_hand(model))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")],
)
@pytest.mark.parametrize("old", [False, True], ids=["new folder", "over an old one"])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, failure, old):
    model = saved(tmp_path / "out") if old else None
    before = sorted(os.listdir(tmp_path))
    from transformers import modeling_utils

    write = modeling_utils.safe_save_file

    def full(tensors, filename, **options):
        if "00003-of" in str(filename):
            Path(filename).write_bytes(b"half")
            raise failure
        write(tensors, filename, **options)

    monkeypatch.setattr(modeling_utils, "safe_save_file", full)
    with pytest.raises(GfwsvdError, match="could not write.*No space left on device"):
        saved(tmp_path / "out", "opt", overwrite=True, max_shard_size="50KB")
    assert sorted(os.listdir(tmp_path)) == before
    if model is not None:
        assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_ctrl_c_while_saving_leaves_nothing(tmp_path):
    class Interrupted:
        def save_pretrained(self, folder):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path / "out", tokenizer=Interrupted())
    assert os.listdir(tmp_path) == []


def test_only_a_model_folder_is_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    with pytest.raises(GfwsvdError, match="not empty"):
        saved(tmp_path / "out")
    with pytest.raises(GfwsvdError, match=r"no config\.json"):
        saved(tmp_path / "out", overwrite=True)
    assert os.listdir(tmp_path / "out") == ["thesis.tex"]
