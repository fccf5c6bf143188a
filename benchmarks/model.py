"""A prediction for each kernel before there is a GPU: occupancy, waves and roofline. It measures nothing.

    python -m benchmarks.model --op gram_accumulate --results FILE    # beside what was measured, if anything was
    python -m benchmarks.model --break-even    # the share of the weights up to which a compressed layer is faster

The launches are those that the operators would make on the reference card; their registers and shared memory are what
the compiler makes of them. A launch takes the longest of its arithmetic, its traffic of memory and its traffic of the
L2 cache, plus the gap between launches. docs/kernels.md defines the terms; `Card` holds what is assumed.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.registry import OPS, AnyCase
from benchmarks.run import DTYPES, OK, aligned, digits, track
from benchmarks.shapes import KEEPS, MODELS, Grid, Layer
from benchmarks.work import WORK, TorchWork, Work, cdiv

KEEPS_TRIED = tuple(number / 100 for number in range(98, 8, -2))
EVEN_HEADINGS = ("op", "layer", "tokens", "dense µs", "faster from keep", "ours µs there")
HEADINGS = (
    "op", "shape", "GFLOP", "MB", "launches", "longest", "registers", "shared KB", "blocks/SM", "waves", "bound by",
    "floor µs", "predicted µs", "measured µs", "measured/predicted",
)  # fmt: skip


@dataclass(frozen=True)
class Card:
    """Published figures of one NVIDIA H200, and three guesses. Assumptions all of them, measurements none."""

    arch: int = 90
    num_sms: int = 132
    half_tflops: float = 989.0  # dense; float32 products run as three of TF32, at half that rate
    tf32_tflops: float = 494.0
    hbm_gbs: float = 4800.0
    l2_gbs: float = 10100.0  # a guess: the 5120 bytes a cycle published for the A100, at 1.98 GHz
    latency_us: float = 0.8  # a guess: from asking memory for bytes to having them, under load
    launch_us: float = 1.3  # a guess: between two launches of one CUDA graph


H200 = Card()


@dataclass(frozen=True)
class Prediction:
    """Of one launch; `waves` is its blocks over those that fit on the card at once."""

    kernel: str
    registers: int
    shared_bytes: int
    blocks_per_sm: int
    waves: float
    bound: str
    us: float


def predicted(work: Work, per_sm: int, num_stages: int, card: Card = H200) -> tuple[str, float]:
    """What bounds a launch, and its microseconds."""
    busy = work.blocks / (cdiv(work.blocks, card.num_sms) * card.num_sms)  # the last round leaves SMs idle
    rate = card.half_tflops if work.half else card.tf32_tflops
    # Little's law: a block waits with one step less in flight than its pipeline has stages
    in_flight = min(work.blocks, per_sm * card.num_sms) * max(num_stages - 1, 1) * work.step_bytes
    bandwidth = min(card.hbm_gbs * 1e3, in_flight / card.latency_us)  # bytes a microsecond
    times = {
        "compute": work.flops / (rate * 1e6 * busy),
        "memory" if bandwidth == card.hbm_gbs * 1e3 else "latency": work.dram_bytes / bandwidth,
        "L2": work.l2_bytes / (card.l2_gbs * 1e3),
    }
    bound = max(times, key=lambda name: times[name])
    return bound, times[bound] + card.launch_us


def predictions(
    op: str, case: AnyCase, dtype: torch.dtype, compiled: dict[Any, Any], provider: str = "ours"
) -> list[Prediction]:
    """One for each launch that a provider makes; `compiled` keeps what was compiled for other cases.

    What torch launches has no registers here and no waves: its kernels are the BLAS's own.
    """
    from gfwsvd_kernels import testing

    call = OPS[op].providers[provider].load(torch.device("cuda"))
    inputs = OPS[op].inputs(case, dtype, torch.device("meta"))
    with testing.recorded_launches() as launches, TorchWork(H200.num_sms) as by_torch:
        call(inputs)
    found = []
    for name, work in by_torch.found:
        bound, us = predicted(work, 1, 3)
        found.append(Prediction(name, 0, 0, 0, 0.0, bound, us))
    for launch in launches:
        name = launch.kernel.__name__
        if name not in WORK:
            raise SystemExit(f"benchmarks/work.py knows no work of the kernel {name}: add it to WORK")
        key = launch.source().hash(), str(launch.options)
        if key not in compiled:
            compiled[key] = testing.compile_launch(launch, H200.arch)
        made = compiled[key]
        work = WORK[name](launch.arguments, launch.grid, case)
        bound, us = predicted(work, made.blocks_per_sm, launch.options.get("num_stages", 1))
        waves = work.blocks / (made.blocks_per_sm * H200.num_sms)
        found.append(Prediction(name, made.registers, made.shared_bytes, made.blocks_per_sm, waves, bound, us))
    return found


def cells(
    op: str, case: AnyCase, dtype: torch.dtype, launches: Sequence[Prediction], measured: float | None
) -> list[str]:
    """A case in the columns of `HEADINGS`: its longest launch, the floor of the operator, the sum of all launches."""
    top = max(launches, key=lambda launch: launch.us)
    flops, num_bytes = OPS[op].flops(case), OPS[op].bytes(case, dtype.itemsize)
    rate = H200.half_tflops if dtype.itemsize == 2 else H200.tf32_tflops / 3
    floor = max(flops / rate / 1e6, num_bytes / H200.hbm_gbs / 1e3)
    total = sum(launch.us for launch in launches)
    resources = [str(top.registers), digits(top.shared_bytes / 1024), str(top.blocks_per_sm), f"{top.waves:.2f}"]
    return [
        op, case.label, digits(flops / 1e9), digits(num_bytes / 1e6), str(len(launches)), top.kernel,
        *(resources if top.blocks_per_sm else ["-"] * 4), top.bound,
        digits(floor), digits(total), "" if measured is None else digits(measured),
        "" if measured is None else f"{measured / total:.2f}",
    ]  # fmt: skip


def break_even(op: str, layers: Sequence[Layer], tokens: Sequence[int], dtype: torch.dtype) -> list[list[str]]:
    """For each layer or group and number of tokens the largest keep at which ours is predicted faster than dense."""
    compiled: dict[Any, Any] = {}

    def us(case: AnyCase, provider: str = "ours") -> float:
        return sum(launch.us for launch in predictions(op, case, dtype, compiled, provider))

    # Of one list of cases to the next nothing differs but how much is kept
    by_keep = [list(OPS[op].cases(Grid(layers, tokens, [keep]))) for keep in KEEPS_TRIED]
    lines = []
    for number, case in enumerate(track(by_keep[0], f"{op}: break-even")):
        dense, found = us(case, "dense"), ["none", ""]
        for keep, cases in zip(KEEPS_TRIED, by_keep, strict=True):
            if (ours := us(cases[number])) < dense:
                found = [f"{keep:.2f}", digits(ours)]
                break
        lines.append([op, case.name, str(case.tokens), digits(dense), *found])
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=list(OPS), default=list(OPS), metavar="OP", help=", ".join(OPS))
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--shapes", nargs="+", choices=list(MODELS), default=["llama-3.1-8b"])
    parser.add_argument("--tokens", type=int, nargs="+", help="default: each operator's own")
    parser.add_argument("--keep", type=float, nargs="+", default=list(KEEPS))
    parser.add_argument("--seq-len", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--results", type=Path, help="JSON lines of benchmarks.run, for the measured column")
    parser.add_argument("--break-even", action="store_true", help="from which keep on a layer is faster than dense")
    arguments = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("the model compiles the kernels, which Triton's interpreter does not: unset TRITON_INTERPRET")
    if arguments.results and not arguments.results.exists():
        parser.error(f"--results {arguments.results} does not exist: benchmarks.run writes it")
    rows = record.read(arguments.results) if arguments.results else []
    measured = {
        (row["op"], row["shape"], row["dtype"]): row["us_p50"]
        for row in rows
        if row["status"] == OK and row["provider"] == "ours" and "H200" in (row["gpu"] or "")
    }

    dtype = DTYPES[arguments.dtype]
    layers = [layer for model in arguments.shapes for layer in MODELS[model]]
    print("Predicted, not measured, for", H200)
    compiled: dict[Any, Any] = {}
    if arguments.break_even:
        for op in [op for op in arguments.op if "dense" in OPS[op].providers]:
            tokens = arguments.tokens or OPS[op].tokens
            print(aligned([EVEN_HEADINGS, *break_even(op, layers, tokens, dtype)]), end="\n\n", flush=True)
        return 0
    for op in arguments.op:
        grid = Grid(layers, arguments.tokens or OPS[op].tokens, arguments.keep, arguments.seq_len)
        lines: list[Sequence[str]] = [HEADINGS]
        for case in track(list(OPS[op].cases(grid)), op):
            us = measured.get((op, case.label, arguments.dtype))
            lines.append(cells(op, case, dtype, predictions(op, case, dtype, compiled), us))
        print(aligned(lines), end="\n\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
