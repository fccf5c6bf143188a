"""The command `gfwsvd`: calibrate, compress, tune, convert, latency, eval, sweep, serve, inspect."""

import functools
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Column, Table

from . import __version__, sources
from .bounds import check_bounds, parse_bounds
from .calibration import CLIP, calibrate, check_settings, data_sha256
from .checkpoint import MANIFEST, read_manifest
from .checkpoint import inspect as inspect_checkpoint
from .checks import check_stride
from .compress import DAMPING, RANK_MULTIPLE, CompressionReport, compress
from .errors import GfwsvdError
from .evaluate import evaluate
from .folders import check_output_file, check_output_folder
from .latency import STEP, LatencyTable, measure_latency
from .methods import METHODS, method_named
from .options import (
    ALL_METHODS,
    DTYPES,
    FRONTIER,
    GLOBAL,
    PIVOTED,
    TEXT_HELP,
    BatchSize,
    Bounds,
    Clip,
    Device,
    Dtype,
    Epochs,
    EvalBatchSize,
    EvalLimit,
    Exclude,
    Fewshot,
    Json,
    Keeps,
    Labels,
    Latency,
    LearningRate,
    Limit,
    Methods,
    Model,
    OptionalText,
    Overwrite,
    Products,
    RankWays,
    Seed,
    SeqLen,
    Sequences,
    Storages,
    Stride,
    Sweeps,
    TaskFolder,
    TaskNames,
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
from .tasks import find_tasks, run_tasks, task_table
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
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="stop sweeping once no layer's right factor turns by more (a sine)")
    ] = 0.0,
    online: Annotated[
        bool, typer.Option("--online", help="within a sweep, weigh samples by the factors of those before them")
    ] = False,
    clip: Clip = CLIP,
    seed: Seed = 0,
    heldout: Annotated[
        int | None, typer.Option("--heldout", min=0, help="sequences to judge the metrics by; default: one of 16")
    ] = None,
    start: Annotated[
        Path | None, typer.Option("--start", metavar="DIR", help="statistics whose Kronecker factors to go on from")
    ] = None,
    exclude: Exclude = [],  # noqa: B006 - typer copies it
    dtype: Dtype = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
    json_output: Json = False,
) -> None:
    """Collect the statistics of a model's layers once, for all methods and ratios."""
    check_settings(unit, labels, sweeps, clip, tolerance)
    _check_dtype(dtype)
    begun = None if start is None else load_statistics(start)[0]
    check_output_folder(stats, overwrite=overwrite, marker=JSON_NAME)
    loaded, tokenizer, name = sources.load_model(model, dtype=dtype, device=device)
    batches = sources.token_batches(
        sources.load_text(text), tokenizer, sequences=sequences, seq_len=seq_len, batch_size=batch_size, seed=seed
    )
    statistics = calibrate(
        loaded,
        batches,
        unit=unit,
        labels=labels,
        sweeps=sweeps,
        tolerance=tolerance,
        online=online,
        clip=clip,
        seed=seed,
        heldout=heldout,
        start=begun,
        exclude=exclude,
        track=bar,
    )
    provenance = _provenance(name, text, sequences, seq_len)
    save_statistics(statistics, stats, provenance=provenance, overwrite=overwrite)
    summary = {
        "stats": str(stats),
        "layers": len(statistics.layers),
        "tokens": sequences * seq_len,
        "heldout_sequences": statistics.num_heldout,
        "sweeps": len(statistics.seconds),
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
        float, typer.Option("--keep", help="stored over dense parameters of the linear layers, (0, 1]; see --latency")
    ] = 0.8,
    ranks: Annotated[
        str,
        typer.Option("--ranks", metavar=one_of(RANKS), help="one share for every layer, or by predicted loss"),
    ] = "global",
    rank_multiple: Annotated[
        int, typer.Option("--rank-multiple", min=1, help="ranks are multiples of it")
    ] = RANK_MULTIPLE,
    bound: Bounds = [],  # noqa: B006 - typer copies it
    latency: Latency = None,
    storage: Annotated[
        str,
        typer.Option("--storage", metavar=one_of(STORAGE), help="rows and coefficients of the others, or two factors"),
    ] = "pivoted",
    damping: Annotated[
        float, typer.Option("--damping", min=0, help="added to the metrics' diagonals, relative to their mean")
    ] = DAMPING,
    guard: Annotated[
        bool, typer.Option("--guard/--no-guard", help="judge each layer's metrics by the statistics' held-out tokens")
    ] = True,
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
    bounds = parse_bounds(bound)
    check_bounds(bounds)
    check_settings(unit, labels, sweeps, clip)
    _check_dtype(dtype)
    if stats is None and text is None and needs:
        raise GfwsvdError(f"method {method} needs calibration: give either --stats DIR or --text TEXT, and not both")
    if stats is not None:
        _check_no_calibration(context)
    check_output_folder(out, overwrite=overwrite, marker="config.json")
    if report is not None:
        check_output_file(report)
    table = None if latency is None else LatencyTable.load(latency)
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
        bounds=bounds,
        latency=table,
        storage=storage,
        damping=damping,
        guard=guard,
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


@app.command("convert")
@_mendable
def convert_command(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="a folder of gfwsvd compress, or factors that others published")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="where to write the converted model")],
    to_dense: Annotated[
        bool, typer.Option("--merge", help="multiply the factors of gfwsvd's own form out: an ordinary dense model")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="MODEL", help="the dense model whose factors, by others, SOURCE holds"),
    ] = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    json_output: Json = False,
) -> None:
    """Write a compressed model in another form: dense again, or from the factors of other projects to gfwsvd's form.

    With --base, SOURCE is a .safetensors file, a state dict saved with torch.save, or a folder of either, with the
    tensor names of SVD-LLM, ASVD, LEMS or PIFA. Pickled models are refused: to read one is to run its code.
    """
    if to_dense == (base is not None):
        raise GfwsvdError("give either --merge, to make a dense model, or --base MODEL, to read what others published")
    _check_dtype(dtype)
    from .convert import import_published, merge

    if base is None:
        merged = merge(source, out, dtype=dtype, overwrite=overwrite, track=bar)
        print_values({"out": str(out), "merged_layers": merged}, json_output)
    else:
        result = import_published(source, out, base=base, dtype=dtype, overwrite=overwrite, track=bar)
        print_values(_summary(result, out), json_output)


@app.command("latency")
@_mendable
def latency_command(
    model: Model,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="rows of the layers' inputs: 1 for decoding one text")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="where to write the table, JSON")],
    step: Annotated[int, typer.Option("--step", min=1, help="ranks are measured at its multiples")] = STEP,
    dtype: Dtype = None,
    device: Device = "cpu",
    json_output: Json = False,
) -> None:
    """Measure how long a model's linear layers take on this machine, dense and low-rank, for compress --latency.

    It shows up to which share of its parameters a low-rank layer of each shape is faster than the dense one.
    """
    _check_dtype(dtype)
    check_output_file(out)
    loaded, _, name = sources.load_model(model, dtype=dtype, device=device)
    table = measure_latency(loaded, tokens=tokens, step=step, track=bar)
    table.save(out)
    break_even = {f"{d_out} x {d_in}": table.break_even((d_out, d_in)) for d_out, d_in in table.us}
    if not json_output:
        shown = Table("outputs x inputs", "dense, µs", "low-rank is faster up to")
        for shape, (name_of, share) in zip(table.us, break_even.items(), strict=True):
            shown.add_row(name_of, f"{table.time(shape, 'dense', 0):.1f}", "never" if share is None else f"{share:.0%}")
        Console().print(shown)
    summary = {"out": str(out), "model": name, "break_even": break_even if json_output else None, **table.about()}
    print_values(summary, json_output)


@app.command("eval")
@_mendable
def eval_command(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_DIR", help="a model, or what gfwsvd compress wrote")],
    text: OptionalText = None,
    window: Window = 1024,
    stride: Stride = None,
    reference: Annotated[
        str | None, typer.Option("--reference", metavar="MODEL", help="the dense model, for KL and top-1 agreement")
    ] = None,
    tasks: TaskNames = None,
    task_folder: TaskFolder = None,
    num_fewshot: Fewshot = None,
    limit: EvalLimit = None,
    batch_size: EvalBatchSize = 1,
    dtype: Dtype = None,
    device: Device = "cpu",
    json_output: Json = False,
) -> None:
    """Measure perplexity on a text and how far a model is from a reference, or how well it answers tasks, or both."""
    _check_dtype(dtype)
    if text is None and tasks is None:
        raise GfwsvdError("there is nothing to evaluate on: give --text TEXT, --tasks NAME, or both")
    for owner, names in {"text": ("window", "stride", "reference"), "tasks": ("task_folder", "num_fewshot")}.items():
        if context.params[owner] is None and (given := _given(context, names)):
            raise GfwsvdError(f"{given} would have no effect without --{owner}: give that too")
    check_stride(window if stride is None else stride, window)
    asked = None if tasks is None else find_tasks([name.strip() for name in tasks.split(",")], folder=task_folder)
    loaded, tokenizer, _ = sources.load_model(model, dtype=dtype, device=device)
    found: dict[str, Any] = {}
    if text is not None:
        tokens = sources.windows(sources.load_text(text), tokenizer, window=window, stride=stride, limit=limit)
        dense = sources.load_model(reference, dtype=dtype, device=device)[0] if reference is not None else None
        found = evaluate(loaded, tokens, stride=stride, reference=dense, batch_size=batch_size, track=bar).to_json()
    if asked is not None:
        found |= run_tasks(loaded, tokenizer, asked, num_fewshot=num_fewshot, limit=limit, batch_size=batch_size)
        if not json_output:
            Console().print(task_table(found.pop("tasks")))
    print_values(found, json_output)


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


@app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@_mendable
def serve_command(
    context: typer.Context,
    directory: Annotated[str, typer.Argument(metavar="DIR", help="a folder that gfwsvd compress wrote")],
) -> None:
    """Serve a compressed model to OpenAI clients, by transformers' own server. Requests name the model DIR.

    Further options are those of `transformers serve`, such as --host, --port, --device, --dtype, --continuous-batching.
    """
    from .serve import serve

    serve(directory, context.args)


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
        loss = layer.get("predicted_loss")  # whatever a manifest of others says
        table.add_row(
            layer["name"],
            layer["kind"],
            str(layer["rank"] or ""),
            f"{layer['stored']:,}",
            f"{layer['dense']:,}",
            f"{loss:.2e}" if isinstance(loss, float) else "",
        )
    Console(markup=False).print(table)  # names are shown as they are
    print_values({key: value for key, value in found.items() if key != "layers"}, json_output)


def _check_no_calibration(context: typer.Context) -> None:
    """With statistics, an option of the calibration would have no effect; `exclude` would leave out no layer."""
    names = ("text", "sequences", "seq_len", "batch_size", "unit", "labels", "sweeps", "clip", "seed", "exclude")
    if given := _given(context, names):
        raise GfwsvdError(
            f"the statistics of --stats bring their own calibration, got {given} as well: give either --stats DIR or "
            "--text TEXT, and not both"
        )


def _given(context: typer.Context, names: Iterable[str]) -> str:
    """Those of the options that stand on the command line."""
    given = [name for name in names if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"]
    return ", ".join(f"--{name.replace('_', '-')}" for name in given)


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
