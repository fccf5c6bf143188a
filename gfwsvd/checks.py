"""Checks of token ids and their windows, on which a model of transformers would fail in its own way, or not at all."""

from typing import Any

from torch import Tensor, nn

from .errors import GfwsvdError


def is_causal(model: nn.Module) -> bool:
    """Whether `model` may predict next tokens: False for encoders and encoder-decoders of transformers."""
    can_generate: Any = getattr(model, "can_generate", lambda: True)
    return can_generate() and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def check_causal(model: nn.Module) -> None:
    """GfwsvdError unless `is_causal`."""
    if not is_causal(model):
        raise GfwsvdError(f"{type(model).__name__} predicts no next tokens: expected a causal language model")


def check_tokens(model: nn.Module, ids: Tensor) -> None:
    """GfwsvdError where token ids (N, S) are longer than the model's context or not of its vocabulary."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    check_length(ids.shape[1], getattr(text, "max_position_embeddings", None))
    vocabulary = getattr(text, "vocab_size", None)
    if vocabulary is not None and ids.numel() and not 0 <= ids.min() <= ids.max() < vocabulary:
        raise GfwsvdError(
            f"the tokens are from {ids.min()} to {ids.max()}, the model's vocabulary has {vocabulary}: expected tokens "
            "of the model's own tokenizer"
        )


def check_length(tokens: int, positions: int | None) -> None:
    """GfwsvdError where sequences of so many tokens are longer than the model has positions (None: any number)."""
    if positions is not None and tokens > positions:
        raise GfwsvdError(
            f"the sequences have {tokens} tokens, the model takes {positions} at most; ask for shorter ones"
        )


def check_stride(stride: int, window: int) -> None:
    """GfwsvdError unless windows of `window` tokens that start every `stride` tokens leave none out."""
    if not 1 <= stride <= window:
        raise GfwsvdError(f"stride must be from 1 to the window's {window} tokens, got {stride}")
