"""The memory of each device that a calibration takes besides the statistics, and what its limits leave for these."""

import contextlib
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .budget import Collected, Room, layer_groups
from .errors import GfwsvdError
from .hooks import frozen, watch
from .layers import layer_device, model_device
from .losses import Batch, Loss

_WORKSPACE = 2 * 32 << 20  # bytes of cuBLAS on a GPU, of the thread that runs forward and of the one that runs backward
_COPIES = 3  # of its largest tensors that a step holds at a time: their gradients, and copies in float32
Bytes = Counter[str]  # by device


@dataclass(frozen=True)
class InUse:
    """Bytes of each device besides the statistics.

    Attributes:
        kept: where a forward pass keeps all that the backward pass needs.
        recomputed: where blocks keep their inputs alone, and one at a time is run again; None where it cannot be.
    """

    kept: Bytes
    recomputed: Bytes | None


def divided(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    collected: Collected,
    batch: Batch,
    run: Loss,
    *,
    device_memory: int | None,
    host_memory: int | None,
    backward: bool,
) -> tuple[list[list[str]], bool]:
    """The groups that layers are collected in within limits of memory (None for none), and whether activations have to
    be recomputed for that (`recomputing`), which they are where nothing else makes room.

    Raises:
        GfwsvdError: see `layer_groups`.
    """
    found = bytes_in_use(model, linears, batch, run, backward=backward)
    places = {name: str(layer_device(linears[name])) for name in collected.sizes}
    limits = {"device_memory": device_memory, "host_memory": host_memory}
    try:
        return layer_groups(collected, rooms(found.kept, places, **limits)), False
    except GfwsvdError:
        if found.recomputed is None:
            raise
        return layer_groups(collected, rooms(found.recomputed, places, **limits)), True


def rooms(
    taken: Bytes, places: Mapping[str, str], *, device_memory: int | None, host_memory: int | None
) -> Iterator[Room]:
    """What each device has for statistics of layers that are at `places`; the sums of all come to the host, where they
    are written from. On the CPU the lower limit counts."""
    devices = {*places.values(), *taken} - {"cpu"}
    limits: dict[str, int | None] = dict.fromkeys(sorted(devices), device_memory)
    limits["cpu"] = host_memory if devices else min(filter(None, (device_memory, host_memory)), default=None)
    for place, limit in limits.items():
        if limit is not None:
            layers = [name for name in places if place in (places[name], "cpu")]
            yield Room(limit, taken[place], layers, place)


def bytes_in_use(
    model: nn.Module, linears: Mapping[str, nn.Module], batch: Batch, run: Loss, *, backward: bool
) -> InUse:
    """Memory of a calibration besides the statistics: parameters and buffers, those that wait on the host included,
    what the forward pass of a batch keeps for the backward pass, copies that a step makes of its largest tensors, and a
    library's workspace. The pass keeps nothing here, so that it takes less than what it tells of."""
    blocks: list[Any] = [module for module in model.modules() if _recomputable(module)]
    recomputes = [block for block in blocks if block.gradient_checkpointing]
    kept = _Kept({value.untyped_storage().data_ptr() for value in model.parameters()})
    device = model_device(model)
    with contextlib.ExitStack() as stack:
        for block in recomputes:  # what it would drop is counted too
            block.gradient_checkpointing = False
            stack.callback(setattr, block, "gradient_checkpointing", True)
        for number, block in enumerate(blocks):
            stack.enter_context(kept.apart(number, block))
        taps = {"on_gradient": lambda name, x, g: None} if backward else {}
        stack.enter_context(watch(linears, on_input=lambda name, x: kept.see(x), **taps))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(kept.see, lambda value: value))
        stack.enter_context(torch.set_grad_enabled(backward))
        run(model, {name: value.to(device) for name, value in batch.items()})
    base = _resident(model)
    for place, size in (kept.largest | _largest_waiting(model)).items():
        base[place] += _COPIES * size + (place != "cpu") * _WORKSPACE
    if not backward:
        return InUse(base + kept.largest, None)
    outside = kept.of.pop(None, Counter())
    all_kept, widest = base + outside, base + outside
    for block_bytes in kept.of.values():
        all_kept += block_bytes
    for place in base:
        widest[place] += max((block_bytes[place] for block_bytes in kept.of.values()), default=0)
    return InUse(widest if recomputes else all_kept, None if recomputes or not blocks else widest)


class _Kept:
    """Counts the tensors that a forward pass would keep, each once, by the block that it runs in."""

    def __init__(self, weights: set[int]) -> None:
        self.weights = weights
        self.of: dict[int | None, Bytes] = {}  # by number of the block, None outside of all
        self.largest: Bytes = Counter()
        self.block: int | None = None
        self.alive: dict[int, weakref.ref[Any]] = {}

    def see(self, value: Tensor) -> None:
        storage, place = value.untyped_storage(), str(value.device)
        known = self.alive.get(storage._cdata)
        if known is not None and known() is storage or storage.data_ptr() in self.weights:
            return
        self.alive[storage._cdata] = weakref.ref(storage)
        self.of.setdefault(self.block, Counter())[place] += storage.nbytes()
        self.largest[place] = max(self.largest[place], storage.nbytes())

    @contextlib.contextmanager
    def apart(self, number: int, block: nn.Module) -> Iterator[None]:
        """What `block` keeps is counted as its own, but for its inputs."""

        def enter(module: nn.Module, arguments: Any, options: Any) -> None:
            for value in tree_leaves((arguments, options)):
                if isinstance(value, Tensor):
                    self.see(value)
            self.block = number

        def leave(*_: Any) -> None:
            self.block = None

        handles = block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _resident(model: nn.Module) -> Bytes:
    """Parameters and buffers by device, with those that accelerate keeps on the host until a module runs."""
    values = [value for value in (*model.parameters(), *model.buffers()) if not value.is_meta]
    for module in model.modules():
        waiting = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        store = getattr(waiting, "dataset", waiting)
        values += (getattr(store, "state_dict", store) or {}).values()  # what is on disk is in no state_dict
    found: Bytes = Counter()
    for value in {id(value): value for value in values}.values():
        found[str(value.device)] += value.nbytes
    return found


def _largest_waiting(model: nn.Module) -> Bytes:
    """Of the weights that come to a device when their module runs, the largest."""
    found: Bytes = Counter()
    for module in model.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        for value in module.parameters(recurse=False):
            if value.is_meta and hook is not None:
                place = str(torch.device(hook.execution_device))
                found[place] = max(found[place], value.nbytes)
    return found


def _recomputable(module: nn.Module) -> bool:
    return any(base.__name__ == "GradientCheckpointingLayer" for base in type(module).__mro__)


@contextlib.contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Within it, the blocks of a frozen model keep their inputs alone; warns."""
    warnings.warn(
        "memory is short: activations are recomputed, which takes a forward pass more for each batch", stacklevel=3
    )
    recompute(model)
    try:
        with frozen(model):  # whose blocks have to be in training mode for that, without dropout
            yield
    finally:
        recompute(model, enabled=False)


def recompute(model: nn.Module, *, enabled: bool = True) -> None:
    """Whether the blocks of a model of transformers keep their inputs alone, and run again where a gradient asks."""
    name = "enable" if enabled else "disable"
    # The name in newer versions, and the one before
    switch = getattr(model, f"activation_checkpointing_{name}", None) or getattr(
        model, f"gradient_checkpointing_{name}"
    )
    switch()
