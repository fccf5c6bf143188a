"""The command `gfwsvd`: calibrate, compress, tune, eval, sweep, inspect."""

import functools
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Column, Table

from . import __version__, sources
from .calibration import CLIP, calibrate, check_settings, data_sha256
from .checkpoint import MANIFEST, read_manifest
from .checkpoint import inspect as inspect_checkpoint
from .compress import DAMPING, RANK_MULTIPLE, CompressionReport, compress
from .errors import GfwsvdError
from .evaluate import evaluate
from .folders import check_output_file, check_output_folder
from .methods import METHODS, method_named
from .options import (
    ALL_METHODS,
    DTYPES,
    FRONTIER,
    GLOBAL,
    PIVOTED,
    TEXT_HELP,
    BatchSize,
    Clip,
    Device,
    Dtype,
    Epochs,
    Exclude,
    Json,
    Keeps,
    Labels,
    LearningRate,
    Limit,
    Methods,
    Model,
    Overwrite,
    Products,
    RankWays,
    Seed,
    SeqLen,
    Sequences,
    Storages,
    Sweeps,
    Text,
    Unit,
    Window,
    one_of,
)
from .output import print_values
from .progress import bar
from .ranks import RANKS, STORAGE, check_keep, check_ranks, check_storage
from .store import JSON_NAME, load_statistics, save_statistics
from .sweep import all_runs, comparison, sweep
from .texts import text_name

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Compress language models by generalized Fisher-weighted SVD: low-rank layers that cost the loss least.",
    epilog="A first try: gfwsvd compress MODEL --text TEXT --keep 0.8 --out DIR; then: gfwsvd eval DIR --text OTHER",
)


def _mendable(command: Callable[..., None]) -> Callable[..., None]:
    """An error that the user can mend is one line on standard error and exit status 1; Ctrl-C is 130."""

    @functools.wraps(command)
    def guarded(**arguments: Any) -> None:
        try:
            command(**arguments)
        except GfwsvdError as error:
            print(f"gfwsvd: error: {error}", file=sys.stderr)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            print("gfwsvd: interrupted; nothing half-written is left", file=sys.stderr)
            raise typer.Exit(130) from error

    return guarded


@app.command("calibrate")
@_mendable
def calibrate_command(
    model: Model,
    text: Text,
    stats: Annotated[Path, typer.Option("--stats", metavar="DIR", help="where to write the statistics")],
    sequences: Sequences = 64,
    seq_len: SeqLen = 512,
    batch_size: BatchSize = 4,
    unit: Unit = "token",
    labels: Labels = "empirical",
    sweeps: Sweeps = 1,
    clip: Clip = CLIP,
    seed: Seed = 0,
    exclude: Exclude = [],  # noqa: B006 - typer copies it
    dtype: Dtype = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
    json_output: Json = False,
) -> None:
    """Collect the statistics of a model's layers once, for all methods and ratios."""
    check_settings(unit, labels, sweeps, clip)
    _check_dtype(dtype)
    check_output_folder(stats, overwrite=overwrite, marker=JSON_NAME)
    loaded, tokenizer, name = sources.load_model(model, dtype=dtype, device=device)
    batches = sources.token_batches(
        sources.load_text(text), tokenizer, sequences=sequences, seq_len=seq_len, batch_size=batch_size, seed=seed
    )
    statistics = calibrate(
        loaded, batches, unit=unit, labels=labels, sweeps=sweeps, clip=clip, seed=seed, exclude=exclude, track=bar
    )
    provenance = _provenance(name, text, sequences, seq_len)
    save_statistics(statistics, stats, provenance=provenance, overwrite=overwrite)
    summary = {
        "stats": str(stats),
        "layers": len(statistics.layers),
        "tokens": sequences * seq_len,
        "seconds": sum(statistics.seconds),
        "settings": statistics.settings,
        "unreached": list(statistics.unreached),
    }
    print_values(summary, json_output)


@app.command("compress")
@_mendable
def compress_command(
    context: typer.Context,
    model: Model,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="where to write the compressed model")],
    method: Annotated[str, typer.Option("--method", metavar=one_of(METHODS), help="how errors are weighed")] = "gfwsvd",
    keep: Annotated[
        float, typer.Option("--keep", help="stored over dense parameters of the linear layers, (0, 1]")
    ] = 0.8,
    ranks: Annotated[
        str,
        typer.Option("--ranks", metavar=one_of(RANKS), help="one share for every layer, or by predicted loss"),
    ] = "global",
    rank_multiple: Annotated[
        int, typer.Option("--rank-multiple", min=1, help="ranks are multiples of it")
    ] = RANK_MULTIPLE,
    storage: Annotated[
        str,
        typer.Option("--storage", metavar=one_of(STORAGE), help="rows and coefficients of the others, or two factors"),
    ] = "pivoted",
    damping: Annotated[
        float, typer.Option("--damping", min=0, help="added to the metrics' diagonals, relative to their mean")
    ] = DAMPING,
    stats: Annotated[
        Path | None, typer.Option("--stats", metavar="DIR", help="statistics of an earlier gfwsvd calibrate")
    ] = None,
    text: Annotated[str | None, typer.Option("--text", metavar="TEXT", help=f"calibrate now, on {TEXT_HELP}")] = None,
    sequences: Sequences = 64,
    seq_len: SeqLen = 512,
    batch_size: BatchSize = 4,
    unit: Unit = "token",
    labels: Labels = "empirical",
    sweeps: Sweeps = 1,
    clip: Clip = CLIP,
    seed: Seed = 0,
    exclude: Exclude = [],  # noqa: B006 - typer copies it
    dtype: Dtype = None,
    device: Device = "cpu",
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="also write an HTML report with plots")
    ] = None,
    overwrite: Overwrite = False,
    json_output: Json = False,
) -> None:
    """Write a smaller model: low-rank linear layers in an ordinary transformers folder.

    The options from --sequences to --exclude belong to a calibration on --text and are refused with --stats: statistics
    bring their own. Method svd needs neither.
    """
    needs = method_named(method).needs
    check_keep(keep)
    check_ranks(ranks, rank_multiple)
    check_storage(storage)
    check_settings(unit, labels, sweeps, clip)
    _check_dtype(dtype)
    if stats is None and text is None and needs:
        raise GfwsvdError(f"method {method} needs calibration: give either --stats DIR or --text TEXT, and not both")
    if stats is not None:
        _check_no_calibration(context)
    check_output_folder(out, overwrite=overwrite, marker="config.json")
    if report is not None:
        check_output_file(report)
    statistics, provenance = (None, {}) if stats is None else load_statistics(stats)
    loaded, tokenizer, name = sources.load_model(model, dtype=dtype, device=device)
    batches = None
    if text is not None:
        provenance = _provenance(name, text, sequences, seq_len)
        batches = sources.token_batches(
            sources.load_text(text), tokenizer, sequences=sequences, seq_len=seq_len, batch_size=batch_size, seed=seed
        )
    result = compress(
        loaded,
        batches,
        method=method,
        keep=keep,
        ranks=ranks,
        rank_multiple=rank_multiple,
        storage=storage,
        damping=damping,
        statistics=statistics,
        unit=unit,
        labels=labels,
        sweeps=sweeps,
        clip=clip,
        seed=seed,
        exclude=exclude,
        track=bar,
    )
    result.provenance |= {"model": name, **provenance, **_versions()}
    from .hf import save_pretrained

    save_pretrained(loaded, out, report=result, tokenizer=tokenizer, overwrite=overwrite)
    if report is not None:
        from .report import write_report

        write_report(report, title=f"{name}, {method}, keep {keep}", reports=[result])
    print_values(_summary(result, out), json_output)


@app.command("tune")
@_mendable
def tune_command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="a folder that gfwsvd compress wrote")],
    text: Text,
    out: Annotated[Path, typer.Option("--out", metavar="DIR2", help="where to write the trained model")],
    reference: Annotated[
        str | None,
        typer.Option("--reference", metavar="MODEL", help="the dense model, to learn its predictions: give it"),
    ] = None,
    sequences: Sequences = 256,
    seq_len: SeqLen = 512,
    batch_size: BatchSize = 4,
    epochs: Epochs = 1,
    learning_rate: LearningRate = 1e-4,
    seed: Seed = 0,
    dtype: Products = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
    json_output: Json = False,
) -> None:
    """Train the factors of a compressed model for a while, to recover quality at the same size.

    Its checkpoints are in DIR2.tune until DIR2 is written: the same command goes on after an interruption. The end of
    the text is held out; if the training does not lower the loss there, DIR2 gets the factors of DIR.
    """
    from .hf import save_pretrained
    from .tune import check_training, training_tokens, tune

    check_training(epochs, learning_rate, dtype)
    target = check_output_folder(out, overwrite=overwrite, marker="config.json")
    inspect_checkpoint(directory)
    if (details := read_manifest(directory).get("report")) is None:
        raise GfwsvdError(f"{directory} has no {MANIFEST}, it was saved again: give the folder of gfwsvd compress")
    report = CompressionReport.from_json(details)
    work = target.with_name(f"{target.name}.tune")
    loaded, tokenizer, name = sources.load_model(str(directory), device=device)
    dense, dense_name = None, None
    if reference is not None:
        dense, _, dense_name = sources.load_model(reference, device=device)
    train, heldout = training_tokens(
        sources.load_text(text), tokenizer, sequences=sequences, seq_len=seq_len, seed=seed
    )
    try:
        tuning = tune(
            loaded,
            train,
            heldout,
            work,
            reference=dense,
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            seed=seed,
            dtype=dtype,
            track=bar,
        )
    except KeyboardInterrupt:
        print(f"gfwsvd: the same command goes on from the last checkpoint in {work}", file=sys.stderr)
        raise
    about = {"source": name, "text": text_name(text), "reference": dense_name, **tuning.to_json(), **_versions()}
    report.provenance["tuned"] = [*report.provenance.get("tuned", ()), about]
    save_pretrained(loaded, out, report=report, tokenizer=tokenizer, overwrite=overwrite)
    shutil.rmtree(work)
    if not tuning.improved:
        print(f"gfwsvd: the training did not lower the held-out loss: {out} has the factors of {name}", file=sys.stderr)
    print_values({"out": str(out), **about}, json_output)


@app.command("eval")
@_mendable
def eval_command(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_DIR", help="a model, or what gfwsvd compress wrote")],
    text: Text,
    window: Window = 1024,
    limit: Limit = None,
    reference: Annotated[
        str | None, typer.Option("--reference", metavar="MODEL", help="the dense model, for KL and top-1 agreement")
    ] = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    json_output: Json = False,
) -> None:
    """Measure perplexity on a text, and how far a model is from a reference."""
    _check_dtype(dtype)
    loaded, tokenizer, _ = sources.load_model(model, dtype=dtype, device=device)
    tokens = sources.windows(sources.load_text(text), tokenizer, window=window, limit=limit)
    dense = sources.load_model(reference, dtype=dtype, device=device)[0] if reference is not None else None
    print_values(evaluate(loaded, tokens, reference=dense, track=bar).to_json(), json_output)


@app.command("sweep")
@_mendable
def sweep_command(
    model: Model,
    stats: Annotated[Path, typer.Option("--stats", metavar="DIR", help="statistics of gfwsvd calibrate")],
    text: Annotated[str, typer.Option("--text", metavar="TEXT", help=f"evaluation text: {TEXT_HELP}")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="rows.jsonl and report.html; goes on where it was")],
    method: Methods = ALL_METHODS,
    keep: Keeps = FRONTIER,
    ranks: RankWays = GLOBAL,
    storage: Storages = PIVOTED,
    window: Window = 1024,
    limit: Limit = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    json_output: Json = False,
) -> None:
    """Compare methods and ratios on one text: perplexity and distance from the dense model, in a table and a picture.

    Every row is written as soon as it is known. The same command again computes only what is missing.
    """
    statistics, provenance = load_statistics(stats)
    runs = all_runs(method, ranks, keep, storage)
    _check_dtype(dtype)
    check_output_file(out / "report.html")
    loaded, tokenizer, name = sources.load_model(model, dtype=dtype, device=device)
    tokens = sources.windows(sources.load_text(text), tokenizer, window=window, limit=limit)
    about = {
        "model": name,
        "model_sha256": statistics.model_sha256,
        "calibration": {**provenance, **statistics.settings, "data_sha256": statistics.data_sha256},
        "evaluation": text_name(text),
        "evaluation_sha256": data_sha256([{"input_ids": tokens}]),
        "windows": list(tokens.shape),
        "dtype": dtype,
        "gfwsvd": __version__,
    }
    rows = sweep(loaded, statistics, runs, tokens, rows_file=out / "rows.jsonl", about=about, track=bar)
    from .report import write_report

    write_report(out / "report.html", title=f"{name}: quality against size", reports=[], evaluations=rows)
    if json_output:
        print_values({"out": str(out), "rows": rows}, json_output)
    else:
        Console().print(comparison(rows))
        print_values({"rows": str(out / "rows.jsonl"), "report": str(out / "report.html")}, json_output)


@app.command("inspect")
@_mendable
def inspect_command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="a folder that gfwsvd compress wrote")],
    json_output: Json = False,
) -> None:
    """Show what a compressed model holds: layers, ranks, sizes, and where it comes from."""
    found = inspect_checkpoint(directory)
    if json_output:
        print_values(found, json_output)
        return
    table = Table(Column("layer", overflow="fold"), "kind", "rank", "stored", "dense", "predicted loss")
    for layer in found["layers"]:
        loss = layer.get("predicted_loss")
        table.add_row(
            layer["name"],
            layer["kind"],
            str(layer["rank"] or ""),
            f"{layer['stored']:,}",
            f"{layer['dense']:,}",
            "" if loss is None else f"{loss:.2e}",
        )
    Console().print(table)
    print_values({key: value for key, value in found.items() if key != "layers"}, json_output)


def _check_no_calibration(context: typer.Context) -> None:
    """With statistics, an option of the calibration would have no effect; `exclude` would leave out no layer."""
    names = ("text", "sequences", "seq_len", "batch_size", "unit", "labels", "sweeps", "clip", "seed", "exclude")
    given = [name for name in names if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise GfwsvdError(
            f"the statistics of --stats bring their own calibration, got {options} as well: give either --stats DIR or "
            "--text TEXT, and not both"
        )


def _check_dtype(dtype: str | None) -> None:
    if dtype not in (None, *DTYPES):
        raise GfwsvdError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")


def _provenance(model: str, text: str, sequences: int, seq_len: int) -> dict[str, Any]:
    tokens = sequences * seq_len
    return {"model": model, "text": text_name(text), "sequences": sequences, "seq_len": seq_len, "tokens": tokens}


def _versions() -> dict[str, str]:
    import transformers

    return {
        "gfwsvd": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _summary(result: CompressionReport, out: Path) -> dict[str, Any]:
    details = result.to_json()
    return {
        "out": str(out),
        **{key: value for key, value in details.items() if key not in ("layers", "provenance")},
        "kinds": dict(Counter(layer.kind for layer in result.layers)),
        "predicted_loss": sum(layer.predicted_loss for layer in result.layers) if result.predicts_loss else None,
        "provenance": details["provenance"],
    }


def main() -> None:
    """Runs the command line."""
    app()
