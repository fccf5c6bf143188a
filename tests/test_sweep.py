"""The size-quality frontier: rows that add up, and nothing computed twice."""

import json

import pytest
import torch

from gfwsvd import sweep as sweep_module
from gfwsvd.calibration import calibrate
from gfwsvd.errors import GfwsvdError
from gfwsvd.evaluate import evaluate
from gfwsvd.sweep import Run, all_runs, read_rows, sweep
from tiny_models import random_tokens, tiny_model

ABOUT = {"text": "t", "windows": (3, 16)}
RUNS = [Run("gfwsvd", "global", 0.8), Run("svd", "uniform", 0.5, "factors")]
WINDOWS = random_tokens(3, 16)


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
