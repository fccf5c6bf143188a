"""The shape of a model from its configuration alone: no weight is read, and none is downloaded."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .calibration import input_leaders
from .effort import Shape
from .errors import GfwsvdError
from .layers import find_linears, is_linear, weight_shape
from .losses import forward
from .sources import quiet

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def model_shape(spec: str, *, dtype: str | None = None, exclude: Iterable[str] = ()) -> tuple[Shape, str]:
    """The shape of a model, and a name for reports.

    Args:
        spec: a name on the hub, of which the configuration is downloaded; a folder, of which config.json is read; or a
            .gguf file, of which the header is.
        dtype: of the weights, such as "bfloat16"; by default as in the configuration, and float32 for a .gguf file.
        exclude: see `calibrate`.

    Raises:
        GfwsvdError: when there is no configuration, it cannot be read, or it is of a model that is compressed already;
            and see `find_linears`.
    """
    path = Path(spec).expanduser()
    try:
        with quiet():
            config, name = _configuration(spec, path)
            described = config.dtype or torch.float32
            kind = getattr(torch, dtype) if dtype else torch.float32 if path.suffix == ".gguf" else described
            return shape_of(_skeleton(config, kind), exclude=exclude), name
    except GfwsvdError:
        raise
    except Exception as error:  # of many kinds: the readers fail in any way on what they cannot read
        raise GfwsvdError(
            f"cannot tell the shape of the model {spec} from its configuration: {type(error).__name__}: {error}"
        ) from error


def shape_of(model: Any, *, exclude: Iterable[str] = ()) -> Shape:
    """The shape of a language model of transformers, on any device: on "meta" the run that tells which layers share
    their input costs nothing. Layers that `exclude` leaves out of a calibration run all the same."""
    config = model.config.get_text_config()
    modules, every = find_linears(model, exclude=exclude), find_linears(model)
    leaders = input_leaders(model, modules, {"input_ids": torch.zeros(1, 2, dtype=torch.int64)}, forward)
    linears = {name: weight_shape(module)[::-1] for name, module in modules.items() if name in leaders}
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    tied = head is not None and head.weight is embedding
    weight = next(model.parameters())
    return Shape(
        linears=linears,
        leaders=leaders,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        embedding=0 if tied else embedding.numel(),
        vocabulary=weight_shape(head)[0] if head is not None and is_linear(head) else 0,
        hidden=config.hidden_size,
        blocks=config.num_hidden_layers,
        heads=config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        dtype=str(weight.dtype).removeprefix("torch."),
        itemsize=weight.itemsize,
        positions=getattr(config, "max_position_embeddings", None),
        others={name: weight_shape(module)[::-1] for name, module in every.items() if name not in modules},
    )


def _configuration(spec: str, path: Path) -> "tuple[PretrainedConfig, str]":
    from transformers import AutoConfig

    if path.suffix == ".gguf":
        if not path.is_file():
            raise GfwsvdError(f"there is no file {path}")
        return AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name), path.name
    if path.is_dir():
        if not (path / "config.json").exists():
            raise GfwsvdError(f"{path} is no model folder: it has no config.json")
    elif path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", spec):
        raise GfwsvdError(f"{spec} is no model: expected a folder, a .gguf file or a name on the hub")
    config = AutoConfig.from_pretrained(str(path) if path.is_dir() else spec)
    if getattr(config, "quantization_config", None) is not None:
        raise GfwsvdError(f"{spec} is compressed or quantised already: plan for the original model")
    return config, path.resolve().name if path.is_dir() else spec


def _skeleton(config: "PretrainedConfig", dtype: torch.dtype) -> "PreTrainedModel":
    """The model of a configuration on the "meta" device, of the class that `load_model` would choose."""
    import transformers

    named = next((name for name in config.architectures or () if hasattr(transformers, name)), None)
    with torch.device("meta"):
        if named is None:
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        else:
            model = getattr(transformers, named)._from_config(config, dtype=dtype)
    model.config.pad_token_id = None  # or a run would look for it among the tokens, which are not there
    return model
