"""The statistics directory: what calibration collected, to be reused for other methods and ratios.

It holds `statistics.json` (settings, digests of model, data, tensors and itself, the numbers of each layer) and
`statistics.safetensors`: symmetric matrices as packed lower triangles, row by row, and vectors, float32; tokens held
out, bfloat16.
"""

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .calibration import Statistics
from .errors import GfwsvdError
from .folders import (
    atomic_folder,
    check_digests,
    check_seal,
    read_headers,
    read_json,
    sealed,
    sha256_file,
    write_json,
)
from .statistics import LayerStatistics

STATISTICS_VERSION = 2
JSON_NAME, TENSORS_NAME = "statistics.json", "statistics.safetensors"

_TRIANGLES = {"input_moment": "d_in", "output_moment": "d_out", "left": "d_out", "right": "d_in"}
_VECTORS = {"input_abs": "d_in", "fisher_rows": "d_out"}
_ROWS = {"heldout_x": "d_in", "heldout_g": "d_out"}
_TENSORS = _TRIANGLES | _VECTORS | _ROWS
_PLAIN = [field.name for field in fields(Statistics) if field.name not in ("layers", "collected")]
_NUMBERS = [field.name for field in fields(LayerStatistics) if field.name not in _TENSORS]


def pack(lower: Tensor) -> Tensor:
    """The lower triangle of (D, D), row by row, (D (D + 1) / 2,)."""
    return lower[torch.ones_like(lower, dtype=torch.bool).tril_()]


def unpack(packed: Tensor, size: int) -> Tensor:
    """The lower triangle (size, size) that `pack` packed, zeros above the diagonal."""
    lower = packed.new_zeros(size, size)
    lower[torch.ones_like(lower, dtype=torch.bool).tril_()] = packed
    return lower


def save_statistics(
    statistics: Statistics,
    directory: str | os.PathLike[str],
    *,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a statistics directory; it appears whole or not at all.

    Args:
        provenance: plain JSON values to keep beside, for people: names of model and text, for instance.
        overwrite: replace an existing statistics directory as a whole.

    Raises:
        GfwsvdError: when the directory cannot be written, or exists and `overwrite` is off.
    """
    owners: dict[int, str] = {}  # layers that share a tensor: the first one stores it
    tensors: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Any]] = {}
    for name, stats in statistics.layers.items():
        stored = {}
        for field in _TENSORS:
            if (value := getattr(stats, field)) is not None:
                key = stored[field] = owners.setdefault(id(value), f"{name}.{field}")
                if key not in tensors:
                    tensors[key] = (pack(value) if field in _TRIANGLES else value).cpu().contiguous()
        layers[name] = {**{number: getattr(stats, number) for number in _NUMBERS}, "tensors": stored}
    with atomic_folder(directory, overwrite=overwrite, marker=JSON_NAME) as folder:
        save_file(tensors, folder / TENSORS_NAME)
        described = {
            "statistics_version": STATISTICS_VERSION,
            "collected": sorted(statistics.collected),
            **{name: getattr(statistics, name) for name in _PLAIN},
            "provenance": dict(provenance or {}),
            "sha256": {TENSORS_NAME: sha256_file(folder / TENSORS_NAME)},
            "layers": layers,
        }
        write_json(folder / JSON_NAME, sealed(described))


def load_statistics(directory: str | os.PathLike[str]) -> tuple[Statistics, dict[str, Any]]:
    """The statistics of a directory and the provenance kept beside them.

    Whether they belong to a model is checked where they meet it, by `compress`.

    Raises:
        GfwsvdError: when the directory is none, of another version, or was cut short or changed; names file and tensor.
    """
    folder = Path(directory).expanduser()
    described = read_json(folder / JSON_NAME)
    if described.get("statistics_version") != STATISTICS_VERSION:
        raise GfwsvdError(
            f"this gfwsvd reads statistics_version {STATISTICS_VERSION}, {folder / JSON_NAME} has "
            f"{described.get('statistics_version')!r}; calibrate again"
        )
    check_seal(folder / JSON_NAME, described)
    read_headers([folder / TENSORS_NAME])
    try:
        check_digests(folder, {TENSORS_NAME: described["sha256"][TENSORS_NAME]})
        tensors = load_file(folder / TENSORS_NAME)
        shared: dict[str, Tensor] = {}
        layers = {
            name: LayerStatistics(
                **{number: entry[number] for number in _NUMBERS}
                | {field: _restore(key, field, entry, tensors, shared) for field, key in entry["tensors"].items()}
            )
            for name, entry in described["layers"].items()
        }
        plain = {name: described[name] for name in _PLAIN}
        plain |= {name: tuple(plain[name]) for name in ("unreached", "seconds")}
        return Statistics(layers, frozenset(described["collected"]), **plain), described["provenance"]
    except (KeyError, TypeError, AttributeError, OSError, RuntimeError, SafetensorError) as error:
        raise GfwsvdError(
            f"{folder / JSON_NAME} does not describe the tensors beside it ({type(error).__name__}: {error}); the "
            f"directory was changed: calibrate again"
        ) from error


def _restore(
    key: str, field: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor], shared: dict[str, Tensor]
) -> Tensor:
    if key not in shared:
        value = tensors[key]
        shared[key] = unpack(value, entry[_TRIANGLES[field]]) if field in _TRIANGLES else value
    size = entry[_TENSORS[field]]
    if shared[key].shape[-1] != size or not torch.isfinite(shared[key]).all():
        raise GfwsvdError(f"{TENSORS_NAME}: {key} should be finite and of size {size}; calibrate again")
    return shared[key]
