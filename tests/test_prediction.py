"""The predicted loss orders allocations of a real model as the measured divergence does; the benchmark of it runs."""

import random
import sys
from pathlib import Path

import pytest
from test_benchmarks import run, workspace  # noqa: F401 - a fixture

import gfwsvd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the benchmarks are no part of the installed packages

from benchmarks import prediction, record

KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)


def test_the_predicted_loss_orders_random_allocations_of_smollm2_as_measured(smollm2):
    """Attention of one block and the MLP of another, few tokens: measuring the whole model would take an hour."""
    model, tokenizer, _ = gfwsvd.load_model(str(smollm2))
    batches = gfwsvd.token_batches(
        gfwsvd.load_text("pydoc:calibration"), tokenizer, sequences=4, seq_len=96, batch_size=4, seed=0
    )
    exclude = [r"layers\.(?!5\.self_attn|20\.mlp)"]
    statistics = gfwsvd.calibrate(model, batches, collect=["kronecker"], exclude=exclude)
    assert len(statistics.layers) == 7
    windows = gfwsvd.windows(gfwsvd.load_text("pydoc:heldout"), tokenizer, window=64, limit=2)
    rows = list(prediction.measured_rows(model, statistics, windows, range(12), keeps=KEEPS, storage="factors"))
    assert prediction.correlation(rows, "kl") > 0.8, rows


def test_random_shares_are_around_keep_and_differ_from_layer_to_layer():
    names = [str(number) for number in range(1000)]
    for keep in KEEPS:
        shares = prediction.random_shares(names, keep, random.Random(0)).values()
        assert sum(shares) / 1000 == pytest.approx(keep, abs=0.02)
        assert max(0.05, 2 * keep - 1) <= min(shares) < max(shares) <= 1 and len(set(shares)) > 900


def test_the_correlation_is_of_ranks_alone():
    rows = [{"predicted_loss": x, "kl": x**3, "loss_increase": -x} for x in (0.1, 4.0, 0.5, 2.0)]
    assert prediction.correlation(rows, "kl") == pytest.approx(1)
    assert prediction.correlation(rows, "loss_increase") == pytest.approx(-1)


def test_prediction_measures_the_missing_allocations_only(workspace, tmp_path, monkeypatch, capsys):  # noqa: F811
    results, text = tmp_path / "rows.jsonl", workspace / "text.txt"
    options = ["--model", workspace / "model", "--calibration", text, "--evaluation", text, "--sequences", 4]
    options += ["--seq-len", 32, "--window", 64, "--limit", 2, "--stats", tmp_path / "stats", "--results", results]
    run(monkeypatch, prediction, *options, "--allocations", 3)
    first = results.read_text()
    assert [row["allocation"] for row in record.read(results)] == [0, 1, 2]
    assert [row["keep"] for row in record.read(results)] == [0.9, 0.8, 0.7]
    picture = tmp_path / "picture.png"
    run(monkeypatch, prediction, *options, "--allocations", 5, "--plot", picture)
    assert results.read_text().startswith(first) and len(record.read(results)) == 5
    assert all(row["kl"] > 0 and row["predicted_loss"] > 0 for row in record.read(results))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "Spearman rank correlation of the predicted loss with KL" in capsys.readouterr().out
    run(monkeypatch, prediction, *options, "--allocations", 2, "--seed", 1)
    assert len(record.read(results)) == 7, "another seed makes other rows"
