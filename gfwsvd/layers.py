"""The compressed layer, and the linear layers of a model that it can stand for."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import GfwsvdError
from .feedback import whole_numbered
from .quantise import BITS, UNIT, check_form, factor_shapes
from .whiten import Root


class LowRankLinear(nn.Module):
    """`y = up (down x) + bias`: a linear layer of `rank` inner dimensions, in place of a dense one.

    In the pivoted form (`pivot.py`) `down x` are outputs themselves and `up` gives the others: `order` says where each
    output stands among the former, followed by the latter.

    The down factor is the parameter `weight`, so that a reader which takes the layer for a dense one meets a tensor of
    the wrong shape and stops, instead of filling the model with random numbers.

    In eight or four bits (`quantise.py`) both factors are whole numbers, without gradient, and `scales` make numbers of
    them again.

    Attributes:
        weight: the down factor, (rank, in_features); in four bits two numbers of a row in each byte.
        up: the up factor, (out_features, rank), bytes alike; of a pivoted layer (out_features - rank, rank).
        order: (out_features,) int32, a buffer of a pivoted layer, else None.
        scales: those of the down factor first, (2, rank) in eight bits, a vector in four: a buffer, or None.
        bits: of the factors where they are whole numbers, else None.
        bias: (out_features,) or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        pivoted: bool = False,
        bits: int | None = None,
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
        check_form("the layer", bits, d_in=in_features, pivoted=pivoted)
        self.in_features, self.out_features, self.rank, self.bits = in_features, out_features, rank, bits
        rows = out_features - rank if pivoted else out_features
        shapes = factor_shapes(bits, rows, rank, in_features)
        stored = dtype if bits is None else BITS[bits].dtype
        self.weight = _factor(torch.empty(shapes["weight"], device=device, dtype=stored))
        self.up = _factor(torch.empty(shapes["up"], device=device, dtype=stored))
        order = torch.empty(out_features, device=device, dtype=torch.int32) if pivoted else None
        self.order: Tensor | None
        self.register_buffer("order", order)
        scales = None if bits is None else torch.empty(shapes["scales"], device=device, dtype=dtype)
        self.scales: Tensor | None
        self.register_buffer("scales", scales)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_factors(
        cls,
        up: Tensor,
        down: Tensor,
        bias: Tensor | None = None,
        order: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> "LowRankLinear":
        """The layer of the factors `up (D_OUT, R)` and `down (R, D_IN)`, or with `order` of a pivoted form (D_OUT - R
        rows of `up`), which it takes as they are; with `scales` they are those of `feedback.whole_numbered`."""
        d_out = up.shape[0] if order is None else len(order)
        bits = next((bits for bits, form in BITS.items() if form.dtype == down.dtype), None)
        d_in = down.shape[1] * (1 if bits is None else BITS[bits].in_byte)
        options: dict[str, Any] = {"pivoted": order is not None, "bits": bits, "bias": bias is not None}
        layer = cls(d_in, d_out, down.shape[0], **options, device="meta")
        layer.weight, layer.up = _factor(down.contiguous()), _factor(up.contiguous())
        layer.order, layer.scales = order, scales
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone())
        return layer

    @property
    def kind(self) -> str:
        """What a checkpoint calls the layer: "lowrank" or "pivoted"."""
        return "lowrank" if self.order is None else "pivoted"

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers that the layer computes with."""
        return (self.weight if self.scales is None else self.scales).dtype

    @property
    def stored(self) -> int:
        """Numbers that the layer stores in place of a weight."""
        return self.rank * (self.in_features + self.up.shape[0]) + sum(buffer.numel() for buffer in self.buffers())

    def forward(self, x: Tensor) -> Tensor:
        if self.scales is not None and self.bits == 8:
            unit = x.new_full((), UNIT)  # brings whole numbers to the dtype of x
            up = self.up * unit
            z = F.linear(x, self.weight * unit) * self.scales[0]
            to_up = z * self.scales[1]
        else:
            up, down = (self.up, self.weight) if self.scales is None else self.factors(x.dtype)
            z = to_up = F.linear(x, down)
        if self.order is None:
            return F.linear(to_up, up, self.bias)
        y = torch.cat((z, F.linear(to_up, up)), -1).index_select(-1, self.order)
        return y if self.bias is None else y + self.bias

    def factors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """`up` and `down` as floating-point numbers in `dtype` (default: the layer's own), detached."""
        dtype, up, down = dtype or self.dtype, self.up.detach(), self.weight.detach()
        if self.scales is None or self.bits is None:
            return up.to(dtype), down.to(dtype)
        return BITS[self.bits].factors(up, down, self.scales, dtype)

    def product(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight (D_OUT, D_IN) that the factors stand for, detached, multiplied in `dtype` (default: their own)."""
        up, down = self.factors(dtype)
        return up @ down if self.order is None else torch.cat((down, up @ down))[self.order]

    def in_bits(self, bits: int) -> "LowRankLinear":
        """A layer of the same form whose factors are those of this one, rounded to `bits` by no metric.

        Raises:
            GfwsvdError: see `quantise.check_form`.
        """
        check_form("the layer", bits, d_in=self.in_features, pivoted=self.order is not None)
        factors = self.factors(torch.float64)
        up, down, scales = whole_numbered(*factors, Root("identity"), bits=bits, dtype=self.dtype)
        return LowRankLinear.from_factors(up, down, self.bias, self.order, scales).train(self.training)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
        options = {"pivoted": self.order is not None or None, "bits": self.bits}
        return ", ".join([sizes, *(f"{key}={value}" for key, value in options.items() if value is not None)])


def _factor(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=values.is_floating_point())


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


class Size(NamedTuple):
    """What tensors take, as numbers and as bytes."""

    numbers: int
    bytes: int


def model_size(model: nn.Module) -> Size:
    """What the model stores: its parameters, shared ones once, and the orders and scales of low-rank layers."""
    layers = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    own = [tensor for layer in layers for tensor in (layer.weight, layer.up, *layer.buffers())]
    held = set(map(id, own))
    others = [tensor for tensor in model.parameters() if id(tensor) not in held]
    numbers = sum(tensor.numel() for tensor in others) + sum(layer.stored for layer in layers)
    return Size(numbers, sum(tensor.nbytes for tensor in own + others))


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
