"""Folders that appear whole or not at all, and the checks of what is read back."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gfwsvd import folders
from gfwsvd.errors import GfwsvdError
from gfwsvd.folders import (
    atomic_folder,
    check_digests,
    check_output_file,
    check_output_folder,
    check_seal,
    read_headers,
    read_json,
    sealed,
    sha256_file,
    write_json,
)


def write(target: Path, content: str, **options: object) -> None:
    with atomic_folder(target, **options) as folder:
        (folder / "a").write_text(content)
        (folder / "b").write_text(content)


def content(target: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in target.iterdir()}


# ---------------------------------------------------------------------------------------------------------- writing


def test_the_folder_appears_only_at_the_end_and_nothing_else_stays(tmp_path):
    target = tmp_path / "new" / "out"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert content(target) == {"a": "1"}
    assert os.listdir(target.parent) == ["out"]


def test_the_folder_gets_ordinary_permissions(tmp_path):
    (tmp_path / "plain").mkdir()
    write(tmp_path / "out", "1")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, GfwsvdError])
def test_a_block_that_fails_leaves_nothing(tmp_path, failure):
    with pytest.raises(failure), atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
        raise failure
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_the_old_folder(tmp_path, failure):
    write(tmp_path / "out", "old")
    with pytest.raises(failure), atomic_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "a").write_text("new")
        raise failure
    assert content(tmp_path / "out") == {"a": "old", "b": "old"}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("exchange", ["of the system", "by two renames"])
def test_overwrite_replaces_the_whole_folder(tmp_path, monkeypatch, exchange):
    if exchange == "by two renames":
        monkeypatch.setattr(folders, "_exchange", lambda first, second: False)
    write(tmp_path / "out", "old")
    with atomic_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "c").write_text("new")
    assert content(tmp_path / "out") == {"c": "new"}
    assert os.listdir(tmp_path) == ["out"]


def test_a_failed_second_rename_brings_the_old_folder_back(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "_exchange", lambda first, second: False)
    write(tmp_path / "out", "old")
    rename = Path.rename

    def failing(self, target):
        if self.name.startswith(".out.tmp-") and not Path(target).exists():
            raise OSError(errno.EIO, "input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(GfwsvdError, match="input/output error"):
        write(tmp_path / "out", "new", overwrite=True)
    assert content(tmp_path / "out") == {"a": "old", "b": "old"}
    assert os.listdir(tmp_path) == ["out"]


def test_an_existing_folder_with_files_is_refused_and_kept(tmp_path):
    write(tmp_path / "out", "old")
    with pytest.raises(GfwsvdError, match="not empty"):
        write(tmp_path / "out", "new")
    assert content(tmp_path / "out") == {"a": "old", "b": "old"}


def test_a_folder_that_fills_up_meanwhile_is_kept(tmp_path):
    with pytest.raises(GfwsvdError, match="could not write"), atomic_folder(tmp_path / "out"):
        write(tmp_path / "out", "other")
    assert content(tmp_path / "out") == {"a": "other", "b": "other"}
    assert os.listdir(tmp_path) == ["out"]


def test_an_empty_folder_and_a_link_to_one_are_accepted(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    write(tmp_path / "link", "1")
    assert content(tmp_path / "out") == {"a": "1", "b": "1"}
    assert (tmp_path / "link").is_symlink()


def test_overwrite_spares_a_folder_without_the_marker(tmp_path):
    write(tmp_path / "out", "old")
    assert check_output_folder(tmp_path / "out", overwrite=True, marker="a") == tmp_path / "out"
    with pytest.raises(GfwsvdError, match="none of ours"):
        check_output_folder(tmp_path / "out", overwrite=True, marker="config.json")


def test_a_file_and_the_working_directory_are_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(GfwsvdError, match="is a file"):
        check_output_folder(tmp_path / "file", overwrite=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GfwsvdError, match="working directory"):
        check_output_folder(".", overwrite=True)


def test_a_folder_that_cannot_be_made_is_an_error_of_ours(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GfwsvdError, match="could not write"):
        write(tmp_path / "file" / "out", "1")


@pytest.mark.parametrize("check", [check_output_folder, check_output_file])
def test_a_place_without_permission_is_refused_before_anything_is_written(tmp_path, check, monkeypatch):
    (tmp_path / "theirs").mkdir()
    # For root, who may run the tests, no permission is missing.
    monkeypatch.setattr(folders.os, "access", lambda path, mode: path != tmp_path / "theirs")
    for path in (tmp_path / "theirs" / "out", tmp_path / "theirs" / "some" / "where" / "out"):
        with pytest.raises(GfwsvdError, match="no permission to write in .*/theirs;"):
            check(path)
    check(tmp_path / "new" / "out")
    assert list(tmp_path.rglob("*")) == [tmp_path / "theirs"]


def test_a_full_disk_leaves_nothing(tmp_path):
    code = f"""
import resource, torch
from safetensors.torch import save_file
from gfwsvd.errors import GfwsvdError
from gfwsvd.folders import atomic_folder
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    with atomic_folder({str(tmp_path / "out")!r}) as folder:
        save_file({{"small": torch.ones(8)}}, folder / "small.safetensors")
        save_file({{"large": torch.ones(1 << 20)}}, folder / "large.safetensors")
except GfwsvdError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "could not write" in done.stdout and "File too large" in done.stdout
    assert os.listdir(tmp_path) == []


KILLED_WRITERS = """
import json, os, random, signal, sys, time
from gfwsvd.folders import atomic_folder

target, generator = sys.argv[1], random.Random(0)
for run in range(30):
    if (writer := os.fork()) == 0:
        for version in range(1000000):
            with atomic_folder(target, overwrite=True) as folder:
                for name in "abcd":
                    (folder / name).write_text(f"{run}-{version}")
                    time.sleep(0.002)
    time.sleep(generator.uniform(0, 0.06))
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    found = {}
    if os.path.exists(target):
        for name in os.listdir(target):
            with open(os.path.join(target, name)) as file:
                found[name] = file.read()
    print(json.dumps([found, len(os.listdir(os.path.dirname(target)))]))
"""


def test_a_kill_at_any_moment_leaves_one_whole_version_and_the_next_write_tidies_up(tmp_path):
    target = tmp_path / "out"
    command = [sys.executable, "-c", KILLED_WRITERS, str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(runs) == 30
    for found, _ in runs:
        assert not found or sorted(found) == ["a", "b", "c", "d"]
        assert len(set(found.values())) <= 1, "files of different versions in one folder"
    written = [bool(found) for found, _ in runs]
    assert written == sorted(written) and written[-1], "a folder that was there has gone"
    assert any(entries > 1 for _, entries in runs), "no kill hit a write: the test shows nothing"
    write(target, "last", overwrite=True)
    assert os.listdir(tmp_path) == ["out"]


def test_the_temporary_of_a_living_writer_is_left_alone(tmp_path):
    with atomic_folder(tmp_path / "out") as first:
        (first / "a").write_text("first")
        (tmp_path / ".out.tmp-1-dead").mkdir()
        write(tmp_path / "out", "second")
        assert (first / "a").read_text() == "first"
        assert not (tmp_path / ".out.tmp-1-dead").exists()
        (tmp_path / "out" / "a").unlink()
        (tmp_path / "out" / "b").unlink()
    assert content(tmp_path / "out") == {"a": "first"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), torch.ones(1), {1, 2}])
def test_json_takes_plain_finite_values_only(tmp_path, value):
    with pytest.raises(GfwsvdError, match=r"x\.json"):
        write_json(tmp_path / "x.json", {"value": value})
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    "value", [{}, {"a": 0.1, "b": [1, None, "é"], "c": {"10": 1e-300, "2": True}}, {2: 1, 10: (3, 4)}]
)
def test_a_sealed_object_is_known_again_and_every_change_of_it_noticed(tmp_path, value):
    write_json(tmp_path / "x.json", sealed(value))
    back = read_json(tmp_path / "x.json")
    check_seal(tmp_path / "x.json", back)
    changes = [{**back, name: "other"} for name in back] + [{**back, "new": 1}]
    changes += [{k: v for k, v in back.items() if k != name} for name in back]
    for changed in changes:
        with pytest.raises(GfwsvdError, match=r"x\.json is not what was written there"):
            check_seal(tmp_path / "x.json", changed)


# ---------------------------------------------------------------------------------------------------------- reading


def test_headers_give_names_shapes_and_types_of_all_files(tmp_path):
    save_file({"x": torch.ones(2, 3)}, tmp_path / "1.safetensors")
    save_file({"y": torch.ones(4, dtype=torch.bfloat16)}, tmp_path / "2.safetensors")
    tensors = read_headers([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])
    assert tensors == {
        "x": (tmp_path / "1.safetensors", (2, 3), "F32"),
        "y": (tmp_path / "2.safetensors", (4,), "BF16"),
    }


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:40],
        lambda data: b"",
        lambda data: data + b"\0",
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data.replace(b'"F32"', b'"X32"'),
        lambda data: data.replace(b"[2,3]", b"[9,3]"),
    ],
    ids=["cut", "cut in header", "empty", "longer", "absurd header length", "unknown type", "shape beyond data"],
)
def test_a_damaged_tensor_file_is_refused_by_its_header(tmp_path, damage):
    file = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(2, 3)}, file)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(GfwsvdError, match=r"x\.safetensors is not a whole safetensors file"):
        read_headers([file])


def test_a_missing_tensor_file_and_a_tensor_in_two_files_are_refused(tmp_path):
    with pytest.raises(GfwsvdError, match="is missing"):
        read_headers([tmp_path / "x.safetensors"])
    for name in ("1.safetensors", "2.safetensors"):
        save_file({"x": torch.ones(1)}, tmp_path / name)
    with pytest.raises(GfwsvdError, match="tensor x is both in"):
        read_headers([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])


def test_one_changed_byte_changes_the_digest(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(bytes(1000))
    digests = {"x": sha256_file(file)}
    assert digests["x"] == "541b3e9daa09b20bf85fa273e5cbd3e80185aa4ec298e765db87742b70138a53"  # known of 1000 zeros
    check_digests(tmp_path, digests)
    file.write_bytes(bytes(999) + b"\1")
    with pytest.raises(GfwsvdError, match="not the file that was written there"):
        check_digests(tmp_path, digests)
    with pytest.raises(GfwsvdError, match="No such file"):
        check_digests(tmp_path, {"y": digests["x"]})


@pytest.mark.parametrize(("text", "message"), [("{", "cut short"), ("[]", "one JSON object"), (None, "cannot read")])
def test_a_bad_json_file_is_refused_by_name(tmp_path, text, message):
    if text is not None:
        (tmp_path / "x.json").write_text(text)
    with pytest.raises(GfwsvdError, match=rf"x\.json.*{message}|{message}.*x\.json"):
        read_json(tmp_path / "x.json")
