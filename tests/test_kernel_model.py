"""The predictions of the kernels' times."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the benchmarks are no part of the installed packages

from benchmarks import model, record
from benchmarks.model import H200, Card, predicted
from benchmarks.registry import OPS
from benchmarks.shapes import MODELS, Grid
from benchmarks.work import TorchWork, Work

ROOT = Path(__file__).resolve().parents[1]


def test_a_prediction_takes_the_longest_of_its_terms():
    card = Card(num_sms=100, half_tflops=1e3, hbm_gbs=1e3, l2_gbs=1e4, latency_us=1.0, launch_us=1.0)
    work = Work(blocks=150, flops=10**10, half=True, dram_bytes=10**6, l2_bytes=10**6, step_bytes=10**5)
    # 10 µs of arithmetic, on 150 of the 200 places that two rounds over 100 SMs have
    assert predicted(work, 1, 3, card) == ("compute", pytest.approx(10 / 0.75 + 1))
    few = Work(blocks=1, flops=0, half=True, dram_bytes=10**6, l2_bytes=0, step_bytes=10**5)
    # one block has 2 x 10⁵ bytes on their way at any time: 5 µs for a million
    assert predicted(few, 1, 3, card) == ("latency", pytest.approx(5 + 1))


def test_what_torch_launches_is_counted_from_sizes():
    x, weight, y = (torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((8, 64), (32, 64), (8, 48)))
    with TorchWork(H200.num_sms) as by_torch:
        torch.mm(x, weight.mT, out=y[:, :32])
        torch.nn.functional.silu(y.view(2, 4, 48))
    (mm, product), (silu, pointwise) = by_torch.found
    assert (mm, product.flops, product.dram_bytes) == ("mm", 2 * 8 * 64 * 32, 2 * (8 * 64 + 32 * 64 + 8 * 32))
    assert (silu, pointwise.flops, pointwise.dram_bytes) == ("silu", 0, 2 * 2 * 8 * 48)


def test_break_even_is_the_largest_keep_that_is_faster(monkeypatch):
    def predictions(op, case, dtype, compiled, provider="ours"):
        weights = case.num_weights if provider == "ours" else 0.7 * sum(case.d_outs) * case.d_in
        return [model.Prediction("", 0, 0, 0, 0.0, "", weights * case.tokens)]

    monkeypatch.setattr(model, "predictions", predictions)
    lines = model.break_even("lowrank_group", MODELS["llama-3.1-8b"], [1, 8], torch.bfloat16)
    assert [line[1] for line in lines[:2]] == ["qkv 4096->4096+1024+1024", "o 4096->4096"]
    # ranks are rounded down: a little more than 0.7 of the weights can still be below it
    assert len(lines) == 8 and all(0.7 <= float(line[4]) <= 0.72 for line in lines)


MODELLED = ["--tokens", "8192", "--keep", "0.8", "--seq-len", "512"]
MODELLED_FEW = ["--op", "lowrank_group_pivoted", "--tokens", "8", "64", "--keep", "0.8"]


@pytest.fixture(scope="module")
def modelled(tmp_path_factory):
    """Lines of cells of the model's output, with one measured row to show."""
    folder = tmp_path_factory.mktemp("model")
    row = {"op": "quadratic_form", "shape": "D=1024 T=8192", "dtype": "bf16", "provider": "ours", "status": "ok"}
    for gpu, us in (("NVIDIA H200", 50.0), (None, 7.0)):
        record.append(folder / "r.jsonl", row | {"gpu": gpu, "us_p50": us})
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "TRITON_CACHE_DIR": str(folder / "triton")}
    runs = [[*MODELLED, "--results", str(folder / "r.jsonl")], MODELLED_FEW]
    command = [sys.executable, "-c", f"from benchmarks import model; print(*map(model.main, {runs}))"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("0 0\n"), done.stderr
    return done.stdout.splitlines()


def test_no_prediction_is_below_the_floor(modelled):
    assert modelled[0].startswith("Predicted, not measured")
    lines = [line for line in modelled if line.startswith(tuple(OPS))]
    for line in lines:
        cells = [cell for cell in line.split("  ") if cell]
        floor, prediction = map(float, cells[11:13])
        assert prediction > floor > 0, line
    many, few = (Grid(MODELS["llama-3.1-8b"], tokens, [0.8], [512]) for tokens in ([8192], [8, 64]))
    expected = sum(len(list(spec.cases(many))) for spec in OPS.values())
    assert len(lines) == expected + len(list(OPS["lowrank_group_pivoted"].cases(few)))


def test_measured_times_stand_beside_predictions_only_where_the_card_was_that_one(modelled):
    (line,) = [line for line in modelled if line.startswith("quadratic_form ") and "D=1024 T=8192" in line]
    prediction, measured, ratio = map(float, line.split()[-3:])
    assert measured == 50 and ratio == pytest.approx(50 / prediction, rel=0.01)
