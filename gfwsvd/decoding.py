"""Decoding with a static cache, each step a replay of one CUDA graph: at a few tokens a step launches, not memory,
would otherwise take the time."""

from typing import Any

import torch
from torch import Tensor, nn

from .errors import GfwsvdError


class GraphDecoder:
    """Prefill and single-token steps of a causal language model of transformers, dense, compressed or fused.

    On a GPU a step is captured once, here, and replayed; on a CPU it is called. Calls must follow one another on one
    stream, those of other decoders of a fused model too. The model must not change while the decoder is in use.

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
        self._tokens = torch.zeros(batch_size, 1, dtype=torch.int64, device=next(model.parameters()).device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor
        if self._tokens.is_cuda:
            if any(layer.is_sliding for layer in self.cache.layers):
                raise GfwsvdError(
                    f"{type(model).__name__} has layers with sliding windows, which no graph can replay: expected full "
                    f"attention; use the model's own generate"
                )
            self._capture()

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor) -> Tensor:
        """Starts anew with prompts (B, S), none of them padded; logits (B, V) of the token after each."""
        if input_ids.dim() != 2 or input_ids.shape[0] != self.batch_size:
            raise GfwsvdError(f"expected prompts ({self.batch_size}, S), got {tuple(input_ids.shape)}")
        self._make_room(0, input_ids.shape[1])
        self.cache.reset()
        return self._forward(input_ids)

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Appends a token to each sequence (B,); logits (B, V) of the one after it, valid until the next step."""
        self._make_room(self.length, 1)
        self._tokens.copy_(tokens[:, None])
        if self._graph is None:
            return self._forward(self._tokens)
        self._graph.replay()
        return self._logits

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

    def _forward(self, input_ids: Tensor) -> Tensor:
        output: Any = self.model(input_ids=input_ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = output.logits[:, -1]
        return logits

    @torch.inference_mode()
    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # twice: the first call may compile and allocate
            for _ in range(2):
                self._forward(self._tokens)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._forward(self._tokens)
        self.cache.reset()
