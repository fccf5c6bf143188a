"""Calibration by several processes: the statistics of one process, a clear end where one is killed, nothing lost."""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_batches import batches_of, model_short_of_memory, model_with_nan, spoilt_tokens

from gfwsvd import passes, ranked
from gfwsvd.calibration import Statistics, about_calibration, calibrate
from gfwsvd.errors import GfwsvdError
from gfwsvd.packed import TENSORS
from gfwsvd.store import load_statistics, save_statistics
from gfwsvd.work import open_work
from processes import exit_codes, start_job
from tiny_models import random_tokens, tiny_model

BATCHES = [{"input_ids": random_tokens(1, 12, seed=seed)} for seed in range(11)]
SETTINGS: list[dict[str, Any]] = [
    {"sweeps": 2},
    {"unit": "sequence", "sweeps": 2},
    {"labels": "sampled"},
    {"collect": ["inputs", "gradients"]},
    {"sweeps": 2, "host_memory": 2_700_000},
]


def _calibrate(folder: Path, settings: dict[str, Any], killed: int | None = None) -> None:
    """Leaves in `folder` the statistics, what was run, by rank, and an error. The rank `killed` dies within the second
    pass, of which two of its batches are kept."""
    passes.SNAPSHOT_SECONDS = passes.SNAPSHOT_COST = -1
    seen = folder / f"seen-{ranked.rank()}.txt"

    def track(items: list[Any], description: str) -> Iterator[Any]:
        with open(seen, "a") as file:
            file.write(f"{description}: {len(items)}\n")
        for number, item in enumerate(items):
            if ranked.rank() == killed and "pass 2" in description and number == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            yield item

    model = tiny_model("llama")
    try:
        with open_work(folder / "work", about_calibration(model, BATCHES, **settings)) as work:
            found = calibrate(model, BATCHES, heldout=1, work=work, track=track, **settings)
            if ranked.rank() == 0:
                save_statistics(found, folder / "statistics")
    except GfwsvdError as error:
        (folder / f"error-{ranked.rank()}.txt").write_text(str(error))
        raise SystemExit(3) from error


def _seen(folder: Path, size: int) -> list[list[str]]:
    return [(folder / f"seen-{rank}.txt").read_text().splitlines() for rank in range(size)]


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
                assert (a.double() - b.double()).norm() <= 1e-5 * b.double().norm(), (name, field)
        for number in ("num_tokens", "num_parts", "gradient_scale"):
            assert getattr(other, number) == getattr(stats, number), (name, number)
        for number in ("scale", "trace", "kronecker_residual", "convergence"):
            a, b = getattr(other, number), getattr(stats, number)
            assert a == (b if b is None else pytest.approx(b, rel=1e-4, abs=1e-6)), (name, number)
        for matrix, value in stats.squared_parts.items():
            assert other.squared_parts[matrix] == pytest.approx(value, rel=1e-4), (name, matrix)


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_job_of_two_has_the_statistics_of_one_process(settings, tmp_path):
    assert exit_codes(start_job(2, _calibrate, tmp_path, settings)) == [0, 0]
    expected = calibrate(tiny_model("llama"), BATCHES, heldout=1, **settings)
    _assert_same(load_statistics(tmp_path / "statistics")[0], expected)
    first_passes = [[int(line.split()[-1]) for line in lines if "pass 1" in line] for lines in _seen(tmp_path, 2)]
    assert {part for lines in first_passes for part in lines} == {5}  # of ten batches each has half
    assert (len(first_passes[0]) > 1) == ("host_memory" in settings)


@pytest.mark.parametrize(("size", "killed"), [(3, 1), (2, 0)])  # rank 0 holds the lock, and writes
def test_a_killed_process_ends_the_job_and_the_next_goes_on_from_what_was_kept(tmp_path, size, killed):
    settings = SETTINGS[0]
    codes = exit_codes(start_job(size, _calibrate, tmp_path, settings, killed))
    assert codes == [-signal.SIGKILL if rank == killed else 3 for rank in range(size)]
    for rank in set(range(size)) - {killed}:
        message = (tmp_path / f"error-{rank}.txt").read_text()
        assert "lost touch with the others" in message and "the same command goes on" in message
    for rank in range(size):
        (tmp_path / f"seen-{rank}.txt").unlink()
    about = about_calibration(tiny_model("llama"), BATCHES, **settings)
    with pytest.raises(GfwsvdError, match=f"processes was {size} and is 1"), open_work(tmp_path / "work", about):
        pass
    assert exit_codes(start_job(size, _calibrate, tmp_path, settings)) == [0] * size
    lines = _seen(tmp_path, size)
    assert not any("pass 1" in line for part in lines for line in part)  # which was done
    batches = len(range(killed, 10, size))
    assert lines[killed][0] == f"calibration pass 2 of 2: {batches - 2}"  # two were kept
    expected = calibrate(tiny_model("llama"), BATCHES, heldout=1, **settings)
    _assert_same(load_statistics(tmp_path / "statistics")[0], expected)


@pytest.mark.parametrize("settings", [{"online": True}, {"heldout": 10}])
def test_what_a_job_cannot_do_is_refused(settings, monkeypatch):
    monkeypatch.setattr(ranked, "world_size", lambda: 2)
    with pytest.raises(GfwsvdError, match="2 processes need as many batches, got .* take smaller batches or fewer"):
        calibrate(tiny_model("llama"), BATCHES, **settings)


def _calibrate_short(folder: Path, batches: list[dict[str, torch.Tensor]], short: tuple[int, ...]) -> None:
    """Leaves in `folder` the statistics; ranks of `short` run out of memory with more than two sequences in a pass."""
    most = 2 if ranked.rank() in short else 4
    found = calibrate(model_short_of_memory(most, lambda _: torch.is_grad_enabled()), batches, sweeps=2, heldout=0)
    if ranked.rank() == 0:
        save_statistics(found, folder / "statistics")


@pytest.mark.parametrize("short", [(0,), (1,), (0, 1)])
def test_ranks_that_run_out_of_memory_halve_their_batches_and_the_sums_stay_those_of_one_process(short, tmp_path):
    """The first half of each batch predicts fewer tokens: the scale of its gradients is not the whole batch's."""
    ids = random_tokens(16, 12)
    labels = ids.clone()
    labels.view(4, 4, 12)[:, :2, 2:] = -100

    def batches(size: int) -> list[dict[str, torch.Tensor]]:
        parts = zip(ids.split(size), labels.split(size), strict=True)
        return [{"input_ids": some, "labels": theirs} for some, theirs in parts]

    whole, halves = (calibrate(tiny_model("llama"), batches(size), sweeps=2, heldout=0) for size in (4, 2))
    scales = [{name: stats.gradient_scale for name, stats in found.layers.items()} for found in (whole, halves)]
    assert scales[0] != scales[1]
    assert exit_codes(start_job(2, _calibrate_short, tmp_path, batches(4), short)) == [0, 0]
    _assert_same(load_statistics(tmp_path / "statistics")[0], halves if 0 in short else whole)


def _calibrate_nan(folder: Path, ids: torch.Tensor, size: int) -> None:
    try:
        found = calibrate(model_with_nan(), batches_of(ids, size), sweeps=2)
    except GfwsvdError as error:
        (folder / f"error-{ranked.rank()}.txt").write_text(str(error))
        raise SystemExit(3) from error
    if ranked.rank() == 0:
        save_statistics(found, folder / "statistics")


def test_sequences_of_nan_count_among_those_of_all_ranks(tmp_path):
    """Two of 32 that one rank has would be too many, of 64 they are not; nor does a held-out one end the job."""
    ids = spoilt_tokens(64, 1, 9, 63)
    assert exit_codes(start_job(2, _calibrate_nan, tmp_path, ids, 4)) == [0, 0]
    found = load_statistics(tmp_path / "statistics")[0]
    with pytest.warns(UserWarning, match="1 sequences are left out"):
        expected = calibrate(model_with_nan(), batches_of(ids, 4), sweeps=2)
    assert found.num_skipped == expected.num_skipped == 3
    _assert_same(found, expected)


@pytest.mark.parametrize(
    ("sequences", "bad", "size", "message"),
    [
        (64, (1, 9, 5, 13), 4, "NaN or inf .*4 of 64 sequences have such values, at most one of 20"),
        (43, (40,), 40, "rank 1 got no sequence whose loss is finite: start fewer processes"),  # the last two held out
    ],
)
def test_too_many_sequences_of_nan_end_a_job_on_all_ranks(sequences, bad, size, message, tmp_path):
    assert exit_codes(start_job(2, _calibrate_nan, tmp_path, spoilt_tokens(sequences, *bad), size)) == [3, 3]
    for rank in range(2):
        assert re.search(message, (tmp_path / f"error-{rank}.txt").read_text())


def _calibrate_interrupted(folder: Path, presses: bool) -> None:
    """Each rank gets Ctrl-C within its second batch of the second pass."""
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def track(items: list[Any], description: str) -> Iterator[Any]:
        with open(folder / f"seen-{ranked.rank()}.txt", "a") as file:
            file.write(f"{description}: {len(items)}\n")
        for number, item in enumerate(items):
            if presses and "pass 2" in description and number == 1:
                os.kill(os.getpid(), signal.SIGINT)
            yield item

    model = tiny_model("llama")
    with open_work(folder / "work", about_calibration(model, BATCHES)) as work:
        try:
            found = calibrate(model, BATCHES, sweeps=2, heldout=1, work=work, track=track)
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        if ranked.rank() == 0:
            save_statistics(found, folder / "statistics")


def test_a_job_that_is_interrupted_goes_on_from_the_batches_in_hand(tmp_path):
    assert exit_codes(start_job(2, _calibrate_interrupted, tmp_path, True)) == [130, 130]
    for rank in range(2):
        (tmp_path / f"seen-{rank}.txt").unlink()
    assert exit_codes(start_job(2, _calibrate_interrupted, tmp_path, False)) == [0, 0]
    assert [lines[0] for lines in _seen(tmp_path, 2)] == ["calibration pass 2 of 2: 3"] * 2  # of five batches each
    expected = calibrate(tiny_model("llama"), BATCHES, sweeps=2, heldout=1)
    _assert_same(load_statistics(tmp_path / "statistics")[0], expected)
