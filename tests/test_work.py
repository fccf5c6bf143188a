"""Work in progress on disk: whole or not there, of one setting, of one process."""

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gfwsvd.errors import GfwsvdError
from gfwsvd.work import claimed, open_work, remove_work

ABOUT = {"sweeps": 2, "data": "abc"}


def test_a_state_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "sum": torch.randn(2, dtype=torch.float64), "half": torch.randn(5).bfloat16()}
    values = {"trace": 0.1 + 0.2, "convergence": [1 / 3], "done": 7}
    with open_work(tmp_path / "w", ABOUT) as work:
        work.save("state", tensors, {"done": 0})
        work.save("state", tensors, values)
    with open_work(tmp_path / "w", ABOUT) as work:
        found = work.load("state")
    assert found is not None and found[1] == values
    assert all(torch.equal(found[0][name], value) for name, value in tensors.items())


def test_there_is_no_state_before_it_was_saved_and_after_it_was_discarded(tmp_path: Path) -> None:
    with open_work(tmp_path / "w", ABOUT) as work:
        assert work.load("state") is None
        work.save("state", {"a": torch.ones(1)}, {})
        work.discard("state")
        assert work.load("state") is None


def test_work_of_other_settings_is_refused_and_kept(tmp_path: Path) -> None:
    with open_work(tmp_path / "w", ABOUT) as work:
        work.save("state", {"a": torch.ones(1)}, {})
    with pytest.raises(GfwsvdError, match="sweeps was 2 and is 3"), open_work(tmp_path / "w", {**ABOUT, "sweeps": 3}):
        pass
    with open_work(tmp_path / "w", ABOUT) as work:
        assert work.load("state") is not None


def test_a_second_process_is_refused_while_the_first_is_at_work(tmp_path: Path) -> None:
    script = (
        "import sys; from gfwsvd.work import open_work\nwith open_work(sys.argv[1], {'sweeps': 2, 'data': 'abc'}): pass"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "w")]
    with open_work(tmp_path / "w", ABOUT):
        found = subprocess.run(command, capture_output=True, text=True)
        assert found.returncode and "another process is at work" in found.stderr
    assert subprocess.run(command).returncode == 0


def test_a_folder_of_something_else_is_neither_used_nor_removed(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(GfwsvdError, match="something else"), open_work(tmp_path, ABOUT):
        pass
    remove_work(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_a_state_that_was_cut_short_is_named(tmp_path: Path) -> None:
    with open_work(tmp_path / "w", ABOUT) as work:
        work.save("state", {"a": torch.ones(100)}, {})
        file = tmp_path / "w" / "state.safetensors"
        file.write_bytes(file.read_bytes()[:-50])
        with pytest.raises(GfwsvdError, match=r"state\.safetensors is no state"):
            work.load("state")


def test_what_a_killed_removal_leaves_is_no_work_and_binds_nobody(tmp_path: Path) -> None:
    for removed in range(4):
        with open_work(tmp_path / "w", ABOUT) as work:
            for number in range(3):
                work.save(f"state-{number}", {"a": torch.ones(1)}, {})
        with pytest.MonkeyPatch.context() as patch:
            unlink, left = Path.unlink, iter(range(removed))

            def killed(file: Path, unlink: Any = unlink, left: Any = left, **options: Any) -> None:
                if next(left, None) is None:
                    raise KeyboardInterrupt
                unlink(file, **options)

            patch.setattr(Path, "unlink", killed)
            with pytest.raises(KeyboardInterrupt):
                remove_work(tmp_path / "w")
        for _ in range(2):
            with open_work(tmp_path / "w", {**ABOUT, "sweeps": removed}) as work:
                assert not any(work.has(f"state-{number}") for number in range(3))
        assert not (tmp_path / "w").exists()


def test_a_lock_on_a_folder_that_its_holder_has_just_removed_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, removed = fcntl.flock, iter([tmp_path / "w"])

    def late(descriptor: int, how: int) -> None:
        for folder in removed:
            shutil.rmtree(folder)
        flock(descriptor, how)

    monkeypatch.setattr("gfwsvd.folders.fcntl.flock", late)
    with open_work(tmp_path / "w", ABOUT) as work:
        work.save("state", {"a": torch.ones(1)}, {})
        with pytest.raises(GfwsvdError, match="another process is at work"), claimed(tmp_path / "w"):
            pass
    assert (tmp_path / "w" / "state.safetensors").exists()


def test_a_claim_of_the_caller_is_enough_and_stays(tmp_path: Path) -> None:
    with claimed(tmp_path / "w") as claim:
        with open_work(claim, ABOUT) as work:
            work.save("state", {"a": torch.ones(1)}, {})
        with pytest.raises(GfwsvdError, match="another process is at work"), open_work(tmp_path / "w", ABOUT):
            pass
        assert claim.open(ABOUT).has("state")
