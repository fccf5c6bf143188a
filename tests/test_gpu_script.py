"""`make gpu`: the same script runs to its end on a CPU, so that nothing in it can rot until a GPU is there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the benchmarks are no part of the installed packages

from benchmarks.kernel_names import kernel_names
from benchmarks.registry import OPS

ROOT = Path(__file__).resolve().parents[1]
STEPS = {
    "tests": ["tests on the GPU"],
    "checks": ["memcheck", "memcheck of groups", "memcheck of groups of many tokens"],
    "kernels": ["benchmarks", "predictions", "tables"],
    "models": ["generation", "compression"],
}


def started(*arguments, command=("bash", ROOT / "benchmarks/gpu.sh"), **environment):
    command = [*map(str, command), *arguments]
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process):
    """(exit status, the steps it took, standard output, standard error)"""
    out, err = process.communicate()
    return process.returncode, re.findall(r"^== (.+) \(at most \d+ s", out, re.MULTILINE), out, err


def test_dry_runs_of_the_parts_take_every_step_and_measure_every_provider(tmp_path):
    """As `make` starts them, in two scripts at once: starting Python is what takes the time."""
    make = ["make", "--silent", "-C", ROOT, "gpu", f"PYTHON={sys.executable}"]
    sides = [["kernels"], ["tests", "checks", "models"]]
    running = [
        started(f"GPU_ARGS=--dry-run {' '.join(parts)}", command=make, OUT=str(tmp_path / parts[0])) for parts in sides
    ]
    for parts, process in zip(sides, running, strict=True):
        status, steps, out, err = finished(process)
        assert status == 0, err + out[-3000:]
        assert steps == [step for part in parts for step in STEPS[part]]
    paths = {path.name: path for path in tmp_path.glob("*/*")}
    assert len(paths) <= 8 and all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in paths)
    (results,) = tmp_path.glob("*/kernels-*.jsonl")
    assert re.fullmatch(r"kernels-[a-z0-9-]+-\d{4}-\d\d-\d\d-\w+(-dirty)?\.jsonl", results.name)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    found = {(row["op"], row["provider"]) for row in rows}
    assert found == {(op, provider) for op, spec in OPS.items() for provider in spec.providers}
    assert {row["status"] for row in rows} == {"ok", "missing"}
    assert {"kernels.md", "kernels.log", "tests.log", "checks.log", "models.log"} <= paths.keys()
    assert "Predicted, not measured" in paths["kernels.log"].read_text()
    assert re.search(r"test_cuda\.py: \d+", paths["tests.log"].read_text())


def test_the_tests_it_names_are_there():
    named = re.findall(r"\btests/[\w/.]+", (ROOT / "benchmarks/gpu.sh").read_text())
    assert len(named) >= 6 and all((ROOT / name).exists() for name in named)


def test_the_time_limits_keep_it_under_eight_minutes():
    text = (ROOT / "benchmarks/gpu.sh").read_text()
    deadline = int(re.search(r"^deadline=(\d+)", text, re.MULTILINE)[1])
    kill_after = int(re.search(r"--kill-after=(\d+)", text)[1])
    last_benchmark = int(re.search(r"^last_benchmark=(\d+)", text, re.MULTILINE)[1])
    assert deadline + kill_after < 8 * 60 and last_benchmark < deadline - 45 - 25  # predictions and tables come after
    assert '[ "$limit" -le $((deadline - SECONDS)) ]' in text  # what holds every step to it


def test_a_step_that_fails_is_named_and_the_rest_goes_on(tmp_path):
    """A Python that can import, but runs no module: every step fails, and with 3 if it was told to ask no network."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -m ] && exit $((2 + HF_HUB_OFFLINE))\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    out = str(tmp_path / "out")
    status, steps, _, err = finished(started("--dry-run", OUT=out, PYTHON=str(python), HF_HUB_OFFLINE="0"))
    assert status == 1 and steps == [step for part in STEPS.values() for step in part]
    assert re.findall(r"FAILED: (.+): exit status 3", err) == steps and "names of the kernels" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_says_so_and_does_nothing():
    status, _, out, err = finished(started())
    assert status == 2 and "sees no GPU" in err and out == ""
    assert finished(started("--dryrun"))[0] == 2


def test_the_tree_that_has_to_be_carried_is_as_small_as_the_documentation_says():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("the sources are no git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    stated = int(re.search(r"tracked files, below\s+(\d+) MB", (ROOT / "docs/gpu.md").read_text())[1])
    assert len(files) > 100 and sum(file.lstat().st_size for file in files if file.exists()) < stated * 10**6


def test_the_names_of_the_kernels_are_those_in_the_sources(tmp_path):
    sources = "".join(path.read_text() for path in (ROOT / "kernels/gfwsvd_kernels").glob("*.py"))
    launched = {*re.findall(r"(\w+)\[[^\[\]\n]+(?:\([^()]*\)[^\[\]\n]*)*\]\(\n", sources)}
    assert launched and launched <= {*kernel_names()}
    assert {*re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE)} == {*kernel_names()}
