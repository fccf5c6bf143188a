"""The commands that make something of a dense model: calibrate, compress."""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import typer

from . import sources
from .bounds import check_bounds, parse_bounds
from .calibration import CLIP, about_calibration, calibrate, check_settings
from .cli_app import (
    app,
    beside,
    calibrated_on,
    check_dtype,
    exactly_repeated,
    given_options,
    in_job,
    kept_work,
    memory_limits,
    mendable,
    placement,
    summary,
    versions,
)
from .compress import DAMPING, RANK_MULTIPLE, about_work, compress
from .errors import GfwsvdError
from .folders import check_output_file, check_output_folder
from .gains import check_gains
from .latency import LatencyTable
from .methods import METHODS, method_named
from .options import (
    TEXT_HELP,
    BatchSize,
    Bits,
    Bounds,
    Clip,
    Deterministic,
    DeviceMemory,
    Dtype,
    Exclude,
    Gains,
    HostMemory,
    Json,
    Labels,
    Latency,
    Model,
    Overwrite,
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
from .output import print_values
from .progress import bar
from .quantise import check_bits
from .ranked import rank, shared_errors
from .ranks import RANKS, STORAGE, check_keep, check_ranks, check_storage
from .refine import check_rounds
from .store import JSON_NAME, load_statistics, save_statistics

_OF_TEXT = ("text", "sequences", "seq_len", "batch_size", "seed")  # what rounds and gains need of it


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
    with exactly_repeated(deterministic), kept_work(beside(target, "work")) as claim:
        loaded, tokenizer, name = sources.load_model(model, dtype=dtype, **placement(device, memory))
        batches = sources.token_batches(
            sources.load_text(text), tokenizer, sequences=sequences, seq_len=seq_len, batch_size=batch_size, seed=seed
        )
        settings: dict[str, Any] = {"unit": unit, "labels": labels, "sweeps": sweeps, "tolerance": tolerance}
        settings |= {"online": online, "clip": clip, "seed": seed, "heldout": heldout, "exclude": exclude, **memory}
        about = about_calibration(loaded, batches, start=begun, **settings)
        statistics = calibrate(loaded, batches, start=begun, work=claim.open(about), track=bar, **settings)
        with shared_errors():
            if rank() == 0:
                provenance = calibrated_on(name, text, sequences, seq_len)
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
    gains: Gains = 0,
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
    with --stats: statistics bring their own. Method svd needs neither. With --rounds or --gains, --stats and --text go
    together: the text, its sequences, their length and the batches are then what the loss is measured on.
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
    check_gains(gains, method_named(method))
    if (rounds or gains) and text is None:
        asked = f"--rounds {rounds}" if rounds else f"--gains {gains}"
        raise GfwsvdError(f"{asked} measures the loss of the compressed model on --text TEXT: give it as well")
    if stats is not None:
        _check_no_calibration(context, but=_OF_TEXT if rounds or gains else ())
    target = check_output_folder(out, overwrite=overwrite, marker="config.json")
    if report is not None:
        check_output_file(report)
    table = None if latency is None else LatencyTable.load(latency)
    statistics, provenance = (None, {}) if stats is None else load_statistics(stats)
    with exactly_repeated(deterministic), kept_work(beside(target, "work")) as claim:
        loaded, tokenizer, name = sources.load_model(model, dtype=dtype, **placement(device, memory))
        batches = None
        if text is not None:
            about_text = calibrated_on(name, text, sequences, seq_len)
            provenance = about_text if statistics is None else {**provenance, "measured_on": about_text}
            batches = sources.token_batches(
                sources.load_text(text),
                tokenizer,
                sequences=sequences,
                seq_len=seq_len,
                batch_size=batch_size,
                seed=seed,
            )
        settings: dict[str, Any] = {
            "method": method,
            "keep": keep,
            "damping": damping,
            "guard": guard,
            "storage": storage,
        }
        settings |= {"unit": unit, "labels": labels, "sweeps": sweeps, "clip": clip, "seed": seed, "exclude": exclude}
        settings |= memory
        about = about_work(loaded, batches or (), statistics=statistics, **settings)
        result = compress(
            loaded,
            batches,
            ranks=ranks,
            rank_multiple=rank_multiple,
            bounds=bounds,
            latency=table,
            bits=bits,
            rounds=rounds,
            gains=gains,
            statistics=statistics,
            work=claim.open(about),
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
    print_values(summary(result, out), json_output)


def _check_no_calibration(context: typer.Context, *, but: Collection[str]) -> None:
    """With statistics, an option of the calibration would have no effect; `exclude` would leave out no layer."""
    names = [*_OF_TEXT, "unit", "labels", "sweeps", "clip", "exclude", "device_memory", "host_memory"]
    if given := given_options(context, [name for name in names if name not in but]):
        raise GfwsvdError(
            f"the statistics of --stats bring their own calibration, got {given} as well: give either --stats DIR or "
            "--text TEXT, and not both"
        )
