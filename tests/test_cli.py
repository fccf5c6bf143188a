"""The command line: the contract that scripts rely on, and what a user sees when something is wrong."""

import json
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
from typer.testing import CliRunner

from gfwsvd.cli import app
from gfwsvd.store import load_statistics
from tiny_models import tiny_model, tiny_workspace

CALIBRATION = ("--sequences", "8", "--seq-len", "16")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with a tiny model, a text and the statistics of both."""
    folder = tiny_workspace(tmp_path_factory.mktemp("cli"), words=2000)
    run("calibrate", folder / "model", "--text", folder / "text.txt", *CALIBRATION, "--stats", folder / "stats")
    return folder


def run(*arguments, status=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output + repr(result.exception)
    return result


def run_json(*arguments):
    return json.loads(run(*arguments, "--json").stdout.splitlines()[-1])


def test_the_whole_way_from_statistics_to_evaluation(workspace, tmp_path):
    compressed = run_json(
        "compress", workspace / "model", "--method", "gfwsvd", "--keep", "0.8", "--ranks", "global",
        "--rank-multiple", "2", "--stats", workspace / "stats", "--out", tmp_path / "out",
    )  # fmt: skip
    assert 0.7 < compressed["kept"] <= 0.8 and compressed["kinds"]["pivoted"] > 0
    assert compressed["stored"] / compressed["dense"] == pytest.approx(compressed["kept"])
    assert compressed["provenance"]["text"] == "text.txt" and compressed["provenance"]["tokens"] == 128

    text = ("--text", workspace / "text.txt", "--window", "64", "--limit", "4")
    dense = run_json("eval", workspace / "model", *text)
    small = run_json("eval", tmp_path / "out", *text, "--reference", workspace / "model")
    assert dense["tokens"] == small["tokens"] == 4 * 63
    assert dense["kl"] is None and small["kl"] > 0 and 0 < small["top1"] < 1
    assert dense["perplexity"] != small["perplexity"] and small["seconds"] > 0

    more = run_json("eval", tmp_path / "out", *text, "--stride", "16", "--batch-size", "3")
    assert (small["window"], small["stride"], more["stride"]) == (64, 64, 16)
    assert more["tokens"] == 63 + 3 * 16 and more["perplexity"] != small["perplexity"]

    shown = run_json("inspect", tmp_path / "out")
    assert shown["kept"] == compressed["kept"] and shown["provenance"] == compressed["provenance"]
    assert sum(layer["stored"] for layer in shown["layers"]) == compressed["stored"]
    assert "model.layers.0" in run("inspect", tmp_path / "out").stdout


def test_compress_calibrates_on_a_text_as_calibrate_does(workspace, tmp_path):
    options = ("--keep", "0.7", "--rank-multiple", "1")
    text = ("--text", workspace / "text.txt", *CALIBRATION)
    once = run_json("compress", workspace / "model", *options, *text, "--out", tmp_path / "once")
    twice = run_json(
        "compress", workspace / "model", *options, "--stats", workspace / "stats", "--out", tmp_path / "two"
    )
    assert once["predicted_loss"] == twice["predicted_loss"]
    assert once["provenance"]["data_sha256"] == twice["provenance"]["data_sha256"]
    tensors = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("once", "two")]
    assert tensors[0] == tensors[1]


def test_tolerance_online_and_start_reach_the_calibration(workspace, tmp_path):
    text = ("--text", workspace / "text.txt", *CALIBRATION)

    def factors(name, *options):
        found = run_json("calibrate", workspace / "model", *text, "--stats", tmp_path / name, *options)
        layers = load_statistics(tmp_path / name)[0].layers.values()
        return found, torch.cat([layer.right.flatten() for layer in layers])

    begun = load_statistics(workspace / "stats")[0]
    once = torch.cat([layer.right.flatten() for layer in begun.layers.values()])
    twice, right_twice = factors("twice", "--sweeps", "2")
    converged, right_converged = factors("converged", "--sweeps", "2", "--tolerance", "1")
    assert (twice["sweeps"], converged["sweeps"]) == (2, 1) and converged["settings"]["tolerance"] == 1
    assert torch.equal(right_converged, once) and not torch.equal(right_twice, once)
    online, right_online = factors("online", "--online")
    assert online["settings"]["online"] and not torch.equal(right_online, once)
    resumed, right_resumed = factors("resumed", "--start", workspace / "stats")
    assert resumed["settings"]["start"] == begun.data_sha256 and twice["settings"]["start"] is None
    assert torch.equal(right_resumed, right_twice), "one sweep from one is two"


def test_rounds_and_gains_measure_the_loss_on_a_text_beside_the_statistics(workspace, tmp_path):
    options = [
        "--keep",
        "0.5",
        "--rank-multiple",
        "1",
        "--rounds",
        "2",
        "--gains",
        "1",
        "--text",
        workspace / "text.txt",
        *CALIBRATION,
    ]
    found = run_json("compress", workspace / "model", *options, "--stats", workspace / "stats", "--out", tmp_path / "a")
    again = run_json("compress", workspace / "model", *options, "--out", tmp_path / "b")
    for losses, count in (("round_losses", 3), ("gain_losses", 2)):
        assert len(found[losses]) == count and found[losses] == again[losses]
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert found["provenance"]["measured_on"] == {
        "model": "model", "text": "text.txt", "sequences": 8, "seq_len": 16, "tokens": 128,
    }  # fmt: skip


def test_every_command_explains_itself():
    for command in ("calibrate", "compress", "convert", "latency", "eval", "inspect", "sweep"):
        assert "--json" in run(command, "--help").stdout
        assert command in run("--help").stdout


def test_plain_svd_needs_no_calibration(workspace, tmp_path):
    out = tmp_path / "out"
    assert run_json("compress", workspace / "model", "--method", "svd", "--out", out)["provenance"]["num_losses"] == 0


def test_the_report_is_written_on_request(workspace, tmp_path):
    page = tmp_path / "report.html"
    run("compress", workspace / "model", "--stats", workspace / "stats", "--out", tmp_path / "out", "--report", page)
    assert page.read_text().lstrip().lower().startswith("<!doctype html>")


def test_a_measured_table_makes_keep_a_share_of_time_and_bounds_hold(workspace, tmp_path):
    table, out = tmp_path / "table.json", tmp_path / "out"
    measured = run_json("latency", workspace / "model", "--tokens", "1", "--step", "16", "--out", table)
    assert measured["tokens"] == 1 and len(measured["break_even"]) == 4 and measured["dtype"] == "float32"
    options = ("--stats", workspace / "stats", "--out", out, "--rank-multiple", "2", "--bound", "down_proj=1")
    found = run_json("compress", workspace / "model", "--keep", "1", "--latency", table, *options)
    assert found["time_kept"] == run_json("inspect", out)["time_kept"] == 1
    assert found["provenance"]["latency"]["device"] == measured["device"]
    found = run_json("compress", workspace / "model", *options, "--bound", "q_proj=0.2:0.4", "--overwrite")
    assert found["time_kept"] is None and found["kept"] <= 0.8
    layers = {layer["name"]: layer for layer in run_json("inspect", out)["layers"]}
    assert layers["model.layers.0.mlp.down_proj"]["kind"] == "dense"
    query = layers["model.layers.1.self_attn.q_proj"]
    assert query["bound"] == [0.2, 0.4] and 0.2 <= query["stored"] / query["dense"] <= 0.4


BAD = {
    "malformed bound": (["--stats", "STATS", "--bound", "q_proj"], "REGEX=LOW:HIGH"),
    "bound out of order": (["--stats", "STATS", "--bound", "q_proj=0.9:0.5"], "0 <= low <= high <= 1"),
    "bound of no layer": (["--stats", "STATS", "--bound", "w1=0.9"], "'w1' matches none of the 14 layers"),
    "no latency table": (["--stats", "STATS", "--latency", "nowhere.json"], "cannot read nowhere.json"),
    "a text for a table": (["--stats", "STATS", "--latency", "TEXT"], "is not JSON"),
    "keep above one": (["--keep", "1.5"], "keep must be a share of parameters in (0, 1], got 1.5"),
    "keep of zero": (["--keep", "0"], "keep must be a share"),
    "keep that is no number": (["--keep", "nan"], "keep must be a share"),
    "neither statistics nor text": ([], "give either --stats DIR or --text TEXT"),
    "missing statistics": (["--stats", "nowhere"], "cannot read"),
    "missing text": (["--text", "nowhere.txt"], "there is no text nowhere.txt"),
    "text too short": (["--text", "TEXT", "--sequences", "500"], "too short"),
    "both sources": (["--text", "TEXT", "--stats", "STATS"], "and not both"),
    "both sources for plain svd": (["--method", "svd", "--text", "TEXT", "--stats", "STATS"], "and not both"),
    "statistics and other labels": (["--stats", "STATS", "--labels", "sampled"], "got --labels as well"),
    "statistics and excluded layers": (["--stats", "STATS", "--exclude", "mlp"], "got --exclude as well"),
    "sequences beyond the context": (["--text", "TEXT", "--sequences", "2", "--seq-len", "129"], "takes 128 at most"),
    "rounds without a text": (
        ["--stats", "STATS", "--rounds", "1"],
        "--rounds 1 measures the loss of the compressed model on",
    ),
    "rounds of uniform ranks": (["--stats", "STATS", "--rounds", "1", "--ranks", "uniform"], "leave out the rounds"),
    "rounds and other labels": (
        ["--stats", "STATS", "--rounds", "1", "--text", "TEXT", "--labels", "sampled"],
        "got --labels as well",
    ),
    "nothing but excluded layers": (["--text", "TEXT", *CALIBRATION, "--exclude", "."], "no linear layer to compress"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_is_one_line_and_writes_nothing(workspace, tmp_path, case):
    options, message = BAD[case]
    places = {"TEXT": workspace / "text.txt", "STATS": workspace / "stats"}
    options = [places.get(option, option) for option in options]
    result = run("compress", workspace / "model", "--out", tmp_path / "out", *options, status=1)
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [("--method", "magic"), ("--ranks", "some"), ("--unit", "word"), ("--labels", "none"), ("--dtype", "int8")],
)
def test_an_unknown_choice_is_refused_with_the_choices(workspace, tmp_path, options):
    result = run("compress", "no-such-model", "--stats", "none", "--out", tmp_path / "out", *options, status=1)
    assert f"{options[0][2:]} must be one of" in result.stderr and repr(options[1]) in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_device_without_memory_is_one_line(workspace, tmp_path, monkeypatch):
    def short(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore")

    monkeypatch.setattr("gfwsvd.cli_make.calibrate", short)
    text = ("--text", workspace / "text.txt", *CALIBRATION)
    result = run("calibrate", workspace / "model", *text, "--stats", tmp_path / "stats", status=1)
    assert result.stderr.count("\n") == 1 and "allocate 2 GiB. Take a smaller batch" in result.stderr


def test_an_existing_folder_is_refused_before_any_work_and_kept(workspace, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result = run("compress", "no-such-model", "--method", "svd", "--out", tmp_path, status=1)
    assert "is not empty" in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_places_that_cannot_be_written_are_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    svd = ("compress", "no-such-model", "--method", "svd", "--out")
    for options in (
        (*svd, tmp_path / "file" / "out"),
        (*svd, tmp_path / "out", "--report", tmp_path / "folder"),
        (*svd, tmp_path / "out", "--report", tmp_path / "file" / "report.html"),
        ("calibrate", "no-such-model", "--text", "pydoc", "--stats", tmp_path / "file" / "stats"),
    ):
        assert "could not write" in run(*options, status=1).stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


@pytest.mark.parametrize("stride", [0, 65])
def test_a_stride_beyond_the_window_is_refused_before_any_work(stride):
    result = run("eval", "no-such-model", "--text", "t.txt", "--window", "64", "--stride", stride, status=1)
    assert f"stride must be from 1 to the window's 64 tokens, got {stride}" in result.stderr


def test_names_of_layers_are_shown_whole_and_texts_without_their_folders(workspace, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"body": (workspace / "text.txt").read_text()}))
    options = ("--text", f"{rows}:body", *CALIBRATION, "--out", tmp_path / "out")
    assert run_json("compress", workspace / "model", *options)["provenance"]["text"] == "rows.jsonl:body"
    shown = "".join(
        line.split("│")[1].strip() for line in run("inspect", tmp_path / "out").stdout.splitlines() if "│" in line
    )
    assert all(layer["name"] in shown for layer in run_json("inspect", tmp_path / "out")["layers"])


def test_a_method_that_predicts_no_loss_shows_none(workspace, tmp_path):
    options = ("--stats", workspace / "stats", "--out")
    assert (
        run_json("compress", workspace / "model", "--method", "svd", *options, tmp_path / "1")["predicted_loss"] is None
    )
    assert run_json("compress", workspace / "model", "--method", "kfac", *options, tmp_path / "2")["predicted_loss"] > 0


def test_a_compressed_model_is_not_compressed_again(workspace, tmp_path):
    run("compress", workspace / "model", "--method", "svd", "--keep", "0.5", "--out", tmp_path / "once")
    result = run("compress", tmp_path / "once", "--method", "svd", "--out", tmp_path / "twice", status=1)
    assert "low-rank layers already" in result.stderr and not (tmp_path / "twice").exists()


def test_statistics_of_another_model_are_refused(workspace, tmp_path):
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "other")
    result = run(
        "compress", tmp_path / "other", "--stats", workspace / "stats", "--out", tmp_path / "out", status=1
    )  # fmt: skip
    assert "not those that were calibrated" in result.stderr and not (tmp_path / "out").exists()


def test_ctrl_c_in_calibration_says_the_command_that_goes_on(workspace, tmp_path):
    out = tmp_path / "the statistics"
    text = ("--text", workspace / "text.txt", *CALIBRATION, "--batch-size", "4", "--sweeps", "20")
    command = [sys.executable, "-m", "gfwsvd", "calibrate", workspace / "model", *text, "--stats", out]
    process = subprocess.Popen(
        [str(word) for word in command],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    while process.poll() is None and not list(tmp_path.glob("*.work/*-passes.safetensors")):  # of the first pass
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 130, said
    kept, line, last = said[-3:]
    assert kept == f"gfwsvd: what is done is kept in {out}.work; to go on from it:"
    assert last == "gfwsvd: interrupted; nothing half-written is left"
    assert [path.name for path in tmp_path.iterdir()] == [f"{out.name}.work"]
    words = shlex.split(line)
    assert words[:3] == command[:3]
    again = run(*words[3:]).stderr
    assert "pass 20 of 20" in again and "pass 1 of 20" not in again
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_ctrl_c_in_a_sweep_says_the_command_that_goes_on_once_there_is_a_row(workspace, tmp_path, monkeypatch):
    arguments = ("sweep", workspace / "model", "--stats", workspace / "stats", "--text", workspace / "text.txt")
    arguments += ("--window", "64", "--limit", "3", "--out", tmp_path / "out", "--method", "svd", "--keep", "0.8")
    monkeypatch.setattr("sys.argv", ["gfwsvd", *map(str, arguments)])

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("gfwsvd.sweep.evaluate", interrupt)
        assert "to go on from it" not in run(*arguments, status=130).stderr
    with monkeypatch.context() as patch:
        patch.setattr("gfwsvd.sweep.compress", interrupt)
        said = run(*arguments, status=130).stderr.splitlines()
    line = said[said.index(f"gfwsvd: what is done is kept in {tmp_path / 'out' / 'rows.jsonl'}; to go on from it:") + 1]
    assert line.startswith("gfwsvd sweep ")
    with monkeypatch.context() as patch:
        patch.setattr("gfwsvd.sweep.dense_row", interrupt)  # which is there
        assert [row["keep"] for row in run_json(*shlex.split(line)[1:])["rows"]] == [1, 0.8]


def test_a_sweep_writes_rows_and_a_picture_and_goes_on_where_it_was(workspace, tmp_path):
    arguments = ("sweep", workspace / "model", "--stats", workspace / "stats", "--text", workspace / "text.txt")
    arguments += ("--window", "64", "--limit", "3", "--out", tmp_path / "out", "--method", "gfwsvd", "--method", "svd")
    found = run_json(*arguments, "--keep", "0.8")
    assert [row["name"] for row in found["rows"]] == ["dense", "gfwsvd, global ranks", "svd, global ranks"]
    assert found["rows"][1]["about"]["calibration"]["text"] == "text.txt"
    assert "<svg" in (tmp_path / "out" / "report.html").read_text()
    more = run_json(*arguments, "--keep", "0.8", "--keep", "0.5")
    assert more["rows"][:3] == found["rows"] and [row["keep"] for row in more["rows"]] == [1, 0.8, 0.8, 0.5, 0.5]
    assert "perplexity" in run(*arguments, "--keep", "0.8").stdout

    measured = ("--rounds", "1", "--gains", "1", "--calibration-text", workspace / "text.txt", *CALIBRATION)
    fitted = run_json(*arguments, "--keep", "0.8", *measured)
    names = ["dense", "gfwsvd, global ranks", "gfwsvd, global ranks, 1 round, 1 gain", "svd, global ranks"]
    assert [row["name"] for row in fitted["rows"]] == names
    assert [row for row in fitted["rows"] if row["name"] != names[2]] == found["rows"]
    same = load_statistics(workspace / "stats")[0].data_sha256  # the text and options of the calibration
    assert fitted["rows"][2]["about"]["measured_on"] == {
        "model": "model", "text": "text.txt", "sequences": 8, "seq_len": 16, "tokens": 128, "data_sha256": same,
        "batches": [4, 4],
    }  # fmt: skip
    again = run_json(*arguments, "--keep", "0.8", *measured, "--batch-size", "2")["rows"]
    assert again[2]["about"]["measured_on"]["batches"] == [2, 2, 2, 2] and again[:2] == found["rows"][:2]


BAD_SWEEPS = {
    "keep above one": (["--keep", "8"], "keep must be"),
    "rounds without a text": (["--rounds", "1"], "--rounds 1 measures the loss of compressed models on"),
    "gains without a text": (["--gains", "2"], "--gains 2 measures the loss of compressed models on"),
    "a text for nothing": (["--calibration-text", "t.txt"], "--calibration-text would have no effect without --rounds"),
    "sequences for nothing": (["--seq-len", "16", "--seed", "1"], "--seq-len, --seed would have no effect without"),
    "rounds of uniform ranks": (
        ["--ranks", "uniform", "--rounds", "1", "--gains", "1", "--calibration-text", "t.txt"],
        "no combination of these methods and ranks takes rounds",
    ),
    "gains by no prediction": (
        ["--method", "svd", "--gains", "1", "--calibration-text", "t.txt"],
        "no combination of these methods and ranks takes gains",
    ),
}


@pytest.mark.parametrize("case", BAD_SWEEPS)
def test_a_sweep_refuses_what_it_could_not_compress_before_it_loads_the_model(workspace, tmp_path, case):
    options, message = BAD_SWEEPS[case]
    arguments = ("sweep", tmp_path / "no model", "--stats", workspace / "stats", "--text", workspace / "text.txt")
    result = run(*arguments, "--out", tmp_path / "out", *options, status=1)
    assert message in result.stderr and result.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
