"""Low rank and few bits, each by itself and both: perplexity by bytes, SmolLM2-135M by default.

    python -m benchmarks.quantised --calibration wiki.train.raw --evaluation wiki.valid.raw --stats DIR --results FILE

Weights are rounded to the numbers that a few bits can say and multiplied as before: that gives the quality and the
size, not the speed. Eight bits have one scale (bfloat16) a row of a dense weight; of factors one a row of `down` and
one a column of `up`, as `gfwsvd compress --bits 8` stores them. Four bits have a scale (float16) for each 64
numbers of a row; of two factors the columns of `up` are first brought to one size, which the rows of `down` take over.
4+8 has four bits in `down`, and in dense weights, and eight in `up`. All symmetric, by the largest magnitude, without
calibration. 4f are the four bits of `gfwsvd compress --bits 4` (`gfwsvd/feedback.py`), of two factors only: numbers
make up for the errors of others by the metric over inputs that the layer was factored by. Dense weights are rounded by
the same feedback and metric, row by row, which is GPTQ with the Fisher's right factor in place of the inputs' moment.
Bytes are those of the linear layers; 16-bit rows are bfloat16. Rows that FILE holds are not computed again.
"""

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import record, setting
from gfwsvd.compress import DAMPING
from gfwsvd.errors import GfwsvdError
from gfwsvd.evaluate import evaluate
from gfwsvd.feedback import four_bits as fitted_four_bits
from gfwsvd.feedback import rounded as fed_back
from gfwsvd.layers import LowRankLinear, find_linears
from gfwsvd.logits import ReferenceLogits
from gfwsvd.methods import method_named
from gfwsvd.progress import bar
from gfwsvd.quantise import GROUP, UNIT, grouped_numbers, whole_numbers
from gfwsvd.ranks import STORAGE
from gfwsvd.solve import metrics_of
from gfwsvd.sweep import Run, compressed_models
from gfwsvd.whiten import Root, root

Rounding = Callable[[Tensor, int], tuple[Tensor, int]]  # a matrix and where its scales run -> rounded, bytes


def eight_bits(matrix: Tensor, dim: int) -> tuple[Tensor, int]:
    """One scale for all numbers along `dim`, as a checkpoint stores factors in eight bits."""
    steps, scale = whole_numbers(matrix, dim, dtype=torch.bfloat16)
    return UNIT * steps * scale.float().unsqueeze(dim), matrix.numel() + 2 * scale.numel()


def four_bits(matrix: Tensor, dim: int) -> tuple[Tensor, int]:
    """One scale for each `GROUP` numbers of a row, whatever `dim` is; the last group of a row may be shorter."""
    rows, width = matrix.shape
    padded = torch.nn.functional.pad(matrix, (0, -width % GROUP)).view(rows, -1, GROUP)
    scale = (padded.abs().amax(-1, keepdim=True) / 7).clamp_min(1e-8).half().float()
    rounded = ((padded / scale).round().clamp_(-7, 7) * scale).reshape(rows, -1)[:, :width]
    return rounded, rows * ((width + 1) // 2 + 2 * padded.shape[1])


def sixteen_bits(matrix: Tensor, dim: int) -> tuple[Tensor, int]:
    """As they are, in bfloat16."""
    return matrix, 2 * matrix.numel()


# Of a dense weight or `down`, and of `up`
BITS: dict[str, tuple[Rounding, Rounding]] = {
    "16": (sixteen_bits, sixteen_bits),
    "8": (eight_bits, eight_bits),
    "4": (four_bits, four_bits),
    "4+8": (four_bits, eight_bits),
}
FED_BACK = "4f"


def layers(model: nn.Module) -> list[nn.Module]:
    """The linear layers that a compression is about, low-rank or still dense."""
    low_rank: list[nn.Module] = [layer for layer in model.modules() if isinstance(layer, LowRankLinear)]
    try:
        return low_rank + list(find_linears(model).values())
    except GfwsvdError:  # none is dense any more
        return low_rank


@torch.no_grad()
def feed_back(model: nn.Module, metrics: Callable[[str], Root]) -> int:
    """As `quantise`, in four bits by the metric over inputs of each layer, given by its name."""
    names = {id(module): name for name, module in model.named_modules()}
    total = 0
    for layer in layers(model):
        right = metrics(names[id(layer)])
        if isinstance(layer, LowRankLinear):
            up, down, scales = fitted_four_bits(*layer.factors(torch.float64), right, dtype=torch.bfloat16)
            rounded = LowRankLinear.from_factors(up, down, None, None, scales)
            for part, found in zip((layer.up, layer.weight), rounded.factors(torch.float32), strict=True):
                part.copy_(found)
            total += up.nbytes + down.nbytes + scales.nbytes
        else:
            weight = layer.weight
            assert isinstance(weight, Tensor)
            steps, scales = fed_back(weight.double(), right.unit_triangle(), dtype=torch.bfloat16)
            weight.copy_(grouped_numbers(steps, scales, torch.float32))
            total += steps.numel() // 2 + scales.nbytes
    return total


@torch.no_grad()
def quantise(model: nn.Module, bits: str) -> int:
    """Rounds the linear layers of a dense or compressed model in place; the bytes that they then take."""
    total = 0
    for layer in layers(model):
        if isinstance(layer, LowRankLinear) and layer.order is None and bits != "16":
            size = layer.up.abs().amax(0).clamp_min(1e-30)
            layer.up.div_(size)
            layer.weight.mul_(size[:, None])
        # The scales of `up` run down its columns: they meet those of the rows of `down` in the intermediate
        parts = [(layer.weight, 1)] + ([(layer.up, 0)] if isinstance(layer, LowRankLinear) else [])
        for (part, dim), rounding in zip(parts, BITS[bits], strict=False):
            assert isinstance(part, Tensor)
            rounded, num_bytes = rounding(part.float(), dim)
            part.copy_(rounded)
            total += num_bytes
        if isinstance(layer, LowRankLinear) and layer.order is not None:
            total += 2 * layer.order.numel()  # an order of fewer than 65536 outputs fits 16 bits
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    setting.add_arguments(parser)
    parser.add_argument("--keep", type=float, nargs="*", default=[0.9, 0.8, 0.6])
    parser.add_argument("--storage", choices=STORAGE, default="pivoted")
    parser.add_argument("--bits", choices=[*BITS, FED_BACK], nargs="+", default=["16", "8", "4"])
    arguments = parser.parse_args()
    made = record.provenance()
    prepared = setting.prepare(arguments)
    dtype = getattr(torch, arguments.dtype)
    reference = ReferenceLogits(copy.deepcopy(prepared.model).to(dtype), prepared.windows, track=bar)
    rows = [row for row in record.read(arguments.results) if all(row.get(k) == v for k, v in prepared.about.items())]

    def metric(name: str) -> Root:
        right = metrics_of(prepared.statistics, name, method_named("gfwsvd"))[1]
        return root(right, damping=DAMPING, name=name)

    def add(model: nn.Module, keep: float, storage: str, widths: list[str]) -> None:
        done = {(row["keep"], row.get("storage", "pivoted"), str(row["bits"])) for row in rows}
        for bits in widths:
            if (keep, storage, bits) in done:
                continue
            rounded = copy.deepcopy(model)
            num_bytes = feed_back(rounded, metric) if bits == FED_BACK else quantise(rounded, bits)
            found = evaluate(rounded.to(dtype), prepared.windows, reference=reference, track=bar).to_json()
            row: dict[str, Any] = {"benchmark": "quantised", "keep": keep, "bits": bits, "storage": storage}
            rows.append({**row, "linear_bytes": num_bytes, **found, **prepared.about, **made})
            record.append(arguments.results, rows[-1])

    add(prepared.model, 1.0, "pivoted", [bits for bits in arguments.bits if bits != "4+8"])
    runs = [Run("gfwsvd", "global", keep, arguments.storage) for keep in arguments.keep]
    for run, model, _, _ in compressed_models(prepared.model, prepared.statistics, runs, track=bar):
        add(model, run.keep, run.storage, arguments.bits)
    table = Table("keep", "storage", "bits", "MB of linear layers", "perplexity", "KL")
    for row in sorted(rows, key=lambda row: -row["linear_bytes"]):
        cells = (f"{row['linear_bytes'] / 1e6:.1f}", f"{row['perplexity']:.2f}", f"{row['kl']:.4f}")
        table.add_row(f"{row['keep']}", row.get("storage", "pivoted"), str(row["bits"]), *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
