"""How good a causal language model still is: perplexity, and the distance of its predictions to a reference model's."""

import contextlib
import math
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .batches import data_sha256
from .checks import check_causal, check_stride
from .errors import GfwsvdError
from .layers import model_device, model_sha256
from .logits import CachedLogits, LogitsSource, ReferenceLogits, check_windows, evaluating
from .losses import CHUNK_LOGITS, log_softmax
from .track import Track, silent
from .work import Work

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_STATE = "evaluation"
_KEPT_EVERY = 20.0  # seconds: writing the sums takes far less


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of a predicted token, or of 700 if that is less.
        kl: mean over predicted tokens of KL(reference || model), in nats; None without a reference.
        top1: share of predicted tokens whose likeliest value is the reference's; None without a reference.
        tokens: how many were predicted.
        window, stride: tokens of a window, and from the start of one to that of the next.
        seconds: wall time.
    """

    perplexity: float
    kl: float | None
    top1: float | None
    tokens: int
    window: int
    stride: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The evaluation as plain JSON values."""
        return asdict(self)


def evaluate(
    model: nn.Module,
    windows: Tensor,
    *,
    stride: int | None = None,
    reference: nn.Module | ReferenceLogits | None = None,
    batch_size: int = 1,
    work: Work | None = None,
    track: Track[int] = silent,
) -> Evaluation:
    """Perplexity of `model` on windows of tokens, and the distance of its predictions to those of a reference.

    Each window is on its own; its S - 1 tokens after the first are predicted. Of overlapping windows, those after the
    first predict only their last `stride` tokens, which the window before did not have: each after S - stride tokens or
    more. Log-probabilities are in float32 (float64 for a float64 model), sums in float64. About 2**22 logits exist at a
    time where the model does nothing to them after its output embedding (which the start of the first window shows),
    else those of one batch.

    Args:
        model: a transformers causal language model; its training flags are left as they were.
        windows: (N, S) token ids, int64 or int32, N >= 1, S >= 2.
        stride: that of `gfwsvd.windows`; by default S, windows that do not overlap.
        reference: the model to compare with, or its `ReferenceLogits` of these windows, to evaluate several models.
        batch_size: windows in a forward pass; the result depends on it by rounding only.
        work: opened for the `about_evaluation` of the same arguments: the sums over the batches that are done are kept
            there every 20 s and whenever it ends, by Ctrl-C too, and an evaluation that was interrupted goes on with
            them to the same result, to the bit. What is kept at the end gives the result again without any pass.
        track: wraps the starts of the batches to show progress.

    Raises:
        GfwsvdError: for windows of another shape or stride, too long for the model or of tokens it does not have; a
            model that predicts no next tokens; a reference of another vocabulary or of other windows; NaN or inf in
            logits.
    """
    began = time.perf_counter()
    check_windows(windows, batch_size)
    window = windows.shape[1]
    stride = window if stride is None else stride
    _check_overlap(windows, stride)
    sums, done = _begun(work)
    kept = done
    due = time.monotonic() + _KEPT_EVERY
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))
        source, other = LogitsSource(model, windows), _open(reference, windows, stack)
        if other is not None and other.vocabulary != source.vocabulary:
            raise GfwsvdError(
                f"the model predicts {source.vocabulary} tokens, the reference {other.vocabulary}: expected the same "
                "vocabulary; compare models of one family"
            )
        try:
            for start in track(range(done, len(windows), batch_size), f"evaluation: {len(windows)} windows"):
                stop = min(start + batch_size, len(windows))
                sums, done = sums + _score_batch(source, other, windows, start, stop, stride=stride), stop
                if work is not None and time.monotonic() >= due:
                    work.save(_STATE, {"sums": sums}, {"windows": done})
                    kept, due = done, time.monotonic() + _KEPT_EVERY
        finally:
            if work is not None and done > kept:
                work.save(_STATE, {"sums": sums}, {"windows": done})
    tokens = window - 1 + (len(windows) - 1) * min(stride, window - 1)
    loss, kl, top1 = (sums / tokens).tolist()
    return Evaluation(
        perplexity=math.exp(min(loss, 700)),
        kl=None if reference is None else kl,
        top1=None if reference is None else top1,
        tokens=tokens,
        window=window,
        stride=stride,
        seconds=time.perf_counter() - began,
    )


def about_evaluation(
    model: nn.Module,
    windows: Tensor,
    *,
    stride: int | None = None,
    reference: nn.Module | None = None,
    batch_size: int = 1,
) -> dict[str, Any]:
    """What the result of `evaluate` with these arguments depends on, to the last bit, for `gfwsvd.work.open_work`."""
    import transformers

    return {
        "model_sha256": model_sha256(model),
        "reference_sha256": None if reference is None else model_sha256(reference),
        "dtypes": [sorted({str(p.dtype) for p in m.parameters()}) for m in (model, reference) if m is not None],
        "device": model_device(model).type,
        "windows": list(windows.shape),
        "data_sha256": data_sha256([{"input_ids": windows}]),
        "stride": windows.shape[1] if stride is None else stride,
        "batch_size": batch_size,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def generate_sample(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    prompt: str,
    *,
    max_new_tokens: int = 64,
) -> str:
    """What `model` answers to `prompt`, always with the likeliest token; as a chat if the tokenizer has a template.

    Raises:
        GfwsvdError: without a tokenizer, for a model that generates no text, a prompt without tokens, or
            `max_new_tokens` below 1.
    """
    check_causal(model)
    if tokenizer is None:
        raise GfwsvdError("the model has no tokenizer, so no sample can be generated from text")
    if max_new_tokens < 1:
        raise GfwsvdError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if tokenizer.chat_template is not None:
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    ids, mask = (inputs[name].to(model_device(model)) for name in ("input_ids", "attention_mask"))
    if ids.shape[1] == 0:
        raise GfwsvdError("the prompt has no tokens; give one of at least a word")
    greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with evaluating(model):
        tokens = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=padding, **greedy
        )
    return tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)


def _begun(work: Work | None) -> tuple[Tensor, int]:
    """The sums of `_score_batch` over the windows that are done, and how many these are."""
    state = None if work is None else work.load(_STATE)
    if state is None:
        return torch.zeros(3, dtype=torch.float64), 0
    return state[0]["sums"], state[1]["windows"]


def _check_overlap(windows: Tensor, stride: int) -> None:
    check_stride(stride, windows.shape[1])
    if not torch.equal(windows[1:, :-stride], windows[:-1, stride:]):
        raise GfwsvdError(
            f"the windows do not follow one another by a stride of {stride} tokens; make them with "
            f"gfwsvd.windows(..., stride={stride})"
        )


def _open(
    reference: nn.Module | ReferenceLogits | None, windows: Tensor, stack: contextlib.ExitStack
) -> LogitsSource | CachedLogits | None:
    if reference is None:
        return None
    if not isinstance(reference, ReferenceLogits):
        stack.enter_context(evaluating(reference))
        try:
            return LogitsSource(reference, windows)
        except GfwsvdError as error:
            raise GfwsvdError(f"the model cannot be compared with the reference: {error}") from error
    if not torch.equal(reference.windows, windows.to(reference.windows)):
        raise GfwsvdError(
            f"the reference logits are of other windows, {tuple(reference.windows.shape)}, than those to evaluate, "
            f"{tuple(windows.shape)}; make them anew"
        )
    return stack.enter_context(reference.open())


def _score_batch(
    source: LogitsSource,
    other: LogitsSource | CachedLogits | None,
    windows: Tensor,
    start: int,
    stop: int,
    *,
    stride: int,
) -> Tensor:
    """Sums over the tokens predicted in windows `start` to `stop`: log-loss, KL, agreements; (3,) float64.

    Raises:
        GfwsvdError: when they are not finite.
    """
    states = _scored(source.states(start, stop), start, stride)
    other_states = None if other is None else _scored(other.states(start, stop), start, stride)
    targets = _scored(windows[start:stop, 1:], start, stride).long()
    rows = max(1, CHUNK_LOGITS // source.vocabulary)
    sums = torch.zeros(3, dtype=torch.float64)
    for first in range(0, len(targets), rows):
        part = slice(first, first + rows)
        logits, expected = source.logits(states[part]), None
        if other is not None and other_states is not None:
            expected = other.logits(other_states[part]).to(logits.device)
        sums += _score(logits, expected, targets[part].to(logits.device)).cpu()
    for value, whose in zip(sums.tolist(), ("model's", "model's or the reference's"), strict=False):
        if not math.isfinite(value):
            raise GfwsvdError(
                f"the {whose} logits hold NaN or inf somewhere in the windows {start} to {stop - 1}; check the "
                "weights, or take bfloat16 or float32 in place of float16"
            )
    return sums


def _scored(values: Tensor, start: int, stride: int) -> Tensor:
    """Of `values` (B, S - 1, ...) of the predictions in windows from `start` on, those that count, (T, ...)."""
    last = values[:, -stride:].flatten(0, 1)
    if start > 0 or stride >= values.shape[1]:
        return last
    return torch.cat([values[0, :-stride], last])  # the first window has no other before it


def _score(logits: Tensor, expected: Tensor | None, targets: Tensor) -> Tensor:
    """The sums of `_score_batch` of logits (T, V) and those of the reference, for targets (T,)."""
    logs = log_softmax(logits)
    loss = -logs.gather(-1, targets[:, None]).double().sum()
    if expected is None:
        return torch.stack([loss, torch.zeros_like(loss), torch.zeros_like(loss)])
    agreements = torch.eq(logits.argmax(-1), expected.argmax(-1)).sum().double()
    expected_logs = log_softmax(expected).to(logs.dtype)
    torch.sub(expected_logs, logs, out=logs)  # in place: fresh memory for each step would take longer than the step
    kl = torch.linalg.vecdot(expected_logs.exp_(), logs).double().sum()
    return torch.stack([loss, kl, agreements])
