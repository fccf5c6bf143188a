"""A model with its low-rank layers in place: its loss, and what one backward pass says of each of them."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import ranked
from .batches import num_rows, num_tokens
from .errors import GfwsvdError
from .hooks import frozen, watch
from .layers import LowRankLinear, model_device
from .losses import Batch, Loss
from .track import Track

# What the rows x (..., D_IN) and output gradients g (..., D_OUT) of a batch say of a layer: a tensor that adds up
See = Callable[[str, Tensor, Tensor], Tensor]


@contextlib.contextmanager
def placed(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within it, `layers` stand at their names in `model`; afterwards those that stood there before."""
    before = {name: model.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)


def first_tokens(batches: Sequence[Batch], least: int) -> list[Batch]:
    """As many of the first batches as hold `least` entries of their first tensors, or all."""
    few: list[Batch] = []
    tokens = 0
    for batch in batches:
        if tokens < least:
            few.append(batch)
            tokens += num_tokens(batch)
    return few


def measured(
    model: nn.Module,
    layers: Mapping[str, LowRankLinear],
    batches: Sequence[Batch],
    loss: Loss,
    *,
    see: See | None = None,
    title: str,
    track: Track[Any],
) -> tuple[float, dict[str, Tensor]]:
    """The mean loss over `batches` of a `model` in which `layers` are, and of each of them what `see` gives, summed
    over all batches and divided by the number of losses.

    Args:
        batches: the same in all processes of a job, which share them and find the same bits.
        see: takes the name of a layer, its input x (..., D_IN) and the gradient g (..., D_OUT) of the summed loss at
            its output, and gives a float64 tensor; None for no backward pass.
        title: of the progress.

    Raises:
        GfwsvdError: on all ranks of a job, when the loss is NaN or inf.
    """
    sums: dict[str, Tensor] = {}

    def add(name: str, x: Tensor, g: Tensor) -> None:
        assert see is not None
        found = see(name, x, g)
        sums[name] = sums[name] + found if name in sums else found

    rows = []
    device = model_device(model)
    with ranked.shared_errors(), placed(model, layers), frozen(model), torch.set_grad_enabled(see is not None):
        for number in track(ranked.share(range(len(batches))), title):
            batch = batches[number]
            sums.clear()
            with watch(layers, on_input=lambda name, x: None, on_gradient=add):
                losses = loss(model, {name: value.to(device) for name, value in batch.items()})
                if not torch.isfinite(total := losses.double().sum()):
                    raise GfwsvdError(f"the loss of the compressed model is NaN or inf ({num_rows(batch)} sequences)")
                if see is not None:
                    total.backward()
            rows.append((number, losses.numel(), total.item(), {name: value.cpu() for name, value in sums.items()}))
    # By batch, not by process, so that the sums have the same bits in any job
    found = sorted((row for part in ranked.gathered(rows) for row in part), key=lambda row: row[0])
    count = sum(terms for _, terms, _, _ in found)
    mean = sum(total for _, _, total, _ in found) / count
    of_layers = {name: [seen[name] for *_, seen in found if name in seen] for name in layers}
    return mean, {name: torch.stack(seen).sum(0) / count for name, seen in of_layers.items() if seen}
