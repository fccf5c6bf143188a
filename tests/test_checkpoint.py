"""The checkpoint format: what its JSON files and tensor headers must say."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gfwsvd.checkpoint import check_layers, checkpoint_files, inspect, parse_section
from gfwsvd.errors import GfwsvdError
from gfwsvd.folders import (
    read_headers,
    sealed,
    write_json,
)

LAYERS = {"a": {"kind": "lowrank", "rank": 2}, "b": {"kind": "dense"}}
SECTION = {"quant_method": "gfwsvd", "format_version": 1, "method": "svd", "keep": 0.5, "kept": 0.4, "layers": LAYERS}
TENSORS = {
    "a.weight": torch.ones(2, 8),
    "a.up": torch.ones(6, 2),
    "a.bias": torch.ones(6),
    "b.weight": torch.ones(3, 5),
    "norm": torch.ones(7),
}


def checkpoint(folder: Path, *, section: object = SECTION, tensors: dict[str, torch.Tensor] = TENSORS) -> Path:
    write_json(folder / "config.json", {"quantization_config": section})
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_inspect_counts_what_the_headers_say(tmp_path):
    report = {"layers": [{"name": "b", "d_in": 5}, {"name": "a", "predicted_loss": 0.5}], "provenance": {"seed": 3}}
    write_json(checkpoint(tmp_path) / "gfwsvd.json", sealed({"format_version": 1, "sha256": {}, "report": report}))
    found = inspect(tmp_path)
    assert found == {
        "format_version": 1,
        "method": "svd",
        "keep": 0.5,
        "kept": 0.4,
        "time_kept": None,
        "kinds": {"lowrank": 1, "dense": 1},
        "metrics": None,
        "unjudged": None,
        "stored": 2 * (8 + 6) + 15,
        "dense": 48 + 15,
        "model_stored": 28 + 6 + 15 + 7,
        "model_dense": 48 + 6 + 15 + 7,
        "bytes": 4 * (28 + 15),
        "model_bytes": 4 * (28 + 6 + 15 + 7),
        "provenance": {"seed": 3},
        "layers": [
            {"name": "b", "d_in": 5, "kind": "dense", "rank": None, "bits": None}
            | {"stored": 15, "dense": 15, "bytes": 60},
            {"name": "a", "predicted_loss": 0.5, "kind": "lowrank", "rank": 2, "bits": None}
            | {"stored": 28, "dense": 48, "bytes": 112},
        ],
    }
    assert json.loads(json.dumps(found)) == found


def test_inspect_refuses_a_manifest_that_was_changed(tmp_path):
    manifest = sealed({"format_version": 1, "sha256": {}, "report": {"layers": [], "provenance": {"seed": 3}}})
    for changed in (manifest | {"report": 3}, manifest | {"sha256": {"model.safetensors": "0"}}, {}):
        write_json(checkpoint(tmp_path) / "gfwsvd.json", changed)
        with pytest.raises(GfwsvdError, match=r"gfwsvd\.json is not what was written there"):
            inspect(tmp_path)


def test_inspect_does_without_the_manifest(tmp_path):
    found = inspect(checkpoint(tmp_path))
    assert found["provenance"] == {} and [layer["name"] for layer in found["layers"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "other"}, "quant_method should be 'gfwsvd', got 'other'"),
        ({"format_version": 3}, "format_version 1 and 2, got 3"),
        ({"format_version": None}, "format_version 1 and 2, got None"),
        ({"layers": None}, "object `layers`"),
        ({"layers": {"a": {"kind": "sparse"}}}, "layer a: expected kind"),
        ({"layers": {"a": {"kind": "lowrank"}}}, "layer a: expected kind"),
        ({"layers": {"a": {"kind": "lowrank", "rank": 0}}}, "layer a: expected kind"),
        ({"layers": {"a": {"kind": "lowrank", "rank": True}}}, "layer a: expected kind"),
        ({"layers": {"a": {"kind": "lowrank", "rank": "2"}}}, "layer a: expected kind"),
        ({"layers": {"a": {"kind": "pivoted"}}}, "layer a: expected kind"),
        ({"layers": {"a": "dense"}}, "layer a: expected kind"),
    ],
)
def test_a_section_of_another_kind_is_refused(tmp_path, change, message):
    with pytest.raises(GfwsvdError, match=message):
        parse_section({**SECTION, **change})
    with pytest.raises(GfwsvdError, match=message):
        inspect(checkpoint(tmp_path, section={**SECTION, **change}))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.up": None}, r"tensor a\.up is missing from .*model\.safetensors"),
        ({"a.weight": None}, r"tensor a\.weight is missing"),
        ({"b.weight": None}, r"tensor b\.weight is missing"),
        ({"a.up": torch.ones(6, 3)}, r"model\.safetensors: a\.up should be \(6, 2\) by config\.json, got \(6, 3\)"),
        ({"a.weight": torch.ones(3, 8)}, r"a\.weight should be \(2, 8\) by config\.json, got \(3, 8\)"),
        ({"a.weight": torch.ones(2)}, r"a\.weight should be a matrix"),
        ({"a.up": torch.ones(())}, r"a\.up should be a matrix"),
        ({"b.up": torch.ones(3, 2)}, r"b\.up is the factor of a low-rank layer, but config\.json lists b as none"),
        ({"a.up": torch.ones(1, 2)}, r"layer a of shape \(1, 8\) cannot have rank 2"),
    ],
)
def test_tensors_that_do_not_fit_the_section_are_refused(tmp_path, tensors, message):
    changed = {name: tensor for name, tensor in {**TENSORS, **tensors}.items() if tensor is not None}
    with pytest.raises(GfwsvdError, match=message):
        inspect(checkpoint(tmp_path, tensors=changed))


PIVOTED = {"a": {"kind": "pivoted", "rank": 2}}
PIVOTED_TENSORS = {"a.weight": torch.ones(2, 8), "a.up": torch.ones(4, 2), "a.order": torch.arange(6).int()}


def test_a_pivoted_layer_is_counted_with_the_order_of_its_outputs(tmp_path):
    found = inspect(checkpoint(tmp_path, section={**SECTION, "layers": PIVOTED}, tensors=PIVOTED_TENSORS))
    counts = {"stored": 16 + 8 + 6, "dense": 48, "bytes": 4 * 30}
    assert found["layers"] == [{"name": "a", "kind": "pivoted", "rank": 2, "bits": None, **counts}]
    assert found["model_stored"] == 30 and found["model_dense"] == 48


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.order": None}, r"tensor a\.order is missing"),
        ({"a.order": torch.ones(2, 3)}, r"a\.order should be a vector"),
        ({"a.order": torch.arange(7).int()}, r"a\.up should be \(5, 2\) by config\.json, got \(4, 2\)"),
        ({"a.order": torch.arange(2).int()}, r"layer a of shape \(2, 8\) cannot have rank 2"),
        ({"a.up": torch.ones(6, 2)}, r"a\.up should be \(4, 2\) by config\.json, got \(6, 2\)"),
    ],
)
def test_tensors_that_do_not_fit_a_pivoted_layer_are_refused(tmp_path, tensors, message):
    changed = {name: tensor for name, tensor in {**PIVOTED_TENSORS, **tensors}.items() if tensor is not None}
    with pytest.raises(GfwsvdError, match=message):
        inspect(checkpoint(tmp_path, section={**SECTION, "layers": PIVOTED}, tensors=changed))


def test_tensors_that_do_not_fit_the_model_are_refused(tmp_path):
    tensors = read_headers([checkpoint(tmp_path) / "model.safetensors"])
    ranks = parse_section(SECTION)
    assert check_layers(ranks, tensors, shapes={"a": (6, 8), "b": (3, 5)})["a"].stored == 28
    with pytest.raises(GfwsvdError, match=r"a\.weight should be \(2, 9\)"):
        check_layers(ranks, tensors, shapes={"a": (6, 9)})
    with pytest.raises(GfwsvdError, match=r"a\.up should be \(7, 2\)"):
        check_layers(ranks, tensors, shapes={"a": (7, 8), "b": (3, 5)})


@pytest.mark.parametrize(("index", "message"), [("{}", "no weight_map"), ('{"weight_map": {"a": 1}}', "no weight_map")])
def test_an_index_without_files_is_refused(tmp_path, index, message):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(GfwsvdError, match=message):
        checkpoint_files(tmp_path)


def test_a_folder_without_tensor_files_or_section_is_refused(tmp_path):
    write_json(tmp_path / "config.json", {})
    with pytest.raises(GfwsvdError, match="no gfwsvd checkpoint"):
        inspect(tmp_path)
    write_json(tmp_path / "config.json", {"quantization_config": SECTION})
    with pytest.raises(GfwsvdError, match=r"neither model\.safetensors nor"):
        inspect(tmp_path)
    with pytest.raises(GfwsvdError, match="cannot read"):
        inspect(tmp_path / "nowhere")
