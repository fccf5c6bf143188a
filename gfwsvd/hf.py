"""Checkpoints as ordinary transformers folders: writing them, and the quantizer by which `from_pretrained` reads them.

After `import gfwsvd`, `AutoModelForCausalLM.from_pretrained(folder)` loads a compressed model like any other one. In a
process without gfwsvd it fails: the down factor lies where the dense weight is expected and has another shape.
"""

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from . import checkpoint
from .card import model_card
from .checkpoint import inspect as inspect
from .errors import GfwsvdError
from .folders import atomic_folder, check_digests, digests_of, read_headers, sealed, write_json
from .layers import LowRankLinear, check_order, is_linear, weight_shape
from .quantise import check_scales
from .ranked import rank

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Report(Protocol):
    """What `save_pretrained` asks of a report: `gfwsvd.CompressionReport` is one."""

    def to_json(self) -> dict[str, Any]: ...


class GfwsvdConfig(QuantizationConfigMixin):
    """The format section of a checkpoint, as transformers hands it about; see `gfwsvd.checkpoint`.

    Raises:
        GfwsvdError: when the section is of an unknown version, or a layer of an unknown kind.
    """

    def __init__(self, **section: Any) -> None:
        checkpoint.parse_section(section)
        self.__dict__.update(section)


class GfwsvdQuantizer(HfQuantizer):
    """Puts the low-rank layers into the model's skeleton before transformers fills it, after checking the files."""

    requires_calibration = True  # a dense checkpoint cannot be loaded into this format, it takes `gfwsvd.compress`
    quantization_config: GfwsvdConfig

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        section = self.quantization_config.to_dict()
        entries = checkpoint.parse_section(section)
        places = {name: place for name in entries if (place := _find_module(model, name)) is not None}
        if len(set(places.values())) < len(places):
            twice = next(place for place, count in Counter(places.values()).items() if count > 1)
            raise GfwsvdError(f"config.json: layer {twice} is listed under two names; the file was changed")
        modules = {name: model.get_submodule(place) for name, place in places.items()}
        for name, module in modules.items():
            if not is_linear(module):
                raise GfwsvdError(f"config.json: layer {name} is no linear layer here, but {type(module).__name__}")
        if checkpoint_files is not None:
            _check_files(model.name_or_path, [Path(file) for file in checkpoint_files], entries, modules)
        for name, module in modules.items():
            if (rank := entries[name].rank) is not None:
                d_out, d_in = weight_shape(module)
                entry, has_bias = entries[name], module.bias is not None
                options: dict[str, Any] = {"pivoted": entry.pivoted, "bits": entry.bits, "bias": has_bias}
                layer = LowRankLinear(d_in, d_out, rank, **options, device="meta", dtype=module.weight.dtype)
                model.set_submodule(places[name], layer)
        # A model without its head, or with one around it, has other module names; saved again, it needs its own.
        self.quantization_config.layers = {place: section["layers"][name] for name, place in places.items()}

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **_: Any) -> None:
        # Keeps a later model.save_pretrained from renaming or merging tensors as the dense checkpoint had them.
        model._weight_conversions = []
        for name, module in model.named_modules():
            if isinstance(module, LowRankLinear) and module.order is not None:
                check_order(name, module.order)
            if isinstance(module, LowRankLinear) and module.scales is not None and module.bits is not None:
                check_scales(name, module.scales, module.bits)

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:  # what Trainer asks before it trains all parameters, without adapters
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _find_module(model: "PreTrainedModel", name: str) -> str | None:
    """The name in `model` of the layer that the checkpoint calls `name`; None for one in a head that `model` lacks."""
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        try:
            model.get_submodule(candidate)
            return candidate
        except AttributeError:
            continue
    if type(model).__name__ in (model.config.architectures or ()):
        raise GfwsvdError(f"config.json: {type(model).__name__} has no layer {name}; the file was changed")
    return None


def _check_files(
    source: str, files: list[Path], entries: dict[str, checkpoint.Entry], modules: dict[str, nn.Module]
) -> None:
    """Places first, then headers, then the digests where the manifest lies beside."""
    folder = files[0].parent
    for file in map(os.path.abspath, files):
        inside = not os.path.isdir(source) or Path(file).is_relative_to(os.path.abspath(source))
        if not inside or os.path.dirname(file) != os.path.abspath(folder):
            raise GfwsvdError(f"the index of {source} leads out of the folder, to {file}; the file was changed")
    shapes = {name: weight_shape(module) for name, module in modules.items()}
    biased = {name for name, module in modules.items() if module.bias is not None}
    checkpoint.check_layers(entries, read_headers(files), shapes=shapes, biased=biased)
    digests = checkpoint.read_manifest(folder).get("sha256", {})
    check_digests(folder, {file.name: digests[file.name] for file in files if file.name in digests})


def save_pretrained(
    model: "PreTrainedModel",
    directory: str | os.PathLike[str],
    *,
    report: Report,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a compressed model as a transformers folder that `from_pretrained` reads back bit by bit.

    The folder holds safetensors files, config, generation config, tokenizer if given, a model card `README.md` as the
    hub wants it, and the manifest `gfwsvd.json` with the report and a digest of every tensor file; `from_pretrained`
    refuses files that differ from their digest. It appears whole or not at all. The configuration of `model` gets the
    format section too, so that a later `model.save_pretrained` writes a loadable folder, without manifest. Of the ranks
    of a job, which have the same model, rank 0 writes, and the others do not wait for it.

    Args:
        model: a transformers model some of whose linear layers are `LowRankLinear`.
        directory: a new or empty folder; with `overwrite`, also a folder with a `config.json`, replaced as a whole.
        report: of the compression of this very model.
        max_shard_size: of one safetensors file, in bytes or as text such as "5GB".

    Raises:
        GfwsvdError: when the folder cannot be written, the report is of another model, a rank is as large as the number
            of outputs (then the down factor has the shape of the dense weight, which a process without gfwsvd would
            take it for), the model is quantized by another method, or transformers refuses to save it.
    """
    details = report.to_json()
    section = _section(model, details)
    if rank():
        _set_section(model, section)
        return
    with atomic_folder(directory, overwrite=overwrite, marker="config.json") as folder:
        _set_section(model, section)
        write_model(model, folder, tokenizer, max_shard_size=max_shard_size)
        auto_class = "AutoModelForCausalLM" if model.can_generate() else type(model).__name__
        card = model_card(details, auto_class=auto_class, base_card=_base_card(model.name_or_path))
        (folder / "README.md").write_text(card, encoding="utf-8")
        files = checkpoint.checkpoint_files(folder)
        checkpoint.check_layers(checkpoint.parse_section(section), read_headers(files))
        manifest = {"format_version": section["format_version"], "sha256": digests_of(files), "report": details}
        write_json(folder / checkpoint.MANIFEST, sealed(manifest))


def write_model(
    model: "PreTrainedModel",
    folder: Path,
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    max_shard_size: int | str = "5GB",
) -> None:
    """What transformers writes of a model, into a folder of `atomic_folder`; GfwsvdError where it refuses."""
    try:
        # In the names of the modules, not in those of the dense checkpoint that transformers may know for them.
        model.save_pretrained(folder, max_shard_size=max_shard_size, save_original_format=False)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except ValueError as error:  # such as a generation config that contradicts itself
        raise GfwsvdError(f"transformers cannot save this {type(model).__name__}: {error}") from error
    except Exception as error:
        if type(error) is Exception:  # what a tokenizer makes of a full disk
            raise OSError(str(error)) from error
        raise


def _base_card(source: str) -> str:
    """The card of the model that was loaded from `source`, as far as it lies on this machine; else ""."""
    try:
        found = cached_file(source, "README.md", local_files_only=True) if source else None
        return Path(found).read_text(encoding="utf-8") if found else ""
    except (OSError, ValueError):  # not there, no name at all, or no text
        return ""


def _section(model: "PreTrainedModel", report: dict[str, Any]) -> dict[str, Any]:
    """The format section of `model`, in the order of the report."""
    found = {
        name: checkpoint.Entry(module.kind, module.rank, module.bits)
        for name, module in model.named_modules()
        if isinstance(module, LowRankLinear)
    }
    reported = {
        entry["name"]: checkpoint.Entry(entry["kind"], entry["rank"], entry.get("bits"))
        for entry in report["layers"]
        if entry["rank"] is not None
    }
    for name in {**found, **reported}:
        if found.get(name) != reported.get(name):
            there, told = (_said(entries.get(name)) for entries in (found, reported))
            raise GfwsvdError(
                f"the report is not of this model: layer {name} is {there} in the model and {told} in the report"
            )
        if found[name].rank == model.get_submodule(name).out_features:
            raise GfwsvdError(
                f"layer {name} has as many inner dimensions as outputs ({found[name].rank}), which saves nothing "
                "and cannot be stored safely; keep it dense"
            )
    names = [entry["name"] for entry in report["layers"]]
    in_bits = any(entry.bits for entry in found.values())
    return {
        "quant_method": checkpoint.QUANT_METHOD,
        "format_version": checkpoint.BITS_VERSION if in_bits else checkpoint.FORMAT_VERSION,
        **{key: report[key] for key in ("method", "keep", "kept")},
        "layers": {name: found.get(name, checkpoint.Entry("dense", None)).to_json() for name in names},
    }


def _said(entry: checkpoint.Entry | None) -> str:
    if entry is None:
        return "dense"
    return f"{entry.kind} of rank {entry.rank}{f' in {entry.bits} bits' if entry.bits else ''}"


def _set_section(model: "PreTrainedModel", section: dict[str, Any]) -> None:
    """Make `section` the quantization config of `model`, in place of that of the GGUF file it may have come from."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not isinstance(quantizer, GfwsvdQuantizer):
        if (method := quantizer.quantization_config.quant_method) != "gguf":
            raise GfwsvdError(f"{type(model).__name__} is quantized by {method}; load and compress it unquantized")
        quantizer.remove_quantization_config(model)
    model.config.quantization_config = GfwsvdConfig(**section)


def register() -> None:
    """Enter the format into transformers' tables; again is harmless. Importing this module does it."""
    if checkpoint.QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(checkpoint.QUANT_METHOD)(GfwsvdConfig)
        register_quantizer(checkpoint.QUANT_METHOD)(GfwsvdQuantizer)


register()
