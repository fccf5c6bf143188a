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
from benchmarks import frontier, record
from benchmarks.packaged import packaged_smollm2
from gfwsvd.progress import bar
from gfwsvd.ranks import RANKS, STORAGE
from gfwsvd.sweep import all_runs, comparison, compressed_rows, dense_row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="see gfwsvd.load_model; default: SmolLM2-135M")
    parser.add_argument("--calibration", required=True, help="calibration text, see gfwsvd.load_text")
    parser.add_argument("--evaluation", required=True, help="evaluation text")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--limit", type=int, default=40, help="evaluation windows")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the evaluation")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.6, 0.9])
    parser.add_argument("--methods", nargs="+", choices=list(gfwsvd.METHODS), default=list(gfwsvd.METHODS))
    parser.add_argument("--ranks", nargs="+", choices=RANKS, default=list(RANKS))
    parser.add_argument("--storage", nargs="+", choices=STORAGE, default=["pivoted"], help="of low-rank layers")
    parser.add_argument("--stats", type=Path, required=True, help="statistics directory, made if it is not there")
    parser.add_argument("--results", type=Path, required=True, help="JSON lines to add to")
    parser.add_argument("--plot", type=Path, help="also draw perplexity against the ratio into this file")
    parser.add_argument("--markdown", type=Path, help="also write the rows as a Markdown table into this file")
    arguments = parser.parse_args()

    made = record.provenance()  # now: the sources may be another commit's by the time the last row is written
    model, tokenizer, name = gfwsvd.load_model(arguments.model or str(packaged_smollm2()))
    batches = gfwsvd.token_batches(
        gfwsvd.load_text(arguments.calibration),
        tokenizer,
        sequences=arguments.sequences,
        seq_len=arguments.seq_len,
        batch_size=4,
        seed=0,
    )
    statistics = frontier.statistics_in(arguments.stats, model, batches)
    windows = gfwsvd.windows(
        gfwsvd.load_text(arguments.evaluation), tokenizer, window=arguments.window, limit=arguments.limit
    )
    dtype = getattr(torch, arguments.dtype)
    about = {
        "model": name,
        "calibration": Path(arguments.calibration).name,
        "calibration_tokens": statistics.num_sequences * arguments.seq_len,
        "calibration_sha256": statistics.data_sha256,
        "settings": statistics.settings,
        "evaluation": Path(arguments.evaluation).name,
        "windows": list(windows.shape),
        "evaluation_dtype": arguments.dtype,
    }
    rows = frontier.complete(
        arguments.results,
        about,
        made,
        all_runs(arguments.methods, arguments.ranks, arguments.keep, arguments.storage),
        dense=lambda: dense_row(model, windows, track=bar, dtype=dtype),
        compressed=lambda runs: (
            row for row, _ in compressed_rows(model, statistics, runs, windows, track=bar, dtype=dtype)
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
