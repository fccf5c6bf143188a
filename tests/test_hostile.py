"""Checkpoints that somebody changed on purpose: each loads as the original or is refused, quickly and by an error of
ours. What transformers itself cannot read is for it to refuse: no code of ours runs then.
"""

import json
import resource
import shutil
import struct
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import gfwsvd
from gfwsvd.checkpoint import inspect
from gfwsvd.cli import app
from gfwsvd.compress import compress
from gfwsvd.errors import GfwsvdError
from gfwsvd.folders import read_headers, sealed
from gfwsvd.hf import save_pretrained
from mutations import Q, change_header, change_somewhere
from tiny_models import random_tokens, tiny_model

transformers = pytest.importorskip("transformers")
OURS = str(Path(gfwsvd.__file__).parent)


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    """The folders `opt` (one file, layers with biases), `llama` (shards), `qwen3` and `mistral` (factors in eight bits
    and in four), and an outsider beside them."""
    root = tmp_path_factory.mktemp("hostile")
    kinds = (("opt", "5GB", None), ("llama", "50KB", None), ("qwen3", "5GB", 8), ("mistral", "5GB", 4))
    for kind, shard, bits in kinds:
        model, storage = tiny_model(kind), "factors" if bits == 4 else "pivoted"
        options = {"ranks": "uniform", "rank_multiple": 4, "storage": storage, "bits": bits}
        report = compress(model, method="svd", keep=0.7, **options)
        save_pretrained(model, root / kind, report=report, max_shard_size=shard)
    return root


@pytest.fixture
def folder(originals, tmp_path):
    """A copy of the sharded checkpoint without its manifest, whose digests would tell of most changes first."""
    shutil.copytree(originals / "llama", tmp_path / "llama")
    (tmp_path / "llama" / "gfwsvd.json").unlink()
    return tmp_path / "llama"


def load(folder: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(random_tokens(1, 9)).logits


def change_json(file: Path, change) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


# ------------------------------------------------------------------------------------------------ one attack at a time


def listed(name: str, **entry: Any):
    return lambda section: section["layers"].update({name: entry})


SECTIONS = {
    "a huge rank": (listed(Q, kind="lowrank", rank=1 << 40), "cannot have rank 1099511627776"),
    "a negative rank": (listed(Q, kind="lowrank", rank=-8), "positive rank"),
    "a rank of another type": (listed(Q, kind="lowrank", rank=8.0), "positive rank"),
    "an empty name": (listed("", kind="dense"), "names of modules"),
    "a name of dots": (listed("..", kind="dense"), "names of modules"),
    "a name that leads up": (listed("../model", kind="dense"), "names of modules"),
    "a name that writes on terminals": (listed("a\x1b[2J", kind="dense"), "names of modules"),
    "a tensor for a layer": (listed(f"{Q}.weight", kind="dense"), "has no layer"),
    "a norm for a layer": (listed("model.norm", kind="lowrank", rank=8), "is no linear layer here"),
    "one layer under two names": (listed(Q.removeprefix("model."), kind="lowrank", rank=8), "under two names"),
    "layers without end": (
        lambda section: section["layers"].update({f"x{number}": {"kind": "dense"} for number in range(70_000)}),
        "65536 at most",
    ),
    "an entry without end": (listed(Q, kind="x" * 100_000), "expected kind"),
    "a key that hides a method": (lambda section: section.update(to_dict=1), "keys of no meaning: 'to_dict'"),
    "a share that is none": (lambda section: section.update(keep=float("nan")), "keep should be a share"),
    "a huge share": (lambda section: section.update(kept=10**3000), "kept should be a share"),
    "a method that is no name": (lambda section: section.update(method={"a": 1}), "method should be a name"),
}


@pytest.mark.parametrize("case", SECTIONS)
def test_a_hostile_section_is_refused_soon_and_in_few_words(folder, case):
    change, message = SECTIONS[case]
    change_json(folder / "config.json", lambda config: change(config["quantization_config"]))
    began = time.perf_counter()
    with pytest.raises(GfwsvdError, match=message) as caught:
        load(folder)
    assert time.perf_counter() - began < 20 and len(str(caught.value)) < 600


@pytest.mark.parametrize("place", ["../{}", "{folder}/../{}", "{outside}/{}", "/etc/../{outside}/{}"])
def test_an_index_cannot_lead_out_of_the_folder(folder, place):
    shard = sorted(folder.glob("model-*"))[0].name
    shutil.move(folder / shard, folder.parent / shard)
    name = place.format(shard, folder=folder, outside=folder.parent)
    change_json(
        folder / "model.safetensors.index.json",
        lambda index: index["weight_map"].update({k: name for k, v in index["weight_map"].items() if v == shard}),
    )
    with pytest.raises(GfwsvdError, match="leads out of the folder"):
        load(folder)
    with pytest.raises(GfwsvdError, match="should name .safetensors files beside it"):
        inspect(folder)


def test_files_may_be_links_as_in_the_hubs_cache(originals, folder):
    for file in [*folder.glob("*.safetensors")]:
        shutil.move(file, folder.parent / file.name)
        file.symlink_to(folder.parent / file.name)
    assert torch.equal(logits(load(folder)), logits(load(originals / "llama")))


@pytest.mark.parametrize("name", ["\ud800.safetensors", "a\0.safetensors", "a" * 5000, ".", "model.bin"])
def test_an_index_with_names_of_no_tensor_files_is_refused(folder, name):
    change_json(
        folder / "model.safetensors.index.json", lambda index: index["weight_map"].update({"lm_head.weight": name})
    )
    with pytest.raises(GfwsvdError, match="should name .safetensors files"):
        inspect(folder)


@pytest.mark.parametrize(
    ("leaf", "tensor", "message"),
    [
        ("up", torch.ones(1, dtype=torch.int64), "should be of type BF16, F16, F32, F64, got I64"),
        ("weight", torch.ones(1, dtype=torch.bool), "should be of type BF16, F16, F32, F64, got BOOL"),
        ("order", torch.ones(1), "should be of type I32, got F32"),
        ("bias", None, r"tensor .*bias is missing"),
        ("bias", torch.ones(3), r"bias should be \(64,\) by config.json, got \(3,\)"),
    ],
)
def test_tensors_of_other_types_and_lost_biases_are_refused(originals, tmp_path, leaf, tensor, message):
    shutil.copytree(originals / "opt", tmp_path / "opt")
    (tmp_path / "opt" / "gfwsvd.json").unlink()
    file, name = tmp_path / "opt" / "model.safetensors", f"model.decoder.layers.0.self_attn.q_proj.{leaf}"
    tensors = load_file(file)
    old = tensors.pop(name)
    if tensor is not None:
        tensors[name] = tensor if leaf == "bias" else tensor.expand(old.shape).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(GfwsvdError, match=message):
        load(tmp_path / "opt")


NESTED = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("text", [NESTED, f'{{"a": {NESTED}}}', '{"a": NaN}', '{"a": 1e999}', f'{{"a": {"1" * 5000}}}'])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "gfwsvd.json"])
def test_json_without_end_or_bounds_is_refused(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(GfwsvdError, match=name):
        inspect(folder)


@pytest.mark.parametrize(
    "change",
    [{"sha256": [1]}, {"report": []}, {"report": {"layers": [1], "provenance": {}}}, {"report": {"layers": []}}],
)
def test_a_manifest_of_another_shape_is_refused_although_its_seal_fits(originals, folder, change):
    manifest = json.loads((originals / "llama" / "gfwsvd.json").read_text()) | change
    manifest.pop("seal")
    (folder / "gfwsvd.json").write_text(json.dumps(sealed(manifest)))
    for read in (load, inspect):
        with pytest.raises(GfwsvdError, match="holds no digests and report"):
            read(folder)


def test_inspect_shows_what_a_manifest_says_without_obeying_it(originals, folder):
    manifest = json.loads((originals / "llama" / "gfwsvd.json").read_text())
    manifest.pop("seal")
    manifest["report"]["layers"][0] |= {"predicted_loss": "[/red]", "rank": "[/x]"}
    manifest["report"]["provenance"] = {"text": "[/x] [link=file:///etc/passwd]"}
    (folder / "gfwsvd.json").write_text(json.dumps(sealed(manifest)))
    result = CliRunner().invoke(app, ["inspect", str(folder)])
    assert result.exit_code == 0 and "[/x] [link=file:///etc/passwd]" in result.stdout.replace("\n", "")


def test_of_two_equal_keys_the_last_counts_for_every_reader(originals, folder):
    text = (folder / "config.json").read_text()
    first = text.replace('"layers": {', '"layers": {}, "layers": {', 1)
    last = text.replace('"layers": {', '"layers": {"nowhere": {"kind": "dense"}}, "layers": {', 1)
    assert first.count('"layers"') == last.count('"layers"') == 2
    for changed in (first, last):
        (folder / "config.json").write_text(changed)
        assert len(inspect(folder)["layers"]) == 14
        assert torch.equal(logits(load(folder)), logits(load(originals / "llama")))


def test_a_header_longer_than_its_file_and_a_shape_beyond_memory_are_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    for length, shape, size in ((1 << 62, [1], 4), (None, [1 << 40, 1 << 40], 4), (None, [1 << 40], 4)):
        header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
        file.write_bytes(struct.pack("<Q", length or len(header)) + header + bytes(size))
        with pytest.raises(GfwsvdError, match="not a whole safetensors file"):
            read_headers([file])


# ------------------------------------------------------------------------------------------------------- random changes


def change_config(data, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = change_somewhere(data, config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    if data.draw(st.booleans()):
        (folder / "gfwsvd.json").unlink()


def change_index(data, folder: Path) -> None:
    file = folder / "model.safetensors.index.json"
    if file.exists():
        file.write_text(json.dumps(change_somewhere(data, json.loads(file.read_text()))))


def change_some_header(data, folder: Path) -> None:
    change_header(data, data.draw(st.sampled_from(sorted(folder.glob("*.safetensors")))))


def change_manifest(data, folder: Path) -> None:
    """With a seal that fits: whoever changes a manifest on purpose can make one."""
    manifest = json.loads((folder / "gfwsvd.json").read_text())
    manifest.pop("seal")
    changed = change_somewhere(data, manifest)
    (folder / "gfwsvd.json").write_text(json.dumps(sealed(changed) if isinstance(changed, dict) else changed))


@settings(max_examples=400)
@given(
    data=st.data(),
    kind=st.sampled_from(["opt", "llama", "qwen3", "mistral"]),
    change=st.sampled_from([change_config, change_config, change_index, change_some_header, change_manifest]),
)
def test_a_changed_checkpoint_loads_as_the_original_or_is_refused(originals, data, kind, change):
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / kind
        shutil.copytree(originals / kind, folder)
        change(data, folder)
        began = time.perf_counter()
        try:
            inspect(folder)
        except GfwsvdError:
            pass
        try:
            model = load(folder)
        except GfwsvdError:
            pass
        except Exception as error:
            ours = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(OURS)]
            assert not ours, f"not an error of ours, but from within: {error!r} at {ours[-1]}"
        else:
            assert torch.equal(logits(model), logits(load(originals / kind)))
        assert time.perf_counter() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000, "more than 200 MB"
