"""What a compression costs at the size of a 7B model: seconds of every phase and memory, on some of its layers.

    python -m benchmarks.scale --results FILE                        # 2 layers of Llama-2-7B, 16 x 2048 tokens
    python -m benchmarks.scale --layers 32 --sequences 128 --results FILE

All that `gfwsvd.compress` does from text to checkpoint: the statistics that its method needs, in memory, ranks,
factors, new layers, files. The weights and tokens are random: none of the phases depends on their values but for the
guard, which may factor a layer up to four times. Passes and factorisation grow with the layers; the head is the same
for any number of them. Beside what is measured stands what `gfwsvd plan` predicts for the same work on the machine,
in groups that fit what is free of its memory before the model is there; what only the commands do (reading the model,
files of statistics and factors) is predicted alone.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import gfwsvd
from benchmarks import record
from benchmarks.random_models import SHAPES, random_model
from gfwsvd.footprint import Settings
from gfwsvd.hardware import measure
from gfwsvd.methods import method_named
from gfwsvd.plan import estimate
from gfwsvd.progress import bar
from gfwsvd.skeleton import shape_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-2-7b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4, help="sequences at a time")
    parser.add_argument("--sweeps", type=int, default=2)
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--no-guard", action="store_true")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, required=True, help="JSON lines to add to")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    machine = measure(arguments.device, dtype)  # whose free memory is that without the model
    model = random_model(arguments.shape, dtype=dtype, device=arguments.device, layers=arguments.layers)
    collect = method_named("gfwsvd").needs
    settings = Settings(
        keep=arguments.keep, sequences=arguments.sequences, seq_len=arguments.seq_len, batch_size=arguments.batch,
        sweeps=arguments.sweeps, collect=collect,
    )  # fmt: skip
    predicted = estimate(shape_of(model), settings, machine)
    ids = torch.randint(SHAPES[arguments.shape]["vocab_size"], (arguments.sequences, arguments.seq_len))
    batches = [{"input_ids": part} for part in ids.split(arguments.batch)]
    times = [time.perf_counter()]
    titles: list[str] = []

    def track(items: Sequence[Any], title: str) -> Iterable[Any]:
        titles.append(title)
        return bar(items, title)

    about = {"collect": collect, "sweeps": arguments.sweeps, "device_memory": machine.device_memory}
    statistics = gfwsvd.calibrate(model, batches, track=track, **about)
    groups = max([1, *(int(title.rpartition(" of ")[2]) for title in titles if ", layers" in title)])
    times.append(time.perf_counter())
    guard = not arguments.no_guard
    report = gfwsvd.compress(model, statistics=statistics, keep=arguments.keep, guard=guard, track=bar)
    times.append(time.perf_counter())
    with tempfile.TemporaryDirectory() as folder:
        gfwsvd.save_pretrained(model, Path(folder) / "smaller", report=report)
    times.append(time.perf_counter())
    calibration, factorisation, writing = (after - before for before, after in itertools.pairwise(times))
    seconds = {f"calibration sweep {number}": taken for number, taken in enumerate(statistics.seconds, start=1)}
    seconds["held-out tokens"] = calibration - sum(seconds.values())
    seconds |= {"factorisation": factorisation, "writing": writing}
    on_gpu = torch.device(arguments.device).type == "cuda"
    expected = {phase.name: phase.seconds for phase in predicted.phases}
    row = {
        "benchmark": "scale", "shape": arguments.shape, "layers": arguments.layers, "sequences": arguments.sequences,
        "seq_len": arguments.seq_len, "batch": arguments.batch, "dtype": arguments.dtype, "keep": arguments.keep,
        "guard": guard, "seconds": seconds, "predicted_seconds": expected,
        "groups": groups, "predicted_groups": predicted.groups,
        "linears": len(report.layers), "dense": report.dense, "stored": report.stored,
        "metrics": {layer.name: layer.metrics for layer in report.layers},
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }  # fmt: skip
    record.append(arguments.results, row | record.provenance())
    table = Table("phase", "s", "s a decoder layer", "predicted s", "predicted / measured")
    for phase, planned in expected.items():
        taken = seconds.get(phase)
        run = ("", "", planned, "") if taken is None else (taken, taken / arguments.layers, planned, planned / taken)
        table.add_row(phase, *(value if isinstance(value, str) else f"{value:.2f}" for value in run))
    whole, planned = sum(seconds.values()), sum(expected[phase] for phase in seconds)
    values = whole, whole / arguments.layers, planned, planned / whole
    table.add_row("all that ran", *(f"{value:.2f}" for value in values))
    Console().print(table)


if __name__ == "__main__":
    main()
