"""This process among those of a job started by `torchrun`: what each does of the work, and how sums come together."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import GfwsvdError

Item = TypeVar("Item")

# A process that ends is noticed at once; one that hangs, after this long. No step of a job is so uneven between ranks.
PATIENCE = timedelta(minutes=30)
_TORCHRUN = {"RANK", "WORLD_SIZE", "LOCAL_RANK"}


@contextlib.contextmanager
def joined(device: str) -> Iterator[None]:
    """Within it, a process that `torchrun` started works together with the others of its job; any other one is alone.

    Args:
        device: "cpu" or "cuda"; in a job, each process takes the GPU of its local rank.

    Raises:
        GfwsvdError: in a job, for a GPU by number, for fewer GPUs than processes, and when the others do not come.
    """
    if not os.environ.keys() >= _TORCHRUN:
        yield
        return
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda"):
        raise GfwsvdError(f"in a job each process takes the model onto a device of its own, got {device}: cpu or cuda")
    if kind == "cuda":
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number:
            raise GfwsvdError(f"in a job each process takes a GPU of its own, got device {device}: say cuda")
        if local >= gpus:
            raise GfwsvdError(f"a job needs a GPU for each process, got {gpus} for local rank {local}: start fewer")
        torch.cuda.set_device(local)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise GfwsvdError(f"the processes of the job did not come together: {error}; start it by torchrun") from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0; 0 too where there is only one."""
    return dist.get_rank() if _is_job() else 0


def world_size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if _is_job() else 1


def share(items: Sequence[Item]) -> Sequence[Item]:
    """Every `world_size`-th item, from that of this rank on."""
    return items[rank() :: world_size()]


def owners(costs: Mapping[str, float]) -> dict[str, int]:
    """The rank that does each item, the same on all ranks: the dearest items first, each to whom has least to do."""
    loads = [0.0] * world_size()
    found = dict.fromkeys(costs, 0)
    for name in sorted(costs, key=lambda name: -costs[name]):
        found[name] = loads.index(min(loads))
        loads[found[name]] += costs[name]
    return found


@contextlib.contextmanager
def shared_errors() -> Iterator[None]:
    """All ranks end the block together; what one of them raises in it, all raise: the others as a GfwsvdError.

    Within the block, no rank may wait for another one.
    """
    try:
        yield
    except Exception as error:
        with contextlib.suppress(GfwsvdError):  # the others are gone already
            gathered(f"{type(error).__name__}: {error}")
        raise
    for number, reason in enumerate(gathered(None)):
        if reason is not None:
            raise GfwsvdError(f"rank {number} of {world_size()} failed, which ends the job: {reason}")


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replaces each tensor by its sum over all ranks, which have tensors of the same shapes in the same order.

    Raises:
        GfwsvdError: when a process of the job has ended.
    """
    if world_size() > 1:
        for tensor in tensors:
            _together(dist.all_reduce, tensor)


def summed(numbers: Mapping[str, float]) -> dict[str, float]:
    """The sums of numbers over all ranks, which have the same names in the same order."""
    total = torch.tensor(list(numbers.values()), dtype=torch.float64)
    add_up([total])
    return {name: type(number)(value) for (name, number), value in zip(numbers.items(), total.tolist(), strict=True)}


def send(tensor: Tensor, owner: int) -> None:
    """Overwrites `tensor` by that of rank `owner`, on all ranks; GfwsvdError when a process of the job has ended."""
    if world_size() > 1:
        _together(dist.broadcast, tensor, owner)


def gathered(value: Any) -> list[Any]:
    """The plain values of all ranks, by rank; GfwsvdError when a process of the job has ended."""
    values: list[Any] = [value]
    if world_size() > 1:
        values = [None] * world_size()
        _together(dist.all_gather_object, values, value)
    return values


def _is_job() -> bool:
    return dist.is_available() and dist.is_initialized()


def _together(operation: Any, *arguments: Any) -> None:
    try:
        operation(*arguments)
    except (RuntimeError, dist.DistBackendError, torch.distributed.DistError) as error:
        raise GfwsvdError(
            f"rank {rank()} of {world_size()} lost touch with the others: one of them has ended, and its own message "
            f"says why ({str(error).splitlines()[0]}); the same command goes on from what was kept"
        ) from error
