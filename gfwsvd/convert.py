"""Checkpoints from and to other forms: dense ones of ours, and ours of what others published."""

import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .checkpoint import checkpoint_files
from .errors import GfwsvdError
from .folders import atomic_folder, check_output_folder, read_headers
from .hf import GfwsvdQuantizer, save_pretrained, write_model
from .layers import LowRankLinear, dense_weight, find_linears, is_linear, is_transposed, model_size
from .layouts import LAYOUTS, Factors, check_numbers, find_layout, read_layers
from .outcome import CompressionReport, LayerReport, read_report
from .pivot import Pivoted
from .quantise import check_bits, check_form
from .sources import load_model
from .track import Track, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def merge(
    source: str, directory: Path, *, dtype: str | None = None, overwrite: bool = False, track: Track = silent
) -> int:
    """Write a compressed model as an ordinary dense one, which programs read that know nothing of gfwsvd.

    Every weight is the product of its factors, computed in float64 and rounded once.

    Args:
        source: a checkpoint of ours: a folder or a name on the hub.
        directory: a new or empty folder; with `overwrite`, also one with a `config.json`, replaced as a whole.
        dtype: of the weights, by default as stored.

    Returns:
        How many layers were low-rank.

    Raises:
        GfwsvdError: when the source cannot be loaded or has no low-rank layers, or the folder cannot be written.
    """
    check_output_folder(directory, overwrite=overwrite, marker="config.json")
    model, tokenizer, _ = load_model(source, dtype=dtype)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LowRankLinear)]
    if not layers or not isinstance(quantizer := getattr(model, "hf_quantizer", None), GfwsvdQuantizer):
        raise GfwsvdError(f"{source} has no low-rank layers to multiply out; expected what gfwsvd compress wrote")
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    for name, layer in track(layers, f"products of {len(layers)} layers"):
        dense: Any = skeleton.get_submodule(name)
        weight = layer.product(torch.float64).to(layer.dtype)
        dense.weight = nn.Parameter(weight.T.contiguous() if is_transposed(dense) else weight)
        dense.bias = layer.bias
        model.set_submodule(name, dense)
    quantizer.remove_quantization_config(model)
    with atomic_folder(directory, overwrite=overwrite, marker="config.json") as folder:
        write_model(model, folder, tokenizer)
    return len(layers)


def in_bits(
    source: str,
    directory: Path,
    *,
    bits: int,
    dtype: str | None = None,
    overwrite: bool = False,
    track: Track = silent,
) -> CompressionReport:
    """Write a checkpoint of ours with its factors rounded to `bits` (`quantise.py`).

    Args:
        source: a folder of gfwsvd compress or tune, with its manifest.
        directory, overwrite: see `merge`.
        bits: 8, or for two factors 4, fitted to each other as in `compress`, but by no metric, for which there are no
            statistics.
        dtype: of all other tensors, by default as stored.

    Raises:
        GfwsvdError: when the source cannot be loaded, has no manifest, no low-rank layers, some in few bits already
            or some that cannot be in four, or the folder cannot be written.
    """
    check_bits(bits)
    check_output_folder(directory, overwrite=overwrite, marker="config.json")
    report = read_report(Path(source).expanduser())
    model, tokenizer, _ = load_model(source, dtype=dtype)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LowRankLinear)}
    if not layers or any(layer.bits for layer in layers.values()):
        raise GfwsvdError(f"{source} has no low-rank layers, or their factors are in eight or four bits already")
    for name, layer in layers.items():
        check_form(f"layer {name}", bits, d_in=layer.in_features, pivoted=layer.order is not None)
    reports = {layer.name: layer for layer in report.layers}
    for name, layer in track(list(layers.items()), f"{len(layers)} layers in {bits} bits"):
        rounded = layer.in_bits(bits)
        model.set_submodule(name, rounded)
        reports[name].bits, reports[name].stored, reports[name].rounding_loss = rounded.bits, rounded.stored, None
    size = model_size(model)
    report.bits, report.model_stored, report.model_bytes = bits, size.numbers, size.bytes
    report.stored = sum(layer.stored for layer in report.layers)
    report.kept = report.stored / report.dense
    save_pretrained(model, directory, report=report, tokenizer=tokenizer, overwrite=overwrite)
    return report


def import_published(
    source: str,
    directory: Path,
    *,
    base: str,
    dtype: str | None = None,
    overwrite: bool = False,
    track: Track = silent,
) -> CompressionReport:
    """Write a checkpoint of ours from factors that another project published, under the names of one of `LAYOUTS`.

    Args:
        source: a .safetensors file, a pickled state dict (read with `weights_only=True`: no code of it runs), or a
            folder of one of the two. It has to hold every tensor of the model.
        directory, overwrite: see `merge`.
        base: the dense model that was compressed, for its architecture, configuration and tokenizer.
        dtype: of the weights, by default that of the factors.

    Raises:
        GfwsvdError: when the source cannot be read without running its code, follows no layout, or does not fit the
            base model in every name, shape and type; nothing is written then.
    """
    check_output_folder(directory, overwrite=overwrite, marker="config.json")
    began = time.perf_counter()
    published = read_tensors(Path(source).expanduser())
    layout_name = find_layout(published)
    layout = LAYOUTS[layout_name]
    factor, value = next(item for item in published.items() if item[0].endswith(f"{layout.up}.weight"))
    check_numbers(factor, value)
    model, tokenizer, base_name = load_model(base, dtype=dtype or value.dtype)
    linears = {name: module for name, module in model.named_modules() if name and is_linear(module)}
    shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in _weights(linears).items()}
    factors, others = read_layers(published, layout, shapes)
    _check_others(model, factors, others)
    reported = {**factors, **find_linears(model)}
    before = model_size(model)
    for name in track(list(factors), f"{layout_name}: {len(factors)} layers"):
        model.set_submodule(name, _layer(linears[name], factors[name]))
    model.load_state_dict(others, strict=False)
    layers = [_report(model.get_submodule(name), name, *shapes[name]) for name in linears if name in reported]
    stored, dense = (sum(getattr(layer, count) for layer in layers) for count in ("stored", "dense"))
    after = model_size(model)
    report = CompressionReport(
        method=layout.method,
        keep=stored / dense,
        kept=stored / dense,
        ranks="published",
        rank_multiple=1,
        storage="pivoted" if layout.pivots else "factors",
        damping=0.0,
        stored=stored,
        dense=dense,
        model_stored=after.numbers,
        model_dense=before.numbers,
        model_bytes=after.bytes,
        model_dense_bytes=before.bytes,
        predicts_loss=False,
        seconds=time.perf_counter() - began,
        layers=layers,
        provenance={"model": base_name, "converted_from": layout_name, "source": Path(source).name},
    )
    save_pretrained(model, directory, report=report, tokenizer=tokenizer, overwrite=overwrite)
    return report


def read_tensors(source: Path) -> dict[str, Tensor]:
    """The tensors of a file or folder by name, on the CPU; see `import_published`.

    Raises:
        GfwsvdError: when there is none, it is damaged, or it is a pickle of something else than tensors.
    """
    files = [source]
    if source.is_dir():
        pickles = sorted(source.glob("pytorch_model*.bin"))
        files = pickles if pickles and not any(source.glob("*.safetensors")) else checkpoint_files(source)
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():
            raise GfwsvdError(f"there is no file {file}; expected tensors that another project published")
        part = _load_safetensors(file) if file.suffix == ".safetensors" else _load_state_dict(file)
        if twice := tensors.keys() & part.keys():
            raise GfwsvdError(f"tensor {min(twice)} is in more than one file of {source}")
        tensors |= part
    return tensors


def _load_safetensors(file: Path) -> dict[str, Tensor]:
    read_headers([file])
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise GfwsvdError(f"cannot read {file}: {error}") from error


def _load_state_dict(file: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # of many kinds, for whatever a file may hold
        reason = str(error).partition("\n")[0]
        raise GfwsvdError(
            f"{file} is no state dict of tensors alone ({type(error).__name__}: {reason}) A whole pickled model is not "
            "read, since that runs whatever code its author put there; whoever trusts the file can load it where it "
            'was made and write its tensors: torch.save(model.state_dict(), "state.pt")'
        ) from error
    if isinstance(found, dict):
        found = next((found[key] for key in ("state_dict", "model") if isinstance(found.get(key), dict)), found)
    if not isinstance(found, dict) or not found:
        raise GfwsvdError(f"{file} should hold a state dict, tensors by name, got {type(found).__name__}")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise GfwsvdError(f"{file} should hold tensors by name, got {type(value).__name__} under {name!r:.200}")
    return {name: value.detach() for name, value in found.items()}


def _weights(linears: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {name: dense_weight(module) for name, module in linears.items()}


def _check_others(model: "PreTrainedModel", factors: Mapping[str, Factors], others: Mapping[str, Tensor]) -> None:
    """GfwsvdError unless `others` are all tensors of the model but the compressed weights, and fit."""
    own = model.state_dict()
    names: dict[tuple[int, torch.Size], list[str]] = {}  # of one tensor each, tied ones together
    for name, value in own.items():
        names.setdefault((value.data_ptr(), value.shape), []).append(name)
    compressed = {f"{name}.weight" for name in factors}
    for group in names.values():
        if len(group) > 1 and (tied := compressed.intersection(group)):
            raise GfwsvdError(f"{min(tied)} is one tensor with others in the base model, so it cannot have factors")
        given = [others[name] for name in group if name in others]
        if not given and not compressed.intersection(group):
            raise GfwsvdError(f"tensor {group[0]} is missing; expected every tensor of the model in the source")
        if any(not torch.equal(given[0], value) for value in given[1:]):
            raise GfwsvdError(f"{' and '.join(group)} are one tensor in the base model, and differ in the source")
    if extra := others.keys() - (own.keys() - compressed):
        raise GfwsvdError(f"the base model has no tensor {min(extra)}, nor is it a factor; give the model it is of")
    for name, value in others.items():
        if value.shape != own[name].shape:
            shapes = f"{tuple(own[name].shape)}, got {tuple(value.shape)}"
            raise GfwsvdError(f"tensor {name} should have the shape that it has in the base model, {shapes}")
        check_numbers(f"tensor {name}", value)


def _layer(module: nn.Module, factors: Factors) -> LowRankLinear:
    base: Any = module
    up, down = (factor.to(base.weight.dtype) for factor in (factors.up, factors.down))
    order = None if factors.pivots is None else Pivoted(down, up, factors.pivots).order()
    return LowRankLinear.from_factors(up, down, base.bias, order).train(module.training)


def _report(module: nn.Module, name: str, d_out: int, d_in: int) -> LayerReport:
    if isinstance(module, LowRankLinear):
        return LayerReport(name, module.kind, d_in, d_out, module.rank, module.stored, d_out * d_in)
    reason = "dense in what was published"
    return LayerReport(name, "dense", d_in, d_out, None, d_out * d_in, d_out * d_in, reason=reason)
