"""What the benchmarks of methods and ratios share: rows that are measured once, their tables and pictures."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

import gfwsvd
from benchmarks import record
from gfwsvd.batches import data_sha256
from gfwsvd.calibration import Batch
from gfwsvd.progress import bar
from gfwsvd.sweep import Run

Row = dict[str, Any]
Points = list[tuple[float, float]]


def statistics_in(folder: Path, model: nn.Module, batches: list[Batch], **options: Any) -> gfwsvd.Statistics:
    """The statistics in `folder`, collected there first where it is new; they must be those of `batches`."""
    if not folder.exists():
        gfwsvd.save_statistics(gfwsvd.calibrate(model, batches, track=bar, **options), folder)
    statistics, _ = gfwsvd.load_statistics(folder)
    if statistics.data_sha256 != data_sha256(batches):
        raise SystemExit(f"{folder} is not of this text, in these sequences; name another directory")
    return statistics


def complete(
    results: Path,
    about: Row,
    made: Row,
    runs: Iterable[Run],
    *,
    dense: Callable[[], Row],
    compressed: Callable[[list[Run]], Iterable[Row]],
    shown: Sequence[str],
) -> list[Row]:
    """The rows in `results` of the model, texts and settings `about`, with those of the dense model and of `runs`.

    Only what is not there is measured, and added row by row, so that an interrupted run goes on where it was.

    Args:
        made: `record.provenance()`, added to new rows.
        shown: the figures of a row to print as it comes.
    """
    rows = _rows(results, about)
    if not any(row["method"] == "dense" for row in rows):
        record.append(results, {**dense(), **about, **made})
    done = {Run(row["method"], row["ranks"], row["keep"], storage(row)) for row in rows if row["method"] != "dense"}
    for row in compressed([run for run in runs if run not in done]):
        record.append(results, {**row, **about, **made})
        figures = ", ".join(f"{name} {row[name]:.3f}" for name in shown)
        print(f"{row['name']}, keep {row['keep']}: {figures}", flush=True)
    return _rows(results, about)


def _rows(results: Path, about: Row) -> list[Row]:
    return [row for row in record.read(results) if all(row.get(key) == value for key, value in about.items())]


def dense_of(rows: Iterable[Row]) -> Row:
    """The row of the uncompressed model."""
    return next(row for row in rows if row["method"] == "dense")


def storage(row: Row) -> str:
    """How the low-rank layers of a row are stored; rows from before there was a choice have two factors."""
    return row.get("storage", "factors")


def markdown(corner: str, columns: Sequence[str], rows: Mapping[str, Mapping[str, str]]) -> str:
    """A Markdown table of cells by row and column name; those that are not there stay empty."""
    lines = [f"| {corner} | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    lines += [f"| {name} | {' | '.join(cells.get(column, '') for column in columns)} |" for name, cells in rows.items()]
    return "\n".join(lines) + "\n"


def plot(
    panels: Mapping[str, tuple[float, Mapping[str, Points]]], path: Path, *, ylabel: str, yscale: str = "linear"
) -> None:
    """Figures against the kept share, one panel per title with the dense model's figure and one line per name."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogFormatter

    size = (3 + 3.5 * len(panels), 4.5)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, (title, (dense, lines)) in zip(axes[0], panels.items(), strict=True):
        for name, points in lines.items():
            if points:
                axis.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        axis.axhline(dense, color="gray", linestyle=":", label="dense")
        axis.set(yscale=yscale, xlabel="weights kept in the linear layers", title=title)
        if yscale == "log":
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axes[0, 0].set_ylabel(ylabel)
    axes[0, -1].legend()
    figure.savefig(path)
