"""The statistics directory: what comes back is what was collected, and what is broken is refused."""

import errno
import json

import pytest
import torch
from safetensors import safe_open

import gfwsvd
from gfwsvd import store
from gfwsvd.errors import GfwsvdError
from gfwsvd.folders import sealed
from gfwsvd.store import JSON_NAME, load_statistics, save_statistics
from tiny_models import random_tokens, tiny_model

TENSORS_NAME = "statistics-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def statistics(model):
    return gfwsvd.calibrate(model, [{"input_ids": random_tokens(4, 16)}], sweeps=2, heldout=1)


@pytest.fixture
def folder(tmp_path, statistics):
    save_statistics(statistics, tmp_path / "statistics", provenance={"text": "random"})
    return tmp_path / "statistics"


def test_loaded_statistics_equal_the_collected_ones(folder, statistics):
    loaded, provenance = load_statistics(folder)
    assert provenance == {"text": "random"}
    for name in ("collected", "settings", "num_losses", "num_sequences", "data_sha256", "model_sha256", "unreached"):
        assert getattr(loaded, name) == getattr(statistics, name), name
    assert loaded.layers.keys() == statistics.layers.keys()
    for name, expected in statistics.layers.items():
        for field, value in vars(expected).items():
            found = getattr(loaded.layers[name], field)
            if isinstance(value, torch.Tensor):
                assert torch.equal(found, value), (name, field)
            else:
                assert found == value, (name, field)


def test_a_shared_input_moment_is_stored_once(folder, statistics):
    with safe_open(folder / TENSORS_NAME, framework="pt") as reader:
        moments = sorted(key for key in reader.keys() if key.endswith(".input_moment"))  # noqa: SIM118
    inputs = {id(stats.input_moment) for stats in statistics.layers.values()}
    assert len(moments) == len(inputs) < len(statistics.layers)
    assert "model.layers.0.self_attn.q_proj.input_moment" in moments
    assert "model.layers.0.self_attn.k_proj.input_moment" not in moments


def test_layers_of_large_statistics_are_spread_over_files(tmp_path, statistics, monkeypatch):
    monkeypatch.setattr(store, "_SHARD_BYTES", 100_000)
    save_statistics(statistics, tmp_path / "many")
    files = sorted(tmp_path.glob("many/*.safetensors"))
    assert len(files) > 3 and max(file.stat().st_size for file in files) < 300_000
    loaded = load_statistics(tmp_path / "many")[0]
    assert loaded.layers.keys() == statistics.layers.keys()
    for name, stats in loaded.layers.items():
        assert torch.equal(stats.input_moment, statistics.layers[name].input_moment), name
        assert torch.equal(stats.left, statistics.layers[name].left), name


def test_a_copy_of_loaded_statistics_has_the_same_files(folder, tmp_path):
    save_statistics(load_statistics(folder)[0], tmp_path / "copy")
    assert (tmp_path / "copy" / TENSORS_NAME).read_bytes() == (folder / TENSORS_NAME).read_bytes()
    save_statistics(load_statistics(folder)[0], folder, overwrite=True)
    assert load_statistics(folder)[0].layers.keys() == load_statistics(tmp_path / "copy")[0].layers.keys()


def test_a_file_that_is_gone_since_loading_is_named(folder):
    loaded = load_statistics(folder)[0]
    (folder / TENSORS_NAME).unlink()
    with pytest.raises(GfwsvdError, match=r"cannot read model\.layers\.0.*calibrate again"):
        _ = next(iter(loaded.layers.values())).left


@pytest.mark.parametrize("method", gfwsvd.METHODS)
def test_compression_from_the_directory_equals_compression_from_memory(folder, statistics, method):
    models = [tiny_model("llama") for _ in range(2)]
    for model, source in zip(models, (statistics, load_statistics(folder)[0]), strict=True):
        gfwsvd.compress(model, method=method, keep=0.6, rank_multiple=1, statistics=source)
    first, second = (model.state_dict() for model in models)
    assert first.keys() == second.keys() and any(name.endswith(".up") for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_statistics_of_other_weights_are_refused(folder):
    other = tiny_model("llama", seed=1)
    before = dict(other.named_modules())
    with pytest.raises(GfwsvdError, match="weights are not those that were calibrated"):
        gfwsvd.compress(other, statistics=load_statistics(folder)[0])
    assert dict(other.named_modules()) == before


def test_statistics_of_another_architecture_are_refused(folder):
    with pytest.raises(GfwsvdError, match="belong to another model"):
        gfwsvd.compress(tiny_model("opt"), statistics=load_statistics(folder)[0])


def test_statistics_that_lack_what_a_method_needs_are_refused(model):
    inputs = gfwsvd.calibrate(model, [{"input_ids": random_tokens(2, 8)}], collect=["inputs"])
    with pytest.raises(GfwsvdError, match="kfac needs the statistics gradients, inputs; these hold inputs"):
        gfwsvd.compress(model, method="kfac", statistics=inputs)


def _truncate(folder):
    file = folder / TENSORS_NAME
    file.write_bytes(file.read_bytes()[:-100])


def _flip(folder):
    file = folder / TENSORS_NAME
    content = bytearray(file.read_bytes())
    content[-50] ^= 1
    file.write_bytes(content)


def _edit(change, *, seal=True):
    """Changes what the JSON file says; with `seal` as if it had been written so."""

    def damage(folder):
        described = json.loads((folder / JSON_NAME).read_text())
        change(described)
        if seal:
            described.pop("seal")
            described = sealed(described)
        (folder / JSON_NAME).write_text(json.dumps(described))

    return damage


def _first_layer(described):
    return next(iter(described["layers"].values()))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "not a whole safetensors file"),
        (_flip, "not the file that was written"),
        (lambda folder: (folder / TENSORS_NAME).unlink(), "is missing"),
        (lambda folder: (folder / JSON_NAME).unlink(), "cannot read"),
        (lambda folder: (folder / JSON_NAME).write_text('{"statistics_version"'), "is not JSON"),
        (_edit(lambda described: described.update(statistics_version=99)), "reads statistics_version"),
        (_edit(lambda described: described.pop("layers")), "does not describe the tensors"),
        (_edit(lambda described: _first_layer(described).update(d_in=3)), "calibrate again"),
        (_edit(lambda described: described["sha256"].clear()), "does not describe the tensors"),
        (_edit(lambda described: _first_layer(described).update(file="../elsewhere")), "does not describe the tensors"),
        (_edit(lambda described: described.update(num_losses=0), seal=False), "not what was written there"),
        (_edit(lambda described: _first_layer(described).update(trace="x"), seal=False), "not what was written there"),
        (_edit(lambda described: described["layers"].popitem(), seal=False), "not what was written there"),
        (_edit(lambda described: described.pop("seal"), seal=False), "not what was written there"),
    ],
)
def test_a_damaged_directory_is_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(GfwsvdError, match=message):
        load_statistics(folder)


def test_a_full_disk_leaves_nothing(tmp_path, statistics, monkeypatch):
    def full(tensors, file):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(GfwsvdError, match="No space left on device"):
        save_statistics(statistics, tmp_path / "statistics")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_kept_unless_told_otherwise(folder, statistics):
    before = (folder / JSON_NAME).read_text()
    with pytest.raises(GfwsvdError, match="not empty"):
        save_statistics(statistics, folder)
    assert (folder / JSON_NAME).read_text() == before
    save_statistics(statistics, folder, provenance={"text": "new"}, overwrite=True)
    assert load_statistics(folder)[1] == {"text": "new"}
