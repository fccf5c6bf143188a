"""Low-rank layers of one input as one grouped operation (`gfwsvd_kernels.LowRankGroup`), in any model's own classes.

The first layer of a group computes the outputs of all; the others, which the model calls with the very same tensor,
hand out theirs. Nothing of the model's code is copied or changed.
"""

from typing import cast

import torch
from torch import Tensor, nn

from gfwsvd_kernels import Factors, LowRankGroup

from .errors import GfwsvdError
from .layers import LowRankLinear

# Names of layers that read one input, under one parent; of layers in no such group, each is one of its own.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("w1", "w3"),
)


class GroupedLinear(nn.Module):
    """The first of the layers of a group: computes the outputs of all, and keeps those of the others for them."""

    def __init__(self, layers: list[LowRankLinear]) -> None:
        super().__init__()
        self.group = LowRankGroup([_factors(layer) for layer in layers])
        self.widths = [layer.out_features for layer in layers]
        self.in_features, self.out_features = layers[0].in_features, self.widths[0]
        self.waiting: tuple[Tensor, dict[int, Tensor]] | None = None  # the input, and outputs not yet handed out

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.group(x).split_with_sizes(self.widths, -1)
        self.waiting = (x, dict(enumerate(outputs[1:], start=1))) if len(outputs) > 1 else None
        return outputs[0]

    def take(self, x: Tensor, index: int) -> Tensor:
        """The output of layer `index` of the group for `x`."""
        if self.waiting is None or self.waiting[0] is not x or index not in self.waiting[1]:
            return self.group(x).split_with_sizes(self.widths, -1)[index]
        output = self.waiting[1].pop(index)
        if not self.waiting[1]:
            self.waiting = None  # holds no memory once all is handed out
        return output

    def _save_to_state_dict(self, *_: object) -> None:
        raise GfwsvdError("a fused model is for inference alone: to save or change it, load the checkpoint anew")


class GroupedOutput(nn.Module):
    """Another layer of a group."""

    def __init__(self, first: GroupedLinear, index: int) -> None:
        super().__init__()
        self.__dict__["first"] = first  # a reference: the module stands in the model once, in its own place
        self.index = index
        self.in_features, self.out_features = first.in_features, first.widths[index]

    def forward(self, x: Tensor) -> Tensor:
        return cast(GroupedLinear, self.__dict__["first"]).take(x, self.index)


def fuse(model: nn.Module) -> nn.Module:
    """Prepares a compressed model for decoding, in place: its low-rank layers run as grouped operations.

    Projections of one input (`SIBLINGS`: queries, keys and values, gate and up) share a call, every other low-rank
    layer has one of its own; on a GPU a call is two launches for up to 16 tokens, in `GraphDecoder` best. For longer
    batches and prompts it is no faster than two matrix products a layer, and on a CPU it is slower than the layers as
    they were. Dense layers stay, and so do factors in four bits, which no kernel reads; those in eight bits are read as
    they are. Outputs are equal up to rounding.
    Afterwards the model can be moved to no other device or dtype, and neither trained nor saved; the tensors of its
    low-rank layers are released.

    Returns:
        `model`.

    Raises:
        GfwsvdError: for a model without such low-rank layers, as one that was fused already.
    """
    low_rank = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    names = [name for name, layer in low_rank.items() if layer.bits != 4]
    if not names:
        raise GfwsvdError(
            f"{type(model).__name__} has no low-rank layers to fuse: expected a compressed model, not in four bits, "
            "fused only once"
        )
    for members in _groups(names):
        layers = [cast(LowRankLinear, model.get_submodule(name)) for name in members]
        first = GroupedLinear(layers).train(layers[0].training)
        model.set_submodule(members[0], first)
        for index, name in enumerate(members[1:], start=1):
            model.set_submodule(name, GroupedOutput(first, index).train(first.training))
    return model


def _groups(names: list[str]) -> list[list[str]]:
    """The names by group, in the model's order."""
    kinds = {leaf: leaves[0] for leaves in SIBLINGS for leaf in leaves}
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        groups.setdefault((parent, kinds.get(leaf, leaf)), []).append(name)
    return list(groups.values())


@torch.no_grad()
def _factors(layer: LowRankLinear) -> Factors:
    pivots = None
    if layer.order is not None:  # where each output stands: the pivots are those that stand in the first ranks
        pivots = layer.order.long().argsort()[: layer.rank]
    return Factors(layer.weight.detach(), layer.up.detach(), layer.bias, pivots, layer.scales)
