"""The application behind the command `gfwsvd`, and what its commands share."""

import contextlib
import functools
import os
import platform
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import typer

from . import __version__
from .budget import parse_bytes
from .errors import GfwsvdError
from .options import DTYPES
from .outcome import CompressionReport
from .ranked import joined, rank, shared_errors, world_size
from .texts import text_name
from .work import Claim, claimed, remove_work

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Compress language models by generalized Fisher-weighted SVD: low-rank layers that cost the loss least.",
    epilog="A first try: gfwsvd compress MODEL --text TEXT --keep 0.8 --out DIR; then: gfwsvd eval DIR --text OTHER",
)


def mendable(command: Callable[..., None]) -> Callable[..., None]:
    """An error that the user can mend is one line on standard error and exit status 1; Ctrl-C is 130."""

    @functools.wraps(command)
    def guarded(**arguments: Any) -> None:
        try:
            command(**arguments)
        except GfwsvdError as error:
            print(f"gfwsvd: error: {error}", file=sys.stderr)
            raise typer.Exit(1) from error
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            print(f"gfwsvd: error: {reason} Take a smaller batch, or another device; see gfwsvd plan", file=sys.stderr)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            print("gfwsvd: interrupted; nothing half-written is left", file=sys.stderr)
            raise typer.Exit(130) from error

    return guarded


def in_job(command: Callable[..., None]) -> Callable[..., None]:
    """A command that the processes of a job of `torchrun` run together, each on its --device."""

    @functools.wraps(command)
    def joining(**arguments: Any) -> None:
        with joined(arguments["device"]):
            command(**arguments)

    return joining


def command_line() -> str:
    """What to type to run the running command, or the job on one machine that it is part of, once more."""
    program = [sys.executable, "-m", "gfwsvd"] if Path(sys.argv[0]).name == "__main__.py" else sys.argv[:1]
    if world_size() > 1:
        program = ["torchrun", "--nproc-per-node", str(world_size()), "-m", "gfwsvd"]
    return shlex.join([*program, *sys.argv[1:]])


@contextlib.contextmanager
def resumable(kept: Path) -> Iterator[None]:
    """Ctrl-C within it says the command that goes on from what is kept in the file or folder `kept`, if that exists."""
    try:
        yield
    except KeyboardInterrupt:
        if kept.exists():  # on every rank, since any may be the one that is left
            print(f"gfwsvd: what is done is kept in {kept}; to go on from it:\n{command_line()}", file=sys.stderr)
        raise


@contextlib.contextmanager
def kept_work(folder: Path) -> Iterator[Claim]:
    """A folder for the work in progress of a command, its own from before it loads anything until the block ends; if
    that is well, the folder is removed, and Ctrl-C says the command that goes on."""
    with resumable(folder), claimed(folder) as claim:
        yield claim
        with shared_errors():
            if rank() == 0:
                remove_work(folder)


def beside(target: Path, ending: str) -> Path:
    """Where the work in progress of a command that writes the folder `target` is kept."""
    return target.with_name(f"{target.name}.{ending}")


def memory_limits(device_memory: str | None, host_memory: str | None) -> dict[str, int | None]:
    """The arguments of `calibrate` for these options."""
    limits = {"device_memory": device_memory, "host_memory": host_memory}
    return {name: None if text is None else parse_bytes(text) for name, text in limits.items()}


def placement(device: str, memory: Mapping[str, int | None]) -> dict[str, Any]:
    """The arguments of `load_model` for these options: spread over devices, weights take half of what is free, or of
    the limits; statistics and activations have the rest."""
    if device != "auto":
        return {"device": device}
    from accelerate.utils import get_max_memory

    free = get_max_memory()  # of each GPU and the host
    limits = {place: memory["host_memory" if place == "cpu" else "device_memory"] for place in free}
    return {"device": device, "max_memory": {place: (limits[place] or free[place]) // 2 for place in free}}


@contextlib.contextmanager
def exactly_repeated(wanted: bool) -> Iterator[None]:
    """Within it, where `wanted`, a GPU gives the same bits at every run."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS reads when it starts
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def given_options(context: typer.Context, names: Iterable[str]) -> str:
    """Those of the options that stand on the command line."""
    given = [name for name in names if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"]
    return ", ".join(f"--{name.replace('_', '-')}" for name in given)


def check_dtype(dtype: str | None) -> None:
    """GfwsvdError unless `dtype` is one of `DTYPES`, or None."""
    if dtype not in (None, *DTYPES):
        raise GfwsvdError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")


def summary(result: CompressionReport, out: Path) -> dict[str, Any]:
    """What commands that write a compressed model to `out` print of it."""
    details = result.to_json()
    return {
        "out": str(out),
        **{key: value for key, value in details.items() if key not in ("layers", "provenance")},
        "kinds": dict(Counter(layer.kind for layer in result.layers)),
        "predicted_loss": sum(layer.predicted_loss for layer in result.layers) if result.predicts_loss else None,
        "provenance": details["provenance"],
    }


def calibrated_on(model: str, text: str, sequences: int, seq_len: int) -> dict[str, Any]:
    """What results say of the model and the text they are from."""
    tokens = sequences * seq_len
    return {"model": model, "text": text_name(text), "sequences": sequences, "seq_len": seq_len, "tokens": tokens}


def versions() -> dict[str, str]:
    """Of what a result depends on."""
    import transformers

    return {
        "gfwsvd": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
