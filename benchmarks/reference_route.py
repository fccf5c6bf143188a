"""The Kronecker factors of one layer by the published route, stored gradients and Lanczos, and by ours, streamed.

    python -m benchmarks.reference_route --results FILE [--text wiki.train.raw] [--layer NAME] [--repeats 5]

The published route writes the gradient `G_i = g_iᵀ x_i` of every sample, a sequence, to disk, reads all of them back
and finds the leading singular triplet of the Van Loan rearrangement `X -> sum_i G_i X G_iᵀ` of their Fisher block with
`scipy.sparse.linalg.svds` (which this benchmark alone needs). Ours sweeps over inputs and output gradients as they
come, each sweep in a pass of its own. Both get the same recorded tokens of one layer, in processes of their own, and
one function measures both fits, in float64. In the token unit the bytes of its gradients stand beside ours.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

import gfwsvd
from benchmarks import record
from benchmarks.measure import forget_peak, memory_bytes
from benchmarks.packaged import packaged_smollm2
from benchmarks.routes import ROUTES, fit_residual, recorded

ROOT = Path(__file__).resolve().parents[1]
HEADINGS = ("unit", "route", "passes", "seconds (spread)", "peak MB", "gradients, MB", "residual", "cosine left, right")


def work(route: str, folder: Path, sweeps: int) -> None:
    """A run of a route on the tokens in `folder`: a JSON line and the factors for each of its results."""
    held = load_file(folder / "tokens.safetensors")
    tokens = {name: tensor.clone() for name, tensor in held.items()}  # in memory, and no longer a mapped file
    for offsets in (torch.tensor([0, 2, 4]), torch.arange(5)):  # warm, at sizes that take no memory
        list(ROUTES[route](torch.randn(4, 8), torch.randn(4, 6), offsets, 1))
    forget_peak()
    before = memory_bytes("VmRSS")
    for cost, left, right in ROUTES[route](tokens["x"], tokens["g"], tokens["offsets"], sweeps):
        cost["extra_peak_bytes"] = memory_bytes("VmHWM") - before
        save_file({"left": left, "right": right}, folder / f"{route}-{cost['passes']}.safetensors")
        print(json.dumps(cost), flush=True)


def measured(
    routes: Sequence[str], x: Tensor, g: Tensor, offsets: Tensor, *, sweeps: int, repeats: int
) -> list[dict[str, Any]]:
    """A row for each result of each route, run in turn: the seconds of all repeats, sorted, the fit in float64 and the
    pair of factors under "factors"."""
    runs: dict[str, list[list[dict[str, Any]]]] = {route: [] for route in routes}
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file({"x": x, "g": g, "offsets": offsets}, folder / "tokens.safetensors")
        command = [sys.executable, "-m", "benchmarks.reference_route", "--sweeps", str(sweeps), "--work"]
        for route in list(routes) * repeats:
            done = subprocess.run([*command, route, name], cwd=ROOT, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise SystemExit(f"the {route} route ended with status {done.returncode}")
            runs[route].append([json.loads(line) for line in done.stdout.splitlines()])
        for route in routes:
            for costs in zip(*runs[route], strict=True):
                row = {"route": route, **costs[0], "seconds": sorted(cost["seconds"] for cost in costs)}
                row["factors"] = load_file(folder / f"{route}-{row['passes']}.safetensors")
                row["residual"] = fit_residual(x, g, offsets, **row["factors"], scale=row["scale"])
                rows.append(row)
    return rows


def cosine(one: Tensor, other: Tensor) -> float:
    """Of two matrices as vectors, whatever their signs: a pair of factors may have a common one."""
    return abs(torch.cosine_similarity(one.double().flatten(), other.double().flatten(), dim=0).item())


def compared(x: Tensor, g: Tensor, seq_len: int, *, sweeps: int, repeats: int) -> Iterator[dict[str, Any]]:
    """The rows of both routes in the sequence unit, then of ours in the token unit with the bytes of the other."""
    for unit, length, routes in (("sequence", seq_len, ("published", "streamed")), ("token", 1, ("streamed",))):
        offsets = torch.arange(0, len(x) + 1, length)
        rows = measured(routes, x, g, offsets, sweeps=sweeps, repeats=repeats)
        best = rows[0 if "published" in routes else -1]["factors"]
        gradient_bytes = 4 * (len(offsets) - 1) * g.shape[1] * x.shape[1]
        for row in rows:
            found = row.pop("factors")
            trace = found["right"].trace().item()
            row |= {f"cosine_{side}": cosine(found[side], best[side]) for side in ("left", "right")}
            yield {"unit": unit, **row, "negative": trace < 0, "gradient_bytes": gradient_bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="see gfwsvd.load_model; default: SmolLM2-135M")
    parser.add_argument("--layer", default="model.layers.15.mlp.down_proj")
    parser.add_argument("--text", default="pydoc:calibration")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--sweeps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", type=Path, help="JSON lines to add to")
    parser.add_argument("--work", nargs=2, metavar=("ROUTE", "FOLDER"), help="one run of a route, as a part of this")
    arguments = parser.parse_args()
    if arguments.work:
        return work(arguments.work[0], Path(arguments.work[1]), arguments.sweeps)
    if arguments.results is None:
        parser.error("--results FILE is missing")

    model, tokenizer, name = gfwsvd.load_model(arguments.model or str(packaged_smollm2()))
    sizes = {"sequences": arguments.sequences, "seq_len": arguments.seq_len}
    text = gfwsvd.load_text(arguments.text)
    batches = gfwsvd.token_batches(text, tokenizer, **sizes, batch_size=1, seed=0)
    x, g, pass_seconds = recorded(model, arguments.layer, batches)
    del model
    about = {"benchmark": "reference_route", "model": name, "layer": arguments.layer, **sizes}
    about |= {"d_out": g.shape[1], "d_in": x.shape[1], "text": Path(arguments.text).name}
    about |= {"pass_seconds": pass_seconds, **record.provenance()}
    table = Table(*HEADINGS)
    for row in compared(x, g, arguments.seq_len, sweeps=arguments.sweeps, repeats=arguments.repeats):
        row |= {"load": os.getloadavg()[0]}
        record.append(arguments.results, {**about, **row})
        table.add_row(*cells(row))
    print(f"a pass to {arguments.layer} takes {pass_seconds:.1f} s")
    Console(width=120).print(table)


def cells(row: dict[str, Any]) -> list[str]:
    """A row in the columns of `HEADINGS`."""
    seconds = row["seconds"]
    return [
        row["unit"],
        row["route"],
        str(row["passes"]),
        f"{median(seconds):.1f} ({seconds[0]:.1f} to {seconds[-1]:.1f})",
        f"{row['extra_peak_bytes'] / 1e6:.0f}",
        f"{row['disk_bytes'] / 1e6:.0f} of {row['gradient_bytes'] / 1e6:.0f}",
        f"{row['residual']:.4f}",
        f"{row['cosine_left']:.5f}, {row['cosine_right']:.5f}",
    ]


if __name__ == "__main__":
    main()
