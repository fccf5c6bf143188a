"""The benchmark against the published route: both find the singular triplet of an explicit rearrangement in float64."""

import sys
from pathlib import Path

import pytest
import torch

from tiny_models import VOCABULARY, tiny_model, word_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the benchmarks are no part of the installed packages

from benchmarks import record, reference_route, routes

OFFSETS = {"sequence": torch.tensor([0, 5, 11, 20]), "token": torch.arange(21)}


@pytest.fixture
def tokens():
    """A layer (5, 7) with inputs and gradients whose Fisher block has a clear leading triplet."""
    return torch.randn(20, 7) + 1, torch.randn(20, 5) * torch.tensor([3.0, 1, 1, 1, 1])


def oracle(x, g, offsets):
    """The Fisher block (D_OUT, D_IN, D_OUT, D_IN) and its triplet by a whole SVD, in float64."""
    parts = zip(offsets[:-1], offsets[1:], strict=True)
    gradients = torch.stack([g[i:j].double().mT @ x[i:j].double() for i, j in parts])
    fisher = torch.einsum("nab,ncd->abcd", gradients, gradients)
    left, values, right = torch.linalg.svd(fisher.permute(0, 2, 1, 3).reshape(g.shape[1] ** 2, -1))
    return fisher, left[:, 0].view(g.shape[1], -1), right[0].view(x.shape[1], -1), values[0].item()


@pytest.mark.parametrize("unit", OFFSETS)
def test_the_fit_is_that_of_the_explicit_fisher_block(tokens, unit):
    fisher, left, right, scale = oracle(*tokens, OFFSETS[unit])
    for factor in (scale, 0.3 * scale):
        fitted = factor * torch.einsum("ac,bd->abcd", left, right)
        exact = ((fisher - fitted).norm() / fisher.norm()).item()
        assert routes.fit_residual(*tokens, OFFSETS[unit], left, right, factor) == pytest.approx(exact, rel=1e-10)


@pytest.mark.parametrize("unit", OFFSETS)
def test_sweeps_come_to_the_singular_triplet(tokens, unit):
    _, left, right, scale = oracle(*tokens, OFFSETS[unit])
    *_, (cost, found_left, found_right) = routes.streamed(*tokens, OFFSETS[unit], 30)
    assert cost["passes"] == 30 and cost["scale"] == pytest.approx(scale, rel=1e-4)
    torch.testing.assert_close(found_left.double(), left * left.trace().sign(), rtol=0, atol=1e-5)
    torch.testing.assert_close(found_right.double(), right * right.trace().sign(), rtol=0, atol=1e-5)


def test_stored_gradients_and_lanczos_come_to_it_too(tokens):
    _, left, right, scale = oracle(*tokens, OFFSETS["sequence"])
    ((cost, found_left, found_right),) = routes.published(*tokens, OFFSETS["sequence"], 1)
    assert cost["scale"] == pytest.approx(scale, rel=1e-5) and cost["disk_bytes"] > 3 * 35 * 4
    sign = found_left.trace().sign() * left.trace().sign()
    torch.testing.assert_close(found_left.double(), sign * left, rtol=0, atol=1e-5)
    torch.testing.assert_close(found_right.double(), sign * right, rtol=0, atol=1e-5)


def test_without_scipy_the_published_route_says_what_is_missing(tokens, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(SystemExit, match="pip install scipy"):
        list(routes.published(*tokens, OFFSETS["sequence"], 1))


def test_the_tokens_of_a_layer_give_its_weight_gradients():
    model = tiny_model("llama")
    batches = [{"input_ids": torch.randint(VOCABULARY, (1, 12))} for _ in range(2)]
    layer = "model.layers.1.mlp.down_proj"
    x, g, _ = routes.recorded(model, layer, batches)
    for number, batch in enumerate(batches):
        model.zero_grad()
        logits = model(**batch).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, batch["input_ids"][0, 1:], reduction="sum").backward()
        exact = model.get_submodule(layer).weight.grad
        found = g[12 * number :][:12].mT @ x[12 * number :][:12]
        ratio = found.norm() / exact.norm()  # the power of two that gradients are scaled by
        assert ratio.log2().item() == pytest.approx(round(ratio.log2().item()), abs=1e-5)
        torch.testing.assert_close(found / ratio, exact, rtol=1e-4, atol=1e-6)


def test_the_benchmark_has_a_row_for_each_route_unit_and_number_of_sweeps(tmp_path, monkeypatch, capsys):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(f"w{number}" for number in torch.randint(VOCABULARY, (500,)).tolist()))
    options = [
        "--model",
        tmp_path / "model",
        "--text",
        tmp_path / "text.txt",
        "--layer",
        "model.layers.1.mlp.down_proj",
    ]
    options += ["--sequences", 4, "--seq-len", 16, "--sweeps", 2, "--repeats", 1, "--results", tmp_path / "rows.jsonl"]
    monkeypatch.setattr(sys, "argv", ["reference_route", *map(str, options)])
    reference_route.main()
    rows = record.read(tmp_path / "rows.jsonl")
    found = [(row["unit"], row["route"], row["passes"]) for row in rows]
    ours = [
        ("sequence", "streamed", 1),
        ("sequence", "streamed", 2),
        ("token", "streamed", 1),
        ("token", "streamed", 2),
    ]
    assert found == [("sequence", "published", 1), *ours]
    assert rows[0]["gradient_bytes"] == 4 * 4 * 64 * 160 <= rows[0]["disk_bytes"]
    assert rows[3]["gradient_bytes"] == 16 * rows[0]["gradient_bytes"] and rows[3]["disk_bytes"] == 0
    assert all(0 < row["residual"] < 1 and len(row["seconds"]) == 1 for row in rows)
    assert rows[0]["residual"] < rows[2]["residual"] < rows[1]["residual"]
    assert rows[0]["cosine_left"] == pytest.approx(1) and rows[1]["cosine_left"] < rows[2]["cosine_left"] < 1
    assert "published" in capsys.readouterr().out
