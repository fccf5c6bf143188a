"""Statistics of layers as named tensors and plain numbers, as they lie on disk: a tensor that several layers share
once."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import GfwsvdError
from .folders import TensorInfo
from .statistics import LayerStatistics
from .work import digest_of

_TRIANGLES = {"input_moment": "d_in", "output_moment": "d_out", "left": "d_out", "right": "d_in"}
_VECTORS = {"input_abs": "d_in", "fisher_rows": "d_out"}
_ROWS = {"heldout_x": "d_in", "heldout_g": "d_out"}
TENSORS = _TRIANGLES | _VECTORS | _ROWS
NUMBERS = [field.name for field in fields(LayerStatistics) if field.name not in TENSORS]


def pack_layers(layers: Mapping[str, LayerStatistics]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by key; and of each layer its numbers, and the keys of its tensors by field."""
    keys: dict[int, str] = {}  # of shared tensors: that of the first layer
    tensors: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}
    for name, stats in layers.items():
        stored = {}
        for field in TENSORS:
            if (value := getattr(stats, field)) is not None:
                key = stored[field] = keys.setdefault(id(value), f"{name}.{field}")
                tensors[key] = value
        entries[name] = {**{number: getattr(stats, number) for number in NUMBERS}, "tensors": stored}
    return tensors, entries


def unpack_layers(
    tensors: Mapping[str, Tensor], entries: Mapping[str, Any], devices: Mapping[str, torch.device]
) -> dict[str, LayerStatistics]:
    """The statistics that `pack_layers` packed, the tensors of each layer on its device."""
    shared: dict[str, Tensor] = {}
    layers = {}
    for name, entry in entries.items():
        layers[name] = LayerStatistics(**_numbers(entry))
        for field, key in entry["tensors"].items():
            if key not in shared:
                shared[key] = tensors[key].to(devices[name])
            setattr(layers[name], field, shared[key])
    return layers


def _numbers(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a layer's entry; files from before there were `heldout_lengths` have none."""
    entry = {"heldout_lengths": [], **entry}
    return {number: entry[number] for number in NUMBERS}


class StoredLayer(LayerStatistics):
    """Statistics of a layer whose tensors stay in their file: each is read whenever it is asked for."""

    file: Path
    entry: Mapping[str, Any]
    unseen: dict[str, str]

    def __init__(self, file: Path, entry: Mapping[str, Any], unseen: dict[str, str] | None = None) -> None:
        """Numbers and keys of tensors are those of `entry`, by `pack_layers`; KeyError where some are missing.

        Args:
            unseen: digests of the tensors of the file, by `work.digest_of`, which all layers in it share: each tensor
                is compared with its own when it is first read, and the digest removed.
        """
        vars(self).update(_numbers(entry), file=file, entry=entry, unseen=unseen or {})

    def compare(self) -> None:
        """Reads the tensors that were not compared with their digests yet; GfwsvdError as `read`."""
        for field, key in self.entry["tensors"].items():
            if key in self.unseen:
                self.read(field)

    def read(self, field: str) -> Tensor | None:
        """A tensor of the layer, on the CPU; GfwsvdError when the file does not hold it any more, or another one."""
        key = self.entry["tensors"].get(field)
        if key is None:
            return None
        try:
            with safe_open(self.file, framework="pt") as reader:
                value: Tensor = reader.get_tensor(key)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise GfwsvdError(f"cannot read {key} of {self.file} ({error}); calibrate again") from error
        if key in self.unseen and digest_of(value) != self.unseen[key]:
            raise GfwsvdError(f"{self.file}: {key} does not have its digest, the file was changed; calibrate again")
        self.unseen.pop(key, None)
        if not torch.isfinite(value).all():
            raise GfwsvdError(f"{self.file}: {key} should hold finite numbers; calibrate again")
        return value


def _stored(field: str) -> property:
    return property(lambda layer: layer.read(field))


for _field in TENSORS:
    setattr(StoredLayer, _field, _stored(_field))


def check_entry(name: str, entry: Mapping[str, Any], headers: Mapping[str, TensorInfo]) -> None:
    """GfwsvdError unless the tensors of a layer's `entry` are there, of the layer's sizes."""
    for field, key in entry["tensors"].items():
        size, shape = entry[TENSORS[field]], headers[key].shape
        expected = (size * (size + 1) // 2,) if field in _TRIANGLES else (*shape[:-1], size)
        if shape != expected or len(shape) != (2 if field in _ROWS else 1):
            raise GfwsvdError(f"{headers[key].file}: {key} of layer {name} is of shape {shape}; calibrate again")
