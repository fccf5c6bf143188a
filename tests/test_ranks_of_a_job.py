"""The processes of a job end with one model, to the last bit that of one process, or all with an error."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gfwsvd import ranked, whiten
from gfwsvd.calibration import calibrate
from gfwsvd.cli import app
from gfwsvd.compress import about_work, compress
from gfwsvd.errors import GfwsvdError
from gfwsvd.ranked import joined, owners, rank
from gfwsvd.store import load_statistics, save_statistics
from gfwsvd.track import silent
from gfwsvd.work import open_work
from processes import exit_codes, start, start_job
from tiny_models import random_tokens, tiny_model, tiny_workspace

SETTINGS: dict[str, Any] = {"method": "gfwsvd", "keep": 0.6, "damping": 0.01, "guard": True, "storage": "pivoted"}
BATCHES = [{"input_ids": ids} for ids in random_tokens(16, 12).split(4)]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "gfwsvd"]
LAST = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def stats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of statistics of the tiny llama, and of statistics by which a layer cannot be whitened."""
    folder = tmp_path_factory.mktemp("statistics")
    statistics = calibrate(tiny_model("llama"), BATCHES)
    save_statistics(statistics, folder / "good")
    statistics.layers[LAST].right.zero_()
    save_statistics(statistics, folder / "bad")
    return folder


def _compress(folder: Path, stats: Path, kind: str = "llama", track: Callable[..., Any] = silent) -> None:
    """Leaves in `folder` what this rank ends with: tensors and report, or the error. As on a GPU, the roots of some
    layers of one shape are found together."""
    whiten.BATCH_NUMBERS["cpu"] = 3 * 2 * 64**2
    options = SETTINGS if kind == "llama" else {**SETTINGS, "method": "svd"}
    rounds = {"rounds": 1, "gains": 2, "batches": BATCHES} if kind == "llama" else {}
    model = tiny_model(kind).bfloat16() if kind == "llama" else tiny_model(kind)
    statistics = load_statistics(stats)[0] if kind == "llama" else None
    try:
        with open_work(folder / "w", about_work(model, statistics=statistics, **options)) as work:
            report = compress(
                model, statistics=statistics, rank_multiple=2, work=work, track=track, **options, **rounds
            )
    except GfwsvdError as error:
        (folder / f"error-{rank()}.txt").write_text(str(error))
        raise SystemExit(3) from error
    report.seconds = 0.0
    (folder / f"report-{rank()}.json").write_text(json.dumps(report.to_json()))
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}  # some share memory
    save_file(tensors, folder / f"model-{rank()}.safetensors")


def _compress_and_die(folder: Path, stats: Path, killed: int) -> None:
    """The rank of this number is killed before its fourth layer."""

    def track(items: list[str], description: str) -> Iterator[str]:
        for number, item in enumerate(items):
            if rank() == killed and number == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            yield item

    _compress(folder, stats, track=track)


def assert_same(folder: Path, number: int, expected: Path) -> None:
    """What the rank of this number left is what the one process left."""
    found, wanted = (
        load_file(path) for path in (folder / f"model-{number}.safetensors", expected / "model-0.safetensors")
    )
    assert found.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
    assert (folder / f"report-{number}.json").read_text() == (expected / "report-0.json").read_text()


@pytest.mark.parametrize(("kind", "size"), [("llama", 2), ("gpt2", 3)])
def test_all_ranks_end_with_the_model_of_one_process(stats, tmp_path, kind, size):
    for name in ("one", "job"):
        (tmp_path / name).mkdir()
    one = start(_compress, tmp_path / "one", stats / "good", kind)
    job = start_job(size, _compress, tmp_path / "job", stats / "good", kind)
    assert exit_codes([one, *job]) == [0] * (size + 1)
    for number in range(size):
        assert_same(tmp_path / "job", number, tmp_path / "one")
    kinds = {layer["kind"] for layer in json.loads((tmp_path / "one/report-0.json").read_text())["layers"]}
    assert "pivoted" in kinds
    assert len(list((tmp_path / "job/w").glob("*.spectrum.safetensors"))) == (14 if kind == "llama" else 8)


def test_an_error_of_one_rank_is_an_error_of_all_that_names_the_layer(stats, tmp_path):
    assert exit_codes(start_job(2, _compress, tmp_path, stats / "bad")) == [3, 3]
    errors = [(tmp_path / f"error-{number}.txt").read_text() for number in range(2)]
    assert all(f"the right metric of layer {LAST} is singular" in error for error in errors)
    assert sorted(error.startswith("rank ") for error in errors) == [False, True]  # one's own, and of the other


@pytest.mark.parametrize(("size", "killed"), [(2, 1), (3, 0)])  # rank 0 holds the lock, and writes
def test_a_killed_process_is_an_error_of_the_others_and_the_next_job_goes_on(stats, tmp_path, size, killed):
    codes = exit_codes(start_job(size, _compress_and_die, tmp_path, stats / "good", killed))
    assert codes == [-signal.SIGKILL if number == killed else 3 for number in range(size)]
    for number in set(range(size)) - {killed}:
        assert "lost touch with the others" in (tmp_path / f"error-{number}.txt").read_text()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "w").glob("*.safetensors")}
    assert len(kept) >= 2 * 3 and not list(tmp_path.glob("model-*"))
    (tmp_path / "one").mkdir()
    one = start(_compress, tmp_path / "one", stats / "good")
    other = 5 - size  # the next job may be of another size
    assert exit_codes([one, *start_job(other, _compress, tmp_path, stats / "good")]) == [0] * (1 + other)
    for number in range(other):
        assert_same(tmp_path, number, tmp_path / "one")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "nothing was solved twice"


def test_a_folder_that_rank_0_cannot_open_is_an_error_of_all(stats, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w/thesis.txt").write_text("mine")
    assert exit_codes(start_job(2, _compress, tmp_path, stats / "good")) == [3, 3]
    errors = [(tmp_path / f"error-{number}.txt").read_text() for number in range(2)]
    assert all("holds something else than work in progress" in error for error in errors)
    assert errors[1].startswith("rank 0 of 2 failed")


def _command(arguments: list[str]) -> None:
    app(arguments)


def test_torchrun_runs_the_command_and_one_process_writes_and_prints(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    options = ["compress", str(tmp_path / "model"), "--method", "svd", "--keep", "0.6", "--json", "--out"]
    one = start(_command, [*options, str(tmp_path / "one")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    job = subprocess.run(
        [*TORCHRUN, *options, str(tmp_path / "job")], capture_output=True, text=True, env=environment, timeout=300
    )
    assert job.returncode == 0 and exit_codes([one]) == [0], job.stderr
    assert json.loads(job.stdout)["out"] == str(tmp_path / "job"), "one line"
    assert (tmp_path / "job/model.safetensors").read_bytes() == (tmp_path / "one/model.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job", "model", "one"]


def _process_of(rank: int, agent: int) -> int:
    """The child of the agent of torchrun that has this rank, once there is one."""
    while True:
        for process in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
            with contextlib.suppress(OSError):  # it has ended
                if f"RANK={rank}" in Path(f"/proc/{process}/environ").read_text().split("\0"):
                    return int(process)
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes of a job in /proc")
def test_a_job_of_torchrun_of_which_rank_0_is_killed_says_so_and_the_next_goes_on(tmp_path):
    """The agent ends the others, which say how to go on, whatever they are about."""
    folder = tiny_workspace(tmp_path, words=2000)
    text = ["--text", str(folder / "text.txt"), "--sequences", "8", "--seq-len", "16", "--batch-size", "2"]
    options = ["calibrate", str(folder / "model"), *text, "--sweeps", "30", "--stats", str(tmp_path / "stats")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen([*TORCHRUN, *options], stderr=subprocess.PIPE, text=True, env=environment)
    first = _process_of(0, job.pid)
    while job.poll() is None and not list(tmp_path.glob("stats.work/*-passes.safetensors")):
        time.sleep(0.01)
    os.kill(first, signal.SIGKILL)
    said = job.communicate(timeout=120)[1]
    assert job.returncode and "SIGKILL" in said, "torchrun names the rank"
    assert "lost touch with the others" in said or "torchrun --nproc-per-node 2 -m gfwsvd calibrate" in said
    assert not (tmp_path / "stats").exists() and (tmp_path / "stats.work").exists()
    assert exit_codes(start_job(2, _command, options, joins=True)) == [0, 0]
    assert (tmp_path / "stats").exists() and not (tmp_path / "stats.work").exists()


@settings(max_examples=30)
@given(costs=st.lists(st.integers(1, 1000), min_size=1), size=st.integers(1, 9))
def test_no_rank_has_more_to_do_than_the_mean_and_one_item(costs, size):
    items = {str(number): float(cost) for number, cost in enumerate(costs)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranked, "world_size", lambda: size)
        found = owners(items)
    assert list(found) == list(items) and set(found.values()) <= set(range(size))
    loads = [sum(items[name] for name, owner in found.items() if owner == number) for number in range(size)]
    assert max(loads) <= sum(costs) / size + max(costs)


@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda:0", "takes a GPU of its own, got device cuda:0"), ("cuda", "a GPU for each process, got .* rank 99")],
)
def test_a_gpu_that_a_process_cannot_have_is_refused(monkeypatch, device, message):
    for name, value in {"RANK": "99", "WORLD_SIZE": "100", "LOCAL_RANK": "99"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(GfwsvdError, match=message), joined(device):
        pass
