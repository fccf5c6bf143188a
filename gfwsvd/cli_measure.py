"""The commands that measure, serve or show a model: latency, eval, sweep, serve, inspect."""

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from . import __version__, sources
from .batches import data_sha256, num_rows
from .checkpoint import inspect as inspect_checkpoint
from .checks import check_stride
from .cli_app import app, calibrated_on, check_dtype, given_options, kept_work, mendable, resumable
from .errors import GfwsvdError
from .evaluate import about_evaluation, evaluate
from .folders import check_output_file, locked_folder
from .latency import STEP, measure_latency
from .options import (
    ALL_METHODS,
    FRONTIER,
    GLOBAL,
    PIVOTED,
    TEXT_HELP,
    BatchSize,
    CalibrationText,
    Device,
    Dtype,
    EvalBatchSize,
    EvalLimit,
    Fewshot,
    Json,
    Keeps,
    Limit,
    Methods,
    Model,
    OptionalText,
    RankWays,
    RowGains,
    RowRounds,
    Seed,
    SeqLen,
    Sequences,
    Storages,
    Stride,
    TaskFolder,
    TaskNames,
    Window,
)
from .output import print_values
from .progress import bar
from .store import load_statistics
from .sweep import all_runs, comparison, sweep
from .tasks import find_tasks, run_tasks, task_table
from .texts import text_name


@app.command("latency")
@mendable
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
    check_dtype(dtype)
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
@mendable
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
    work: Annotated[
        Path | None,
        typer.Option(
            "--work", metavar="DIR", help="keep the sums over the text here, so that an interrupted run goes on"
        ),
    ] = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    json_output: Json = False,
) -> None:
    """Measure perplexity on a text and how far a model is from a reference, or how well it answers tasks, or both.

    With --work the same command goes on after an interruption, at the window where it was; DIR is removed at the end.
    """
    check_dtype(dtype)
    if text is None and tasks is None:
        raise GfwsvdError("there is nothing to evaluate on: give --text TEXT, --tasks NAME, or both")
    for owner, names in {
        "text": ("window", "stride", "reference", "work"),
        "tasks": ("task_folder", "num_fewshot"),
    }.items():
        if context.params[owner] is None and (given := given_options(context, names)):
            raise GfwsvdError(f"{given} would have no effect without --{owner}: give that too")
    check_stride(window if stride is None else stride, window)
    if work is not None:
        check_output_file(work / "state")
    asked = None if tasks is None else find_tasks([name.strip() for name in tasks.split(",")], folder=task_folder)
    with contextlib.nullcontext() if work is None else kept_work(work) as claim:
        loaded, tokenizer, _ = sources.load_model(model, dtype=dtype, device=device)
        found: dict[str, Any] = {}
        if text is not None:
            tokens = sources.windows(sources.load_text(text), tokenizer, window=window, stride=stride, limit=limit)
            dense = sources.load_model(reference, dtype=dtype, device=device)[0] if reference is not None else None
            settings: dict[str, Any] = {"stride": stride, "reference": dense, "batch_size": batch_size}
            if claim is not None:
                settings["work"] = claim.open(about_evaluation(loaded, tokens, **settings))
            found = evaluate(loaded, tokens, **settings, track=bar).to_json()
        if asked is not None:
            found |= run_tasks(loaded, tokenizer, asked, num_fewshot=num_fewshot, limit=limit, batch_size=batch_size)
            if not json_output:
                Console().print(task_table(found.pop("tasks")))
    print_values(found, json_output)


@app.command("sweep")
@mendable
def sweep_command(
    context: typer.Context,
    model: Model,
    stats: Annotated[Path, typer.Option("--stats", metavar="DIR", help="statistics of gfwsvd calibrate")],
    text: Annotated[str, typer.Option("--text", metavar="TEXT", help=f"evaluation text: {TEXT_HELP}")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="rows.jsonl and report.html; goes on where it was")],
    method: Methods = ALL_METHODS,
    keep: Keeps = FRONTIER,
    ranks: RankWays = GLOBAL,
    storage: Storages = PIVOTED,
    rounds: RowRounds = 0,
    gains: RowGains = 0,
    calibration_text: CalibrationText = None,
    sequences: Sequences = 64,
    seq_len: SeqLen = 512,
    batch_size: BatchSize = 4,
    seed: Seed = 0,
    window: Window = 1024,
    limit: Limit = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    json_output: Json = False,
) -> None:
    """Compare methods and ratios on one text: perplexity and distance from the dense model, in a table and a picture.

    Every row is written as soon as it is known. The same command again computes only what is missing. While it runs, no
    other sweep writes to the same folder.

    With --rounds or --gains each row that can take them is followed by one with them: gains those of a method that
    predicts the loss (fwsvd, kfac, gfwsvd), rounds those with global ranks among these. The options from --sequences to
    --seed belong to --calibration-text; give the text and the options of gfwsvd calibrate.
    """
    runs = all_runs(method, ranks, keep, storage, rounds=rounds, gains=gains)
    if (rounds or gains) and calibration_text is None:
        asked = f"--rounds {rounds}" if rounds else f"--gains {gains}"
        raise GfwsvdError(f"{asked} measures the loss of compressed models on --calibration-text TEXT: give it as well")
    of_text = ("calibration_text", "sequences", "seq_len", "batch_size", "seed")
    if not (rounds or gains) and (given := given_options(context, of_text)):
        raise GfwsvdError(f"{given} would have no effect without --rounds or --gains: give one of these too")
    statistics, provenance = load_statistics(stats)
    check_dtype(dtype)
    check_output_file(out / "report.html")
    with resumable(out / "rows.jsonl"), locked_folder(out):
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
        batches = []
        if calibration_text is not None:
            sizes = {"sequences": sequences, "seq_len": seq_len, "batch_size": batch_size, "seed": seed}
            batches = sources.token_batches(sources.load_text(calibration_text), tokenizer, **sizes)
            about["measured_on"] = {
                **calibrated_on(name, calibration_text, sequences, seq_len),
                "data_sha256": data_sha256(batches),
                "batches": [num_rows(batch) for batch in batches],
            }
        rows_file = out / "rows.jsonl"
        rows = sweep(loaded, statistics, runs, tokens, rows_file=rows_file, about=about, batches=batches, track=bar)
        from .report import write_report

        write_report(out / "report.html", title=f"{name}: quality against size", reports=[], evaluations=rows)
    if json_output:
        print_values({"out": str(out), "rows": rows}, json_output)
    else:
        Console().print(comparison(rows))
        print_values({"rows": str(out / "rows.jsonl"), "report": str(out / "report.html")}, json_output)


@app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@mendable
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
@mendable
def inspect_command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="a folder that gfwsvd compress wrote")],
    json_output: Json = False,
) -> None:
    """Show what a compressed model holds: layers, ranks, sizes, and where it comes from."""
    found = inspect_checkpoint(directory)
    if json_output:
        print_values(found, json_output)
        return
    table = Table(Column("layer", overflow="fold"), "kind", "rank", "bits", "stored", "dense", "predicted loss")
    for layer in found["layers"]:
        loss = layer.get("predicted_loss")  # whatever a manifest of others says
        table.add_row(
            layer["name"],
            layer["kind"],
            str(layer["rank"] or ""),
            str(layer["bits"] or ""),
            f"{layer['stored']:,}",
            f"{layer['dense']:,}",
            f"{loss:.2e}" if isinstance(loss, float) else "",
        )
    Console(markup=False).print(table)  # names are shown as they are
    print_values({key: value for key, value in found.items() if key != "layers"}, json_output)
