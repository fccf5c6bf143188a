"""Calibration by several processes: the statistics of one process, a clear end where one is killed, nothing lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from job_of_calibration import BATCHES

from gfwsvd import ranked
from gfwsvd.calibration import Statistics, calibrate
from gfwsvd.errors import GfwsvdError
from gfwsvd.packed import TENSORS
from gfwsvd.store import load_statistics
from tiny_models import tiny_model

TESTS = Path(__file__).parent
SETTINGS = [
    {"sweeps": 2},
    {"unit": "sequence", "sweeps": 2},
    {"labels": "sampled"},
    {"collect": ["inputs", "gradients"]},
    {"sweeps": 2, "host_memory": 2_700_000},
]


def _start(folder: Path, processes: int, settings: list[dict], *more: str) -> list[subprocess.Popen]:
    (folder / "meeting").unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    script = [sys.executable, str(TESTS / "job_of_calibration.py")]
    return [
        subprocess.Popen(
            [*script, str(rank), str(processes), str(folder), json.dumps(settings), *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(processes)
    ]


def _ends(processes: list[subprocess.Popen]) -> list[tuple[str, str]]:
    return [process.communicate(timeout=120) for process in processes]


def _assert_same(found: Statistics, expected: Statistics) -> None:
    assert found.layers.keys() == expected.layers.keys()
    for field in ("num_losses", "num_sequences", "num_heldout", "data_sha256", "settings"):
        assert getattr(found, field) == getattr(expected, field), field
    for name, stats in expected.layers.items():
        other = found.layers[name]
        for field in TENSORS:
            a, b = getattr(other, field), getattr(stats, field)
            assert (a is None) == (b is None), (name, field)
            if b is not None:
                a, b = (value if field.startswith("heldout") or value.dim() == 1 else value.tril() for value in (a, b))
                assert (a.double() - b.double()).norm() <= 1e-5 * b.double().norm(), (name, field)
        for number in ("num_tokens", "num_parts", "gradient_scale"):
            assert getattr(other, number) == getattr(stats, number), (name, number)
        for number in ("scale", "trace", "kronecker_residual", "convergence"):
            a, b = getattr(other, number), getattr(stats, number)
            assert a == (b if b is None else pytest.approx(b, rel=1e-4, abs=1e-6)), (name, number)
        for matrix, value in stats.squared_parts.items():
            assert other.squared_parts[matrix] == pytest.approx(value, rel=1e-4), (name, matrix)


def test_a_job_of_two_has_the_statistics_of_one_process(tmp_path):
    ends = _ends(_start(tmp_path, 2, SETTINGS))
    assert [error for _, error in ends if "Error" in error] == []
    for number, settings in enumerate(SETTINGS):
        expected = calibrate(tiny_model("llama"), BATCHES, heldout=1, **settings)
        _assert_same(load_statistics(tmp_path / f"statistics-{number}")[0], expected)


def test_a_killed_process_ends_the_job_and_the_next_goes_on_from_what_was_kept(tmp_path):
    settings, killed = {"sweeps": 2}, 1
    processes = _start(tmp_path, 3, [settings], str(killed))
    for _ in range(1200):
        if (tmp_path / "waiting").exists():
            break
        time.sleep(0.1)
    processes[killed].send_signal(signal.SIGKILL)
    ends = _ends(processes)
    for rank in (0, 2):
        assert processes[rank].returncode == 1
        assert "lost touch with the others" in ends[rank][1] and "the same command goes on" in ends[rank][1]
    lines = [output.splitlines() for output, _ in _ends(_start(tmp_path, 3, [settings]))]
    assert not any("pass 1" in line for part in lines for line in part)  # which was done
    assert lines[killed][1] == "calibration pass 2 of 2 1"  # of its three batches, two were kept
    _assert_same(
        load_statistics(tmp_path / "statistics-0")[0], calibrate(tiny_model("llama"), BATCHES, heldout=1, **settings)
    )


@pytest.mark.parametrize("settings", [{"online": True}, {"heldout": 10}])
def test_what_a_job_cannot_do_is_refused(settings, monkeypatch):
    monkeypatch.setattr(ranked, "world_size", lambda: 2)
    with pytest.raises(GfwsvdError, match="2 processes need as many batches, got .* take smaller batches or fewer"):
        calibrate(tiny_model("llama"), BATCHES, **settings)
