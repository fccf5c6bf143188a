"""The candidate tiles of the kernels on this GPU, sorted by time: for the tables of `gfwsvd_kernels.tiles`.

    python -m benchmarks.tiles --limit 60 --results FILE    # the Gram matrix and the quadratic form, four shapes each

All candidates are compiled beforehand, side by side, into Triton's cache on disk. Then each is checked against float64
and timed in turn with the base (the BLAS). A candidate that fails is a row with its error. On a CPU, `--device cpu
--shapes tiny` with TRITON_INTERPRET=1 shows that all of this runs.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from os import cpu_count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import measure, record
from benchmarks.gate import Gate
from benchmarks.providers import Call, Inputs, Provider
from benchmarks.registry import OPS
from benchmarks.run import aligned, digits
from benchmarks.shapes import Case
from gfwsvd_kernels import tiles

SHAPES = {  # in the order of their importance: time may run out
    "large": (Case(8192, 4096, 4096), Case(8192, 14336, 14336), Case(8192, 1024, 1024), Case(2048, 4096, 4096)),
    "tiny": (Case(20, 48, 48),),
}
OPS_OF = {"gram": "gram_accumulate", "quadratic_form": "quadratic_form"}  # table of candidates -> operator
HEADINGS = ("op", "shape", "tile", "µs p50", "TFLOP/s", "x base", "")
DTYPE = torch.bfloat16


def launched(kernel: str, tile: tiles.Tile, inputs: Inputs, target: tiles.Target | None = None) -> torch.Tensor:
    """The operator by one tile."""
    from gfwsvd_kernels import gram, quadform

    if kernel == "gram":
        gram.gram_accumulate(inputs["out"], inputs["x"], tile=tile, target=target)
        return inputs["out"]
    return quadform.quadratic_form(inputs["x"], inputs["A"], tile=tile, target=target)


def shipped(kernel: str, target: tiles.Target) -> tiles.Tile:
    """What the operator takes for rows that the copy engine can address."""
    return tiles.ALIGNED[kernel][target.arch][DTYPE.itemsize]


def compiled(kernel: str, tile: tiles.Tile, case: Case, target: tiles.Target) -> str | None:
    """Compile what a case launches as the launch would, into the cache on disk; what went wrong, if anything did."""
    from triton.runtime.jit import JITFunction

    def warm(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        run(self, *args, grid=grid, warmup=True, **kwargs)

    run = JITFunction.run
    try:
        with patch.object(JITFunction, "run", warm):
            launched(kernel, tile, OPS[OPS_OF[kernel]].inputs(case, DTYPE, torch.device("meta")), target)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def compiled_side_by_side(jobs: Sequence[tuple[str, tiles.Tile, Case]], target: tiles.Target) -> list[str | None]:
    """What went wrong with each of the jobs."""
    with ProcessPoolExecutor(min(16, cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        return list(pool.map(partial(compiled, target=target), *zip(*jobs, strict=True)))


def measured(kernel: str, case: Case, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """A row for the base and for each candidate, the fastest first and those without a time last."""
    op = OPS[OPS_OF[kernel]]
    target = tiles.target(device)
    num_bytes = op.bytes(case, DTYPE.itemsize)
    sets = [op.inputs(case, DTYPE, device) for _ in range(measure.number_of_sets(num_bytes, 1, device))]
    gate = Gate(op, case, DTYPE, device)
    rows: dict[str, dict[str, Any]] = {}
    timers: dict[str, measure.Timer] = {}
    calls: dict[str, Call] = {op.base: op.providers[op.base].load(device)}
    for tile in tiles.CANDIDATES[kernel]:
        name = " ".join(
            [f"{tile.rows}x{tile.cols}x{tile.depth}", f"{tile.num_warps}w", f"{tile.num_stages}st"]
            + [f"{tile.per_sm}/SM"] * (tile.per_sm > 1)
        )
        calls[name] = partial(launched, kernel, tile)
        rows[name] = {"shipped": tile == shipped(kernel, target)}
    rows = {op.base: {"shipped": False}} | rows
    for name, call in calls.items():
        try:
            if name != op.base:
                error = gate.error(Provider(lambda device, call=call: call), call)
                if error > gate.limit:
                    raise ValueError(f"relative error {error:.1e}, at most {gate.limit:.0e} allowed")
            timers[name] = measure.timer(call, sets, device)
        except Exception as failure:
            rows[name]["note"] = f"{type(failure).__name__}: {failure}".splitlines()[0]
    times = measure.time_in_turn(timers, seconds=seconds)
    for name, timing in times.items():
        us = timing.us[1]
        rows[name] |= {"us_p50": us, "us_p20": timing.us[0], "us_p80": timing.us[2], "timer": timing.timer}
        rows[name] |= {"tflops": op.flops(case) / us / 1e6, "over_base": times[op.base].us[1] / us}
    about = {"benchmark": "tiles", "op": OPS_OF[kernel], "shape": case.label, "dtype": "bf16", "base": op.base}
    found = [{**about, "tile": name, "note": None, "us_p50": None, **row} for name, row in rows.items()]
    return sorted(found, key=lambda row: row["us_p50"] or float("inf"))


def cells(row: dict[str, Any]) -> list[str]:
    """A row in the columns of `HEADINGS`."""
    names = [row["op"], row["shape"], row["tile"]]
    if row["us_p50"] is None:
        return [*names, row["note"]]
    figures = [digits(row["us_p50"]), digits(row["tflops"]), f"{row['over_base']:.2f}"]
    return [*names, *figures, "shipped" if row["shipped"] else ""]


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit status is 1 if the shipped tile of an operator failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=list(OPS_OF), default=list(OPS_OF))
    parser.add_argument("--shapes", choices=list(SHAPES), default="large")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=0.5, help="of timing a case, all candidates together")
    parser.add_argument("--limit", type=float, default=60, help="seconds after which no case is begun")
    parser.add_argument("--results", type=Path, help="JSON lines to add to")
    arguments = parser.parse_args(argv)
    stop = time.perf_counter() + arguments.limit
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    cases, about = SHAPES[arguments.shapes], record.provenance()
    if device.type == "cuda":
        jobs = [(kernel, tile, cases[0]) for kernel in arguments.op for tile in tiles.CANDIDATES[kernel]]
        for (kernel, tile, _), error in zip(jobs, compiled_side_by_side(jobs, tiles.target(device)), strict=True):
            if error:
                print(f"{kernel} {tile} does not compile: {error}", file=sys.stderr)
    failed = False
    for case in cases:
        for kernel in arguments.op:
            if time.perf_counter() > stop:
                print(f"{kernel} {case.label}: not begun within {arguments.limit:.0f} seconds")
                continue
            rows = measured(kernel, case, device, arguments.seconds)
            failed |= any(row["shipped"] and row["us_p50"] is None for row in rows)
            print(aligned([HEADINGS, *map(cells, rows)]), end="\n\n", flush=True)
            for row in rows:
                if arguments.results:
                    record.append(arguments.results, row | about)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
