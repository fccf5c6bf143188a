"""The compressed layer, and the linear layers of a model that it can stand for."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import GfwsvdError


class LowRankLinear(nn.Module):
    """`y = up (down x) + bias`: a linear layer of `rank` inner dimensions, in place of a dense one.

    In the pivoted form (`pivot.py`) `down x` are outputs themselves and `up` gives the others: `order` says where each
    output stands among the former, followed by the latter.

    The down factor is the parameter `weight`, so that a reader which takes the layer for a dense one meets a tensor of
    the wrong shape and stops, instead of filling the model with random numbers.

    Attributes:
        weight: the down factor, (rank, in_features).
        up: the up factor, (out_features, rank); of a pivoted layer (out_features - rank, rank).
        order: (out_features,) int32, a buffer of a pivoted layer, else None.
        bias: (out_features,) or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        pivoted: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(in_features, out_features, rank) < 1 or rank > min(in_features, out_features - pivoted):
            raise GfwsvdError(
                f"LowRankLinear needs 1 <= rank <= min(in_features, out_features), below out_features if pivoted, got "
                f"rank {rank} for {in_features} -> {out_features}"
            )
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.weight = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        rows = out_features - rank if pivoted else out_features
        self.up = nn.Parameter(torch.empty(rows, rank, device=device, dtype=dtype))
        order = torch.empty(out_features, device=device, dtype=torch.int32) if pivoted else None
        self.order: Tensor | None
        self.register_buffer("order", order)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_factors(
        cls, up: Tensor, down: Tensor, bias: Tensor | None = None, order: Tensor | None = None
    ) -> "LowRankLinear":
        """The layer of the factors `up (D_OUT, R)` and `down (R, D_IN)`, or with `order` of a pivoted form (D_OUT - R
        rows of `up`), which it takes as they are."""
        d_out = up.shape[0] if order is None else len(order)
        pivoted, has_bias = order is not None, bias is not None
        layer = cls(down.shape[1], d_out, down.shape[0], pivoted=pivoted, bias=has_bias, device="meta")
        layer.weight, layer.up, layer.order = nn.Parameter(down.contiguous()), nn.Parameter(up.contiguous()), order
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone())
        return layer

    @property
    def kind(self) -> str:
        """What a checkpoint calls the layer: "lowrank" or "pivoted"."""
        return "lowrank" if self.order is None else "pivoted"

    @property
    def stored(self) -> int:
        """Numbers that the layer stores in place of a weight."""
        return self.weight.numel() + self.up.numel() + (0 if self.order is None else self.order.numel())

    def forward(self, x: Tensor) -> Tensor:
        z = F.linear(x, self.weight)
        if self.order is None:
            return F.linear(z, self.up, self.bias)
        y = torch.cat((z, F.linear(z, self.up)), -1).index_select(-1, self.order)
        return y if self.bias is None else y + self.bias

    def product(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight (D_OUT, D_IN) that the factors stand for, detached, multiplied in `dtype` (default: their own)."""
        up, down = self.up.detach().to(dtype), self.weight.detach().to(dtype)
        return up @ down if self.order is None else torch.cat((down, up @ down))[self.order]

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
        return sizes if self.order is None else f"{sizes}, pivoted=True"


def check_order(name: str, order: Tensor) -> None:
    """GfwsvdError unless the `order` (D_OUT,) of the pivoted layer `name` holds every place once."""
    if not torch.equal(order.sort().values.cpu(), torch.arange(len(order), dtype=torch.int32, device="cpu")):
        raise GfwsvdError(
            f"{name}.order should hold each of 0 to {len(order) - 1} once; the file was changed, copy the folder again "
            "or compress anew"
        )


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a plain `nn.Linear`, or GPT-2's `Conv1D`, which holds its weight transposed."""
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_transposed(module: nn.Module) -> bool:
    """Whether `module` keeps its weight as (D_IN, D_OUT)."""
    return type(module).__name__ == "Conv1D"


def loaded(module: nn.Module, name: str) -> Tensor | None:
    """A parameter of `module`, detached; where accelerate keeps it on the host or on disk until the module runs, it is
    read from there."""
    parameter: Tensor | None = getattr(module, name)
    if parameter is None or not parameter.is_meta or not hasattr(module, "_hf_hook"):
        return None if parameter is None else parameter.detach()
    hook: Any = module._hf_hook
    return hook.weights_map[name]


def model_device(model: nn.Module) -> torch.device:
    """Where the inputs of `model` belong: with its first parameter that is in the memory of a device."""
    return next((value.device for value in model.parameters() if not value.is_meta), torch.device("cpu"))


def layer_device(module: nn.Module) -> torch.device:
    """Where a linear module computes."""
    weight = cast(Tensor, module.weight)
    hook: Any = getattr(module, "_hf_hook", None)
    return torch.device(hook.execution_device) if weight.is_meta and hook is not None else weight.device


def dense_weight(module: nn.Module) -> Tensor:
    """The weight of a linear module as (D_OUT, D_IN): a view, or a copy of what is not in the memory of a device."""
    weight = loaded(module, "weight")
    assert weight is not None
    return weight.T if is_transposed(module) else weight


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """(D_OUT, D_IN) of a linear module."""
    rows, columns = cast(Tensor, module.weight).shape
    return (columns, rows) if is_transposed(module) else (rows, columns)


def find_linears(model: nn.Module, *, exclude: Iterable[str] = ()) -> dict[str, nn.Module]:
    """The linear layers of `model` that compression is about, by module name in the model's order.

    Left out are the output embedding (the language-model head), every layer whose weight another module shares or that
    has several names, and the layers whose name one of the regular expressions in `exclude` matches (`re.search`).

    Raises:
        GfwsvdError: when no linear layer is left, or a pattern is not a regular expression.
    """
    if isinstance(exclude, str):
        raise GfwsvdError(f"exclude must be a list of regular expressions, got one string: say [{exclude!r}]")
    try:
        patterns = [re.compile(pattern) for pattern in exclude]
    except re.error as error:
        raise GfwsvdError(f"exclude must hold regular expressions, got {list(exclude)}: {error}") from error
    find_head: Any = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head else None
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(name)
    linears = {
        name: module
        for name, module in model.named_modules()
        if name  # a model that is itself a linear layer has no place for another
        and is_linear(module)
        and module is not head
        and len(owners[id(module.weight)]) == 1
        and not any(pattern.search(name) for pattern in patterns)
    }
    if not linears:
        raise GfwsvdError(
            f"{type(model).__name__} has no linear layer to compress: expected at least one nn.Linear or Conv1D "
            f"besides the language-model head{' outside the excluded names' if patterns else ''}"
        )
    return linears


def fingerprint(linears: Mapping[str, nn.Module]) -> str:
    """A digest of the names, shapes and about a thousand values of each layer, the same in float32 and bfloat16."""
    digest = hashlib.sha256()
    for name, module in linears.items():
        weight = dense_weight(module)
        sample = weight[:: weight.shape[0] // 32 + 1, :: weight.shape[1] // 32 + 1].to("cpu", torch.bfloat16)
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(sample.contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def model_sha256(model: nn.Module) -> str:
    """The fingerprint of every module that has a matrix, embeddings and low-rank layers included."""
    weights = ((name, module, getattr(module, "weight", None)) for name, module in model.named_modules())
    return fingerprint({name: module for name, module, w in weights if isinstance(w, Tensor) and w.dim() == 2})
