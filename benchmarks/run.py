"""Kernels against their peers: correctness, then microseconds, rates and ratios.

    python -m benchmarks.run --op gram_accumulate lowrank_linear --shapes llama-3.1-8b --results FILE

Every provider of an operator is checked against float64 first, then all that passed are timed in turn on the same
inputs. The exit status is 1 if one computed something wrong or if one of ours failed. docs/kernels.md defines the
columns. The last line is a JSON object that says what measured.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, record
from benchmarks.gate import Gate
from benchmarks.providers import Call, Missing
from benchmarks.registry import OPS
from benchmarks.shapes import KEEPS, MODELS, Case, Grid

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEADINGS = ("op", "shape", "dtype", "provider", "µs p20/p50/p80", "TFLOP/s", "GB/s", "% of ceiling", "x base")
# Status of a row: "ok" has times, "correct" was only to be checked, the others have a note that says why.
OK, CORRECT, MISSING, WRONG, FAILED = "ok", "correct", "missing", "wrong", "failed"


def floor_us(flops: int, num_bytes: int, dtype: str, ceilings: dict[str, float]) -> float:
    """The time in which the machine's measured ceilings allow this much work: the longer of computing and moving."""
    gbs = max(ceilings["copy_gbs"], ceilings["read_gbs"])
    return max(flops / ceilings[f"{dtype}_tflops"] / 1e6, num_bytes / gbs / 1e3)


def checked(
    op: str, case: Case, dtype: torch.dtype, device: torch.device, names: Iterable[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, Call]]:
    """What became of each provider at the gate, and the loaded ones that passed."""
    gate = Gate(OPS[op], case, dtype, device)
    found: dict[str, dict[str, Any]] = {}
    passed: dict[str, Call] = {}
    for name in names:
        provider = OPS[op].providers[name]
        try:
            call = provider.load(device)
            error = gate.error(provider, call)
        except Missing as reason:
            found[name] = {"status": MISSING, "note": str(reason)}
        except Exception as failure:
            found[name] = _failed(failure)
        else:
            if error > gate.limit:
                found[name] = {"status": WRONG, "note": f"relative error {error:.1e}, at most {gate.limit:.0e} allowed"}
            else:
                found[name] = {"status": CORRECT, "error": error}
                passed[name] = call
    return found, passed


def _failed(failure: Exception) -> dict[str, Any]:
    """Whatever a provider throws, out of memory or a package's own bug, is a row, not the end of the run."""
    text = str(failure).strip() or "no message"
    return {"status": FAILED, "note": f"{type(failure).__name__}: {text.splitlines()[0]}"}


def measured(
    op: str,
    case: Case,
    dtype: str,
    device: torch.device,
    *,
    providers: Sequence[str],
    base: str,
    ceilings: dict[str, float] | None,
    seconds: float,
    num_sets: int | None = None,
) -> list[dict[str, Any]]:
    """One row a provider. Without ceilings the gate is all there is."""
    spec, torch_dtype = OPS[op], DTYPES[dtype]
    found, passed = checked(op, case, torch_dtype, device, providers)
    flops, num_bytes = spec.flops(case), spec.bytes(case, torch_dtype.itemsize)
    times: dict[str, measure.Timing] = {}
    if ceilings and passed:
        num_sets = num_sets or measure.number_of_sets(num_bytes, spec.least_sets, device)
        sets = [spec.inputs(case, torch_dtype, device) for _ in range(num_sets)]
        timers = {}
        for name, call in passed.items():
            try:
                timers[name] = measure.timer(call, sets, device)
            except Exception as failure:
                found[name] = _failed(failure)
        times = measure.time_in_turn(timers, seconds=seconds)
    rows = []
    for name in providers:
        row = {
            "benchmark": "kernels", "op": op, "shape": case.label, **case._asdict(), "dtype": dtype,
            "device": device.type, "provider": name, "base": base, "flops": flops, "bytes": num_bytes,
            "error": None, "note": None, **found[name],
        }  # fmt: skip
        if ceilings and name in times:
            timing = times[name]
            p50 = timing.us[1]
            row |= {
                "status": OK, "us_p20": timing.us[0], "us_p50": p50, "us_p80": timing.us[2],
                "samples": timing.samples, "calls": timing.calls, "sets": len(sets), "timer": timing.timer,
                "tflops": flops / p50 / 1e6, "gbs": num_bytes / p50 / 1e3,
                "of_ceiling": floor_us(flops, num_bytes, dtype, ceilings) / p50,
                "over_base": times[base].us[1] / p50 if base in times else None, "ceilings": ceilings,
            }  # fmt: skip
        rows.append(row)
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    """A row in the columns of `HEADINGS`; a row without times has what to say instead in place of them."""
    names = [row["op"], row["shape"], row["dtype"], row["provider"]]
    if row["status"] == OK:
        over = "" if row["over_base"] is None else f"{row['over_base']:.2f}"
        return [*names, microseconds(row), digits(row["tflops"]), digits(row["gbs"]), f"{row['of_ceiling']:.1%}", over]
    if row["status"] == CORRECT:
        return [*names, f"correct, error {row['error']:.1e}"]
    return [*names, row["note"] if row["status"] == MISSING else f"{row['status']}: {row['note']}"]


def microseconds(row: dict[str, Any]) -> str:
    """The three percentiles of a timed row."""
    return "/".join(digits(row[key]) for key in ("us_p20", "us_p50", "us_p80"))


def digits(value: float) -> str:
    """Three significant digits, no exponent where that is readable."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells in columns; the last cell of a line shorter than the first one may run over its column."""
    widths = [0] * len(lines[0])
    for line in lines:
        for i, cell in enumerate(line if len(line) == len(widths) else line[:-1]):
            widths[i] = max(widths[i], len(cell))
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)


def track(items: Sequence[Case], description: str) -> Iterable[Case]:
    """A progress bar on standard error, or plain lines there where the package that draws it is missing."""
    try:
        from gfwsvd.progress import bar
    except ImportError:
        for number, item in enumerate(items, 1):
            print(f"{description} {number}/{len(items)}: {item.label}", file=sys.stderr, flush=True)
            yield item
    else:
        yield from bar(items, description)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=list(OPS), default=list(OPS), metavar="OP", help=", ".join(OPS))
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["bf16"])
    parser.add_argument("--shapes", nargs="+", choices=list(MODELS), default=["llama-3.1-8b"])
    parser.add_argument("--tokens", type=int, nargs="+", help="default: each operator's own")
    parser.add_argument("--keep", type=float, nargs="+", default=list(KEEPS), help="shares of the parameters")
    parser.add_argument("--seq-len", type=int, nargs="+", default=[512, 2048], help="of the sequence units")
    parser.add_argument("--providers", nargs="+", help="only these, of those that an operator has; default: all")
    parser.add_argument("--base", help="provider to compare with; default: each operator's own")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: the GPU, if there is one")
    parser.add_argument("--seconds", type=float, default=0.4, help="of timing a case, all providers together")
    parser.add_argument("--sets", type=int, help="sets of inputs in rotation; default: four times the L2 cache")
    parser.add_argument("--limit", type=float, help="seconds for all operators, shared equally; then no case is begun")
    parser.add_argument("--gate-only", action="store_true", help="check the results, time nothing")
    parser.add_argument("--results", type=Path, help="JSON lines to add to")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no GPU: check nvidia-smi, or use --device cpu")
    if min([*(arguments.tokens or [1]), *arguments.seq_len, 1 if arguments.sets is None else arguments.sets]) < 1:
        parser.error("--tokens, --seq-len and --sets must be at least 1")
    if not all(0 < keep < 1 for keep in arguments.keep):
        parser.error(f"--keep must be shares between 0 and 1, got {arguments.keep}")
    if unknown := set(arguments.providers or ()) - {name for op in arguments.op for name in OPS[op].providers}:
        parser.error(f"no provider {', '.join(sorted(unknown))} in {', '.join(arguments.op)}")
    for op in arguments.op:
        known = OPS[op].providers
        if arguments.base and arguments.base not in known:
            parser.error(f"{op} has no provider {arguments.base} to compare with; it has {', '.join(known)}")
        if arguments.providers and not known.keys() & set(arguments.providers):
            parser.error(f"{op} has no provider {' or '.join(arguments.providers)}; it has {', '.join(known)}")
    return arguments


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    arguments = parsed(argv)
    began = time.perf_counter()
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    about = record.provenance()
    made_by = {key: about[key] for key in ("gpu", "driver", "torch", "triton", "commit", "date")}
    ceilings = None if arguments.gate_only else measure.ceilings(device, seconds=min(0.5, arguments.seconds))
    print(" ".join(f"{key}={value}" for key, value in made_by.items()))
    if ceilings:
        print("ceilings:", ", ".join(f"{name} {value:.4g}" for name, value in ceilings.items()))
    layers = [layer for model in arguments.shapes for layer in MODELS[model]]
    bad = left_out = 0
    for number, op in enumerate(arguments.op):
        spec = OPS[op]
        now = time.perf_counter()
        # An equal share of what is left: a slow operator must not leave the last ones unmeasured
        stop = now + (began + arguments.limit - now) / (len(arguments.op) - number) if arguments.limit else float("inf")
        providers = [name for name in spec.providers if name in (arguments.providers or spec.providers)]
        grid = Grid(layers, arguments.tokens or spec.tokens, arguments.keep, arguments.seq_len)
        for dtype in arguments.dtype:
            rows: list[dict[str, Any]] = []
            for case in track(list(spec.cases(grid)), f"{op} {dtype}"):
                if time.perf_counter() > stop:
                    left_out += 1
                    continue
                new = measured(
                    op, case, dtype, device, providers=providers, base=arguments.base or spec.base,
                    ceilings=ceilings, seconds=arguments.seconds, num_sets=arguments.sets,
                )  # fmt: skip
                rows += new
                if arguments.results:
                    for row in new:
                        record.append(arguments.results, row | about)
            print(aligned([HEADINGS, *map(cells, rows)]), end="\n\n", flush=True)
            bad += sum(
                row["status"] == WRONG or row["status"] == FAILED and row["provider"].startswith("ours") for row in rows
            )
    if left_out:
        print(f"{left_out} cases were not begun within {arguments.limit:.0f} seconds")
    if bad:
        print(f"{bad} results wrong or failed", file=sys.stderr)
    print(json.dumps(made_by))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
