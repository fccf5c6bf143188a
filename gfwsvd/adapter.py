"""A compressed model as a LoRA adapter of its dense one.

A decomposition cut at rank R takes a part of rank min(D_OUT, D_IN) - R away from a weight, whatever the metrics, so an
adapter of that rank over the dense model is the compressed one, up to rounding. A training of the factors ends that.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import GfwsvdError
from .folders import atomic_folder, check_output_folder, write_json
from .layers import LowRankLinear, dense_weight, is_linear, is_transposed, weight_shape
from .sources import load_model
from .track import Track, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CONFIG = "adapter_config.json"


class AdapterReport(NamedTuple):
    """What an adapter holds.

    Attributes:
        ranks: of each layer that has one, by name.
        numbers, dense_numbers: in the adapter, and in the dense weights of the same layers.
        largest_error: over the layers, the Frobenius norm of what the adapter leaves out of the difference, relative to
            that of the compressed weight, before the adapter is rounded.
    """

    ranks: dict[str, int]
    numbers: int
    dense_numbers: int
    largest_error: float


def residual_factors(residual: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """`b (D_OUT, R)` and `a (R, D_IN)`, whose product is nearest to `residual (D_OUT, D_IN)`, all float64, and the
    Frobenius norm of what it leaves out."""
    left, values, right = torch.linalg.svd(residual, full_matrices=False)
    scales = values[:rank].sqrt()
    return left[:, :rank] * scales, scales[:, None] * right[:rank], values[rank:].norm().item()


def rounding_error(layer: LowRankLinear) -> float:
    """How much the rounding of its factors to their dtype changes the product of a layer, in Frobenius norm, expected
    at most: each number by half an eps of itself, independently."""
    up, down = layer.up.detach().double(), layer.weight.detach().double()
    squares = 2 * (up.norm(dim=0) * down.norm(dim=1)).square().sum()
    if layer.order is not None:  # whose down factor is a part of the product too
        squares += down.square().sum()
    return torch.finfo(layer.weight.dtype).eps / 2 * squares.sqrt().item()


def write_adapter(
    source: str,
    directory: Path,
    *,
    base: str,
    dtype: str | None = None,
    overwrite: bool = False,
    track: Track = silent,
) -> AdapterReport:
    """Write a compressed model as an adapter in the form of peft, which makes the dense model the compressed one.

    It is exact up to rounding, over `base` in the dtype of the checkpoint: what it leaves out of a layer is at most
    what the rounding of the stored factors changed (`rounding_error`), else the layer is refused. Layers that stayed
    dense have no adapter. The scaling of every layer is 1.

    Args:
        source: a checkpoint of ours: a folder or a name on the hub.
        directory: a new or empty folder; with `overwrite`, also one with an `adapter_config.json`, replaced as a whole.
        base: the dense model that was compressed; the adapter's configuration names it so.
        dtype: of the adapter, by default that of the factors.

    Raises:
        GfwsvdError: when a model cannot be loaded, the source has no low-rank layers, `base` is another model, a
            difference has no low rank (a trained checkpoint, for instance) or holds NaN or inf, or the folder cannot
            be written.
    """
    check_output_folder(directory, overwrite=overwrite, marker=_CONFIG)
    model, _, _ = load_model(source)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    if not layers:
        raise GfwsvdError(f"{source} has no low-rank layers; expected what gfwsvd compress wrote")
    if rounded := [name for name, layer in layers.items() if layer.bits]:
        raise GfwsvdError(
            f"the factors of layer {rounded[0]} are in {layers[rounded[0]].bits} bits, whose rounding is of full rank: "
            "an adapter would leave it out; make one of the checkpoint before its rounding"
        )
    dense, _, _ = load_model(base)
    bases = _check_base(model, dense, layers, base)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    errors = []
    for name, layer in track(list(layers.items()), f"differences of {len(layers)} layers"):
        b, a, error = _difference(name, layer, dense_weight(bases[name]), base)
        ranks[name] = len(a)
        errors.append(error)
        target = layer.weight.dtype if dtype is None else getattr(torch, dtype)
        for leaf, factor in (("lora_A", a), ("lora_B", b)):
            tensors[f"base_model.model.{name}.{leaf}.weight"] = factor.to(target).contiguous()
    with atomic_folder(directory, overwrite=overwrite, marker=_CONFIG) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        write_json(folder / _CONFIG, _config(dense, ranks, base))
    dense_numbers = sum(layer.in_features * layer.out_features for layer in layers.values())
    return AdapterReport(ranks, sum(map(Tensor.numel, tensors.values())), dense_numbers, max(errors))


def _difference(name: str, layer: LowRankLinear, weight: Tensor, base: str) -> tuple[Tensor, Tensor, float]:
    """`b` and `a` of the layer `name` over its dense weight (D_OUT, D_IN), float64, and what they leave out, relative
    to the compressed weight; GfwsvdError where that is more than rounding."""
    product = layer.product(torch.float64)
    residual = product - weight.to(layer.weight.dtype)
    if not residual.isfinite().all():
        raise GfwsvdError(f"layer {name}, or that of {base}, holds NaN or inf; expected finite numbers")
    rank = max(min(residual.shape) - layer.rank, 1)  # peft knows no rank 0
    b, a, left_out = residual_factors(residual, rank)
    if left_out > (rounding := rounding_error(layer)):
        share, explained = (norm / residual.norm().item() for norm in (left_out, rounding))
        raise GfwsvdError(
            f"the difference between layer {name} and that of {base} is not of rank {rank}: an adapter would leave out "
            f"{share:.1e} of it, and the rounding of the factors explains {explained:.1e}. The checkpoint was trained "
            "or changed after its compression, or is of another model; gfwsvd convert --merge makes it a dense model"
        )
    return b, a, left_out and left_out / product.norm().item()


def _check_base(
    model: "PreTrainedModel", dense: "PreTrainedModel", layers: Mapping[str, LowRankLinear], base: str
) -> dict[str, nn.Module]:
    """The modules of `dense` in whose place `layers` are; GfwsvdError unless all else is the same in both models."""
    modules = dict(dense.named_modules())
    for name, layer in layers.items():
        shape, module = (layer.out_features, layer.in_features), modules.get(name)
        if module is None or not is_linear(module) or weight_shape(module) != shape:
            raise GfwsvdError(f"{base} has no linear layer {name} of shape {shape}: give the model that was compressed")
    inner = {f"{name}.{leaf}" for name in layers for leaf in ("weight", "up", "order")}
    own, given = (
        {name: value for name, value in one.state_dict().items() if name not in inner} for one in (model, dense)
    )
    for name in own.keys() | given.keys():
        if name not in own or name not in given or not torch.equal(given[name].to(own[name].dtype), own[name]):
            raise GfwsvdError(
                f"tensor {name} of {base} is not that of the compressed model, and an adapter is of low-rank layers "
                "alone: give the model that was compressed"
            )
    return {name: modules[name] for name in layers}


def _config(dense: "PreTrainedModel", ranks: Mapping[str, int], base: str) -> dict[str, Any]:
    """What peft reads; an alpha as large as its rank makes a scaling of 1."""
    largest = max(ranks.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if dense.can_generate() else None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": any(is_transposed(dense.get_submodule(name)) for name in ranks),
        "target_modules": list(ranks),
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": dict(ranks),
        "alpha_pattern": dict(ranks),
        "lora_dropout": 0.0,
    }
