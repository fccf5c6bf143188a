"""Processes that tests start, kill and join into jobs: they fork from one that has imported what takes long."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from gfwsvd.ranked import joined

_CONTEXT = multiprocessing.get_context("forkserver")
_LATE = ["pydantic", "transformers.models.auto.tokenization_auto", "transformers.models.llama.modeling_llama"]
_CONTEXT.set_forkserver_preload(["gfwsvd.cli", "gfwsvd.hf", "pytest", "typer.testing", *_LATE])


def start(function: Callable[..., None], *arguments: Any, environment: dict[str, str] | None = None) -> BaseProcess:
    """A process of one thread that calls a function of a test module."""
    process = _CONTEXT.Process(target=_call, args=(function, arguments, environment or {}), daemon=True)
    process.start()
    return process


def start_job(size: int, function: Callable[..., None], *arguments: Any, joins: bool = False) -> list[BaseProcess]:
    """The processes of a job on CPUs, as `torchrun` starts them; joined already, unless `function` `joins` them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(size)}
    call = (function, *arguments) if joins else (_join, function, arguments)
    return [start(*call, environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(size)]


def exit_codes(processes: list[BaseProcess], *, seconds: float = 120) -> list[int | None]:
    """Waits for all; None for one that does not end."""
    for process in processes:
        process.join(seconds)
    return [process.exitcode for process in processes]


def _call(function: Callable[..., None], arguments: tuple[Any, ...], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*arguments)


def _join(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    with joined("cpu"):
        function(*arguments)
