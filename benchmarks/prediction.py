"""Whether the predicted loss orders compressed models as the measured one does: random allocations, drawn and measured.

    python -m benchmarks.prediction --calibration wiki.train.raw --evaluation wiki.valid.raw --stats DIR --results FILE

Every layer gets a random share of its own parameters, around one of the shares `--keep` in turn. Allocations in FILE of
the same model, texts and settings are not measured again, so an interrupted run goes on where it was.
"""

import argparse
import copy
import math
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gfwsvd
from benchmarks import record, setting
from gfwsvd.calibration import Statistics, Track, silent
from gfwsvd.logits import ReferenceLogits
from gfwsvd.progress import bar

LEAST_SHARE = 0.05  # below it some layers have no rank
MEASURED = {"kl": "KL(dense || compressed)", "loss_increase": "increase of log perplexity"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    setting.add_arguments(parser)
    predicting = [name for name, row in gfwsvd.METHODS.items() if row.predicts_loss]
    parser.add_argument("--method", choices=predicting, default="gfwsvd")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6, 0.5])
    parser.add_argument("--allocations", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="also draw measured against predicted losses into this PNG file")
    arguments = parser.parse_args()

    made = record.provenance()
    prepared = setting.prepare(arguments)
    about = {**prepared.about, "method": arguments.method, "seed": arguments.seed, "keeps": arguments.keep}
    done = {row["allocation"] for row in _rows(arguments.results, about)}
    missing = [number for number in range(arguments.allocations) if number not in done]
    for row in measured_rows(
        prepared.model,
        prepared.statistics,
        prepared.windows,
        missing,
        method=arguments.method,
        keeps=arguments.keep,
        seed=arguments.seed,
        dtype=getattr(torch, arguments.dtype),
        track=bar,
    ):
        record.append(arguments.results, {**row, **about, **made})
    rows = [row for row in _rows(arguments.results, about) if row["allocation"] < arguments.allocations]
    for key, name in MEASURED.items():
        print(f"Spearman rank correlation of the predicted loss with {name}: {correlation(rows, key):.3f}")
    if arguments.plot is not None:
        plot(rows, arguments.plot)


def measured_rows(
    model: nn.Module,
    statistics: Statistics,
    windows: Tensor,
    numbers: Sequence[int],
    *,
    keeps: Sequence[float],
    method: str = "gfwsvd",
    storage: str = "pivoted",
    seed: int = 0,
    dtype: torch.dtype | None = None,
    track: Track[int] = silent,
) -> Iterator[dict[str, Any]]:
    """Compresses a copy of `model` at each of the random allocations `numbers` and measures what that costs."""
    if not numbers:
        return
    dense = copy.deepcopy(model).to(dtype)
    reference, before = ReferenceLogits(dense, windows), gfwsvd.evaluate(dense, windows).perplexity
    del dense
    for number in track(numbers, f"{len(numbers)} random allocations"):
        keep = keeps[number % len(keeps)]
        shares = random_shares(statistics.layers, keep, random.Random(f"{seed} {number}"))
        bounds = {f"^{re.escape(name)}$": (0.0, share) for name, share in shares.items()}
        compressed = copy.deepcopy(model)
        report = gfwsvd.compress(  # at keep 1 each layer stores what its bound allows
            compressed, method=method, keep=1, bounds=bounds, rank_multiple=1, storage=storage, statistics=statistics
        )
        found = gfwsvd.evaluate(compressed.to(dtype), windows, reference=reference)
        yield {
            "allocation": number,
            "keep": keep,
            "kept": report.kept,
            "predicted_loss": sum(layer.predicted_loss for layer in report.layers),
            "kl": found.kl,
            "perplexity": found.perplexity,
            "loss_increase": math.log(found.perplexity / before),
        }


def random_shares(names: Iterable[str], keep: float, generator: random.Random) -> dict[str, float]:
    """A share for each layer between 2 keep - 1 and 1, `keep` on average; none below `LEAST_SHARE`."""
    return {name: max(LEAST_SHARE, keep + (1 - keep) * generator.uniform(-1, 1)) for name in names}


def correlation(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    """Spearman's, of the predicted loss with what was measured as `key`."""
    pairs = torch.tensor([(row["predicted_loss"], row[key]) for row in rows], dtype=torch.float64)
    return torch.corrcoef(pairs.argsort(0).argsort(0).double().T)[0, 1].item()


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Measured against predicted losses, logarithmic, with the diagonal; a loss that did not rise is left out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(MEASURED), figsize=(10, 4.5), layout="constrained")
    for panel, (key, name) in zip(panels, MEASURED.items(), strict=True):
        risen = [row for row in rows if row["predicted_loss"] > 0 and row[key] > 0]
        for keep in sorted({row["keep"] for row in risen}):
            points = [(row["predicted_loss"], row[key]) for row in risen if row["keep"] == keep]
            panel.plot(*zip(*points, strict=True), "o", label=f"around keep {keep:g}")
        if risen:
            panel.axline((risen[0]["predicted_loss"],) * 2, slope=1, color="gray", linestyle=":", label="as predicted")
            panel.legend()
        panel.set(xscale="log", yscale="log", xlabel="predicted loss, nats per token", ylabel=f"{name}, nats per token")
        panel.set_title(f"Spearman {correlation(rows, key):.3f}, {len(rows)} allocations")
    figure.savefig(path, format="png")


def _rows(results: Path, about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of `results` that were made with the same model, texts and settings."""
    return [row for row in record.read(results) if all(row.get(key) == value for key, value in about.items())]


if __name__ == "__main__":
    main()
