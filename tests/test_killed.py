"""Commands that are killed at random moments of each of their phases: the next run goes on, does next to nothing twice,
and the files are those of a run in peace."""

import json
import math
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gfwsvd import cli_make, passes, solve
from gfwsvd.cli import app
from gfwsvd.guard import judged_decomposition
from processes import exit_codes, start
from tiny_models import tiny_workspace

TIMES = {"seconds", "calibration_seconds"}
KILLS = 20


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return tiny_workspace(tmp_path_factory.mktemp("killed"), words=2000)


def _run(arguments: list[str], log: Path) -> None:
    """The command, which keeps every batch; with a line in `log` before each batch of a pass, and each layer solved."""
    passes.SNAPSHOT_SECONDS = passes.SNAPSHOT_COST = -1
    with open(log, "a", buffering=1) as file:

        def track(items: list[Any], description: str) -> Iterator[Any]:
            for item in items:
                if "calibration pass" in description:
                    file.write("pass\n")
                yield item

        def decomposition(*arguments: Any, **options: Any) -> Any:
            file.write("layer\n")
            return judged_decomposition(*arguments, **options)

        cli_make.bar, solve.judged_decomposition = track, decomposition
        app(arguments)


def _until_killed(process: Any, phases: list[str], goal: str, steps: int, now: Any) -> str:
    """The phase in which the process was killed: a moment after the step of this number in the phase `goal`, or at the
    first sight of a later one; "" if it ended before."""
    while process.is_alive() and (now().count(goal) < steps and not set(now()) & set(phases[phases.index(goal) + 1 :])):
        time.sleep(0.001)
    time.sleep(steps * 0.003)
    process.kill()
    assert exit_codes([process])[0] in (0, -signal.SIGKILL)
    return now()[-1] if process.exitcode and now() else ""


def _killed(arguments: list[str], target: Path, log: Path, phases: list[str], chance: random.Random) -> list[str]:
    """Runs the command until `target` is there; the phases in which it was killed, half of all kills if that can be."""
    log.touch()
    goals, kills = [goal for goal in phases for _ in range(math.ceil(KILLS / 2 / len(phases)))], []
    while not target.exists():
        begun, stale = len(log.read_text().split()), set(target.parent.glob(".*.tmp-*"))

        def now(begun: int = begun, stale: set[Path] = stale) -> list[str]:
            """What the process has begun."""
            writing = set(target.parent.glob(f".{target.name}.tmp-*")) - stale
            return log.read_text().split()[begun:] + ["writing"] * bool(writing)

        process = start(_run, arguments, log)
        if goals:
            goal = goals.pop(0)
            kills.append(_until_killed(process, phases, goal, 1 if goal == "writing" else chance.randint(1, 3), now))
        else:
            assert exit_codes([process]) == [0]
            assert not target.with_name(f"{target.name}.work").exists()
    return list(filter(None, kills))


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
    ("command", "phases", "options"),
    [
        ("calibrate", ["pass", "writing"], ("--sweeps", "2", "--host-memory", "2.6M", "--stats")),
        ("compress", ["pass", "layer", "writing"], ("--sweeps", "2", "--rank-multiple", "2", "--out")),
    ],
)
def test_a_command_that_is_killed_twenty_times_writes_the_same_bytes(command, phases, options, workspace, tmp_path):
    text = ("--text", workspace / "text.txt", "--sequences", "12", "--seq-len", "16", "--batch-size", "1")
    arguments = [str(word) for word in (command, workspace / "model", *text, *options)]
    assert exit_codes([start(_run, [*arguments, str(tmp_path / "peace")], tmp_path / "peace.log")]) == [0]
    steps = (tmp_path / "peace.log").read_text().split()
    assert set(steps) == set(phases) - {"writing"}
    kills: list[str] = []
    chance = random.Random(0)
    while len(kills) < KILLS:
        target, log = tmp_path / f"killed-{len(kills)}", tmp_path / f"{len(kills)}.log"
        found = _killed([*arguments, str(target)], target, log, phases, chance)
        _assert_same_files(target, tmp_path / "peace")
        done = log.read_text().split()
        for phase in set(steps):
            assert steps.count(phase) <= done.count(phase) <= steps.count(phase) + found.count(phase), found
        kills += found
    assert all(kills.count(phase) >= 3 for phase in phases), kills
    assert not list(tmp_path.glob(".*"))
