"""The size-quality frontier: several methods, allocations and ratios from one collection of statistics."""

import copy
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from .calibration import Batch, Statistics
from .compress import DAMPING, compress
from .errors import GfwsvdError
from .evaluate import evaluate
from .gains import check_gains
from .logits import ReferenceLogits
from .methods import method_named
from .outcome import CompressionReport
from .ranks import check_keep, check_ranks, check_storage
from .refine import check_rounds, takes_rounds
from .track import Track, silent


@dataclass(frozen=True)
class Run:
    """What to compress, as `compress` takes it: a method, a way to allocate ranks, a ratio, and so on."""

    method: str
    ranks: str
    keep: float
    storage: str = "pivoted"
    damping: float = DAMPING
    guard: bool = True
    rounds: int = 0
    gains: int = 0

    @property
    def name(self) -> str:
        return ", ".join((self.method, f"{self.ranks} ranks", *marks(asdict(self))))


def marks(row: Mapping[str, Any]) -> list[str]:
    """What tells a run, or a row of one, from others of its method, ranks and ratio; what is missing is the default."""
    rounds, gains, damping = row.get("rounds") or 0, row.get("gains") or 0, row.get("damping", DAMPING)
    found = {
        "two factors": row.get("storage") == "factors",
        f"damping {damping}": damping != DAMPING,
        "no guard": not row.get("guard", True),
        f"{rounds} round{'s' * (rounds > 1)}": rounds > 0,
        f"{gains} gain{'s' * (gains > 1)}": gains > 0,
    }
    return [mark for mark, is_on in found.items() if is_on]


def all_runs(
    methods: Iterable[str],
    ranks: Iterable[str],
    keeps: Iterable[float],
    storage: Iterable[str] = ("pivoted",),
    *,
    rounds: int = 0,
    gains: int = 0,
) -> list[Run]:
    """Every combination once, ratio by ratio, each followed by one with those of `rounds` and `gains` that its method
    and ranks take.

    Raises:
        GfwsvdError: for a combination that `compress` would not take, and for rounds or gains that none takes.
    """
    combinations = itertools.product(keeps, ranks, methods, storage)
    plain = [Run(method, way, keep, form) for keep, way, method, form in combinations]
    runs = list(dict.fromkeys(each for run in plain for each in (run, _with(run, rounds, gains))))
    for run in runs:
        check_keep(run.keep)
        check_ranks(run.ranks, 1)
        check_storage(run.storage)
        check_rounds(run.rounds, run.ranks, method_named(run.method))
        check_gains(run.gains, method_named(run.method))
    for asked, of in ((rounds, "rounds"), (gains, "gains")):
        if asked and not any(getattr(run, of) for run in runs):
            raise GfwsvdError(
                f"no combination of these methods and ranks takes {of}: rounds ask for global ranks, and both for a "
                f"method that predicts the loss; add one, or leave out the {of}"
            )
    return runs


def _with(run: Run, rounds: int, gains: int) -> Run:
    """The run with those of `rounds` and `gains` that it can take."""
    row = method_named(run.method)
    return replace(run, rounds=rounds * takes_rounds(run.ranks, row), gains=gains * row.predicts_loss)


def dense_row(
    model: nn.Module, windows: Tensor, *, track: Track = silent, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """The row of the uncompressed model, which all others are compared with."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    found = evaluate(copy.deepcopy(model).to(dtype), windows, track=track).to_json()
    return {"name": "dense", "method": "dense", "keep": 1.0, "kept": 1.0, "model_stored": parameters, **found}


def compressed_rows(
    model: nn.Module,
    statistics: Statistics,
    runs: Iterable[Run],
    windows: Tensor,
    *,
    batches: Sequence[Batch] = (),
    track: Track = silent,
    dtype: torch.dtype | None = None,
    keep_model: Callable[[Run, nn.Module, CompressionReport], nn.Module] | None = None,
) -> Iterator[tuple[dict[str, Any], CompressionReport]]:
    """Compresses a copy of `model` for each run and evaluates it; yields its row and its report as they come.

    Args:
        runs, batches: see `compressed_models`.
        dtype: of the models when they are evaluated, the dense one too; default: the model's own.
        keep_model: called with each compressed model; what it returns is evaluated in its place.
    """
    reference = None
    for run, compressed, report, row in compressed_models(model, statistics, runs, batches=batches, track=track):
        reference = reference or ReferenceLogits(copy.deepcopy(model).to(dtype), windows, track=track)
        if keep_model is not None:
            compressed = keep_model(run, compressed, report)
        found = evaluate(compressed.to(dtype), windows, reference=reference, track=track).to_json()
        yield {**row, **found}, report


def compressed_models(
    model: nn.Module,
    statistics: Statistics,
    runs: Iterable[Run],
    *,
    batches: Sequence[Batch] = (),
    track: Track = silent,
) -> Iterator[tuple[Run, nn.Module, CompressionReport, dict[str, Any]]]:
    """Compresses a copy of `model` for each run; yields the run, the copy, its report, and what a row says of it before
    any evaluation, as they come.

    Ranks are not rounded, so that all runs of one `keep` store the same to a fraction of a percent.

    Args:
        batches: what runs with rounds or gains measure the loss on.
    """
    for run in runs:
        compressed = copy.deepcopy(model)
        began = time.perf_counter()
        report = compress(compressed, batches, **asdict(run), rank_multiple=1, statistics=statistics, track=track)
        row = {
            "name": run.name,
            **asdict(run),
            "kept": report.kept,
            "stored": report.stored,
            "model_stored": report.model_stored,
            "predicted_loss": sum(layer.predicted_loss for layer in report.layers) if report.predicts_loss else None,
            "compress_seconds": time.perf_counter() - began,
        }
        yield run, compressed, report, row


def sweep(
    model: nn.Module,
    statistics: Statistics,
    runs: Sequence[Run],
    windows: Tensor,
    *,
    rows_file: Path,
    about: Mapping[str, Any],
    batches: Sequence[Batch] = (),
    track: Track = silent,
    dtype: torch.dtype | None = None,
) -> list[dict[str, Any]]:
    """The rows of the dense model and of all runs, each added to `rows_file` (JSON lines) once it is known.

    Rows that are there already, of the same `about`, are not computed again, so that an interrupted sweep goes on where
    it was.

    Args:
        about: what else the figures depend on; its "measured_on" belongs to rows with rounds or gains alone, so that
            the others are the same with it and without.
        batches: see `compressed_models`.

    Raises:
        GfwsvdError: when `rows_file` holds something else or cannot be written; what `compress` and `evaluate` raise.
    """
    about = json.loads(json.dumps(dict(about)))  # as it will be read back
    plain = {key: value for key, value in about.items() if key != "measured_on"}

    def about_row(row: Mapping[str, Any]) -> Mapping[str, Any]:
        return about if row.get("rounds") or row.get("gains") else plain

    found = {_run_of(row): row for row in read_rows(rows_file) if row.get("about") == about_row(row)}
    if None not in found:
        found[None] = _append(rows_file, {**dense_row(model, windows, track=track, dtype=dtype), "about": plain})
    missing = [run for run in runs if run not in found]
    settings: dict[str, Any] = {"batches": batches, "track": track, "dtype": dtype}
    for row, _ in compressed_rows(model, statistics, missing, windows, **settings):
        found[_run_of(row)] = _append(rows_file, {**row, "about": about_row(row)})
    return [found[run] for run in (None, *runs)]


def read_rows(rows_file: Path) -> list[dict[str, Any]]:
    """The rows of a file, none where there is no file yet; a last line that was cut short does not count."""
    if not rows_file.exists():
        return []
    lines = rows_file.read_text(encoding="utf-8").split("\n")
    try:
        return [json.loads(line) for line in lines[:-1] if line]
    except ValueError as error:
        raise GfwsvdError(f"{rows_file} holds a line that is not JSON ({error}); name another folder") from error


def _run_of(row: Mapping[str, Any]) -> Run | None:
    """The run that a row is of; None for the dense model."""
    if row["method"] == "dense":
        return None
    return Run(**{field.name: row.get(field.name, field.default) for field in fields(Run)})


def _append(rows_file: Path, row: dict[str, Any]) -> dict[str, Any]:
    try:
        rows_file.parent.mkdir(parents=True, exist_ok=True)
        whole = rows_file.read_bytes() if rows_file.exists() else b""
        with rows_file.open("r+b" if rows_file.exists() else "wb") as file:
            file.truncate(whole.rfind(b"\n") + 1)  # what was cut short
            file.seek(0, os.SEEK_END)
            file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise GfwsvdError(
            f"could not add a row to {rows_file}: {error}; the rows before are there, and the same command goes on"
        ) from error
    return row


def comparison(rows: Iterable[Mapping[str, Any]]) -> Table:
    """The rows as a table for people."""
    table = Table(
        caption="KL: to the dense model, nats a token; top-1: same likeliest token as dense; kept: weights of linear "
        "layers; size: all parameters; s: to compress, calibration aside.",
        caption_justify="left",
    )
    table.add_column("model")  # wraps, so that numbers are shown whole
    for heading in ("perplexity", "KL", "top-1", "kept", "size", "s"):
        table.add_column(heading, no_wrap=True)
    for row in rows:
        dense = row["method"] == "dense"
        table.add_row(
            row["name"].replace(" ranks", ""),
            f"{row['perplexity']:.2f}" if row["perplexity"] < 1e4 else f"{row['perplexity']:.0e}",
            "" if dense else f"{row['kl']:.3f}",
            "" if dense else f"{row['top1']:.1%}",
            f"{row['kept']:.1%}",
            f"{row['model_stored'] / 1e6:.1f} M",
            "" if dense else f"{row['compress_seconds']:.0f}",
        )
    return table
