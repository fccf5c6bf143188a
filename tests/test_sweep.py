"""The size-quality frontier: rows that add up, and nothing computed twice."""

import json

import pytest
import torch
from rich.console import Console

from gfwsvd import sweep as sweep_module
from gfwsvd.calibration import calibrate
from gfwsvd.errors import GfwsvdError
from gfwsvd.evaluate import evaluate
from gfwsvd.sweep import Run, all_runs, comparison, read_rows, sweep
from tiny_models import random_tokens, tiny_model

ABOUT = {"text": "t", "windows": (3, 16)}
RUNS = [Run("gfwsvd", "global", 0.8), Run("svd", "uniform", 0.5, "factors")]
WINDOWS = random_tokens(3, 16)
BATCHES = [{"input_ids": part} for part in random_tokens(8, 12, seed=1).split(2)]
FITTED = Run("gfwsvd", "global", 0.8, rounds=1, gains=2)


@pytest.fixture(scope="module")
def statistics():
    return calibrate(tiny_model("llama"), [{"input_ids": random_tokens(8, 12)}])


@pytest.fixture
def compressions(monkeypatch):
    """The methods of the compressions that a test makes."""
    made = []
    original = sweep_module.compress
    monkeypatch.setattr(sweep_module, "compress", lambda *a, **k: made.append(k["method"]) or original(*a, **k))
    return made


def test_rows_are_those_of_the_models_they_name(statistics, tmp_path):
    model = tiny_model("llama")
    rows = sweep(model, statistics, RUNS, WINDOWS, rows_file=tmp_path / "rows.jsonl", about=ABOUT)
    assert [row["name"] for row in rows] == ["dense", "gfwsvd, global ranks", "svd, uniform ranks, two factors"]
    compressed = tiny_model("llama")
    report = sweep_module.compress(
        compressed, method="gfwsvd", keep=0.8, ranks="global", rank_multiple=1, statistics=statistics
    )
    found = evaluate(compressed, WINDOWS, reference=tiny_model("llama"))
    assert rows[1]["stored"] == report.stored and rows[1]["kept"] == report.kept <= 0.8
    assert rows[1]["perplexity"] == pytest.approx(found.perplexity) and rows[1]["kl"] == pytest.approx(found.kl)
    assert rows[0]["perplexity"] == pytest.approx(evaluate(model, WINDOWS).perplexity) and "kl" in rows[0]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_model("llama").parameters(), strict=True))
    assert read_rows(tmp_path / "rows.jsonl") == rows


def test_what_is_there_is_not_computed_again(statistics, tmp_path, compressions):
    rows_file = tmp_path / "new" / "rows.jsonl"
    first = sweep(tiny_model("llama"), statistics, RUNS[:1], WINDOWS, rows_file=rows_file, about=ABOUT)
    again = sweep(tiny_model("llama"), statistics, RUNS, WINDOWS, rows_file=rows_file, about=ABOUT)
    assert compressions == ["gfwsvd", "svd"] and again[:2] == first and len(read_rows(rows_file)) == 3
    sweep(tiny_model("llama"), statistics, RUNS[:1], WINDOWS, rows_file=rows_file, about={**ABOUT, "text": "other"})
    assert compressions == ["gfwsvd", "svd", "gfwsvd"] and len(read_rows(rows_file)) == 5


def test_a_row_that_was_cut_short_is_computed_again_and_leaves_no_trace(statistics, tmp_path, compressions):
    rows_file = tmp_path / "rows.jsonl"
    sweep(tiny_model("llama"), statistics, RUNS, WINDOWS, rows_file=rows_file, about=ABOUT)
    whole = rows_file.read_bytes()
    rows_file.write_bytes(whole[:-20])
    rows = sweep(tiny_model("llama"), statistics, RUNS, WINDOWS, rows_file=rows_file, about=ABOUT)
    assert compressions == ["gfwsvd", "svd", "svd"]
    assert read_rows(rows_file) == rows and all(json.loads(line) for line in rows_file.read_text().splitlines())


def test_a_row_with_rounds_and_gains_is_that_of_the_model_compressed_with_them(statistics, tmp_path):
    rows = sweep(
        tiny_model("llama"), statistics, [FITTED], WINDOWS, batches=BATCHES, rows_file=tmp_path / "r", about=ABOUT
    )
    compressed = tiny_model("llama")
    settings = {"method": "gfwsvd", "keep": 0.8, "ranks": "global", "rank_multiple": 1, "statistics": statistics}
    report = sweep_module.compress(compressed, BATCHES, rounds=1, gains=2, **settings)
    found = evaluate(compressed, WINDOWS, reference=tiny_model("llama")).to_json()
    assert rows[1]["name"] == "gfwsvd, global ranks, 1 round, 2 gains" and rows[1]["stored"] == report.stored
    assert {key: rows[1][key] for key in ("perplexity", "kl", "top1")} == {
        key: found[key] for key in ("perplexity", "kl", "top1")
    }
    assert report.gain_losses[-1] < report.gain_losses[0], "gains that do nothing would say nothing of the row"


def test_rows_with_rounds_or_gains_alone_depend_on_what_these_are_measured_on(statistics, tmp_path, compressions):
    rows_file = tmp_path / "rows.jsonl"

    def swept(runs, **about):
        place = {"batches": BATCHES, "rows_file": rows_file, "about": {**ABOUT, **about}}
        return sweep(tiny_model("llama"), statistics, runs, WINDOWS, **place)

    def drop(row):
        return {key: value for key, value in row.items() if key not in ("rounds", "gains")}

    swept(RUNS[:1])
    rows_file.write_text("".join(f"{json.dumps(drop(row))}\n" for row in read_rows(rows_file)))  # as they once were
    plain = read_rows(rows_file)
    first = swept([RUNS[0], FITTED], measured_on="a")
    assert first[:2] == plain and first[2]["about"] == {**plain[0]["about"], "measured_on": "a"}
    assert swept([RUNS[0], FITTED], measured_on="a") == first and len(compressions) == 2
    other = swept([RUNS[0], FITTED], measured_on="b")
    assert other[:2] == plain and other[2]["about"]["measured_on"] == "b" and len(compressions) == 3
    assert swept(RUNS[:1]) == plain and len(read_rows(rows_file)) == 4 and len(compressions) == 3


def test_each_run_is_followed_by_one_with_the_rounds_and_gains_that_it_can_take():
    runs = all_runs(["svd_llm", "kfac"], ["global", "uniform"], [0.8], rounds=2, gains=8)
    assert runs == [
        Run("svd_llm", "global", 0.8),
        Run("kfac", "global", 0.8),
        Run("kfac", "global", 0.8, rounds=2, gains=8),
        Run("svd_llm", "uniform", 0.8),
        Run("kfac", "uniform", 0.8),
        Run("kfac", "uniform", 0.8, gains=8),
    ]
    assert all_runs(["kfac"], ["uniform", "global"], [0.8, 0.8], rounds=2) == [
        Run("kfac", "uniform", 0.8), Run("kfac", "global", 0.8), Run("kfac", "global", 0.8, rounds=2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("methods", "ranks", "message"),
    [
        (["gfwsvd", "kfac"], ["uniform"], "these methods and ranks takes rounds"),
        (["svd", "asvd"], ["global"], "these methods and ranks takes rounds"),
    ],
)
def test_rounds_that_no_run_takes_are_refused_though_gains_are_taken(methods, ranks, message):
    with pytest.raises(GfwsvdError, match=message):
        all_runs(methods, ranks, [0.8], rounds=1, gains=1)


def test_gains_that_no_run_takes_are_refused_and_so_are_less_than_none():
    with pytest.raises(GfwsvdError, match="these methods and ranks takes gains"):
        all_runs(["svd_llm"], ["uniform", "global"], [0.8], gains=1)
    with pytest.raises(GfwsvdError, match="rounds must be a whole number from 0 on, got -1"):
        all_runs(["kfac"], ["global"], [0.8], rounds=-1)


def test_long_names_leave_the_numbers_of_a_row_whole():
    run = Run("gfwsvd", "uniform", 0.8, "factors", rounds=12, gains=16)
    console = Console(width=80)
    row = {"name": run.name, "method": "gfwsvd", "perplexity": 19.19, "kl": 0.2604, "top1": 0.815, "kept": 0.7999}
    with console.capture() as captured:
        console.print(comparison([{**row, "model_stored": 134.5e6, "compress_seconds": 1234.0}]))
    assert {"19.19", "0.260", "81.5%", "80.0%", "134.5 M", "1234"} <= {
        cell.strip() for line in captured.get().splitlines() for cell in line.split("│")
    }


def test_a_file_of_something_else_is_refused(statistics, tmp_path):
    (tmp_path / "rows.jsonl").write_text("a diary\n")
    with pytest.raises(GfwsvdError, match=r"rows\.jsonl holds a line that is not JSON"):
        sweep(tiny_model("llama"), statistics, RUNS, WINDOWS, rows_file=tmp_path / "rows.jsonl", about=ABOUT)
    assert (tmp_path / "rows.jsonl").read_text() == "a diary\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["pca"], ["global"], [0.8]), "method must be one of"),
        ((["svd"], ["best"], [0.8]), "ranks must be one of"),
        ((["svd"], ["global"], [0.8, 8]), "keep must be"),
        ((["svd"], ["global"], [0.8], ["int8"]), "storage must be one of"),
    ],
)
def test_a_run_that_could_not_be_made_is_refused_before_any_is(arguments, message):
    with pytest.raises(GfwsvdError, match=message):
        all_runs(*arguments)
