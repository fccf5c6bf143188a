"""Models larger than memory: weights on disk until a layer runs, and the same files in the end."""

import pytest
import torch
from typer.testing import CliRunner

from gfwsvd.calibration import calibrate
from gfwsvd.cli import app
from gfwsvd.layers import find_linears, fingerprint
from gfwsvd.sources import load_model
from tiny_models import random_tokens, tiny_model, tiny_workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return tiny_workspace(tmp_path_factory.mktemp("offload"), words=2000)


def test_weights_on_disk_have_the_statistics_of_weights_in_memory(workspace):
    spread = load_model(str(workspace / "model"), device="auto", max_memory={"cpu": 100_000})[0]
    assert any(value.is_meta for value in spread.parameters())
    whole = tiny_model("llama")
    assert fingerprint(find_linears(spread)) == fingerprint(find_linears(whole))
    batches = [{"input_ids": random_tokens(2, 12)}]
    found, expected = (calibrate(model, batches, sweeps=2) for model in (spread, whole))
    for name, stats in expected.layers.items():
        for matrix in ("input_moment", "output_moment", "left", "right"):
            assert torch.equal(getattr(found.layers[name], matrix), getattr(stats, matrix)), (name, matrix)


def test_autograd_does_not_hold_the_weights_that_were_read(workspace):
    spread = load_model(str(workspace / "model"), device="auto", max_memory={"cpu": 100_000})[0]
    weights = {tuple(module.weight.shape) for module in find_linears(spread).values()}
    held: list[tuple[int, ...]] = []
    calibrate(spread, [{"input_ids": random_tokens(2, 12)}], collect=["inputs"])
    spread.train()
    with torch.autograd.graph.saved_tensors_hooks(lambda value: held.append(tuple(value.shape)) or value, lambda v: v):
        inputs = torch.zeros(2, 12, 64, requires_grad=True)
        spread(inputs_embeds=inputs)
    assert not weights & set(held)


def test_a_compression_within_little_memory_writes_the_same_model(workspace, tmp_path, monkeypatch):
    def compress(out, *options):
        text = ("--text", workspace / "text.txt", "--sequences", "8", "--seq-len", "16", "--rank-multiple", "2")
        found = CliRunner().invoke(app, [*map(str, ("compress", workspace / "model", *text, "--out", out)), *options])
        assert found.exit_code == 0, found.output

    compress(tmp_path / "whole")
    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda: {"cpu": 200_000})
    compress(tmp_path / "spread", "--device", "auto", "--deterministic")
    assert not torch.are_deterministic_algorithms_enabled()
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "spread" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
