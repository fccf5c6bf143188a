"""Whether the predicted loss orders compressed models of one size as the measured one does, by random allocations.

    python -m benchmarks.prediction --calibration wiki.train.raw --evaluation wiki.valid.raw --stats DIR --results FILE

Every layer gets a random share of its own parameters, from few to all, and all of them together store one of the shares
`--keep`, in turn. The size alone would order models of many sizes, but not those of one; its correlation is printed
beside. Allocations in FILE of the same model, texts and settings are not measured again, so an interrupted run goes on
where it was.
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
from gfwsvd.calibration import Statistics
from gfwsvd.logits import ReferenceLogits
from gfwsvd.progress import bar
from gfwsvd.ranks import Candidate
from gfwsvd.track import Track, silent

LEAST_SHARE = 0.05  # below it some layers have no rank
MEASURED = {"kl": "KL(dense || compressed)", "loss_increase": "increase of log perplexity"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    setting.add_arguments(parser)
    predicting = [name for name, row in gfwsvd.METHODS.items() if row.predicts_loss]
    parser.add_argument("--method", choices=predicting, default="gfwsvd")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.9, 0.75, 0.6], help="sizes to draw at")
    parser.add_argument("--allocations", type=int, default=30, help="of all sizes together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="also draw measured against predicted losses into this PNG file")
    arguments = parser.parse_args()

    made = record.provenance()
    prepared = setting.prepare(arguments)
    about = {
        **prepared.about,
        "method": arguments.method,
        "seed": arguments.seed,
        "keeps": arguments.keep,
        "drawn": "equal size",
    }
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
    print(table(rows))
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
    """Compresses a copy of `model` at each of the random allocations `numbers`, of the sizes `keeps` in turn, and
    measures what that costs."""
    if not numbers:
        return
    layers = {
        name: Candidate(layer.d_out, layer.d_in, torch.zeros(0), storage == "pivoted")
        for name, layer in statistics.layers.items()
    }
    dense = copy.deepcopy(model).to(dtype)
    reference, before = ReferenceLogits(dense, windows), gfwsvd.evaluate(dense, windows).perplexity
    del dense
    for number in track(numbers, f"{len(numbers)} random allocations"):
        keep = keeps[number % len(keeps)]
        shares = random_shares(layers, keep, random.Random(f"{seed} {number}"))
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


def random_shares(layers: Mapping[str, Candidate], keep: float, generator: random.Random) -> dict[str, float]:
    """A share for each layer, from `LEAST_SHARE` to 1, with which all together store `keep` or a little less.

    They are uniform over twice that range, shifted alike and clipped: some layers are dense, some almost gone.
    """
    levels = {name: generator.uniform(-1, 1) for name in layers}
    budget = keep * sum(layer.dense for layer in layers.values())

    def shares(shift: float) -> dict[str, float]:
        return {name: min(1.0, max(LEAST_SHARE, level + shift)) for name, level in levels.items()}

    def stored(shift: float) -> int:
        most = {name: int(share * layers[name].dense) for name, share in shares(shift).items()}
        return sum(layer.stored(layer.states(1, most[name])[-1]) for name, layer in layers.items())

    fits, exceeds = -1.0, 2.0  # all at the least share, and all dense
    for _ in range(30):
        middle = (fits + exceeds) / 2
        fits, exceeds = (middle, exceeds) if stored(middle) <= budget else (fits, middle)
    return shares(fits)


def correlation(rows: Sequence[Mapping[str, Any]], key: str, by: str = "predicted_loss") -> float:
    """Spearman's, of what the rows have as `by` with what was measured as `key`; 0 where all are equal."""
    pairs = torch.tensor([(row[by], row[key]) for row in rows], dtype=torch.float64)
    ranks = (pairs[:, None] - pairs).sign().sum(1)  # with mean zero; equal values share one
    return torch.cosine_similarity(*ranks.T, dim=0).item()


def by_size(rows: Iterable[Mapping[str, Any]]) -> dict[float, list[Mapping[str, Any]]]:
    """The rows of each size, the largest first."""
    sizes = sorted({row["keep"] for row in rows}, reverse=True)
    return {keep: [row for row in rows if row["keep"] == keep] for keep in sizes}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Spearman's correlations with what was measured, per size and in all: of the predicted loss, of a small size."""
    lines = [f"{'Spearman, with':32} {'keep':>5} {'allocations':>11} {'predicted loss':>14} {'size alone':>10}"]
    for key, name in MEASURED.items():
        for keep, group in [*by_size(rows).items(), ("all", rows)]:
            predicted, size = correlation(group, key), -correlation(group, key, by="kept")
            lines.append(f"{name:32} {keep:>5} {len(group):>11} {predicted:>14.3f} {size:>10.3f}")
    return "\n".join(lines)


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Measured against predicted losses, logarithmic, with the diagonal; a loss that did not rise is left out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(MEASURED), figsize=(10, 4.5), layout="constrained")
    for panel, (key, name) in zip(panels, MEASURED.items(), strict=True):
        risen = [row for row in rows if row["predicted_loss"] > 0 and row[key] > 0]
        for keep, group in by_size(rows).items():
            points = [row for row in group if row in risen]
            label = f"keep {keep:g}: Spearman {correlation(group, key):.3f}"
            panel.plot([row["predicted_loss"] for row in points], [row[key] for row in points], "o", label=label)
        if risen:
            panel.axline((risen[0]["predicted_loss"],) * 2, slope=1, color="gray", linestyle=":", label="as predicted")
            panel.legend()
        panel.set(xscale="log", yscale="log", xlabel="predicted loss, nats per token", ylabel=f"{name}, nats per token")
        panel.set_title(f"{len(rows)} allocations, all sizes: Spearman {correlation(rows, key):.3f}")
    figure.savefig(path, format="png")


def _rows(results: Path, about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of `results` that were made with the same model, texts and settings."""
    return [row for row in record.read(results) if all(row.get(key) == value for key, value in about.items())]


if __name__ == "__main__":
    main()
