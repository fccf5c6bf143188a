"""Every benchmark runs to its end at a tiny size, so that none rots."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tiny_models import tiny_workspace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the benchmarks are no part of the installed packages

from benchmarks import ablation, demo, frontier, overhead, quality, record, scale, serve
from gfwsvd import hardware


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """One block has every kind of layer, in half the time of two."""
    return tiny_workspace(tmp_path_factory.mktemp("benchmarks"), words=5000, blocks=1)


def run(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


def test_the_demonstration_compares_saves_reloads_and_reports(workspace, tmp_path, monkeypatch, capsys):
    """Of the figures, which take the most time and have tests of their own, each report draws the simpler half."""
    for figure in ("spectra", "diagnostics"):
        monkeypatch.setattr(f"gfwsvd.report.{figure}", lambda report: "")
    out = tmp_path / "out"
    texts = ("--calibration", workspace / "text.txt", "--evaluation", workspace / "text.txt")
    sizes = ("--sequences", 4, "--seq-len", 32, "--windows", 2, "--window", 64)
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    run(monkeypatch, demo, "--model", workspace / "model", *texts, *sizes, "--out", out)
    rows = json.loads((out / "rows.json").read_text())
    assert [row["method"] for row in rows] == ["dense", *(run.method for run in demo.RUNS)]
    assert all(0.75 < row["kept"] <= 0.8 for row in rows[1:])
    assert (out / "model" / "gfwsvd.json").exists() and "<svg" in (out / "report.html").read_text()
    assert (out / "notes.txt").read_text() == "mine"
    assert "perplexity" in capsys.readouterr().out


def test_the_ablation_takes_every_step_of_every_study_once(workspace, tmp_path, monkeypatch, capsys):
    for name, step in ablation.STEPS.items():  # one of what is repeated
        once = {key: 1 for key in ("rounds", "gains") if key in step}
        monkeypatch.setitem(ablation.STEPS, name, step | once)
    text, results = workspace / "text.txt", tmp_path / "rows.jsonl"
    (tmp_path / "other.txt").write_text(text.read_text())
    options = ["--model", workspace / "model", "--calibration", text, "--other", tmp_path / "other.txt"]
    options += [
        "--evaluation",
        text,
        "--sequences",
        24,
        "--seq-len",
        16,
        "--window",
        32,
        "--limit",
        2,
        "--stats",
        tmp_path / "stats",
    ]
    run(monkeypatch, ablation, *options, "--results", results)
    rows = record.read(results)
    expected = [
        ("dense", 1.0),
        *((step, keep) for study in ablation.STUDIES for keep in study.keeps for step in study.steps),
    ]
    assert sorted((row.get("step", "dense"), row["keep"]) for row in rows) == sorted(expected)
    by_study = {row["study"]: row for row in rows[1:]}
    assert by_study["unit sequence"]["calibration_options"] == {"unit": "sequence"}
    assert by_study["half the tokens"]["calibration_tokens"] == 12 * 16
    assert len({row["perplexity"] for row in rows}) > 20, "the settings make a difference"
    written = tmp_path / "table.md"
    drawn = {}
    monkeypatch.setattr(frontier, "plot", lambda panels, path, **_: drawn.update(panels))
    run(monkeypatch, ablation, *options, "--results", results, "--markdown", written, "--plot", tmp_path / "lines.png")
    assert record.read(results) == rows
    ((ratio, lines),) = drawn.values()
    assert ratio == rows[0]["perplexity"] and set(lines) == {
        "svd_llm", "kfac, global, pivoted", "gfwsvd, global, pivoted, guard (default)", "gfwsvd + 2 rounds + gains"
    }  # fmt: skip
    assert all([keep for keep, _ in sorted(points)] == [0.5, 0.6, 0.7, 0.8, 0.9] for points in lines.values())
    some = tmp_path / "some.jsonl"
    narrow = ["--studies", "by the loss", "--steps", "gfwsvd + gains", "--keep", 0.6]
    run(monkeypatch, ablation, *options, "--results", some, *narrow)
    (found,) = record.read(some)[1:]
    (whole,) = (
        row for row in rows[1:] if (row["study"], row["step"], row["keep"]) == ("by the loss", "gfwsvd + gains", 0.6)
    )
    assert found["perplexity"] == whole["perplexity"]
    dense, row = rows[0]["perplexity"], by_study["unit sequence"]
    line = next(line for line in written.read_text().splitlines() if line.startswith("| unit sequence |"))
    assert f"{row['perplexity']:.2f} ({math.log(row['perplexity'] / dense):.3f})" in line
    assert "unit sequence" in capsys.readouterr().out


def test_the_serving_benchmark_measures_every_engine_at_the_same_sizes(tmp_path, monkeypatch, capsys):
    results = tmp_path / "rows.jsonl"
    sizes = ("--keep", 0.8, "--batch", 1, 2, "--prompt", 4, "--new", 3, "--rounds", 2)
    run(monkeypatch, serve, "--shape", "tiny", *sizes, "--engines", *serve.ENGINES, "--results", results)
    rows = record.read(results)
    assert [(row["engine"], row["batch"]) for row in rows] == [(name, n) for n in (1, 2) for name in serve.ENGINES]
    weights = {row["engine"]: row["weights_bytes"] for row in rows}
    assert weights["naive"] < weights["dense"] and weights["pivoted"] < weights["dense"]
    assert all(row["decode_tokens_s"] > 0 and row["first_token_s"] > 0 for row in rows)
    assert all(row["extra_peak_bytes"] >= 0 for row in rows)
    for row in rows:
        low, high = row["first_token_s_spread"]
        assert low <= row["first_token_s"] <= high and row["rounds"] == 2
    assert "decode" in capsys.readouterr().out


def test_quality_adds_the_missing_rows_only(workspace, tmp_path, monkeypatch):
    results = tmp_path / "rows.jsonl"
    text = workspace / "text.txt"
    options = ["--model", workspace / "model", "--calibration", text, "--evaluation", text, "--sequences", 4]
    options += ["--seq-len", 32, "--window", 64, "--limit", 2, "--stats", tmp_path / "stats", "--results", results]
    run(monkeypatch, quality, *options, "--keep", 0.8, "--methods", "svd", "kfac", "--ranks", "global")
    first = results.read_text()
    assert [row["method"] for row in record.read(results)] == ["dense", "svd", "kfac"]
    assert all(row["machine"] and row["commit"] and row["calibration"] == "text.txt" for row in record.read(results))
    picture, written = tmp_path / "picture.png", tmp_path / "table.md"
    options += ["--plot", picture, "--markdown", written]
    run(monkeypatch, quality, *options, "--keep", 0.8, "--methods", "svd", "kfac", "gfwsvd")
    assert results.read_text().startswith(first) and len(record.read(results)) == 7
    assert picture.stat().st_size > 1000
    table = written.read_text().splitlines()
    assert table[0].count("|") == table[1].count("|") == 4 and "uniform 0.8 | global 0.8" in table[0]
    shown = {row["method"]: f"{row['perplexity']:.1f} ({row['kl']:.2f})" for row in record.read(results)[1:3]}
    assert all(
        text in next(line for line in table if line.startswith(f"| {method} |")) for method, text in shown.items()
    )
    run(monkeypatch, quality, *options, "--window", 32, "--keep", 0.8, "--methods", "svd")
    assert [row["windows"] for row in record.read(results)[7:]] == [[2, 32]] * 3, "other settings make other rows"
    run(monkeypatch, quality, *options, "--keep", 0.8, "--methods", "svd", "--ranks", "global", "--storage", "factors")
    assert record.read(results)[-1]["storage"] == "factors"
    assert any(line.startswith("| svd, two factors |") for line in written.read_text().splitlines())
    with pytest.raises(SystemExit, match="is not of this text"):
        run(monkeypatch, quality, *options, "--seq-len", 16)


def test_overhead_measures_every_pass(workspace, tmp_path, monkeypatch):
    results = tmp_path / "rows.jsonl"
    text = ("--text", workspace / "text.txt", "--sequences", 4, "--seq-len", 32)
    run(monkeypatch, overhead, "--model", workspace / "model", *text, "--results", results)
    (row,) = record.read(results)
    assert row["next_sweep_over_training"] == pytest.approx(row["next_sweep_seconds"] / row["training_seconds"])
    assert {"gfwsvd::gram_accumulate", "gfwsvd::quadratic_form"} <= row["op_shares"].keys()


def test_the_benchmark_of_scale_holds_its_plan_beside_what_it_measures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hardware, "_SIZES", [16, 32])
    monkeypatch.setattr(hardware, "_BYTES", [1 << 14, 1 << 16])
    measure = scale.measure
    monkeypatch.setattr(scale, "measure", lambda *about: replace(measure(*about), device_memory=3_500_000))
    sizes = ("--layers", 2, "--sequences", 16, "--seq-len", 16, "--batch", 4, "--sweeps", 2)
    run(monkeypatch, scale, "--shape", "tiny", *sizes, "--dtype", "float32", "--results", tmp_path / "rows.jsonl")
    (row,) = record.read(tmp_path / "rows.jsonl")
    assert row["seconds"].keys() < row["predicted_seconds"].keys()
    assert {"load", "statistics to disk", "factors to disk"} <= row["predicted_seconds"].keys()
    assert row["groups"] == row["predicted_groups"] > 1
    expected = {"calibration sweep 1", "calibration sweep 2", "held-out tokens", "factorisation", "writing"}
    assert set(row["seconds"]) == expected
    assert all(seconds > 0 for seconds in row["predicted_seconds"].values())
    assert "predicted" in capsys.readouterr().out
