"""The loss that calibration takes the gradients of: a vector of unreduced losses of a batch."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .checks import is_causal
from .errors import GfwsvdError

Batch = Mapping[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]
CHUNK_LOGITS = 1 << 22  # at a time: 16 MiB in float32, half of what glibc would get anew from the system each time


def forward(model: nn.Module, batch: Batch) -> Any:
    """The output of `model` for a batch, whose labels are for a loss alone."""
    return model(**{name: value for name, value in batch.items() if name != "labels"})


def next_token_loss(labels: str, seed: int) -> Loss:
    """Next-token cross-entropy of each predicted token; sampled labels depend on `seed` and the text alone."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        logits, targets, valid = _next_tokens(model, batch)
        texts = ids if mask is None else [row[kept] for row, kept in zip(ids, mask.bool(), strict=True)]
        chosen = targets[valid] if labels == "empirical" else _sample(logits.detach(), valid, texts, seed)
        return F.cross_entropy(logits.float(), chosen, reduction="none")

    return loss


def divergence(reference: Callable[[nn.Module], AbstractContextManager[None]]) -> Loss:
    """The Kullback-Leibler divergence of the predictions of `model` from those that it makes within
    `reference(model)`, without gradient, of each predicted token, in nats. Beside the logits of both, and their
    gradient, a chunk of rows exists at a time."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad(), reference(model):
            expected = _next_tokens(model, batch)[0]
        found = _next_tokens(model, batch)[0]
        rows = max(1, CHUNK_LOGITS // found.shape[-1])
        parts = zip(found.split(rows), expected.split(rows), strict=True)
        # The backward pass makes a chunk's logarithms again
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        return torch.cat([checkpoint(_divergences, *part, **options) for part in parts])

    return loss


def _divergences(found: Tensor, expected: Tensor) -> Tensor:
    """Of the predictions by logits `found` (T, V) from those by `expected`, (T,)."""
    return F.kl_div(log_softmax(found), log_softmax(expected), reduction="none", log_target=True).sum(-1)


def log_softmax(logits: Tensor) -> Tensor:
    """Logarithms of the probabilities by logits (T, V), in float32 or, for logits in float64, in that."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _next_tokens(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (T, V) of the predicted tokens, and for all but the first tokens (B, S - 1) what they are and whether
    they are predicted."""
    output = forward(model, batch)
    if not hasattr(output, "logits") or not is_causal(model):
        raise GfwsvdError(f"{type(model).__name__} gives no logits of next tokens: give a loss of your own")
    targets, mask = batch.get("labels", batch["input_ids"])[:, 1:], batch.get("attention_mask")
    valid = targets != -100
    if mask is not None:
        valid = valid & mask[:, 1:].bool() & mask[:, :-1].bool()
    return output.logits[:, :-1][valid], targets, valid


def _sample(logits: Tensor, valid: Tensor, texts: Iterable[Tensor], seed: int) -> Tensor:
    """Labels drawn from `logits`, with one generator per text, so that neither batching nor padding changes them."""
    drawn = []
    for text, part in zip(texts, logits.split(valid.sum(1).tolist()), strict=True):
        key = hashlib.sha256(f"{seed} ".encode() + text.long().cpu().numpy().tobytes()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
        uniform = torch.rand(part.shape[0], 1, generator=generator, dtype=torch.float64)
        where = "cpu" if torch.are_deterministic_algorithms_enabled() else logits.device  # GPUs sum in any order
        total = part.to(where).double().softmax(-1).cumsum(-1)
        drawn.append((total < uniform.to(where) * total[:, -1:]).sum(-1))
    return torch.cat(drawn).to(logits.device)
