"""An evaluation that was interrupted goes on where it was and ends with the result of one that was not, to the bit."""

import importlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from gfwsvd.cli import app
from gfwsvd.errors import GfwsvdError
from gfwsvd.evaluate import Evaluation, about_evaluation, evaluate
from gfwsvd.work import open_work
from tiny_models import random_tokens, tiny_model, word_tokenizer

MODULE = importlib.import_module("gfwsvd.evaluate")  # the name gfwsvd.evaluate is the function's
WINDOWS = random_tokens(1, 41)[0].unfold(0, 11, 3)  # 11 windows, in 6 batches of 2
SETTINGS = {"stride": 3, "batch_size": 2}


@pytest.fixture(autouse=True)
def kept_after_every_batch(monkeypatch):
    monkeypatch.setattr(MODULE, "_KEPT_EVERY", 0.0)


def stopping(before: int, seen: list[int] | None = None):
    """A `track` that fails before that batch of those it is given."""

    def track(items, _):
        for number, item in enumerate(items):
            if number == before:
                raise KeyboardInterrupt
            if seen is not None:
                seen.append(item)
            yield item

    return track


def timeless(found: Evaluation) -> Evaluation:
    return replace(found, seconds=0.0)


@pytest.mark.parametrize("stops", [[0], [1], [5], [2, 1, 0, 2]], ids=str)
def test_an_interrupted_evaluation_gives_the_same_bits(tmp_path, stops):
    model, reference = tiny_model("llama"), tiny_model("llama", seed=1)
    settings = SETTINGS | {"reference": reference}
    whole, about = evaluate(model, WINDOWS, **settings), about_evaluation(model, WINDOWS, **settings)
    seen: list[int] = []
    for stop in stops:
        with pytest.raises(KeyboardInterrupt), open_work(tmp_path / "w", about) as work:
            evaluate(model, WINDOWS, **settings, work=work, track=stopping(stop, seen))
    with open_work(tmp_path / "w", about) as work:
        found = evaluate(model, WINDOWS, **settings, work=work, track=stopping(99, seen))
        assert sorted(set(seen)) == [0, 2, 4, 6, 8, 10] and len(seen) <= 6 + len(stops)
        assert timeless(found) == timeless(whole)
        again = evaluate(model, WINDOWS, **settings, work=work, track=stopping(0))  # fails on any batch
    assert timeless(again) == timeless(whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": 3, "batch_size": 3}, "batch_size was 2 and is 3"),
        ({"windows": WINDOWS.contiguous().flip(1)}, "data_sha256 was"),
        ({"model": tiny_model("llama", seed=2)}, "model_sha256 was"),
        ({"model": tiny_model("llama").bfloat16()}, "dtypes was"),
        ({"reference": tiny_model("llama", seed=2)}, "reference_sha256 was None"),
    ],
)
def test_what_was_kept_of_another_evaluation_is_refused(tmp_path, change, message):
    model = tiny_model("llama")
    with open_work(tmp_path / "w", about_evaluation(model, WINDOWS, **SETTINGS)) as work:
        evaluate(model, WINDOWS, **SETTINGS, work=work)
    other = {"model": model, "windows": WINDOWS} | SETTINGS | change
    with pytest.raises(GfwsvdError, match=message), open_work(tmp_path / "w", about_evaluation(**other)):
        pass


def test_the_sums_are_written_no_more_often_than_asked(tmp_path, monkeypatch):
    model, saves = tiny_model("llama"), []
    monkeypatch.setattr(MODULE, "_KEPT_EVERY", 20.0)
    with open_work(tmp_path / "w", {}) as work:
        monkeypatch.setattr(work, "save", lambda name, tensors, values: saves.append(values["windows"]))
        evaluate(model, WINDOWS, **SETTINGS, work=work)
    assert saves == [len(WINDOWS)]


@pytest.mark.parametrize("within", [True, False], ids=["a pass", "the loop"])
def test_ctrl_c_loses_no_batch_that_is_done(tmp_path, monkeypatch, within):
    """Which those of the last seconds would be, were the sums kept by time alone."""
    monkeypatch.setattr(MODULE, "_KEPT_EVERY", 1e9)
    model, passes = tiny_model("llama"), []

    def interrupted(*_):
        passes.append(1)
        if len(passes) == 5:  # one shows what the model does to its logits: of the batches, three are done
            raise KeyboardInterrupt

    whole, about = evaluate(model, WINDOWS, **SETTINGS), about_evaluation(model, WINDOWS, **SETTINGS)
    with pytest.raises(KeyboardInterrupt), open_work(tmp_path / "w", about) as work:
        hook = model.register_forward_pre_hook(interrupted) if within else None
        evaluate(model, WINDOWS, **SETTINGS, work=work, track=stopping(99 if within else 3))
    if hook is not None:
        hook.remove()
    seen: list[int] = []
    with open_work(tmp_path / "w", about) as work:
        found = evaluate(model, WINDOWS, **SETTINGS, work=work, track=stopping(99, seen))
    assert seen == [6, 8, 10] and timeless(found) == timeless(whole)


KILLED = """
import json, sys
import torch
from gfwsvd.evaluate import evaluate, about_evaluation
from gfwsvd.work import open_work
from tiny_models import tiny_model

torch.set_num_threads(int(sys.argv[2]))
sys.modules["gfwsvd.evaluate"]._KEPT_EVERY = 0.0
settings, model = json.loads(sys.argv[3]), tiny_model("llama")
windows = torch.tensor(json.loads(sys.argv[4]))

def track(items, _):
    for number, item in enumerate(items):
        print(number, flush=True)
        yield item
        if number == 3:
            sys.stdin.read()  # until the kill

with open_work(sys.argv[1], about_evaluation(model, windows, **settings)) as work:
    evaluate(model, windows, **settings, work=work, track=track)
"""


def test_a_killed_evaluation_goes_on_in_another_process(tmp_path):
    model = tiny_model("llama")
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    arguments = [str(tmp_path / "w"), str(torch.get_num_threads()), json.dumps(SETTINGS), json.dumps(WINDOWS.tolist())]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert [process.stdout.readline() for _ in range(4)] == ["0\n", "1\n", "2\n", "3\n"]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    seen: list[int] = []
    with open_work(tmp_path / "w", about_evaluation(model, WINDOWS, **SETTINGS)) as work:
        found = evaluate(model, WINDOWS, **SETTINGS, work=work, track=stopping(99, seen))
    assert seen[0] in (6, 8) and timeless(found) == timeless(evaluate(model, WINDOWS, **SETTINGS))


def test_the_command_goes_on_after_an_interruption_and_removes_what_it_kept(tmp_path, monkeypatch):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(f"w{number}" for number in random_tokens(1, 100)[0].tolist()))
    options = ["--text", str(tmp_path / "text.txt"), "--window", "10", "--work", str(tmp_path / "w"), "--json"]

    def run(status: int, *more: str) -> str:
        result = CliRunner().invoke(app, ["eval", str(tmp_path / "model"), *options, *more])
        assert result.exit_code == status, result.output + repr(result.exception)
        return result.stdout if status == 0 else result.stderr

    whole = json.loads(run(0))
    assert not (tmp_path / "w").exists()
    with monkeypatch.context() as patch:
        patch.setattr("gfwsvd.cli_measure.bar", stopping(4))
        patch.setattr("sys.argv", ["/bin/gfwsvd", "eval", "a model", "--work", "w"])
        assert f"kept in {tmp_path / 'w'}; to go on from it:\n/bin/gfwsvd eval 'a model' --work w\n" in run(130)
    assert "batch_size was 1 and is 2" in run(1, "--batch-size", "2")
    seen: list[int] = []
    monkeypatch.setattr("gfwsvd.cli_measure.bar", stopping(99, seen))
    found = json.loads(run(0))
    assert seen == [4, 5, 6, 7, 8, 9] and not (tmp_path / "w").exists()
    assert found | {"seconds": 0} == whole | {"seconds": 0}
    result = CliRunner().invoke(app, ["eval", "no-such-model", "--tasks", "arc", "--work", str(tmp_path / "w")])
    assert "--work would have no effect without --text" in result.stderr
