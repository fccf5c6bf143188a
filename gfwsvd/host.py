"""Tensors of GPUs brought to the host's memory."""

from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor

STAGE = 32 << 20  # bytes of page-locked memory, two times


def to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, of any shapes and dtypes; those that are there already are not copied.

    A GPU writes at the full speed of its link, and beside other work, into page-locked memory alone, which is dear to
    make and counts in no budget: all goes through two pieces of it, of which one is filled while the other is emptied.
    """
    sources = {key: value.detach().contiguous() for key, value in tensors.items()}
    found = {key: value if value.is_cpu else torch.empty_like(value, device="cpu") for key, value in sources.items()}
    pieces = [
        piece
        for key, value in sources.items()
        if not value.is_cpu
        for piece in zip(_bytes(value).split(STAGE), _bytes(found[key]).split(STAGE), strict=True)
    ]
    stages = [torch.empty(STAGE, dtype=torch.uint8, pin_memory=True) for _ in pieces[:2]]
    filling: deque[tuple[torch.cuda.Event, Tensor, Tensor]] = deque()
    for number, (source, target) in enumerate(pieces):
        if len(filling) == len(stages):
            _empty(*filling.popleft())
        stage = stages[number % 2][: len(target)]
        stage.copy_(source, non_blocking=True)
        filling.append((torch.cuda.current_stream(source.device).record_event(), stage, target))
    for last in filling:
        _empty(*last)
    return found


def _empty(filled: torch.cuda.Event, stage: Tensor, target: Tensor) -> None:
    filled.synchronize()
    target.copy_(stage)


def _bytes(value: Tensor) -> Tensor:
    return value.view(-1).view(torch.uint8)
