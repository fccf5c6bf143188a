"""A compression that is interrupted at any moment and goes on ends in the bits of one that is not."""

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from gfwsvd.calibration import Statistics, calibrate
from gfwsvd.cli import app
from gfwsvd.compress import about_work, compress
from gfwsvd.errors import GfwsvdError
from gfwsvd.guard import judged_decomposition
from gfwsvd.outcome import CompressionReport
from gfwsvd.store import load_statistics, save_statistics
from gfwsvd.work import open_work
from processes import start
from tiny_models import random_tokens, tiny_model

BATCHES = [{"input_ids": part} for part in random_tokens(16, 12).split(8)]
LAYERS = 14
SETTINGS: dict[str, Any] = {"method": "gfwsvd", "keep": 0.6, "damping": 0.01, "guard": True, "storage": "pivoted"}


@pytest.fixture(scope="module")
def statistics() -> Statistics:
    return calibrate(tiny_model("llama"), BATCHES)


def compressed(
    statistics: Statistics, folder: Path | None = None, **options: Any
) -> tuple[dict[str, Tensor], CompressionReport]:
    """The tensors and the report of the tiny llama in bfloat16, where each form of a layer occurs."""
    model = tiny_model("llama").bfloat16()
    options = {"rank_multiple": 2, "statistics": statistics, **SETTINGS, **options}
    if folder is None:
        report = compress(model, **options)
    else:
        with open_work(folder, about_work(model, statistics=statistics, **SETTINGS)) as work:
            report = compress(model, **options, work=work)
    report.seconds = 0.0
    return dict(model.state_dict()), report


def assert_same(found: tuple[dict[str, Tensor], Any], expected: tuple[dict[str, Tensor], Any]) -> None:
    assert found[0].keys() == expected[0].keys()
    assert all(torch.equal(tensor, expected[0][name]) for name, tensor in found[0].items())
    assert found[1] == expected[1]


def failing_at(number: int, error: BaseException):
    """A `track` that fails before the item of this number, counted over all loops."""
    seen = iter(range(number))

    def track(items: list[str], description: str) -> Iterator[str]:
        for item in items:
            if next(seen, None) is None:
                raise error
            yield item

    return track


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layers that are decomposed, as they come."""
    names: list[str] = []

    def spy(*arguments: Any, name: str, **options: Any) -> Any:
        names.append(name)
        return judged_decomposition(*arguments, name=name, **options)

    monkeypatch.setattr("gfwsvd.solve.judged_decomposition", spy)
    return names


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt()], ids=["memory", "interrupt"])
@pytest.mark.parametrize("storage", ["pivoted", "factors"])
def test_a_run_goes_on_from_the_layers_solved_and_ends_in_the_same_bits(statistics, tmp_path, solved, storage, error):
    expected = compressed(statistics, storage=storage)
    solved.clear()
    for number in (0, 1, 6, 13, 17):  # the last is in the second loop, which builds layers
        with pytest.raises(type(error)):
            compressed(statistics, tmp_path / "w", storage=storage, track=failing_at(number, error))
        assert len(solved) == min(number, LAYERS)
    assert_same(compressed(statistics, tmp_path / "w", storage=storage), expected)
    assert len(solved) == len(set(solved)) == LAYERS


def test_what_does_not_change_solutions_may_change_between_runs(statistics, tmp_path, solved):
    compressed(statistics, tmp_path / "w")
    options = {"rank_multiple": 1, "ranks": "uniform", "bounds": {"q_proj": (0.8, 1)}}
    assert_same(compressed(statistics, tmp_path / "w", **options), compressed(statistics, **options))
    assert len(solved) == 2 * LAYERS


def test_layers_solved_by_other_statistics_of_the_same_settings_are_solved_anew(statistics, tmp_path):
    """Such as those that a GPU sums in another order."""
    other = calibrate(tiny_model("llama"), [{"input_ids": ids} for ids in random_tokens(16, 12).split(4)])
    assert (other.data_sha256, other.settings) == (statistics.data_sha256, statistics.settings)
    compressed(other, tmp_path / "w")
    assert_same(compressed(statistics, tmp_path / "w"), compressed(statistics))
    assert_same(compressed(other, tmp_path / "w"), compressed(other))


@pytest.mark.parametrize("changed", [{"method": "kfac"}, {"keep": 0.5}, {"damping": 0.1}, {"guard": False}, "dtype"])
def test_work_of_other_settings_is_refused(statistics, tmp_path, changed):
    model = tiny_model("llama")
    with open_work(tmp_path / "w", about_work(model, statistics=statistics, **SETTINGS)) as work:
        work.save("state", {"a": torch.ones(1)}, {})
    settings = SETTINGS if changed == "dtype" else {**SETTINGS, **changed}
    about = about_work(model.bfloat16() if changed == "dtype" else model, statistics=statistics, **settings)
    with (
        pytest.raises(GfwsvdError, match=f"other settings .*{'dtypes' if changed == 'dtype' else next(iter(changed))}"),
        open_work(tmp_path / "w", about),
    ):
        pass


def test_nothing_is_left_of_a_run_that_solved_nothing(statistics, tmp_path):
    with pytest.raises(GfwsvdError, match="smallest ranks"):
        compressed(statistics, tmp_path / "w", keep=0.01)
    assert list(tmp_path.iterdir()) == []


def _compress_and_save(folder: Path, out: str, work: str | None) -> None:
    tensors, report = compressed(load_statistics(folder / "stats")[0], work and folder / work)
    (folder / f"{out}.txt").write_text(repr(report.to_json()))
    save_file(tensors, folder / f"{out}.safetensors")


def test_a_process_killed_at_random_moments_ends_in_the_same_bits(statistics, tmp_path):
    save_statistics(statistics, tmp_path / "stats")
    chance, codes = random.Random(0), []
    for _ in range(5):
        states = len(list(tmp_path.glob("w/*"))) + chance.randrange(1, 8)  # two files a layer
        process = start(_compress_and_save, tmp_path, "found", "w")
        while process.is_alive() and len(list(tmp_path.glob("w/*"))) < states:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.02))
        process.kill()
        process.join()
        codes.append(process.exitcode)
    assert codes.count(-9) >= 2 and set(codes) <= {0, -9}, "some of the runs were killed, and none failed"
    for out, work in (("found", "w"), ("expected", None)):
        process = start(_compress_and_save, tmp_path, out, work)
        process.join(60)
        assert process.exitcode == 0
    found, expected = (
        (load_file(tmp_path / f"{out}.safetensors"), (tmp_path / f"{out}.txt").read_text())
        for out in ("found", "expected")
    )
    assert_same(found, expected)


def test_the_command_goes_on_after_ctrl_c_and_removes_its_work(tmp_path, monkeypatch):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    command = ["compress", str(tmp_path / "model"), "--method", "svd", "--keep", "0.6", "--out"]

    def run(out: str, *options: str) -> Any:
        return CliRunner().invoke(app, [*command, str(tmp_path / out), *options])

    with monkeypatch.context() as patch:
        names: list[str] = []

        def interrupted(*arguments: Any, name: str, **options: Any) -> Any:
            names.append(name)
            if len(names) == 5:
                raise KeyboardInterrupt
            return judged_decomposition(*arguments, name=name, **options)

        patch.setattr("gfwsvd.solve.judged_decomposition", interrupted)
        patch.setattr("sys.argv", ["gfwsvd", "compress"])
        result = run("out")
    assert result.exit_code == 130
    assert f"what is done is kept in {tmp_path / 'out.work'}; to go on from it:\ngfwsvd compress\n" in result.stderr
    refused = run("out", "--damping", "0.5")
    assert refused.exit_code == 1 and "damping was 0.01 and is 0.5" in refused.stderr
    assert run("out").exit_code == run("whole").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "whole"]
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
