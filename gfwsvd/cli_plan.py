"""The command that tells beforehand what the others will take: plan."""

from dataclasses import replace
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Column, Table

from .budget import bytes_text, parse_bytes
from .cli_app import app, check_dtype, mendable
from .footprint import Settings, check_settings
from .hardware import Hardware, measure
from .methods import METHODS
from .options import BatchSize, Device, Dtype, Json, Model, SeqLen, Sequences, Sweeps, one_of
from .output import print_values
from .plan import Plan, plan
from .ranks import STORAGE
from .skeleton import model_shape

_BYTES = "AMOUNT"


@app.command("plan")
@mendable
def plan_command(
    model: Model,
    keep: Annotated[float, typer.Option("--keep", help="stored over dense parameters of the linear layers")] = 0.8,
    method: Annotated[str, typer.Option("--method", metavar=one_of(METHODS), help="how errors are weighed")] = "gfwsvd",
    storage: Annotated[
        str,
        typer.Option("--storage", metavar=one_of(STORAGE), help="rows and coefficients of the others, or two factors"),
    ] = "pivoted",
    sequences: Sequences = 64,
    seq_len: SeqLen = 512,
    batch_size: BatchSize = 4,
    sweeps: Sweeps = 1,
    dtype: Dtype = None,
    device: Device = "cpu",
    device_memory: Annotated[
        str | None,
        typer.Option("--device-memory", metavar=_BYTES, help="such as 80G; default: what is free on the device"),
    ] = None,
    host_memory: Annotated[
        str | None, typer.Option("--host-memory", metavar=_BYTES, help="such as 128G; default: what is free here")
    ] = None,
    json_output: Json = False,
) -> None:
    """Tell beforehand what calibrate and compress will take of this machine: memory, disk, time; and what they give.

    It reads the configuration of the model, never its weights, measures the machine for a few seconds, and refuses what
    cannot fit. Start it where the output is to go. Times suppose that nothing else runs, and that the guard is content
    with its first choice of metrics: it may factor a layer up to four times.
    """
    check_dtype(dtype)
    settings = Settings(keep, sequences, seq_len, batch_size, sweeps, method, storage)
    check_settings(settings)
    shape, name = model_shape(model, dtype=dtype)
    hardware = measure(device, getattr(torch, shape.dtype))
    found = plan(shape, settings, _limited(hardware, device_memory, host_memory))
    if json_output:
        print_values({"model": name, **found.to_json()}, json_output)
        return
    _print(name, found)


def _limited(hardware: Hardware, device_memory: str | None, host_memory: str | None) -> Hardware:
    """With the memory that is said in place of what was found; on a CPU both are the same."""
    said = [None if text is None else parse_bytes(text) for text in (device_memory, host_memory)]
    if hardware.device == "cpu":
        said = [min(filter(None, said), default=None)] * 2
    return replace(
        hardware,
        device_memory=said[0] or hardware.device_memory,
        host_memory=said[1] or hardware.host_memory,
    )


def _print(name: str, found: Plan) -> None:
    resources = {"device": "device_bytes", "host": "host_bytes", "disk": "disk_bytes"}
    if not any(phase.device_bytes for phase in found.phases):
        del resources["device"]
    amounts = [Column(title, justify="right") for title in (*resources, "TFLOP", "time")]
    table = Table(Column("phase", no_wrap=True), *amounts, title=f"{name} on {found.device}", box=box.SIMPLE)
    for phase in found.phases:
        sizes = (getattr(phase, field) for field in resources.values())
        cells = [bytes_text(size) if size else "" for size in sizes]
        table.add_row(phase.name, *cells, f"{phase.flops / 1e12:.3g}" if phase.flops else "", duration(phase.seconds))
    Console(markup=False).print(table)
    values = {
        "time in all": duration(found.seconds),
        "passes over the text": found.passes,
        "groups of layers": found.groups,
        "statistics": bytes_text(found.statistics_bytes),
        "weights": f"{bytes_text(found.dense_bytes)} before, {bytes_text(found.output_bytes)} after",
        "decoding one text": f"at most {found.speedup:.2f} times as fast, the ratio of the bytes that a token reads",
    }
    print_values(values, json_output=False)


def duration(seconds: float) -> str:
    """A time for people: "3.2 s", "12 min", "5.1 h"."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s"
