"""What goes wrong outside: full disks, files cut short, places without permission, a hub out of reach, a second run.
Each is one clear error, and what was there before is there after."""

import contextlib
import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import gfwsvd
from gfwsvd.cli import app
from gfwsvd.compress import compress
from gfwsvd.errors import GfwsvdError
from gfwsvd.folders import locked_folder, write_text
from gfwsvd.hf import save_pretrained
from gfwsvd.report import write_report
from gfwsvd.sources import load_model, load_text
from gfwsvd.store import save_statistics
from gfwsvd.sweep import read_rows, sweep
from gfwsvd.tune import tune
from gfwsvd.work import open_work, remove_work
from processes import exit_codes, start
from tiny_models import random_tokens, tiny_model, word_tokenizer

HUB = importlib.import_module("huggingface_hub.constants")


@pytest.fixture(scope="module")
def statistics() -> gfwsvd.Statistics:
    return gfwsvd.calibrate(tiny_model("llama"), [{"input_ids": random_tokens(4, 16)}])


@pytest.fixture(scope="module")
def originals(tmp_path_factory, statistics) -> Path:
    """The folders `dense` (shards and a tokenizer), `small` (compressed) and `stats` of one tiny model, and a text."""
    root = tmp_path_factory.mktemp("faults")
    model = tiny_model("llama")
    model.save_pretrained(root / "dense", max_shard_size="100KB")
    word_tokenizer().save_pretrained(root / "dense")
    save_statistics(statistics, root / "stats")
    report = compress(model, method="svd", keep=0.5, ranks="uniform", rank_multiple=4)
    save_pretrained(model, root / "small", report=report, tokenizer=word_tokenizer())
    (root / "text.txt").write_text(" ".join(f"w{number}" for number in random_tokens(1, 300)[0].tolist()))
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 1, result.output + repr(result.exception)
    assert result.stderr.count("\n") == 1, "an error is one line"
    return result.stderr


# ------------------------------------------------------------------------------------------------------ damaged models

DAMAGES = {
    "cut short": lambda data: data[:-50],
    "cut in the header": lambda data: data[:20],
    "empty": lambda data: b"",
    "another header length": lambda data: b"\x01" + data[1:],
    "a flipped bit in a type": lambda data: data.replace(b'"F32"', b'"D32"', 1),
    "a flipped bit in an offset": lambda data: data.replace(b'"data_offsets":[0,', b'"data_offsets":[1,', 1),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["dense", "small"])
def test_a_damaged_tensor_file_of_a_model_is_named(originals, tmp_path, kind, damage):
    shutil.copytree(originals / kind, tmp_path / "model")
    file = sorted((tmp_path / "model").glob("*.safetensors"))[-1]
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    assert f"{file.name} is not a whole safetensors file" in refused(
        "eval", tmp_path / "model", "--text", originals / "text.txt", "--window", "8"
    )


def test_a_lost_shard_and_a_cut_index_are_named(originals, tmp_path):
    shutil.copytree(originals / "dense", tmp_path / "model")
    lost = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    shard = lost.read_bytes()
    lost.unlink()
    with pytest.raises(GfwsvdError, match=lost.name):
        load_model(str(tmp_path / "model"))
    lost.write_bytes(shard)
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(index.read_text()[:100])
    with pytest.raises(GfwsvdError, match=r"model\.safetensors\.index\.json is not JSON, it was cut short or changed"):
        load_model(str(tmp_path / "model"))


# ----------------------------------------------------------------------------------------------------------- full disks


@contextlib.contextmanager
def disk_full_after(size: int):
    """Within it no file of this process grows beyond `size` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def with_many_words() -> object:
    """A tokenizer whose file is larger than the tiny model's."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"word{number}": number for number in range(50_000)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="word0")))


@pytest.mark.parametrize("size", [500, 50_000, 600_000], ids=["config", "tensors", "tokenizer"])
def test_a_disk_full_while_a_checkpoint_is_written_leaves_the_old_one(originals, tmp_path, size):
    shutil.copytree(originals / "small", tmp_path / "out")
    model = tiny_model("llama")
    report = compress(model, method="svd", keep=0.7, ranks="uniform", rank_multiple=4)
    with disk_full_after(size), pytest.raises(GfwsvdError, match="could not write the folder .*File too large"):
        save_pretrained(model, tmp_path / "out", report=report, tokenizer=with_many_words(), overwrite=True)
    assert contents(tmp_path) == {f"out/{name}": data for name, data in contents(originals / "small").items()}


@pytest.mark.parametrize("size", [500, 50_000])
def test_a_disk_full_while_statistics_are_written_leaves_the_old_ones(originals, statistics, tmp_path, size):
    shutil.copytree(originals / "stats", tmp_path / "stats")
    with disk_full_after(size), pytest.raises(GfwsvdError, match="could not write the folder .*File too large"):
        save_statistics(statistics, tmp_path / "stats", overwrite=True)
    assert contents(tmp_path) == {f"stats/{name}": data for name, data in contents(originals / "stats").items()}


def test_a_disk_full_while_a_file_is_written_leaves_the_old_one(tmp_path):
    model = tiny_model("llama")
    report = compress(model, method="svd", keep=0.5, ranks="uniform", rank_multiple=4)
    for write in (
        lambda file: write_report(file, title="new", reports=[report]),
        lambda file: write_text(file, "new" * 1000, what="table"),
    ):
        (tmp_path / "file").write_text("old")
        with disk_full_after(1000), pytest.raises(GfwsvdError, match="could not write the .*File too large"):
            write(tmp_path / "file")
        assert contents(tmp_path) == {"file": b"old"}


def test_a_disk_full_in_a_sweep_keeps_the_rows_before(statistics, tmp_path):
    arguments = (tiny_model("llama"), statistics, [], random_tokens(2, 8))
    rows = tmp_path / "rows.jsonl"
    sweep(*arguments, rows_file=rows, about={"text": "first"})
    before = read_rows(rows)
    with disk_full_after(rows.stat().st_size + 50), pytest.raises(GfwsvdError, match="could not add a row to .*rows"):
        sweep(*arguments, rows_file=rows, about={"text": "second"})
    assert read_rows(rows) == before
    sweep(*arguments, rows_file=rows, about={"text": "second"})
    assert read_rows(rows)[:1] == before and len(read_rows(rows)) == 2


@pytest.mark.parametrize("size", [100, 5000], ids=["header", "tensors"])
def test_a_disk_full_while_work_is_kept_leaves_the_state_before(tmp_path, size):
    with open_work(tmp_path / "w", {}) as work:
        work.save("state", {"a": torch.ones(1)}, {"done": 1})
        before = contents(tmp_path)
        with disk_full_after(size), pytest.raises(GfwsvdError, match="could not keep the work in .*File too large"):
            work.save("state", {"a": torch.ones(10_000)}, {"done": 2})
        assert contents(tmp_path) == before


@pytest.mark.parametrize("size", [50_000, 300_000], ids=["factors", "moments"])
def test_a_disk_full_in_a_training_is_an_error_of_ours(originals, tmp_path, size):
    model = load_model(str(originals / "small"))[0]
    with disk_full_after(size), pytest.raises(GfwsvdError, match="could not keep the training in"):
        tune(model, random_tokens(4, 16), random_tokens(2, 16), tmp_path / "w", batch_size=2)


# ---------------------------------------------------------------------------------------------- places not to write to


WRITERS = (
    "calibrate MODEL --text pydoc --stats OUT",
    "compress MODEL --method svd --out OUT",
    "compress MODEL --method svd --out FREE --report OUT",
    "tune MODEL --text pydoc --out OUT",
    "convert MODEL --merge --out OUT",
    "latency MODEL --tokens 1 --out OUT",
    "sweep MODEL --stats STATS --text pydoc --out OUT",
    "eval MODEL --text pydoc --work OUT",
)
NOBODY = 65534  # a user without files of its own


def _say_as_nobody(folder: Path, commands: list[list[str]]) -> None:
    """Leaves in `folder` what each command says to a user to whom the permissions of folders apply."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    (folder / "said.json").write_text(json.dumps([refused(*command) for command in commands]))


def test_a_place_without_permission_is_refused_before_the_model_is_looked_for(originals):
    with tempfile.TemporaryDirectory() as name:  # not in pytest's folders, which are their user's alone
        root = Path(name)
        root.chmod(0o755)
        shutil.copytree(originals / "stats", root / "stats")
        for file in (root / "stats").iterdir():
            file.chmod(0o644)
        for folder, mode in (("theirs", 0o555), ("free", 0o777)):
            (root / folder).mkdir()
            (root / folder).chmod(mode)
        places = {"MODEL": "no-such-model", "OUT": root / "theirs/out", "FREE": root / "free/out"}
        places["STATS"] = root / "stats"
        commands = [[str(places.get(word, word)) for word in command.split()] for command in WRITERS]
        assert exit_codes([start(_say_as_nobody, root / "free", commands)]) == [0]
        for command, said in zip(WRITERS, json.loads((root / "free/said.json").read_text()), strict=True):
            assert f"no permission to write in {root / 'theirs'};" in said, command
        assert [path.name for path in (root / "free").iterdir()] == ["said.json"]


# ---------------------------------------------------------------------------------------------------- texts that end


@pytest.mark.parametrize("end", [4, 1000, -1, -9], ids=str)
def test_a_parquet_file_cut_short_is_named(tmp_path, end):
    file = tmp_path / "rows.parquet"
    pytest.importorskip("datasets").Dataset.from_dict({"text": [f"row {n} " * 20 for n in range(500)]}).to_parquet(file)
    assert load_text(str(file)).startswith("row 0 row 0")
    file.write_bytes(file.read_bytes()[:end])
    with pytest.raises(GfwsvdError, match=r"cannot read .*rows\.parquet") as error:
        load_text(str(file))
    assert "\n" not in str(error.value) and "hub" not in str(error.value)


def test_a_text_cut_within_a_letter_is_named(tmp_path):
    (tmp_path / "text.txt").write_bytes("schön".encode()[:4])
    with pytest.raises(GfwsvdError, match=r"text\.txt is not UTF-8 text"):
        load_text(str(tmp_path / "text.txt"))


def test_a_text_that_ends_early_says_how_much_there_is(originals, tmp_path):
    options = ("--text", originals / "text.txt", "--stats", tmp_path / "stats", "--sequences", "4", "--seq-len", "100")
    said = refused("calibrate", originals / "dense", *options)
    assert "need 400 tokens, it has 300; give a longer text or ask for less" in said
    assert not (tmp_path / "stats").exists()


# -------------------------------------------------------------------------------------------------- a hub out of reach


@pytest.fixture
def cached(originals, tmp_path, monkeypatch) -> Path:
    """The folder in a hub's cache of the model someone/tiny, as a download leaves it."""
    monkeypatch.setattr(HUB, "HF_HUB_CACHE", str(tmp_path))
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    return shutil.copytree(originals / "dense", repository / "snapshots" / revision)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(random_tokens(1, 9)).logits


def test_a_model_in_the_hubs_cache_needs_no_hub(originals, cached):
    model, tokenizer, name = load_model("someone/tiny")
    assert name == "someone/tiny" and tokenizer("w7")["input_ids"] == [7]
    assert torch.equal(logits(model), logits(tiny_model("llama")))


def test_what_the_cache_has_only_in_part_is_said_so_and_what_it_has_broken_is_named(cached):
    files = sorted(cached.glob("*.safetensors"))
    files[0].write_bytes(files[0].read_bytes()[:-9])
    with pytest.raises(GfwsvdError, match=rf"{files[0].name} is not a whole safetensors file"):
        load_model("someone/tiny")
    for file in [*files, cached / "model.safetensors.index.json"]:
        file.unlink()
    with pytest.raises(GfwsvdError, match="HF_HUB_OFFLINE is set, and its cache .* does not hold all that is needed"):
        load_model("someone/tiny")


def test_without_the_hub_a_name_is_refused_with_what_to_do():
    said = refused("eval", "nobody/nothing", "--text", "pydoc")
    assert "cannot load the model nobody/nothing" in said and "HF_HUB_OFFLINE is set" in said
    assert "unset it for once" in said and "give the path of a local copy" in said
    with pytest.raises(GfwsvdError, match="cannot read dataset nobody/nothing .*HF_HUB_OFFLINE is set.*unset it"):
        load_text("nobody/nothing")
    with pytest.raises(GfwsvdError, match="Cannot have -- or .. in repo_id"):  # no matter of the hub's being there
        load_model("no..name")


UNANSWERED = """
import sys, time
time.sleep = lambda seconds: None  # between the hub's own tries
from gfwsvd.errors import GfwsvdError
from gfwsvd.sources import load_model, load_text
for read in (load_model, load_text):
    try:
        read("nobody/nothing")
    except GfwsvdError as error:
        print(error)
"""


def test_a_hub_that_does_not_answer_is_named_with_what_to_do(tmp_path):
    hub = "http://127.0.0.1:9"  # where nothing listens
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", UNANSWERED], env=environment, capture_output=True, text=True)
    said = done.stdout.splitlines()
    assert len(said) == 2, done.stderr
    for line, what in zip(
        said, ("cannot load the model nobody/nothing", "cannot read dataset nobody/nothing"), strict=True
    ):
        assert line.startswith(what) and f"the hub cannot be asked, {hub} does not answer" in line
        assert "connect for once" in line and "give the path of a local copy" in line


# ---------------------------------------------------------------------------------------------- a second run meanwhile


@pytest.mark.parametrize(
    ("command", "ending"),
    [
        ("calibrate DENSE --text TEXT --stats OUT", ".work"),
        ("compress DENSE --method svd --out OUT", ".work"),
        ("tune SMALL --text TEXT --out OUT", ".tune"),
        ("eval DENSE --text TEXT --work OUT", ""),
        ("sweep DENSE --stats STATS --text TEXT --out OUT", ""),
    ],
)
def test_a_second_run_into_one_folder_is_refused_before_it_loads_the_model(
    originals, tmp_path, monkeypatch, command, ending
):
    def never(*_, **__):
        raise GfwsvdError("a model was loaded")

    monkeypatch.setattr("gfwsvd.sources.load_model", never)
    places = {name.upper(): originals / name for name in ("dense", "small", "stats")}
    places |= {"TEXT": originals / "text.txt", "OUT": tmp_path / "out"}
    arguments = [places.get(word, word) for word in command.split()]
    with locked_folder(tmp_path / f"out{ending}") as folder:
        assert f"another process is at work in {folder}" in refused(*arguments)
    assert "a model was loaded" in refused(*arguments)


def test_a_command_removes_its_work_while_no_other_can_take_it(originals, tmp_path, monkeypatch):
    def spy(folder):
        with pytest.raises(GfwsvdError, match="another process is at work"), locked_folder(folder):
            pass
        remove_work(folder)

    monkeypatch.setattr("gfwsvd.cli_app.remove_work", spy)
    command = ("compress", originals / "dense", "--method", "svd", "--keep", "0.6", "--out", tmp_path / "out")
    result = CliRunner().invoke(app, [str(word) for word in command])
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_second_training_in_one_folder_is_refused_before_it_evaluates(originals, tmp_path):
    def never(items, description):
        raise AssertionError(description)

    model = load_model(str(originals / "small"))[0]
    with open_work(tmp_path / "w", {}), pytest.raises(GfwsvdError, match="another process is at work in"):
        tune(model, random_tokens(4, 16), random_tokens(2, 16), tmp_path / "w", track=never)
    assert list(tmp_path.iterdir()) == []


def test_settings_of_work_that_was_killed_before_anything_was_kept_bind_nobody(tmp_path):
    with open_work(tmp_path / "w", {"seed": 1}):
        shutil.copytree(tmp_path / "w", tmp_path / "killed")
    with open_work(tmp_path / "killed", {"seed": 2}) as work:
        work.save("state", {}, {"done": 1})
    with pytest.raises(GfwsvdError, match="seed was 2 and is 3"), open_work(tmp_path / "killed", {"seed": 3}):
        pass
