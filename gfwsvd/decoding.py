"""Generation with a static cache, short prompts and each step a replay of one CUDA graph: at few tokens launches, not
memory or arithmetic, would otherwise take the time."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import GfwsvdError

GRAPH_TOKENS = 1024  # of all prompts together, padded, up to which a graph is made: more keep a GPU busy longer than
# their launches take
_LEAST = 16  # tokens of the shortest padded prompt


class GraphDecoder:
    """Prefill and single-token steps of a causal language model of transformers, dense, compressed or fused.

    On a GPU a step is captured once, here, and replayed; so are prompts of up to `GRAPH_TOKENS` tokens in all, padded
    to a power of two, each size captured when a prompt first needs it, which takes about three passes. On a CPU both
    are called. Calls must follow one another on one stream, those of other decoders of a fused model too. The model
    must not change while the decoder is in use.

        decoder = GraphDecoder(gfwsvd.fuse(model), batch_size=1, max_length=512)
        tokens = decoder.generate(input_ids, max_new_tokens=100)
    """

    def __init__(self, model: nn.Module, *, batch_size: int, max_length: int) -> None:
        """
        Args:
            model: in eval mode, on the device to run on.
            batch_size: sequences that run side by side, all of one length.
            max_length: tokens of a prompt and its continuation together, for which the cache has room.

        Raises:
            GfwsvdError: sizes below 1, a cache longer than the model's positions, or on a GPU a model with sliding
                windows, whose cache keeps count outside the graph.
        """
        from transformers import StaticCache

        config: Any = model.config
        if batch_size < 1 or max_length < 1:
            raise GfwsvdError(f"batch_size and max_length must be at least 1, got {batch_size} and {max_length}")
        limit = getattr(config, "max_position_embeddings", None) or max_length
        if max_length > limit:
            raise GfwsvdError(f"max_length must be at most the model's {limit} positions, got {max_length}")
        self.model, self.batch_size, self.max_length = model, batch_size, max_length
        self.cache = StaticCache(config, max_cache_len=max_length)
        self.length = 0
        self._device = next(model.parameters()).device
        self._passes: dict[int, _Pass] = {}
        self._pool: Any = None  # of memory for all graphs, since one runs at a time
        if self._device.type == "cuda":
            if any(layer.is_sliding for layer in self.cache.layers):
                raise GfwsvdError(
                    f"{type(model).__name__} has layers with sliding windows, which no graph can replay: expected full "
                    f"attention; use the model's own generate"
                )
            self._pool = torch.cuda.graph_pool_handle()
            self._pass_of(1)

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor) -> Tensor:
        """Starts anew with prompts (B, S), none of them padded; logits (B, V) of the token after each."""
        if input_ids.dim() != 2 or input_ids.shape[0] != self.batch_size:
            raise GfwsvdError(f"expected prompts ({self.batch_size}, S), got {tuple(input_ids.shape)}")
        self._make_room(0, input_ids.shape[1])
        size = self._padded_size(input_ids.shape[1])
        if self._device.type == "cuda" and self.batch_size * size <= GRAPH_TOKENS:
            return self._padded(input_ids, size)
        self.cache.reset()
        return self._forward(input_ids, logits_to_keep=1)

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Appends a token to each sequence (B,); logits (B, V) of the one after it, valid until the next call."""
        self._make_room(self.length, 1)
        return self._pass_of(1)(tokens[:, None])

    def generate(self, input_ids: Tensor, *, max_new_tokens: int, eos_token_id: int | None = None) -> Tensor:
        """Greedy continuations of prompts (B, S), (B, S + N); what follows `eos_token_id` repeats it.

        Raises:
            GfwsvdError: more than `max_length` tokens in all.
        """
        if input_ids.shape[1] + max_new_tokens > self.max_length:
            raise GfwsvdError(
                f"{input_ids.shape[1]} tokens of prompt and {max_new_tokens} new ones are more than the decoder's "
                f"{self.max_length}: make one with a longer max_length"
            )
        found = [input_ids]
        token = self.prefill(input_ids).argmax(-1)
        over = torch.zeros_like(token, dtype=torch.bool)
        for number in range(max_new_tokens):
            if number:
                token = self.step(token).argmax(-1)
            if eos_token_id is not None:
                token = token.masked_fill(over, eos_token_id)
                over |= token == eos_token_id
            found.append(token[:, None])
            if eos_token_id is not None and bool(over.all()):
                break
        return torch.cat(found, 1)

    def _make_room(self, length: int, more: int) -> None:
        if not 0 < length + more <= self.max_length:
            raise GfwsvdError(f"the decoder has room for 1 to {self.max_length} tokens, got {length + more}")
        self.length = length + more

    def _padded_size(self, length: int) -> int:
        return min(max(_LEAST, 1 << (length - 1).bit_length()), self.max_length)

    def _padded(self, input_ids: Tensor, size: int) -> Tensor:
        """`prefill` with what is behind the prompts up to `size` tokens: no token sees it, and steps write over it."""
        run = self._pass_of(size)
        self.cache.reset()
        logits = run(input_ids).clone()
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(input_ids.shape[1])
        return logits

    @torch.inference_mode()
    def _pass_of(self, size: int) -> "_Pass":
        """The pass over `size` tokens a sequence; making one empties the cache."""
        if size not in self._passes:
            tokens = torch.zeros(self.batch_size, size, dtype=torch.int64, device=self._device)
            self._passes[size] = _Pass(self._forward, tokens, self.cache.reset, pool=self._pool)
        return self._passes[size]

    def _forward(self, input_ids: Tensor, *, logits_to_keep: int | Tensor) -> Tensor:
        output: Any = self.model(
            input_ids=input_ids, past_key_values=self.cache, use_cache=True, logits_to_keep=logits_to_keep
        )
        logits: Tensor = output.logits[:, -1]
        return logits


class _Pass:
    """A forward pass over `tokens` (B, S), the last of which may be left out; on a GPU one graph."""

    def __init__(self, forward: Callable[..., Tensor], tokens: Tensor, reset: Callable[[], None], *, pool: Any) -> None:
        self._forward, self._tokens = forward, tokens
        self._length = tokens.shape[1]
        self._last = torch.full((1,), self._length - 1, device=tokens.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor
        if tokens.is_cuda:
            self._capture(reset, pool)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) of what follows the last of `tokens` (B, at most S), valid until the next call of any pass."""
        if (length := tokens.shape[1]) != self._length:
            self._length = length
            self._last.fill_(length - 1)
        self._tokens[:, :length].copy_(tokens)
        if self._graph is None:
            return self._run()
        self._graph.replay()
        return self._logits

    def _run(self) -> Tensor:
        return self._forward(self._tokens, logits_to_keep=self._last)

    def _capture(self, reset: Callable[[], None], pool: Any) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # twice: the first call may compile and allocate
            for _ in range(2):
                reset()
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        reset()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._logits = self._run()
        reset()
