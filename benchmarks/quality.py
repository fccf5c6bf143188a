"""Perplexity of every method, rank allocation and ratio, from one collection of statistics and on one text.

    python -m benchmarks.quality --calibration wiki.train.raw --evaluation wiki.valid.raw --stats DIR --results FILE

Rows of the same model, texts and settings in FILE are not computed again, so an interrupted run goes on where it was.
`keep` is the share of the linear layers' weights that is stored; ranks are not rounded to multiples, so that methods
store the same.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import gfwsvd
from benchmarks import record, setting
from gfwsvd.progress import bar
from gfwsvd.ranks import RANKS, STORAGE
from gfwsvd.sweep import all_runs, comparison, compressed_rows, dense_row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    setting.add_arguments(parser)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.6, 0.9])
    parser.add_argument("--methods", nargs="+", choices=list(gfwsvd.METHODS), default=list(gfwsvd.METHODS))
    parser.add_argument("--ranks", nargs="+", choices=RANKS, default=list(RANKS))
    parser.add_argument("--storage", nargs="+", choices=STORAGE, default=["pivoted"], help="of low-rank layers")
    parser.add_argument("--plot", type=Path, help="also draw perplexity against the ratio into this file")
    parser.add_argument("--markdown", type=Path, help="also write the rows as a Markdown table into this file")
    arguments = parser.parse_args()

    made = record.provenance()  # now: the sources may be another commit's by the time the last row is written
    prepared = setting.prepare(arguments)
    model, statistics, windows, about = prepared.model, prepared.statistics, prepared.windows, prepared.about
    dtype = getattr(torch, arguments.dtype)
    rows = _rows(arguments.results, about)
    done = {(row["method"], row.get("ranks"), row["keep"], _storage(row)) for row in rows}
    if not any(row["method"] == "dense" for row in rows):
        record.append(arguments.results, {**dense_row(model, windows, track=bar, dtype=dtype), **about, **made})
    runs = [
        run
        for run in all_runs(arguments.methods, arguments.ranks, arguments.keep, arguments.storage)
        if (run.method, run.ranks, run.keep, run.storage) not in done
    ]
    for row, _ in compressed_rows(model, statistics, runs, windows, track=bar, dtype=dtype):
        record.append(arguments.results, {**row, **about, **made})
        print(f"{row['name']}, keep {row['keep']}: perplexity {row['perplexity']:.2f}, KL {row['kl']:.3f}", flush=True)
    rows = _rows(arguments.results, about)
    Console().print(comparison(sorted(rows, key=lambda row: (-row["keep"], row["perplexity"]))))
    if arguments.plot is not None:
        plot(rows, arguments.plot)
    if arguments.markdown is not None:
        arguments.markdown.write_text(markdown(rows), encoding="utf-8")


def _rows(results: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of `results` that were made with the same model, texts and settings."""
    return [row for row in record.read(results) if all(row.get(key) == value for key, value in about.items())]


def _storage(row: dict[str, Any]) -> str:
    """How the low-rank layers of a row are stored; rows from before there was a choice have two factors."""
    return row.get("storage", "factors")


def _series(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The compressed rows by method and storage, in the order of both tables, under what to call them."""
    return {
        f"{method}{', two factors' if storage == 'factors' else ''}": found
        for method in gfwsvd.METHODS
        for storage in STORAGE
        if (found := [row for row in rows if (row["method"], _storage(row)) == (method, storage)])
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """Perplexity and KL to the dense model: rows by method and storage, columns by allocation and ratio."""
    dense = next(row for row in rows if row["method"] == "dense")
    found = {(row["ranks"], row["keep"]) for row in rows if row is not dense}
    columns = sorted(found, key=lambda column: (RANKS.index(column[0]), -column[1]))
    lines = [
        f"| dense {dense['perplexity']:.2f} | {' | '.join(f'{ranks} {keep}' for ranks, keep in columns)} |",
        f"|---|{'---|' * len(columns)}",
    ]
    for name, series in _series(rows).items():
        cells = {(row["ranks"], row["keep"]): f"{_figure(row['perplexity'])} ({row['kl']:.2f})" for row in series}
        lines.append(f"| {name} | {' | '.join(cells.get(column, '') for column in columns)} |")
    return "\n".join(lines) + "\n"


def _figure(perplexity: float) -> str:
    return f"{perplexity:.1f}" if perplexity < 1000 else f"{perplexity:.0e}".replace("e+0", "e")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity against the kept share, one line per method and storage, one panel per rank allocation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(RANKS), figsize=(9, 4), sharey=True, layout="constrained")
    dense = next(row["perplexity"] for row in rows if row["method"] == "dense")
    for panel, ranks in zip(panels, RANKS, strict=True):
        for name, series in _series(rows).items():
            points = sorted((row["kept"], row["perplexity"]) for row in series if row["ranks"] == ranks)
            if points:
                panel.plot(*zip(*points, strict=True), marker="o", label=name)
        panel.axhline(dense, color="gray", linestyle=":", label="dense")
        panel.set(yscale="log", xlabel="weights kept in the linear layers", title=f"{ranks} ranks")
    panels[0].set_ylabel("perplexity")
    panels[-1].legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
