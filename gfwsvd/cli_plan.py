"""The command that tells beforehand what the others will take: plan."""

from dataclasses import replace
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Column, Table

from .budget import bytes_text
from .cli_app import app, check_dtype, memory_limits, mendable
from .footprint import Settings, check_settings
from .hardware import Hardware, measure
from .methods import METHODS
from .options import (
    BatchSize,
    Bits,
    DeviceMemory,
    Dtype,
    Exclude,
    Gains,
    HostMemory,
    Json,
    Model,
    Rounds,
    SeqLen,
    Sequences,
    SpreadDevice,
    Sweeps,
    Unit,
    one_of,
)
from .output import print_values
from .plan import Plan, plan
from .ranks import STORAGE
from .skeleton import model_shape


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
    bits: Bits = None,
    rounds: Rounds = 0,
    gains: Gains = 0,
    sequences: Sequences = 64,
    seq_len: SeqLen = 512,
    batch_size: BatchSize = 4,
    unit: Unit = "token",
    sweeps: Sweeps = 1,
    exclude: Exclude = [],  # noqa: B006 - typer copies it
    dtype: Dtype = None,
    device: SpreadDevice = "cpu",
    device_memory: DeviceMemory = None,
    host_memory: HostMemory = None,
    json_output: Json = False,
) -> None:
    """Tell beforehand what calibrate and compress will take of this machine: memory, disk, time; and what they give.

    It reads the configuration of the model, never its weights, measures the machine for a few seconds, and refuses what
    cannot fit into the limits of memory, or else into what is free. Start it where the output is to go. Times suppose
    that nothing else runs, and that the guard is content with its first choice of metrics, of four. Rounds and
    gains have the model in memory twice, dense and compressed.
    """
    check_dtype(dtype)
    settings = Settings(keep, sequences, seq_len, batch_size, sweeps, method, storage, bits, rounds, gains, unit)
    check_settings(settings)
    limits = memory_limits(device_memory, host_memory)
    shape, name = model_shape(model, dtype=dtype, exclude=exclude)
    hardware = measure(device, getattr(torch, shape.dtype))
    found = plan(shape, settings, _limited(hardware, **limits))
    if json_output:
        print_values({"model": name, **found.to_json()}, json_output)
        return
    _print(name, found, bits=bits, gpus=1 if hardware.spread else hardware.gpus)


def _limited(hardware: Hardware, *, device_memory: int | None, host_memory: int | None) -> Hardware:
    """With these limits in place of what was found to be free; on a CPU both are the same memory."""
    if hardware.device == "cpu":
        device_memory = host_memory = min(filter(None, (device_memory, host_memory)), default=None)
    return replace(
        hardware,
        device_memory=device_memory or hardware.device_memory,
        host_memory=host_memory or hardware.host_memory,
    )


def _print(name: str, found: Plan, *, bits: int | None, gpus: int) -> None:
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
    proviso = "" if bits is None else f", and more where a layer stays dense: that has no {bits} bits"
    values = {
        "time in all": duration(found.seconds),
        "passes over the text": found.passes,
        "groups of layers": f"{found.groups}: give --device-memory to calibrate too"
        if found.groups > 1
        else found.groups,
        "statistics": bytes_text(found.statistics_bytes),
        "weights": f"{bytes_text(found.dense_bytes)} before, {bytes_text(found.output_bytes)} after{proviso}",
        "decoding one text": f"at most {found.speedup:.2f} times as fast, an upper bound: the ratio of the bytes that "
        "a token reads, of which a machine may make less",
        "measured at most": ", ".join(f"{value:.3g} {what}" for what, value in found.ceilings.items()),
    }
    if found.recomputed:
        values["activations"] = "recomputed, which takes a forward pass more for each batch"
    if gpus > 1:
        values["one GPU of"] = f"{gpus}: torchrun --nproc-per-node {gpus} -m gfwsvd shares batches and layers among all"
    print_values(values, json_output=False)


def duration(seconds: float) -> str:
    """A time for people: "3.2 s", "12 min", "5.1 h"."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
