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
from benchmarks import frontier, record, setting
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
    dtype = getattr(torch, arguments.dtype)
    rows = frontier.complete(
        arguments.results,
        prepared.about,
        made,
        all_runs(arguments.methods, arguments.ranks, arguments.keep, arguments.storage),
        dense=lambda: dense_row(prepared.model, prepared.windows, track=bar, dtype=dtype),
        compressed=lambda runs: (
            row
            for row, _ in compressed_rows(
                prepared.model, prepared.statistics, runs, prepared.windows, track=bar, dtype=dtype
            )
        ),
        shown=("perplexity", "kl"),
    )
    Console().print(comparison(sorted(rows, key=lambda row: (-row["keep"], row["perplexity"]))))
    if arguments.plot is not None:
        plot(rows, arguments.plot)
    if arguments.markdown is not None:
        arguments.markdown.write_text(markdown(rows), encoding="utf-8")


def _series(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The compressed rows by method and storage, in the order of both tables, under what to call them."""
    return {
        f"{method}{', two factors' if storage == 'factors' else ''}": found
        for method in gfwsvd.METHODS
        for storage in STORAGE
        if (found := [row for row in rows if (row["method"], frontier.storage(row)) == (method, storage)])
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """Perplexity and KL to the dense model: rows by method and storage, columns by allocation and ratio."""
    dense = frontier.dense_of(rows)
    found = {(row["ranks"], row["keep"]) for row in rows if row is not dense}
    columns = sorted(found, key=lambda column: (RANKS.index(column[0]), -column[1]))
    cells = {
        name: {f"{row['ranks']} {row['keep']}": f"{_figure(row['perplexity'])} ({row['kl']:.2f})" for row in series}
        for name, series in _series(rows).items()
    }
    return frontier.markdown(f"dense {dense['perplexity']:.2f}", [f"{ranks} {keep}" for ranks, keep in columns], cells)


def _figure(perplexity: float) -> str:
    return f"{perplexity:.1f}" if perplexity < 1000 else f"{perplexity:.0e}".replace("e+0", "e")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity against the kept share, one line per method and storage, one panel per rank allocation."""
    dense = frontier.dense_of(rows)["perplexity"]
    panels = {
        f"{ranks} ranks": (
            dense,
            {
                name: [(row["kept"], row["perplexity"]) for row in series if row["ranks"] == ranks]
                for name, series in _series(rows).items()
            },
        )
        for ranks in RANKS
    }
    frontier.plot(panels, path, ylabel="perplexity", yscale="log")


if __name__ == "__main__":
    main()
