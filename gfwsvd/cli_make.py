"""The commands that make something: calibrate, compress, tune, convert."""

import shutil
import sys
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import typer

from . import sources
from .bounds import check_bounds, parse_bounds
from .calibration import CLIP, about_calibration, calibrate, check_settings
from .checkpoint import inspect as inspect_checkpoint
from .cli_app import (
    app,
    check_dtype,
    exactly_repeated,
    given_options,
    in_job,
    kept_work,
    memory_limits,
    mendable,
    placement,
    versions,
)
from .compress import DAMPING, RANK_MULTIPLE, CompressionReport, about_work, compress
from .errors import GfwsvdError
from .folders import check_output_file, check_output_folder
from .latency import LatencyTable
from .methods import METHODS, method_named
from .options import (
    TEXT_HELP,
    BatchSize,
    Bits,
    Bounds,
    Clip,
    Deterministic,
    Device,
    DeviceMemory,
    Dtype,
    Epochs,
    Exclude,
    HostMemory,
    Json,
    Labels,
    Latency,
    LearningRate,
    Model,
    Overwrite,
    Products,
    Rounds,
    Seed,
    SeqLen,
    Sequences,
    SpreadDevice,
    Sweeps,
    Text,
    Unit,
    one_of,
)
from .outcome import read_report
from .output import print_values
from .progress import bar
from .quantise import check_bits
from .ranked import rank, shared_errors
from .ranks import RANKS, STORAGE, check_keep, check_ranks, check_storage
from .refine import check_rounds
from .store import JSON_NAME, load_statistics, save_statistics
from .texts import text_name

_OF_TEXT = ("text", "sequences", "seq_len", "batch_size", "seed")  # what rounds of allocation need of it


@app.command("calibrate")
@mendable
@in_job
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
        float,
        typer.Option("--tolerance", help="a layer is not swept again once its right factor turns by no more (a sine)"),
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
    device: SpreadDevice = "cpu",
    device_memory: DeviceMemory = None,
    host_memory: HostMemory = None,
    deterministic: Deterministic = False,
    overwrite: Overwrite = False,
    json_output: Json = False,
) -> None:
    """Collect the statistics of a model's layers once, for all methods and ratios.

    What is collected is in DIR.work until DIR is written: the same command goes on after an interruption. Started by
    torchrun, several processes share the batches.
    """
    check_settings(unit, labels, sweeps, clip, tolerance)
    check_dtype(dtype)
    memory = memory_limits(device_memory, host_memory)
    begun = None if start is None else load_statistics(start)[0]
    target = check_output_folder(stats, overwrite=overwrite, marker=JSON_NAME)
    loaded, tokenizer, name = sources.load_model(model, dtype=dtype, **placement(device, memory))
    batches = sources.token_batches(
        sources.load_text(text), tokenizer, sequences=sequences, seq_len=seq_len, batch_size=batch_size, seed=seed
    )
    settings: dict[str, Any] = {"unit": unit, "labels": labels, "sweeps": sweeps, "tolerance": tolerance}
    settings |= {"online": online, "clip": clip, "seed": seed, "heldout": heldout, "exclude": exclude, **memory}
    about = about_calibration(loaded, batches, start=begun, **settings)
    with exactly_repeated(deterministic), kept_work(target, about) as work:
        statistics = calibrate(loaded, batches, start=begun, work=work, track=bar, **settings)
        with shared_errors():
            if rank() == 0:
                provenance = _provenance(name, text, sequences, seq_len)
                save_statistics(statistics, stats, provenance=provenance, overwrite=overwrite)
    summary = {
        "stats": str(stats),
        "layers": len(statistics.layers),
        "tokens": sequences * seq_len,
        "heldout_sequences": statistics.num_heldout,
        "skipped_sequences": statistics.num_skipped,
        "sweeps": len(statistics.seconds),
        "seconds": sum(statistics.seconds),
        "settings": statistics.settings,
        "unreached": list(statistics.unreached),
    }
    print_values(summary, json_output)


@app.command("compress")
@mendable
@in_job
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
    rounds: Rounds = 0,
    storage: Annotated[
        str,
        typer.Option("--storage", metavar=one_of(STORAGE), help="rows and coefficients of the others, or two factors"),
    ] = "pivoted",
    bits: Bits = None,
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
    device: SpreadDevice = "cpu",
    device_memory: DeviceMemory = None,
    host_memory: HostMemory = None,
    deterministic: Deterministic = False,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="also write an HTML report with plots")
    ] = None,
    overwrite: Overwrite = False,
    json_output: Json = False,
) -> None:
    """Write a smaller model: low-rank linear layers in an ordinary transformers folder.

    What is solved is in DIR.work until DIR is written: the same command goes on after an interruption. Started by
    torchrun, several processes share the layers.

    The options from --sequences to --exclude, and those of memory, belong to a calibration on --text and are refused
    with --stats: statistics bring their own. Method svd needs neither. With --rounds, --stats and --text go together:
    the text, its sequences, their length and the batches are then what the loss is measured on.
    """
    needs = method_named(method).needs
    check_keep(keep)
    check_ranks(ranks, rank_multiple)
    check_storage(storage)
    check_bits(bits)
    bounds = parse_bounds(bound)
    check_bounds(bounds)
    check_settings(unit, labels, sweeps, clip)
    check_dtype(dtype)
    memory = memory_limits(device_memory, host_memory)
    if stats is None and text is None and needs:
        raise GfwsvdError(f"method {method} needs calibration: give either --stats DIR or --text TEXT, and not both")
    check_rounds(rounds, ranks, method_named(method))
    if rounds and text is None:
        raise GfwsvdError(
            f"--rounds {rounds} measures the loss of the compressed model on --text TEXT: give it as well"
        )
    if stats is not None:
        _check_no_calibration(context, but=_OF_TEXT if rounds else ())
    target = check_output_folder(out, overwrite=overwrite, marker="config.json")
    if report is not None:
        check_output_file(report)
    table = None if latency is None else LatencyTable.load(latency)
    statistics, provenance = (None, {}) if stats is None else load_statistics(stats)
    loaded, tokenizer, name = sources.load_model(model, dtype=dtype, **placement(device, memory))
    batches = None
    if text is not None:
        about_text = _provenance(name, text, sequences, seq_len)
        provenance = about_text if statistics is None else {**provenance, "rounds_on": about_text}
        batches = sources.token_batches(
            sources.load_text(text), tokenizer, sequences=sequences, seq_len=seq_len, batch_size=batch_size, seed=seed
        )
    settings: dict[str, Any] = {"method": method, "keep": keep, "damping": damping, "guard": guard, "storage": storage}
    settings |= {"unit": unit, "labels": labels, "sweeps": sweeps, "clip": clip, "seed": seed, "exclude": exclude}
    settings |= memory
    about = about_work(loaded, batches or (), statistics=statistics, **settings)
    with exactly_repeated(deterministic), kept_work(target, about) as work:
        result = compress(
            loaded,
            batches,
            ranks=ranks,
            rank_multiple=rank_multiple,
            bounds=bounds,
            latency=table,
            bits=bits,
            rounds=rounds,
            statistics=statistics,
            work=work,
            track=bar,
            **settings,
        )
        result.provenance |= {"model": name, **provenance, **versions()}
        from .hf import save_pretrained

        with shared_errors():
            save_pretrained(loaded, out, report=result, tokenizer=tokenizer, overwrite=overwrite)
            if rank() == 0 and report is not None:
                from .report import write_report

                write_report(report, title=f"{name}, {method}, keep {keep}", reports=[result])
    print_values(_summary(result, out), json_output)


@app.command("tune")
@mendable
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
    report = read_report(directory)
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
    about = {"source": name, "text": text_name(text), "reference": dense_name, **tuning.to_json(), **versions()}
    report.provenance["tuned"] = [*report.provenance.get("tuned", ()), about]
    save_pretrained(loaded, out, report=report, tokenizer=tokenizer, overwrite=overwrite)
    shutil.rmtree(work)
    if not tuning.improved:
        print(f"gfwsvd: the training did not lower the held-out loss: {out} has the factors of {name}", file=sys.stderr)
    print_values({"out": str(out), **about}, json_output)


@app.command("convert")
@mendable
def convert_command(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="a folder of gfwsvd compress, or factors that others published")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="where to write the converted model")],
    to_dense: Annotated[
        bool, typer.Option("--merge", help="multiply the factors of gfwsvd's own form out: an ordinary dense model")
    ] = False,
    to_adapter: Annotated[
        bool,
        typer.Option("--lora", help="an adapter for peft, which makes the dense model of --base the compressed one"),
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(
            "--base", metavar="MODEL", help="the dense model: of --lora, or whose factors, by others, SOURCE is"
        ),
    ] = None,
    bits: Bits = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    json_output: Json = False,
) -> None:
    """Write a compressed model in another form: dense, as an adapter, in few bits, or from the factors of others to
    gfwsvd's form.

    With --lora, an adapter over --base makes it compute what SOURCE computes, to compare them; it saves nothing. It is
    refused where it would not be exact up to rounding, as after gfwsvd tune.

    With --base alone, SOURCE is a .safetensors file, a state dict saved with torch.save, or a folder of either, with
    the tensor names of SVD-LLM, ASVD, LEMS or PIFA. Pickled models are refused: to read one is to run its code.
    """
    check_dtype(dtype)
    check_bits(bits)
    options: dict[str, Any] = {"dtype": dtype, "overwrite": overwrite, "track": bar}
    match to_dense, to_adapter, bits, base:
        case True, False, None, None:
            from .convert import merge

            found: dict[str, Any] = {"out": str(out), "merged_layers": merge(source, out, **options)}
        case False, True, None, str():
            from .adapter import write_adapter

            adapter = write_adapter(source, out, base=base, **options)
            found = {"out": str(out), "adapted_layers": len(adapter.ranks), **adapter._asdict()}
            found["ranks"] = [min(adapter.ranks.values()), max(adapter.ranks.values())]
        case False, False, int(), None:
            from .convert import in_bits

            found = _summary(in_bits(source, out, bits=bits, **options), out)
        case False, False, None, str():
            from .convert import import_published

            found = _summary(import_published(source, out, base=base, **options), out)
        case _:
            raise GfwsvdError(
                "give either --merge, to make a dense model, or --lora and --base MODEL, to make an adapter, or --bits "
                "N, to round the factors, or --base MODEL alone, to read what others published"
            )
    print_values(found, json_output)


def _check_no_calibration(context: typer.Context, *, but: Collection[str]) -> None:
    """With statistics, an option of the calibration would have no effect; `exclude` would leave out no layer."""
    names = [*_OF_TEXT, "unit", "labels", "sweeps", "clip", "exclude", "device_memory", "host_memory"]
    if given := given_options(context, [name for name in names if name not in but]):
        raise GfwsvdError(
            f"the statistics of --stats bring their own calibration, got {given} as well: give either --stats DIR or "
            "--text TEXT, and not both"
        )


def _provenance(model: str, text: str, sequences: int, seq_len: int) -> dict[str, Any]:
    tokens = sequences * seq_len
    return {"model": model, "text": text_name(text), "sequences": sequences, "seq_len": seq_len, "tokens": tokens}


def _summary(result: CompressionReport, out: Path) -> dict[str, Any]:
    details = result.to_json()
    return {
        "out": str(out),
        **{key: value for key, value in details.items() if key not in ("layers", "provenance")},
        "kinds": dict(Counter(layer.kind for layer in result.layers)),
        "predicted_loss": sum(layer.predicted_loss for layer in result.layers) if result.predicts_loss else None,
        "provenance": details["provenance"],
    }
