"""Where models and token batches come from: names on the hub, folders, GGUF files, and texts (`gfwsvd.texts`)."""

import contextlib
import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checks import check_stride
from .errors import GfwsvdError
from .folders import read_headers, read_json
from .memory import recompute
from .texts import hub_out_of_reach, one_line
from .texts import load_text as load_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_model(
    spec: str,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    max_memory: Mapping[int | str, int] | None = None,
    auto_class: str | None = None,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase | None, str]":
    """A transformers model in eval mode, its tokenizer if it has one, and a name for reports.

    Args:
        spec: a name on the hub, a transformers folder (a gfwsvd checkpoint is one), or a .gguf file.
        dtype: of the weights, by default what the checkpoint was saved in, and float32 for a .gguf file.
        device: where the weights go, by default the CPU; "auto" spreads them over GPUs, host and disk, each of which
            they reach only when they are needed. Activations are then recomputed where a gradient asks for them.
        max_memory: with "auto", the most bytes of weights on each GPU, by number, and on the "cpu"; by default what is
            free.
        auto_class: name of the transformers class to load, such as "AutoModel"; by default the architecture that the
            checkpoint names, and AutoModelForCausalLM for a .gguf file.

    Returns:
        (model, tokenizer or None, name), the name being that of the hub, or the last part of a path.

    Raises:
        GfwsvdError: when there is nothing to read, it has no safetensors file (pickle files are never read), it lacks
            tensors that the model needs, a .gguf file has no tokenizer, or something cannot be read.
    """
    path = Path(spec).expanduser()
    placement = {"device_map": device, "max_memory": max_memory}
    try:
        with quiet():
            if path.suffix == ".gguf":
                return *_load_gguf(path, dtype, placement, auto_class or "AutoModelForCausalLM"), path.name
            if path.is_dir():
                _check_folder(path)
                return *_load_pretrained(str(path), dtype, placement, auto_class), path.resolve().name
            if path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", spec):
                raise GfwsvdError(f"{spec} is no model: expected a folder, a .gguf file or a name on the hub")
            return *_load_pretrained(spec, dtype, placement, auto_class), spec
    except GfwsvdError:
        raise
    except Exception as error:  # of many kinds: the readers below fail in any way on what they cannot read
        raise GfwsvdError(_why_not_loaded(spec, path, error)) from error


def _load_pretrained(
    spec: str, dtype: torch.dtype | str | None, placement: Mapping[str, Any], auto_class: str | None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase | None]":
    import transformers
    from transformers.utils.hub import has_file

    if auto_class is None:
        architectures = transformers.AutoConfig.from_pretrained(spec).architectures or ()
        auto_class = next((name for name in architectures if hasattr(transformers, name)), "AutoModelForCausalLM")
    model, info = _model_class(auto_class).from_pretrained(
        spec, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True, **placement
    )
    if any(value.is_meta for value in model.parameters()):  # else autograd would hold every weight it has seen
        recompute(model)
    if info["missing_keys"]:
        raise GfwsvdError(
            f"{spec} lacks tensors that {type(model).__name__} needs, among them {min(info['missing_keys'])}; "
            "give the class that the checkpoint was made for"
        )
    has_tokenizer = any(has_file(spec, name) for name in _TOKENIZER_FILES)
    return model, transformers.AutoTokenizer.from_pretrained(spec) if has_tokenizer else None


def _load_gguf(
    file: Path, dtype: torch.dtype | str | None, placement: Mapping[str, Any], auto_class: str
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    from transformers import AutoTokenizer, GgufConfig

    if not file.is_file():
        raise GfwsvdError(f"there is no file {file}")
    model_class = _model_class(auto_class)
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = model_class.from_pretrained(
            **source, quantization_config=GgufConfig(dequantize=True), dtype=dtype or torch.float32, **placement
        )
    except Exception as error:
        reason = _why_unreadable(file) or f"cannot load {file}: {type(error).__name__}: {error}"
        raise GfwsvdError(reason) from error
    return model, tokenizer


def _model_class(name: str) -> Any:
    import transformers

    if not hasattr(transformers, name):
        raise GfwsvdError(f"transformers has no class {name}; expected one such as AutoModelForCausalLM")
    return getattr(transformers, name)


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").exists():
        raise GfwsvdError(f"{folder} is no model folder: it has no config.json")
    if not any(folder.glob("*.safetensors")):
        raise GfwsvdError(
            f"{folder} has no safetensors file; pickled weights are not read, since loading them can run code: save "
            "the model again with its save_pretrained"
        )


def _why_not_loaded(spec: str, path: Path, error: Exception) -> str:
    if path.exists():
        where, reason = "", _broken_file(path)
    else:
        where = " (no file or folder here; taken for a name on the hub)"
        cached = _cached_folder(spec)
        reason = cached and _broken_file(cached) or hub_out_of_reach(error)
    return f"cannot load the model {spec}{where}: {reason or f'{type(error).__name__}: {one_line(error)}'}"


def _cached_folder(name: str) -> Path | None:
    """Where the hub's cache has the model of that name, if it has."""
    from transformers.utils.hub import cached_file

    try:
        config = cached_file(name, "config.json", local_files_only=True)
    except (OSError, ValueError):  # not there, or no name that a model could have
        return None
    return Path(config).parent if config else None


def _broken_file(folder: Path) -> str | None:
    """Which file of a model folder that transformers could not load is cut short or changed, as far as that shows."""
    try:
        for index in sorted(folder.glob("*.index.json")):
            read_json(index)
        for file in sorted(folder.glob("*.safetensors")):  # each alone: copies of one tensor in two files are no harm
            read_headers([file])
    except GfwsvdError as error:
        return str(error)
    return None


def _why_unreadable(file: Path) -> str | None:
    """What is wrong with a GGUF file that transformers could not load, as far as the file itself shows."""
    from gguf import GGUFReader

    try:
        fields = GGUFReader(file).fields
    except Exception as error:
        return f"{file} is not a whole GGUF file ({error}); download or copy it again"
    if "tokenizer.ggml.tokens" not in fields:
        return f"{file} has no tokenizer in its metadata (tokenizer.ggml.tokens); take a GGUF file that includes one"
    return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and progress bars of transformers: what matters of them is raised as an error here."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def token_batches(
    text: str,
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    sequences: int,
    seq_len: int,
    batch_size: int = 4,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """Calibration batches: windows of a text, drawn at random without overlap, every placement equally likely.

    Args:
        text: tokenised once and as a whole, with the special tokens that the tokenizer puts around a text.
        sequences, seq_len: number of windows, and tokens of each.
        batch_size: windows in a batch; the last batch may hold fewer.
        seed: the same seed gives the same windows in the same order.

    Returns:
        Batches of `input_ids` and `attention_mask` (all ones), both (B, seq_len) int64.

    Raises:
        GfwsvdError: when the text is too short, there is no tokenizer, or a number is below 1.
    """
    _check_counts(sequences=sequences, seq_len=seq_len, batch_size=batch_size)
    tokens = _tokenize(text, tokenizer, needed=sequences * seq_len, what=f"{sequences} sequences of {seq_len} tokens")
    slack = len(tokens) - sequences * seq_len
    # A placement of windows is a choice of `sequences` among `slack + sequences` places, each then as wide as a window.
    places = random.Random(seed).sample(range(slack + sequences), sequences)
    order = {place: index for index, place in enumerate(sorted(places))}
    starts = torch.tensor([place + order[place] * (seq_len - 1) for place in places])
    chosen = tokens[starts[:, None] + torch.arange(seq_len)]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in chosen.split(batch_size)]


def windows(
    text: str,
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    window: int,
    stride: int | None = None,
    limit: int | None = None,
) -> Tensor:
    """Windows for evaluation: consecutive tokens of a text from its start; what is left for no whole one is dropped.

    Args:
        text: see `token_batches`.
        window: tokens of a window.
        stride: tokens from the start of a window to that of the next; by default `window`, without overlap.
        limit: most windows to take, by default all.

    Returns:
        (N, window) int64 on the CPU, N at least 1; where windows overlap they share memory.

    Raises:
        GfwsvdError: when the text is shorter than one window, there is no tokenizer, a number is below 1, or the stride
            above the window.
    """
    _check_counts(window=window, limit=1 if limit is None else limit)
    stride = window if stride is None else stride
    check_stride(stride, window)
    return _tokenize(text, tokenizer, needed=window, what=f"one window of {window} tokens").unfold(0, window, stride)[
        :limit
    ]


def _tokenize(text: str, tokenizer: "PreTrainedTokenizerBase | None", *, needed: int, what: str) -> Tensor:
    if tokenizer is None:
        raise GfwsvdError("the model has no tokenizer, so no text can be read for it; give token batches instead")
    with quiet():  # of the warning that the text is longer than the model's context
        tokens = torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int64)
    if len(tokens) < needed:
        raise GfwsvdError(
            f"the text is too short: {what} need {needed} tokens, it has {len(tokens)}; give a longer text or ask for "
            "less"
        )
    return tokens


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise GfwsvdError(f"{name} must be at least 1, got {value}")
