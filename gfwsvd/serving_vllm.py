"""vLLM serves a compressed checkpoint as it is: each of its processes calls `register`, an entry point of the package.

vLLM merges layers and splits them over processes; `shards.py` describes what becomes of the factors then.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.utils import set_weight_attrs

from gfwsvd_kernels import LowRankGroup

from . import checkpoint
from .checkpoint import Entry
from .errors import GfwsvdError
from .folders import read_headers
from .shards import MergedLayer

_POSITIONS = {"q": 0, "k": 1, "v": 2}  # vLLM's names of shards of the attention; others have numbers


class GfwsvdVllmConfig(QuantizationConfig):
    """The format section of a checkpoint, as vLLM asks for it; see `gfwsvd.checkpoint`.

    Raises:
        GfwsvdError: when the section is not as it should be or, of a local folder, a header of the tensor files.
    """

    def __init__(self, section: Mapping[str, Any]) -> None:
        super().__init__()
        self.entries = checkpoint.parse_section(section)
        if other := {entry.bits for entry in self.entries.values()} - {None, 8}:
            raise GfwsvdError(
                f"vLLM is taught factors in 8 bits or in floats, got bits {', '.join(map(str, other))}: compress with "
                "--bits 8, or make a dense model with gfwsvd convert --merge"
            )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "GfwsvdVllmConfig":
        return cls(config)

    def get_name(self) -> str:
        return checkpoint.QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # it takes matrix products alone

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # config.json says it all

    def maybe_update_config(self, model_name: str, *_: Any, **__: Any) -> None:
        if (folder := Path(model_name)).is_dir():
            checkpoint.check_layers(self.entries, read_headers(checkpoint.checkpoint_files(folder)))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.entries = hf_to_vllm_mapper.apply_dict(self.entries)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        if not isinstance(layer, LinearBase):
            return None
        last = prefix.rpartition(".")[2]
        names = (prefix.removesuffix(last) + name for name in self.packed_modules_mapping.get(last, [last]))
        entries = {name: self.entries.get(name, Entry("dense", None)) for name in names}
        if all(entry.rank is None for entry in entries.values()):
            return UnquantizedLinearMethod()
        return LowRankLinearMethod(entries)


class LowRankLinearMethod(LinearMethodBase):
    """Parameters, loading and forward pass of a linear layer of vLLM with a factored shard.

    The parameters are the tensors of `MergedLayer.room`. vLLM looks them up by the last names of the checkpoint's
    tensors, so that those are there even where they are empty; after loading they are what `MergedLayer.finish` makes
    of them, or, where this package's kernels run, empty beside the group that `MergedLayer.grouped` makes of them.
    """

    merged: MergedLayer
    group: LowRankGroup | None = None

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = entries

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        outputs = _outputs(layer, output_partition_sizes, output_size)
        first = layer.tp_rank * input_size_per_partition if input_size_per_partition < input_size else 0
        columns = slice(first, first + input_size_per_partition)
        self.merged = MergedLayer(self.entries, outputs, d_in=input_size, columns=columns, bias=layer.has_bias)
        for name, data in self.merged.room(params_dtype).items():
            parameter = nn.Parameter(data, requires_grad=False)
            layer.register_parameter(name, parameter)
            set_weight_attrs(parameter, {"weight_loader": partial(self._load, layer, name)})
        if layer.has_bias:  # which vLLM makes and loads itself, without noticing when it does not come
            layer.weight_loader = partial(self._load_bias, layer.weight_loader)

    def _load(self, layer: Any, leaf: str, _: nn.Parameter, loaded: Tensor, shard_id: Any = None) -> None:
        self.merged.load(self._position(shard_id), leaf, loaded, into=self._tensors(layer))

    def _tensors(self, layer: Any) -> dict[str, Tensor]:
        return {name: getattr(layer, name).data for name in self.merged.sizes}

    def _load_bias(self, load: Callable[..., None], parameter: nn.Parameter, loaded: Tensor, *shard_id: Any) -> None:
        load(parameter, loaded, *shard_id)
        self.merged.shards[self._position(*shard_id)].loaded.add("bias")

    def _position(self, shard_id: Any = None) -> int:
        if len(self.entries) == 1:
            return 0
        if (position := _POSITIONS.get(shard_id, shard_id)) not in range(len(self.entries)):
            raise GfwsvdError(
                f"vLLM loads part {shard_id!r} of a layer that merges {', '.join(self.entries)}, and it is not known "
                "which of them that is; compress the model anew with these layers excluded"
            )
        return position

    def process_weights_after_loading(self, layer: Any) -> None:
        tensors = self.merged.finish(self._tensors(layer))
        if _kernels_run(layer.weight.device) and (group := self.merged.grouped(tensors)) is not None:
            self.group = group
            tensors = {name: tensor.new_empty(0) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            getattr(layer, name).data = tensor

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.group is not None:
            y: Tensor = self.group(x)
            return y if bias is None else y + bias
        return self.merged.forward(x, {name: getattr(layer, name) for name in self.merged.sizes}, bias)


def _kernels_run(device: torch.device) -> bool:
    """Whether the device is a GPU that the kernels of this package are written for."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _outputs(layer: Any, sizes: list[int], output_size: int) -> list[tuple[int, Tensor]]:
    """For each part of a layer D_OUT of the whole, and which of the outputs this process computes: `sizes` many.

    Key and value heads fewer than the processes are copied, and vLLM counts every copy among the outputs.
    """
    outputs = []
    for part, (counted, size) in enumerate(zip(getattr(layer, "output_sizes", [output_size]), sizes, strict=True)):
        copies = getattr(layer, "num_kv_head_replicas", 1) if part else 1
        d_out = counted // copies
        first = layer.tp_rank // copies * size if size < d_out else 0
        outputs.append((d_out, torch.arange(first, first + size, device="cpu")))
    return outputs


def register() -> None:
    """Enter the format into vLLM's table; again is harmless."""
    register_quantization_config(checkpoint.QUANT_METHOD)(GfwsvdVllmConfig)
