"""The benchmarks of the kernels: honest counts, a gate that stops wrong results, and every provider run on a CPU."""

import json
import sys
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the benchmarks are no part of the installed packages

from benchmarks import measure, record, run, serving_table, tables
from benchmarks.gate import Gate
from benchmarks.measure import ceilings as measured_ceilings
from benchmarks.providers import Provider, plain
from benchmarks.registry import OPS
from benchmarks.shapes import MODELS, Case, Grid

ROOT = Path(__file__).resolve().parents[1]
ON_GPUS = {"quack", "flash_muon", "ours_few"}
MOST_TOKENS = {"ours_skinny": 2}
CEILINGS = ("copy_gbs", "read_gbs", "bf16_tflops", "fp16_tflops", "fp32_tflops")
EVERY_LAYER = MODELS["tiny"]
QUICK = ("--shapes", "tiny", "--keep", "0.5", "--seq-len", "8", "--seconds", "0", "--sets", "1", "--device", "cpu")


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Compiled providers are traced but not translated to C++, and the ceilings are not worth their time here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
        patch.setattr(measure, "ceilings", lambda device, seconds: dict.fromkeys(CEILINGS, 1e3))
        patch.setitem(MODELS, "tiny", MODELS["tiny"][-1:])  # (48, 80), which makes two widths
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # for matrices this small, more only wait for each other
        yield
        torch.set_num_threads(threads)


def benchmark(results, *arguments):
    """The exit status of a run and its rows."""
    status = run.main([*QUICK, *map(str, arguments), "--results", str(results)])
    return status, record.read(results)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A results file with every operator and provider in two dtypes."""
    results = tmp_path_factory.mktemp("kernels") / "results.jsonl"
    status, rows = benchmark(results, "--tokens", 20, "--dtype", "bf16", "fp32")
    assert status == 0
    return results, rows


def test_every_provider_of_every_operator_is_right_and_timed(everything):
    _, rows = everything
    found = {(row["op"], row["provider"], row["dtype"]): row for row in rows}
    for op, spec in OPS.items():
        for name in spec.providers:
            for dtype in ("bf16", "fp32"):
                row = found[op, name, dtype]
                if name in ON_GPUS:
                    assert row["status"] == "missing" and ("not installed" in row["note"] or "GPU" in row["note"])
                elif row["tokens"] > MOST_TOKENS.get(name, 20):
                    assert (row["status"], row["note"]) == ("missing", f"takes at most {MOST_TOKENS[name]} tokens")
                else:
                    assert row["status"] == "ok" and row["error"] < (1e-2 if dtype == "bf16" else 1e-5), row


@pytest.mark.parametrize("tokens", [3, 70])
def test_every_way_through_a_group_is_right(monkeypatch, tmp_path, tokens):
    monkeypatch.setitem(MODELS, "tiny", EVERY_LAYER)
    options = ("--op", "lowrank_group", "lowrank_group_pivoted", "--tokens", tokens, "--gate-only")
    status, rows = benchmark(tmp_path / "r.jsonl", *options)
    assert status == 0 and {row["group"] for row in rows} == {"qkv", "o", "gate_up", "down"}
    runs = {row["provider"] for row in rows if row["status"] == "correct"}
    expected = {name for op in ("lowrank_group", "lowrank_group_pivoted") for name in OPS[op].providers} - ON_GPUS
    assert runs == {name for name in expected if tokens <= MOST_TOKENS.get(name, tokens)}
    assert {row["status"] for row in rows} == {"correct", "missing"}


def test_rates_and_ratios_follow_from_the_times(everything):
    _, rows = everything
    timed = [row for row in rows if row["status"] == "ok"]
    base = {(r["op"], r["shape"], r["dtype"]): r["us_p50"] for r in timed if r["provider"] == r["base"]}
    for row in timed:
        assert 0 < row["us_p20"] <= row["us_p50"] <= row["us_p80"] and row["samples"] >= 5
        assert row["tflops"] == pytest.approx(row["flops"] / row["us_p50"] * 1e-6)
        assert row["gbs"] == pytest.approx(row["bytes"] / row["us_p50"] * 1e-3)
        assert row["over_base"] == pytest.approx(base[row["op"], row["shape"], row["dtype"]] / row["us_p50"])
        peak, copy = row["ceilings"][row["dtype"] + "_tflops"], row["ceilings"]["copy_gbs"]
        assert row["of_ceiling"] == pytest.approx(max(row["tflops"] / peak, row["gbs"] / copy))
        assert row["torch"] == torch.__version__ and row["commit"] and row["date"] and "driver" in row


def test_the_ceilings_are_measured_rates():
    found = measured_ceilings(torch.device("cpu"), seconds=0)
    assert found.keys() == set(CEILINGS) and all(0 < value < 1e5 for value in found.values())


class FakeGpu:
    """A clock instead of a GPU: a call takes 5 µs once launched, and 50 µs to launch outside of a graph."""

    def __init__(self, patch, capture_fails):
        self.now, self.capturing, self.seen, self.capture_fails = 0.0, False, [], capture_fails
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = gpu.now

            def synchronize(self):
                assert self.at <= gpu.now

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        class Graph:
            def replay(self):
                gpu.now += 5e-6 * self.calls

        @contextmanager
        def graph(captured):
            self.capturing, before = True, len(self.seen)
            try:
                yield
            finally:
                self.capturing, captured.calls = False, len(self.seen) - before

        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph", graph)
        patch.setattr(torch.cuda, "synchronize", lambda: None)
        patch.setattr(torch.cuda, "current_stream", lambda: None)
        patch.setattr(torch.cuda, "stream", nullcontext)

    def call(self, inputs):
        self.seen.append(inputs)
        if self.capturing and self.capture_fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.now += 0 if self.capturing else 50e-6


@pytest.mark.parametrize(("capture_fails", "timer", "us"), [(False, "graph", 5.0), (True, "events", 50.0)])
def test_a_graph_hides_launches_and_inputs_rotate(monkeypatch, capture_fails, timer, us):
    gpu = FakeGpu(monkeypatch, capture_fails)
    timers = {"ours": measure.timer(gpu.call, "abcdefgh", torch.device("cuda"))}
    found = measure.time_in_turn(timers, seconds=0)["ours"]
    assert found.timer == timer and found.us == pytest.approx((us, us, us))
    # ten milliseconds of calls as they are launched, in whole rotations of the eight sets
    assert found.samples == measure.LEAST_SAMPLES and found.calls in (200, 208)
    assert capture_fails or "".join(gpu.seen) == "abcdefgh" * (len(gpu.seen) // 8)


def forgets_out(i):
    return (i["x"].mT * i.get("weight", i["x"].new_ones(1)).to(i["x"].dtype)) @ i["x"]


def forgets_weights(i):
    return i["out"].addmm_(i["x"].mT.float(), i["x"].float())


def rounds_to_half(i):
    x = i["x"].half().float()
    return i["out"].addmm_(x.mT, x)


def forgets_the_pivots(i):
    return OPS["lowrank_group_pivoted"].providers["two_matmuls"].load(torch.device("cpu"))(i).flip(-1)


def leaves_a_nan(i):
    result = OPS["quadratic_form"].providers["naive"].load(torch.device("cpu"))(i)
    result[-1] = float("nan")
    return result


@pytest.mark.parametrize(
    ("op", "dtype", "wrong"),
    [
        ("gram_accumulate", "bf16", forgets_out),
        ("gram_accumulate_weighted", "bf16", forgets_weights),
        ("gram_accumulate", "fp32", rounds_to_half),
        ("quadratic_form", "bf16", leaves_a_nan),
        ("lowrank_group_pivoted", "bf16", forgets_the_pivots),
    ],
)
def test_the_gate_stops_a_wrong_result(monkeypatch, tmp_path, capsys, op, dtype, wrong):
    monkeypatch.setitem(OPS[op].providers, "ours", plain(wrong))
    options = ("--op", op, "--dtype", dtype, "--tokens", 64, "--providers", "ours", OPS[op].base)
    status, rows = benchmark(tmp_path / "r.jsonl", *options)
    ours = [row for row in rows if row["provider"] == "ours"]
    assert status == 1 and ours and all(row["status"] == "wrong" and "us_p50" not in row for row in ours)
    assert [row["status"] for row in rows if row["provider"] != "ours"] == ["ok"] * len(ours)
    assert "relative error" in capsys.readouterr().out


def test_one_wrong_entry_of_a_large_matrix_does_not_hide():
    op, cpu = OPS["gram_accumulate"], torch.device("cpu")
    gate = Gate(op, Case(128, 1024, 1024), torch.bfloat16, cpu)
    right = op.providers["mm_add"].load(cpu)

    def misses_an_entry(i):
        before = i["out"].clone()
        out = right(i)
        row, col = divmod(int((out - before).tril(-1).abs().argmax()), 1024)
        out[row, col] = before[row, col]
        return out

    assert gate.error(op.providers["mm_add"], right) < 1e-5
    assert gate.error(plain(misses_an_entry), misses_an_entry) > gate.limit


def test_results_that_are_never_written_do_not_pass(monkeypatch, tmp_path):
    """The memory of a first result comes back with NaN in it, not with the answer."""
    store = torch.empty(64)

    def writes_once(i):
        if not store.isnan().any():
            store.copy_(OPS["quadratic_form"].providers["naive"].load(torch.device("cpu"))(i))
        return store

    monkeypatch.setitem(OPS["quadratic_form"].providers, "ours", plain(writes_once))
    status, rows = benchmark(tmp_path / "r.jsonl", "--op", "quadratic_form", "--tokens", 64, "--gate-only")
    assert status == 1 and rows[0]["status"] == "wrong"


def test_a_peer_that_fails_is_a_row_and_ours_an_error(monkeypatch, tmp_path):
    def broken(device):
        raise RuntimeError("out of memory\nand more")

    for name, expected in (("two_matmuls", 0), ("ours", 1)):
        with monkeypatch.context() as patch:
            patch.setitem(OPS["lowrank_linear"].providers, name, Provider(broken))
            options = ("--op", "lowrank_linear", "--tokens", 2, "--gate-only")
            status, rows = benchmark(tmp_path / f"{name}.jsonl", *options)
        assert status == expected
        failed = [row for row in rows if row["provider"] == name]
        assert all((r["status"], r["note"]) == ("failed", "RuntimeError: out of memory") for r in failed)
        assert all(row["status"] == "correct" for row in rows if row["provider"] != name)


def test_another_base_is_compared_with(tmp_path):
    options = ("--op", "lowrank_linear", "--tokens", 2, "--base", "two_matmuls", "--providers", "ours", "two_matmuls")
    _, rows = benchmark(tmp_path / "r.jsonl", *options)
    assert [row["over_base"] for row in rows if row["provider"] == "two_matmuls"] == [1.0] * (len(rows) // 2)
    assert {row["base"] for row in rows} == {"two_matmuls"}


def test_cases_beyond_the_limit_are_counted_not_dropped(tmp_path, capsys):
    options = ("--op", "gram_accumulate", "--tokens", 4, "--limit", 1e-9)
    assert benchmark(tmp_path / "r.jsonl", *options) == (0, [])
    assert "2 cases were not begun within 0 seconds" in capsys.readouterr().out


def test_a_slow_operator_leaves_the_others_their_share_of_the_time(monkeypatch, tmp_path):
    now = [0.0]

    def measured(op, case, *rest, **options):
        now[0] += 3 if op == "gram_accumulate" else 1
        return [{"op": op, "status": "missing", "provider": "ours", "shape": "", "dtype": "", "note": ""}]

    monkeypatch.setattr(run, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(run, "measured", measured)
    options = ("--op", "gram_accumulate", "quadratic_form", "--tokens", *range(1, 31), "--limit", 20)
    ops = [row["op"] for row in benchmark(tmp_path / "r.jsonl", *options)[1]]
    # ten seconds each; what is begun within them is brought to an end
    assert (ops.count("gram_accumulate"), ops.count("quadratic_form")) == (4, 9)


def test_the_last_line_says_what_measured(tmp_path, capsys):
    benchmark(tmp_path / "r.jsonl", "--op", "quadratic_form", "--tokens", 4, "--providers", "ours")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [*found] == ["gpu", "driver", "torch", "triton", "commit", "date"] and found["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "gemm"], "invalid choice: 'gemm'"),
        (["--shapes", "gpt-5"], "invalid choice: 'gpt-5'"),
        (["--dtype", "fp8"], "invalid choice: 'fp8'"),
        (
            ["--op", "lowrank_linear", "--base", "naive"],
            "lowrank_linear has no provider naive to compare with; it has ours, dense",
        ),
        (["--op", "quadratic_form", "--providers", "ours", "mm"], "no provider mm in quadratic_form"),
        (["--op", "quadratic_form", "gram_accumulate", "--providers", "mm"], "quadratic_form has no provider mm; it"),
        (["--tokens", "0"], "must be at least 1"),
        (["--keep", "1.0"], "shares between 0 and 1"),
    ],
)
def test_a_wrong_request_names_what_is_wrong(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        run.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_a_gpu_that_is_not_there_is_an_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        run.main(["--device", "cuda"])
    assert "torch sees no GPU" in capsys.readouterr().err


def test_the_table_and_the_picture_show_the_last_of_several_rows(everything, tmp_path):
    results, rows = everything
    again = tmp_path / "again.jsonl"
    newer = [row | {"us_p50": 12345.0} for row in rows if row["status"] == "ok"][:1]
    for row in rows + newer:
        record.append(again, row)
    picture, table = tmp_path / "roofline.png", tmp_path / "kernels.md"
    assert tables.main([str(again), "--markdown", str(table), "--roofline", str(picture)]) == 0
    text = table.read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    assert len(lines) == len(OPS) + sum(row["status"] == "ok" for row in rows)  # a heading each, and every timed row
    assert len({line.count("|") for line in lines}) == 1
    assert text.count("12345") == 1 and f"commit {rows[0]['commit']}" in text
    assert "gram_accumulate, not timed: quack: " in text
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


def test_the_readme_has_the_figures_of_the_committed_results_and_no_others():
    readme = (ROOT / "README.md").read_text()
    folder = ROOT / "benchmarks/results"
    results = [path for what in ("kernels", "serving") for path in sorted(folder.glob(f"{what}-*.jsonl"))]
    assert tables.with_tables(readme, *results) == readme


def test_generation_is_beside_the_dense_model_of_the_same_run_and_of_the_last_one(tmp_path):
    about = {
        "benchmark": "serve",
        "model": "m",
        "gpu": "NVIDIA H200",
        "driver": "5",
        "torch": "2",
        "first_token_s": 0.05,
    }
    old, new = about | {"date": "2026-01-01", "commit": "old"}, about | {"date": "2026-01-02", "commit": "new"}
    rows = [
        old | {"engine": "fused", "keep": 0.8, "batch": 1, "decode_tokens_s": 120.0},
        old | {"engine": "dense", "keep": 1.0, "batch": 1, "decode_tokens_s": 100.0},
        old | {"engine": "naive", "keep": 0.8, "batch": 1, "decode_tokens_s": 90.0},
        new | {"engine": "dense", "keep": 1.0, "batch": 1, "decode_tokens_s": 200.0},
        new | {"engine": "fused", "keep": 0.8, "batch": 1, "decode_tokens_s": 250.0},
        new | {"engine": "fused", "keep": 0.8, "batch": 2, "decode_tokens_s": 999.0, "gpu": None},
    ]
    table = [line.split(" | ")[:6] for line in serving_table.table(rows).splitlines()[2:]]
    assert table == [
        ["| dense", "", "1", "200", "1.00", "50"],
        ["| two products a layer", "0.8", "1", "90", "0.90", "50"],
        ["| `gfwsvd.fuse`, pivoted", "0.8", "1", "250", "1.25", "50"],
    ]
    assert serving_table.table(rows[-1:]) == serving_table.UNMEASURED


def test_the_readme_takes_ours_on_the_headline_cases_from_gpus_only(everything, tmp_path):
    rows = [row for row in everything[1] if row["status"] == "ok"]
    op, (case,) = "gram_accumulate", OPS["gram_accumulate"].headlines
    row = next(row for row in rows if row["op"] == op and row["provider"] == "ours" and row["dtype"] == "bf16")
    row |= {"shape": case.label, "gpu": "NVIDIA H200", "commit": "abc123", "us_p50": 111.0, "of_ceiling": 0.5}
    for number, changes in enumerate(
        [{"date": "2026-01-01"}, {"date": "2026-01-02", "us_p50": 222.0, "over_base": 1.75}, {"gpu": None}]
        + [{"provider": "mm"}, {"dtype": "fp32"}, {"shape": "D=1 T=1"}]
    ):
        record.append(tmp_path / f"kernels-{number}.jsonl", row | {"date": "2026-01-03"} | changes)
    readme = tmp_path / "README.md"
    (begin, end), generation = tables.marks("kernels"), "\n".join(tables.marks("generation"))
    readme.write_text(f"{generation}\nbefore\n{begin}\nold\n{end}\nafter\n")
    assert tables.main([str(tmp_path / "kernels-*.jsonl"), "--readme", str(readme)]) == 0
    lines = readme.read_text().splitlines()
    assert lines[-2:] == [end, "after"] and lines[lines.index("before") + 1] == begin
    (line,) = [line for line in lines if line.startswith("| `")]
    measured = "NVIDIA H200, 2026-01-02, abc123"
    assert line == f"| `{op}` | {case.label} | 222 | 50% | 1.75x mm | {measured} |"

    assert tables.main([str(tmp_path / "none-*.jsonl"), "--readme", str(readme)]) == 0
    assert tables.UNMEASURED in readme.read_text() and "222" not in readme.read_text()
    with pytest.raises(SystemExit, match="the README must have a line"):
        tables.with_tables("no marks")
    with pytest.raises(SystemExit, match="2"):
        tables.main([str(tmp_path / "missing.jsonl"), "--readme", str(readme)])


def test_every_headline_case_is_among_the_default_ones():
    layers = MODELS["llama-3.1-8b"]
    for op, spec in OPS.items():
        assert spec.headlines and {*spec.headlines} <= {*spec.cases(Grid(layers, spec.tokens))}, op
