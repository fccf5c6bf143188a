"""This process among those of a job started by `torchrun`: what each does of the work, and how sums come together."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import GfwsvdError

Item = TypeVar("Item")


def rank() -> int:
    """The number of this process, from 0; 0 too where there is only one."""
    return dist.get_rank() if _is_job() else 0


def world_size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if _is_job() else 1


def share(items: Sequence[Item]) -> Sequence[Item]:
    """Every `world_size`-th item, from that of this rank on."""
    return items[rank() :: world_size()]


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
