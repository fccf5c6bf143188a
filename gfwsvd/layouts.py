"""How other projects name the factors of a layer in what they publish, and the reading of them, checked.

| layout | project | factors |
|---|---|---|
| `svd_llm` | SVD-LLM (AIoT-MLSys-Lab/SVD-LLM) | `q_u_proj`, `q_v_proj` for `q_proj`; `fc1_u_proj` for `fc1` |
| `asvd` | ASVD (hahnyuan/ASVD4LLM) | `q_proj.ALinear`, `q_proj.BLinear` |
| `lems` | LEMS and KFAC-SVD (lems-svd/lems) | `q_proj.mod_b`, `q_proj.mod_a`, after `wrapped_model.` |
| `pifa` | PIFA, ICML 2025 | `q_proj.ALinear`, `q_proj.BLinear` and the numbers of the outputs that each gives |
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import GfwsvdError


class Layout(NamedTuple):
    """The names of one project.

    Attributes:
        method: what a report calls the method.
        up, down: end of the name of a factor's module; what is before it is the layer's stem.
        pivots, rest: end of the names of the outputs that `down` and `up` give; "" where `up` gives all.
        layers: what the layer of a stem is called in the dense model; the first of them that is there.
        prefix: what stands before every name.
    """

    method: str
    up: str
    down: str
    pivots: str = ""
    rest: str = ""
    layers: tuple[str, ...] = ("{}",)
    prefix: str = ""


LAYOUTS = {
    "svd_llm": Layout("svd_llm", "_u_proj", "_v_proj", layers=("{}_proj", "{}")),
    "asvd": Layout("asvd", ".ALinear", ".BLinear"),
    "lems": Layout("kfac", ".mod_b", ".mod_a", prefix="wrapped_model."),
    "pifa": Layout("pifa", ".ALinear", ".BLinear", pivots=".false_idx", rest=".true_idx"),
}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NOT_STORED = "rotary_emb.inv_freq"  # a constant that older versions of transformers saved


class Factors(NamedTuple):
    """A published layer: `up (D_OUT, R)` and `down (R, D_IN)`; with `pivots (R,)` int64, `up (D_OUT - R, R)`."""

    up: Tensor
    down: Tensor
    pivots: Tensor | None


def find_layout(names: Mapping[str, Tensor]) -> str:
    """The row of `LAYOUTS` that the names of some tensors follow.

    Raises:
        GfwsvdError: when they follow none.
    """

    def has(end: str) -> bool:
        return any(name.endswith(end) for name in names)

    for name, layout in LAYOUTS.items():
        factors = has(f"{layout.up}.weight") and has(f"{layout.down}.weight")
        # The numbers of outputs are all that tells PIFA's names from ASVD's
        if factors and has(".true_idx") == bool(layout.rest) and all(n.startswith(layout.prefix) for n in names):
            return name
    known = "; ".join(f"{name}: *{layout.up}.weight and *{layout.down}.weight" for name, layout in LAYOUTS.items())
    raise GfwsvdError(
        f"no pair of factors among the {len(names)} tensors, such as {min(names, default='')!r}; expected the names of "
        f"one of these layouts: {known}"
    )


def read_layers(
    published: Mapping[str, Tensor], layout: Layout, shapes: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """The factors of each layer, and the other tensors under the names of the dense model, biases of factors included.

    Args:
        published: tensors by name, as `find_layout` recognised them.
        shapes: (D_OUT, D_IN) of the dense model's linear layers by name.

    Raises:
        GfwsvdError: when a factor is missing or of no layer, or shapes, types, ranks or pivots do not fit.
    """
    tensors = {
        name.removeprefix(layout.prefix): value for name, value in published.items() if not name.endswith(_NOT_STORED)
    }
    dense = {f"{name}.weight" for name in shapes}
    ends = (f"{layout.up}.weight", f"{layout.down}.weight")
    stems = {
        name.removesuffix(end): None for name in tensors for end in ends if name.endswith(end) and name not in dense
    }
    layers = {}
    for stem in stems:
        name = next((form for part in layout.layers if (form := part.format(stem)) in shapes), None)
        if name is None:
            raise GfwsvdError(f"the base model has no linear layer for the factors {stem}{layout.up}; give another one")
        up, down = (_take(tensors, stem + end, name) for end in ends)
        pivots = None
        if layout.pivots:
            pivots, rest = (_take(tensors, stem + end, name) for end in (layout.pivots, layout.rest))
            _check_outputs(name, pivots, rest, shapes[name][0])
            pivots = pivots.long()
        _check_factors(name, Factors(up, down, pivots), *shapes[name])
        layers[name] = Factors(up, down, pivots)
        biases = [tensors.pop(f"{stem}{end}.bias", None) for end in (layout.up, layout.down)]
        _fold_biases(name, tensors, up, *biases)
    return layers, tensors


def check_numbers(name: str, tensor: Tensor) -> None:
    """GfwsvdError unless the tensor called `name` holds finite numbers of 16, 32 or 64 bits with a point."""
    if tensor.dtype not in _FLOATS or not torch.isfinite(tensor).all():
        raise GfwsvdError(f"{name} should hold finite floating point numbers, got {tensor.dtype} or others")


def _take(tensors: dict[str, Tensor], name: str, layer: str) -> Tensor:
    if name not in tensors:
        raise GfwsvdError(f"tensor {name} is missing: layer {layer} has only a part of its factors; get the whole file")
    return tensors.pop(name)


def _check_factors(name: str, factors: Factors, d_out: int, d_in: int) -> None:
    up, down, pivots = factors
    pivoted = pivots is not None
    rank = down.shape[0] if down.dim() == 2 else 0
    rows = d_out - rank if pivoted else d_out
    if tuple(up.shape) != (rows, rank) or tuple(down.shape) != (rank, d_in):
        hint = ", both transposed" if (*up.shape[-1:], *down.shape[:1]) == (d_out, d_in) else ""
        expected = f"({'D_OUT - R' if pivoted else d_out}, R) and (R, {d_in})"
        raise GfwsvdError(
            f"layer {name} of shape {(d_out, d_in)}: expected factors {expected}, got {tuple(up.shape)} and "
            f"{tuple(down.shape)}{hint}"
        )
    if not 1 <= rank <= min(d_out - 1, d_in):
        raise GfwsvdError(f"layer {name} of shape {(d_out, d_in)} cannot be stored with rank {rank}")
    for tensor in (up, down):
        check_numbers(f"a factor of {name}", tensor)


def _check_outputs(name: str, pivots: Tensor, rest: Tensor, d_out: int) -> None:
    """GfwsvdError unless both hold each output once, the rest in ascending order."""
    whole = not pivots.is_floating_point() and not rest.is_floating_point() and pivots.dim() == rest.dim() == 1
    if not whole or len(pivots) + len(rest) != d_out:
        found = f"{tuple(pivots.shape)} and {tuple(rest.shape)}"
        raise GfwsvdError(f"layer {name}: expected the numbers of {d_out} outputs in all, got shapes {found}")
    numbers = torch.cat((pivots, rest)).long()
    if not torch.equal(numbers.sort().values, torch.arange(d_out)) or not torch.equal(rest, rest.sort().values):
        raise GfwsvdError(f"layer {name}: its pivots should be outputs 0 to {d_out - 1}, each once, the rest in order")


def _fold_biases(name: str, tensors: dict[str, Tensor], up: Tensor, outer: Tensor | None, inner: Tensor | None) -> None:
    """Make `up (down x + inner) + outer` the one bias of the layer; SVD-LLM has both for OPT."""
    if outer is None and inner is None:
        return
    for bias, size in ((outer, up.shape[0]), (inner, up.shape[1])):
        if bias is not None and tuple(bias.shape) != (size,):
            raise GfwsvdError(f"layer {name}: expected a bias of {size} numbers, got shape {tuple(bias.shape)}")
    folded = torch.zeros(up.shape[0], dtype=torch.float64) if outer is None else outer.double()
    if inner is not None:
        folded = folded + up.double() @ inner.double()
    tensors[f"{name}.bias"] = folded.to(up.dtype)
