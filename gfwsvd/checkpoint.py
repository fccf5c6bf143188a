"""The checkpoint format: what stands in `config.json` and in the tensor files, checked without reading a tensor.

A checkpoint is an ordinary transformers folder whose `quantization_config` is the *format section*

    {"quant_method": "gfwsvd", "format_version": 1 | 2, "method": ..., "keep": ..., "kept": ...,
     "layers": {NAME: {"kind": "lowrank" | "pivoted", "rank": R[, "bits": 8 | 4]} | {"kind": "dense"}}}

with the tensors `NAME.weight` (the down factor, (R, D_IN)) and `NAME.up` (D_OUT, R) for a low-rank layer; `NAME.weight`
(R, D_IN), `NAME.up` (D_OUT - R, R) and `NAME.order` (D_OUT,) int32 for a pivoted one (see `layers.LowRankLinear`); and
`NAME.weight` for a dense one. With `bits` 8 both factors are int8, and `NAME.scales` (2, R) holds the scales of the
rows of down and of the columns of up. With 4, of two factors only, both are uint8, two numbers of a row a byte, (R,
D_IN / 2) and (D_OUT, (R + 1) // 2), and `NAME.scales`, a vector, holds the scale of each 64 numbers of a row, all of
down before all of up (see `quantise`). Only with `bits` is the version 2, so that readers of version 1 refuse it.
The manifest `gfwsvd.json` beside it holds the report, the digest of each tensor file, and a digest of itself.
"""

import os
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from .errors import GfwsvdError
from .folders import TensorInfo, check_seal, read_headers, read_json
from .quantise import BITS, check_form, factor_shapes

FORMAT_VERSION, BITS_VERSION = 1, 2  # the second where a layer has `bits`
QUANT_METHOD = "gfwsvd"
MANIFEST = "gfwsvd.json"

_SECTION_KEYS = {"quant_method", "format_version", "method", "keep", "kept", "layers"}
_MOST_LAYERS = 1 << 16  # of a section; transformers copies it several times
_FLOATS = {"F16", "BF16", "F32", "F64"}
_DTYPES = {"weight": _FLOATS, "up": _FLOATS, "bias": _FLOATS, "order": {"I32"}, "scales": _FLOATS}


class Entry(NamedTuple):
    """What a format section says of a layer: `rank` is None for a dense one, `bits` where factors are floats."""

    kind: str
    rank: int | None
    bits: int | None = None

    @property
    def pivoted(self) -> bool:
        return self.kind == "pivoted"

    def to_json(self) -> dict[str, Any]:
        """As it stands in the section."""
        return {key: value for key, value in self._asdict().items() if value is not None}

    def shapes(self, d_out: int, d_in: int) -> dict[str, tuple[int, ...]]:
        """Last name and shape of each of its tensors, biases aside, where the layer has d_in inputs, d_out outputs."""
        if self.rank is None:
            return {"weight": (d_out, d_in)}
        shapes = factor_shapes(self.bits, d_out - self.rank * self.pivoted, self.rank, d_in)
        return shapes | ({"order": (d_out,)} if self.pivoted else {})

    def dtypes(self, leaf: str) -> set[str]:
        """What the tensor called `leaf` may be of, in the names of safetensors."""
        return {BITS[self.bits].stored_as} if self.bits and leaf in ("weight", "up") else _DTYPES[leaf]


class StoredLayer(NamedTuple):
    """A compressed linear layer of a checkpoint: `rank` is None for a dense one; counts and bytes leave biases out."""

    kind: str
    rank: int | None
    bits: int | None
    stored: int
    dense: int
    bytes: int


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a transformers folder, one or the shards that its index names.

    A file may be a link, as all are in the hub's cache, but an index cannot lead out of the folder.

    Raises:
        GfwsvdError: when there is neither, or the index is not one or names something else than files beside it.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        if not (single := folder / "model.safetensors").exists():
            raise GfwsvdError(f"{folder} has neither model.safetensors nor {index.name}")
        return [single]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise GfwsvdError(f"{index} has no weight_map of tensor names to files")
    for name in set(weight_map.values()):
        if not re.fullmatch(r"[\w.-]{1,200}\.safetensors", name):
            raise GfwsvdError(f"{index} should name .safetensors files beside it, got {name[:200]!r}")
    return [folder / name for name in sorted(set(weight_map.values()))]


def parse_section(section: Mapping[str, Any]) -> dict[str, Entry]:
    """What a format section says of each layer that it lists.

    Raises:
        GfwsvdError: when the section is of another method or version, or says something that no gfwsvd writes: unknown
            keys, sizes that are no shares, names that no module has, a layer of an unknown kind or without a rank.
    """
    if section.get("quant_method") != QUANT_METHOD:
        raise GfwsvdError(f"config.json: quant_method should be {QUANT_METHOD!r}, got {section.get('quant_method')!r}")
    if (version := section.get("format_version")) not in (FORMAT_VERSION, BITS_VERSION):
        raise GfwsvdError(
            f"this gfwsvd reads checkpoints of format_version {FORMAT_VERSION} and {BITS_VERSION}, got "
            f"{version!r:.200}; use the gfwsvd that wrote the checkpoint, or a newer one"
        )
    if unknown := sorted(section.keys() - _SECTION_KEYS):
        raise GfwsvdError(f"config.json: quantization_config has keys of no meaning: {', '.join(map(repr, unknown))}")
    if not isinstance(method := section.get("method"), str) or not re.fullmatch(r"[\w.+-]{1,64}", method):
        raise GfwsvdError(f"config.json: method should be a name, got {method!r:.200}")
    for key in ("keep", "kept"):  # two factors of any rank store no more than twice the weight
        value = section.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 2:
            raise GfwsvdError(f"config.json: {key} should be a share of parameters, got {value!r:.200}")
    layers = section.get("layers")
    if not isinstance(layers, dict) or len(layers) > _MOST_LAYERS:
        raise GfwsvdError(
            f"config.json: quantization_config should list the layers, {_MOST_LAYERS} at most, in an object `layers`; "
            "the file was changed"
        )
    bits = BITS if version == BITS_VERSION else {}
    details: dict[str, list[dict[str, int]]] = {
        "lowrank": [{}, *({"bits": number} for number in bits)],
        "pivoted": [{}, *({"bits": number} for number, form in bits.items() if form.pivots)],
    }
    entries: dict[str, Entry] = {}
    for name, entry in layers.items():
        if not name.isprintable() or not all(name.split(".")):
            raise GfwsvdError(f"config.json: expected names of modules in `layers`, got {name!r:.200}")
        match entry:
            case {"kind": "dense", **rest} if not rest:
                entries[name] = Entry("dense", None)
            case {"kind": "lowrank" | "pivoted" as kind, "rank": int(rank), **rest} if (
                rank > 0 and not isinstance(rank, bool) and rest in details[kind]
            ):
                entries[name] = Entry(kind, rank, next((number for number in bits if rest == {"bits": number}), None))
            case _:
                raise GfwsvdError(
                    f"config.json: layer {name}: expected kind 'lowrank' or 'pivoted' with a positive rank and, in "
                    f"format_version {BITS_VERSION}, bits 8, or 4 of kind 'lowrank', or none, or kind 'dense', got "
                    f"{entry!r:.200}; the file was changed, or a newer gfwsvd wrote it"
                )
    return entries


def check_layers(
    entries: Mapping[str, Entry],
    tensors: Mapping[str, TensorInfo],
    *,
    shapes: Mapping[str, tuple[int, int]] = MappingProxyType({}),
    biased: Collection[str] = (),
) -> dict[str, StoredLayer]:
    """Check that every layer's tensors are there and fit together, and count their parameters.

    Args:
        entries: what `parse_section` returns.
        tensors: what `read_headers` returns.
        shapes: (D_OUT, D_IN) of those low-rank layers that a model is to be filled with.
        biased: the layers among them that have a bias in the model.

    Raises:
        GfwsvdError: when a tensor is missing, has another shape or type, or is a factor of a layer that is not a
            low-rank one; the message names file and tensor.
    """
    checked: dict[str, StoredLayer] = {}
    for name, entry in entries.items():
        weight = _tensor(tensors, f"{name}.weight", dimensions=2)
        rank = entry.rank
        if rank is None:
            checked[name] = StoredLayer("dense", None, None, weight.numbers, weight.numbers, weight.num_bytes)
            continue
        found = {"weight": weight, "up": _tensor(tensors, f"{name}.up", dimensions=2)}
        if entry.pivoted:
            found["order"] = _tensor(tensors, f"{name}.order", dimensions=1)
        if entry.bits is not None:
            found["scales"] = _tensor(tensors, f"{name}.scales")
        counted = list(found.values())
        if name in biased:
            found["bias"] = _tensor(tensors, f"{name}.bias", dimensions=1)
        outputs = found["order" if entry.pivoted else "up"].shape[0]
        in_byte = 1 if entry.bits is None else BITS[entry.bits].in_byte
        d_out, d_in = shapes.get(name, (outputs, weight.shape[1] * in_byte))
        check_form(f"config.json: layer {name}", entry.bits, d_in=d_in, pivoted=entry.pivoted)
        if rank > min(d_out - entry.pivoted, d_in):
            raise GfwsvdError(f"config.json: layer {name} of shape {(d_out, d_in)} cannot have rank {rank}")
        expected_shapes = {**entry.shapes(d_out, d_in), "bias": (d_out,)}
        for leaf, info in found.items():
            if info.dtype not in entry.dtypes(leaf):
                types = ", ".join(sorted(entry.dtypes(leaf)))
                raise GfwsvdError(f"{info.file}: {name}.{leaf} should be of type {types}, got {info.dtype}")
            if info.shape != (expected := expected_shapes[leaf]):
                raise GfwsvdError(
                    f"{info.file}: {name}.{leaf} should be {expected} by config.json, got {info.shape}; "
                    "the two files are not of one checkpoint, copy the folder again"
                )
        numbers = rank * (d_in + d_out - rank * entry.pivoted)
        numbers += sum(info.numbers for leaf, info in found.items() if leaf in ("order", "scales"))
        num_bytes = sum(info.num_bytes for info in counted)
        checked[name] = StoredLayer(entry.kind, rank, entry.bits, numbers, d_out * d_in, num_bytes)
    for tensor, info in tensors.items():
        name, _, leaf = tensor.rpartition(".")
        if leaf == "up" and f"{name}.weight" in tensors and entries.get(name, Entry("dense", None)).rank is None:
            raise GfwsvdError(
                f"{info.file}: {tensor} is the factor of a low-rank layer, but config.json lists {name} as none; "
                "the two files are not of one checkpoint, copy the folder again"
            )
    return checked


def _tensor(tensors: Mapping[str, TensorInfo], name: str, *, dimensions: int | None = None) -> TensorInfo:
    if name not in tensors:
        files = sorted({str(info.file) for info in tensors.values()})
        raise GfwsvdError(
            f"tensor {name} is missing from {', '.join(files) or 'an empty checkpoint'}; copy the folder again or "
            "compress anew"
        )
    if dimensions is not None and len(tensors[name].shape) != dimensions:
        expected = {1: "a vector", 2: "a matrix"}[dimensions]
        raise GfwsvdError(f"{tensors[name].file}: {name} should be {expected}, got shape {tensors[name].shape}")
    return tensors[name]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, {} where it has none (it was saved again by transformers).

    Raises:
        GfwsvdError: when it was cut short or changed, or is none.
    """
    if not (folder / MANIFEST).exists():
        return {}
    manifest = read_json(folder / MANIFEST)
    check_seal(folder / MANIFEST, manifest)
    match manifest:
        case {"sha256": dict(), "report": {"layers": list(layers), "provenance": dict()}}:
            if all(isinstance(layer, dict) and isinstance(layer.get("name"), str) for layer in layers):
                return manifest
    raise GfwsvdError(f"{folder / MANIFEST} holds no digests and report as gfwsvd writes them; compress anew")


def inspect(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """What a checkpoint holds, from its JSON files and the headers of its tensor files: no tensor is read.

    Returns:
        Plain JSON values: `format_version`, `method`, `keep` (asked), `kept` (achieved), `time_kept` (by the latency
        table, None without one); `kinds`, the number of layers of each kind; `metrics` and `unjudged`, see
        `CompressionReport`; `stored` and `dense`, the weights of the compressed linear layers now and before;
        `model_stored` and `model_dense`, the same for all tensors; `bytes` and `model_bytes`, what these take now;
        `provenance`; and `layers`, a list of objects with `name`, `kind`, `rank`, `bits`, `stored`, `dense`, `bytes`
        and whatever else the report says of the layer. A checkpoint that was saved again without its manifest has an
        empty `provenance` and the bare layers.

    Raises:
        GfwsvdError: when the folder is no checkpoint of this format, or one that was cut short or changed.
    """
    folder = Path(directory).expanduser()
    section = read_json(folder / "config.json").get("quantization_config")
    if not isinstance(section, dict):
        raise GfwsvdError(f"{folder} is no gfwsvd checkpoint: its config.json has no quantization_config")
    tensors = read_headers(checkpoint_files(folder))
    layers = check_layers(parse_section(section), tensors)
    report = read_manifest(folder).get("report", {})
    details = {entry["name"]: entry for entry in report.get("layers", ())}
    names = [name for name in details if name in layers] if details.keys() >= layers.keys() else list(layers)
    sizes, dense, num_bytes = (
        sum(getattr(layer, count) for layer in layers.values()) for count in ("stored", "dense", "bytes")
    )
    splits = {tensor: tensor.rpartition(".") for tensor in tensors}
    others = [tensor for tensor, (name, _, leaf) in splits.items() if name not in layers or leaf == "bias"]
    model_stored = sizes + sum(tensors[tensor].numbers for tensor in others)
    return {
        **{key: section.get(key) for key in ("format_version", "method", "keep", "kept")},
        "time_kept": report.get("time_kept"),
        "kinds": dict(Counter(layer.kind for layer in layers.values())),
        "metrics": report.get("metrics"),
        "unjudged": report.get("unjudged"),
        "stored": sizes,
        "dense": dense,
        "model_stored": model_stored,
        "model_dense": model_stored - sizes + dense,
        "bytes": num_bytes,
        "model_bytes": sum(info.num_bytes for info in tensors.values()),
        "provenance": report.get("provenance", {}),
        "layers": [{**details.get(name, {}), "name": name, **layers[name]._asdict()} for name in names],
    }
