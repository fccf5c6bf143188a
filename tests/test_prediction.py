"""The predicted loss orders models of one size as the measured divergence does; the benchmark of it runs."""

import random
import sys
from pathlib import Path

import pytest
import torch
from test_benchmarks import run, workspace  # noqa: F401 - a fixture

import gfwsvd
from tiny_models import random_tokens, tiny_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the benchmarks are no part of the installed packages

from benchmarks import prediction, record
from gfwsvd.bounds import Bound
from gfwsvd.ranks import Candidate


def test_the_predicted_loss_orders_allocations_of_one_size_as_measured_where_the_size_cannot():
    """Measured on other tokens than the statistics are of."""
    model = tiny_model("llama")
    batches = [{"input_ids": tokens} for tokens in random_tokens(64, 64).split(16)]
    statistics = gfwsvd.calibrate(model, batches, collect=["kronecker"])
    rows = list(prediction.measured_rows(model, statistics, random_tokens(16, 64, seed=1), range(16), keeps=[0.8]))
    predicted = [row["predicted_loss"] for row in rows]
    assert max(predicted) > 3 * min(predicted) > 0
    assert all(0.8 * 0.99 < row["kept"] <= 0.8 for row in rows)
    assert prediction.correlation(rows, "kl") > 0.8 > 2 * abs(prediction.correlation(rows, "kl", by="kept")), rows


@pytest.mark.parametrize("pivoted", [True, False])
def test_random_shares_lie_far_apart_and_store_keep(pivoted):
    shapes = [(64, 64), (32, 64), (160, 64), (64, 160)] * 7
    layers = {str(number): Candidate(*shape, torch.zeros(0), pivoted) for number, shape in enumerate(shapes)}
    dense = sum(layer.dense for layer in layers.values())
    for keep in (0.9, 0.75, 0.6, 0.3):
        drawn = [prediction.random_shares(layers, keep, random.Random(seed)) for seed in range(2)]
        for shares in drawn:
            assert max(shares.values()) - min(shares.values()) > 0.5
            bounded = [
                Candidate(layer.d_out, layer.d_in, layer.spectrum, pivoted, Bound(0, shares[name]))
                for name, layer in layers.items()
            ]
            stored = sum(layer.stored(layer.states(1)[-1]) for layer in bounded)
            assert 0.99 * keep < stored / dense <= keep
        assert drawn[0] != drawn[1]


def test_the_correlation_is_of_ranks_alone():
    rows = [{"predicted_loss": x, "kl": x**3, "loss_increase": -x} for x in (0.1, 4.0, 0.5, 2.0)]
    assert prediction.correlation(rows, "kl") == pytest.approx(1)
    assert prediction.correlation(rows, "loss_increase") == pytest.approx(-1)
    ties = [{"kept": x, "kl": y} for x, y in ((1, 1), (2, 2), (2, 3), (3, 4))]  # ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4
    assert prediction.correlation(ties, "kl", by="kept") == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert prediction.correlation([{"kept": 0.8, "kl": y} for y in (1, 2, 3)], "kl", by="kept") == 0


def test_prediction_measures_the_missing_allocations_only(workspace, tmp_path, monkeypatch, capsys):  # noqa: F811
    results, text = tmp_path / "rows.jsonl", workspace / "text.txt"
    options = ["--model", workspace / "model", "--calibration", text, "--evaluation", text, "--sequences", 4]
    options += ["--seq-len", 32, "--window", 64, "--limit", 2, "--stats", tmp_path / "stats", "--results", results]
    run(monkeypatch, prediction, *options, "--allocations", 3)
    first = results.read_text()
    assert [row["allocation"] for row in record.read(results)] == [0, 1, 2]
    assert [row["keep"] for row in record.read(results)] == [0.9, 0.75, 0.6]
    assert all(0.99 * row["keep"] < row["kept"] <= row["keep"] for row in record.read(results))
    picture = tmp_path / "picture.png"
    capsys.readouterr()
    run(monkeypatch, prediction, *options, "--allocations", 5, "--plot", picture)
    assert results.read_text().startswith(first) and len(record.read(results)) == 5
    assert all(row["kl"] > 0 and row["predicted_loss"] > 0 for row in record.read(results))
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = [line.split()[-4:] for line in capsys.readouterr().out.splitlines() if "KL" in line]
    rows = record.read(results)
    groups = {"0.9": rows[0::3], "0.75": rows[1::3], "0.6": rows[2::3], "all": rows}
    assert shown == [
        [keep, f"{len(group)}", f"{prediction.correlation(group, 'kl'):.3f}",
         f"{-prediction.correlation(group, 'kl', by='kept'):.3f}"]
        for keep, group in groups.items()
    ]  # fmt: skip
    run(monkeypatch, prediction, *options, "--allocations", 2, "--seed", 1)
    assert len(record.read(results)) == 7, "another seed makes other rows"
