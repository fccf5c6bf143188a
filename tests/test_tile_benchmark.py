"""The benchmark of candidate tiles, in the interpreter."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the benchmarks are no part of the installed packages

from benchmarks import record
from benchmarks import tiles as benchmark
from gfwsvd_kernels import tiles

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tiny shapes are for Triton's interpreter")

GOOD, BAD = tiles.Tile(32, 32, 32, 4, 2), tiles.Tile(24, 24, 32, 4, 2)  # sizes must be powers of two
TINY = ["--device", "cpu", "--shapes", "tiny", "--seconds", "0"]


@pytest.mark.parametrize("kernel", list(benchmark.OPS_OF))
def test_candidates_come_sorted_by_time_and_one_that_fails_is_a_row(kernel, monkeypatch, tmp_path, capsys):
    shipped = benchmark.shipped(kernel, tiles.H200)
    monkeypatch.setitem(tiles.CANDIDATES, kernel, (BAD, GOOD, shipped))
    assert benchmark.main([*TINY, "--op", kernel, "--results", str(tmp_path / "r.jsonl")]) == 0
    rows = record.read(tmp_path / "r.jsonl")
    times = [row["us_p50"] for row in rows[:-1]]
    assert len(rows) == 4 and times == sorted(times) and all(time > 0 for time in times)
    assert rows[-1]["tile"].startswith("24x24x32") and "Error" in rows[-1]["note"]
    assert [row["shipped"] for row in rows].count(True) == 1
    assert capsys.readouterr().out.count("shipped") == 1


def test_a_wrong_result_of_the_shipped_tile_fails_the_run(monkeypatch, capsys):
    monkeypatch.setitem(tiles.CANDIDATES, "gram", (benchmark.shipped("gram", tiles.H200),))
    monkeypatch.setattr(benchmark, "launched", lambda kernel, tile, inputs: inputs["out"])
    assert benchmark.main([*TINY, "--op", "gram"]) == 1
    assert "relative error" in capsys.readouterr().out


def test_no_case_is_begun_after_the_limit(capsys):
    assert benchmark.main([*TINY, "--limit", "0"]) == 0
    assert capsys.readouterr().out.count("not begun within 0 seconds") == 2


@pytest.mark.parametrize("kernel", list(benchmark.OPS_OF))
def test_the_shipped_tile_is_among_the_candidates(kernel):
    assert benchmark.shipped(kernel, tiles.H200) in tiles.CANDIDATES[kernel]
