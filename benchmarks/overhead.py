"""What streaming the statistics costs: seconds of a sweep over seconds of the plain forward and backward pass.

    python -m benchmarks.overhead --text wiki.train.raw --results FILE

All passes see the same batches in one run. "training" is forward and backward as `loss.backward()` does it, weight
gradients included; "frozen" leaves those out, as calibration does.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import profile

import gfwsvd
from benchmarks import record
from benchmarks.packaged import packaged_smollm2
from gfwsvd.calibration import Batch
from gfwsvd.hooks import frozen
from gfwsvd.progress import bar


def plain_pass(model: nn.Module, batches: list[Batch]) -> None:
    """Forward and backward of the summed next-token loss over all batches."""
    for batch in batches:
        logits = model(**batch).logits[:, :-1].flatten(0, 1)
        F.cross_entropy(logits, batch["input_ids"][:, 1:].flatten(), reduction="sum").backward()
        model.zero_grad(set_to_none=True)


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def shares(model: nn.Module, batches: list[Batch], options: dict[str, Any]) -> dict[str, float]:
    """Share of a two-sweep calibration's time inside each of our ops."""
    with profile() as profiled:
        total = sum(gfwsvd.calibrate(model, batches, sweeps=2, **options).seconds)
    found = {event.key: event.cpu_time_total / 1e6 / total for event in profiled.key_averages()}
    return {name: found[name] for name in sorted(found) if name.startswith("gfwsvd::")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="see gfwsvd.load_model; default: SmolLM2-135M")
    parser.add_argument("--text", default="pydoc:calibration")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--unit", default="token")
    parser.add_argument("--results", type=Path, required=True, help="JSON lines to add to")
    arguments = parser.parse_args()

    model, tokenizer, name = gfwsvd.load_model(arguments.model or str(packaged_smollm2()))
    batches = gfwsvd.token_batches(
        gfwsvd.load_text(arguments.text),
        tokenizer,
        sequences=arguments.sequences,
        seq_len=arguments.seq_len,
        batch_size=4,
        seed=0,
    )
    plain_pass(model, batches[:1])  # warm
    training = seconds(lambda: plain_pass(model, batches))
    with frozen(model), torch.enable_grad():
        frozen_seconds = seconds(lambda: plain_pass(model, batches))
    options = {"unit": arguments.unit}
    first, second = gfwsvd.calibrate(model, batches, sweeps=2, track=bar, **options).seconds
    row = {
        "benchmark": "overhead",
        "model": name,
        "text": Path(arguments.text).name,
        "sequences": arguments.sequences,
        "seq_len": arguments.seq_len,
        "unit": arguments.unit,
        "training_seconds": training,
        "frozen_seconds": frozen_seconds,
        "first_sweep_seconds": first,
        "next_sweep_seconds": second,
        "first_sweep_over_training": first / training,
        "next_sweep_over_training": second / training,
        "next_sweep_over_frozen": second / frozen_seconds,
        "op_shares": shares(model, batches[:1], options),
        **record.provenance(),
    }
    record.append(arguments.results, row)
    for key, value in row.items():
        print(f"{key:28} {value}")


if __name__ == "__main__":
    main()
