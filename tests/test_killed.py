"""Commands that are killed at random moments: the next run goes on, and the files are those of a run in peace."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tiny_models import tiny_workspace

TESTS = Path(__file__).parent
TIMES = {"seconds", "calibration_seconds"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return tiny_workspace(tmp_path_factory.mktemp("killed"), words=2000)


def _run(*arguments: object, kills: int, longest: float = 0.0) -> int:
    command = [sys.executable, str(TESTS / "killed_again_and_again.py"), str(kills), str(longest)]
    found = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=400)
    killed, status = map(int, found.stdout.split("\n")[-2].split())
    assert status == 0, found.stderr
    return killed


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(entry) for key, entry in value.items() if key not in (*TIMES, "seal")}
    return [_without_times(entry) for entry in value] if isinstance(value, list) else value


def _assert_same_files(found: Path, expected: Path) -> None:
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in found.iterdir()) == names
    for name in names:
        a, b = ((folder / name).read_bytes() for folder in (found, expected))
        if name.endswith(".json"):
            a, b = (_without_times(json.loads(content)) for content in (a, b))
        assert a == b, name


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("calibrate", ("--stats", "--sweeps", "2", "--host-memory", "2.6M")),
        ("compress", ("--out", "--sweeps", "2", "--rank-multiple", "2")),
    ],
)
def test_a_command_that_is_killed_twenty_times_writes_the_same_bytes(command, options, workspace, tmp_path):
    out, *more = options
    text = ("--text", workspace / "text.txt", "--sequences", "12", "--seq-len", "16", "--batch-size", "1")
    arguments = (command, workspace / "model", *text, *more)
    assert _run(*arguments, out, tmp_path / "peace", kills=0) == 0
    killed, attempts = 0, 0
    while killed < 20:
        attempts += 1
        target = tmp_path / f"killed-{attempts}"
        killed += _run(*arguments, out, target, kills=20 - killed, longest=0.6)
        _assert_same_files(target, tmp_path / "peace")
        assert not target.with_name(f"{target.name}.work").exists()
    assert not list(tmp_path.glob(".*"))
