"""Logits of a model on windows of tokens, a chunk at a time: those of a whole text never exist at once."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_causal, check_tokens
from .errors import GfwsvdError
from .layers import model_device
from .track import Track, silent

_PROBE_TOKENS = 128  # of the first window, on which logits from hidden states are compared with the model's own


class LogitsSource:
    """The logits of a model in two steps: `states` runs it up to its output embedding, `logits` applies that to rows.

    Where this does not give the model's own logits, states are the logits themselves and `head` is None. Use it within
    `evaluating(model)`.

    Args:
        model: a transformers causal language model.
        windows: (N, S) integer token ids.

    Attributes:
        head: the output embedding or None.
        vocabulary: number of logits of a token.
        device: where tokens go.

    Raises:
        GfwsvdError: for a model that predicts no next tokens, and windows that are too long for it or hold tokens that
            it does not have.
    """

    def __init__(self, model: nn.Module, windows: Tensor) -> None:
        check_causal(model)
        check_tokens(model, windows)
        self.model, self.windows, self.device = model, windows, model_device(model)
        find_head: Any = getattr(model, "get_output_embeddings", lambda: None)
        head = find_head()
        probe = windows[:1, :_PROBE_TOKENS]
        inputs, logits = self._run(probe, head, positions=probe.shape[1])
        self.vocabulary = logits.shape[-1]
        self.head = head if _head_explains(head, inputs, logits) else None

    def states(self, start: int, stop: int) -> Tensor:
        """Of all but the last tokens of windows `start` to `stop`, (B, S - 1, D)."""
        return self.states_of(self.windows[start:stop])

    def states_of(self, ids: Tensor) -> Tensor:
        """The same of other windows (B, S); with gradients where these are on."""
        inputs, logits = self._run(ids, self.head, positions=1)
        return (logits if self.head is None else inputs[0])[:, :-1]

    def logits(self, states: Tensor) -> Tensor:
        """(T, V) of some states (T, D)."""
        return states if self.head is None else self.head(states)

    def _run(self, ids: Tensor, head: nn.Module | None, *, positions: int) -> tuple[list[Tensor], Tensor]:
        """What enters `head`, and the logits; with a head only those of the first `positions`."""
        inputs: list[Tensor] = []

        def shorten(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not arguments or not isinstance(arguments[0], Tensor) or arguments[0].shape[:2] != ids.shape:
                return None
            inputs.append(arguments[0])
            return arguments[0][:, :positions], *arguments[1:]

        handle = head.register_forward_pre_hook(shorten) if head is not None else None
        try:
            output = self.model(input_ids=ids.to(self.device), use_cache=False)
        finally:
            if handle is not None:
                handle.remove()
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise GfwsvdError(f"{type(self.model).__name__} gives no logits: expected a causal language model")
        return inputs, logits


class CachedLogits:
    """What `ReferenceLogits` kept, in the form of a `LogitsSource`."""

    def __init__(self, states: Tensor, head: nn.Module, *, vocabulary: int, device: torch.device) -> None:
        self._states, self._head, self.vocabulary, self._device = states, head, vocabulary, device

    def states(self, start: int, stop: int) -> Tensor:
        return self._states[start:stop].to(self._device)

    def logits(self, states: Tensor) -> Tensor:
        return self._head(states)


class ReferenceLogits:
    """The logits of a model on fixed windows, for any number of evaluations that together run it only once, each of any
    stride that the windows have.

    Kept are a copy of the output embedding and what enters it, (N, S - 1, D) on the CPU in the model's dtype: the model
    may be changed or deleted afterwards. A model that does more to its logits than its output embedding does (such as
    Gemma 2, which caps them) is kept instead and runs again in each evaluation; it must then stay as it is.

    Args:
        model, windows, batch_size, track: as in `evaluate`.

    Attributes:
        windows: a copy.
        cached: whether the model need not run again.

    Raises:
        GfwsvdError: as in `evaluate`.
    """

    def __init__(self, model: nn.Module, windows: Tensor, *, batch_size: int = 1, track: Track[int] = silent) -> None:
        check_windows(windows, batch_size)
        self.windows = windows.clone()
        with evaluating(model):
            source = LogitsSource(model, self.windows)
            self.cached = source.head is not None
            if source.head is None:
                self._model, self._parameters = model, list(model.parameters())
                self._versions = _versions(model)
                return
            starts = track(range(0, len(windows), batch_size), f"reference: {len(windows)} windows")
            states = torch.cat([source.states(start, start + batch_size).cpu() for start in starts])
            head = copy.deepcopy(source.head)
            self._kept = CachedLogits(states, head, vocabulary=source.vocabulary, device=source.device)

    @contextlib.contextmanager
    def open(self) -> Iterator[LogitsSource | CachedLogits]:
        """Yields a source of the logits; GfwsvdError if the model must run again and is no longer what it was."""
        if self.cached:
            yield self._kept
            return
        if _versions(self._model) != self._versions:
            raise GfwsvdError(
                f"the reference {type(self._model).__name__} has changed since its ReferenceLogits were made, and it "
                "must run again because it post-processes its logits; load it a second time for the reference"
            )
        with evaluating(self._model):
            yield LogitsSource(self._model, self.windows)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it there are no gradients and no dropout. Not inference mode: what a model computes once and keeps, such
    as rotary tables, would stay unusable for training."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def check_windows(windows: Tensor, batch_size: int) -> None:
    """Raises GfwsvdError unless `windows` is (N, S) of integers, N >= 1, S >= 2, and `batch_size` positive."""
    if windows.dim() != 2 or windows.shape[0] < 1 or windows.dtype not in (torch.int64, torch.int32):
        raise GfwsvdError(
            "windows must be (N, S) token ids, N at least 1, int64 or int32, got "
            f"{tuple(windows.shape)} {windows.dtype}"
        )
    if windows.shape[1] < 2:
        raise GfwsvdError(f"windows must have at least 2 tokens to predict one, got {windows.shape[1]}")
    if batch_size < 1:
        raise GfwsvdError(f"batch_size must be at least 1, got {batch_size}")


def _head_explains(head: nn.Module | None, inputs: list[Tensor], logits: Tensor) -> bool:
    """Whether `head` alone makes `logits` of its only input, up to what rounding may do."""
    if head is None or len(inputs) != 1:
        return False
    made = head(inputs[0])
    tolerance = (1e-4 + 2 * torch.finfo(logits.dtype).eps) * logits.abs().max().item()
    return made.shape == logits.shape and bool(((made.to(logits) - logits).abs() <= tolerance).all())


def _versions(model: nn.Module) -> list[tuple[str, int, int]]:
    """Changes whenever a parameter of `model` is replaced or written to, as long as the old ones are kept alive."""
    return [(name, id(p), 0 if p.is_inference() else p._version) for name, p in model.named_parameters()]
