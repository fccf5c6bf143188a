"""Calibration: passes over the data that fill the statistics of every layer, streaming."""

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_tokens, is_causal
from .errors import GfwsvdError
from .hooks import frozen, watch
from .layers import dense_weight, find_linears, fingerprint
from .methods import GRADIENTS, INPUTS, KRONECKER
from .statistics import (
    LABELS,
    UNITS,
    LayerStatistics,
    Sweep,
    accumulate_inputs,
    accumulate_outputs,
    clip_tokens,
    power_of_two_scale,
)

CLIP = 3.0

Batch = Mapping[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]
Item = TypeVar("Item")
Track = Callable[[Sequence[Item], str], Iterable[Item]]


def silent(items: Sequence[Item], description: str) -> Iterable[Item]:
    """The `Track` that shows nothing."""
    return items


@dataclass
class Statistics:
    """The statistics of a model's layers and how they came about.

    Attributes:
        layers: by module name.
        collected: which of "inputs", "gradients", "kronecker" they hold.
        settings: unit, labels, sweeps, clip and seed of the Kronecker factors.
        num_losses: loss terms (predicted tokens) of one pass.
        num_sequences: sequences of one pass.
        data_sha256: of the calibration batches.
        model_sha256: of the layers' weights (`layers.fingerprint`).
        unreached: linear layers that no input came to.
        seconds: wall time of each pass.
    """

    layers: dict[str, LayerStatistics]
    collected: frozenset[str]
    settings: dict[str, Any]
    num_losses: int = 0
    num_sequences: int = 0
    data_sha256: str = ""
    model_sha256: str = ""
    unreached: tuple[str, ...] = ()
    seconds: tuple[float, ...] = ()


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    collect: Iterable[str] = (INPUTS, GRADIENTS, KRONECKER),
    unit: str = "token",
    labels: str = "empirical",
    sweeps: int = 1,
    clip: float = CLIP,
    seed: int = 0,
    exclude: Iterable[str] = (),
    loss: Loss | None = None,
    track: Track = silent,
) -> Statistics:
    """Collects the statistics of every linear layer of `model` in `sweeps` passes over `batches`.

    No gradient outlives the backward pass of its layer. The model is left as it was, whatever happens.

    Args:
        batches: needed where something is collected: mappings of tensors, each with "input_ids" or whatever the model
            takes, (B, S) first; a 0 in "attention_mask" (B, S) keeps a position out of all statistics.
        collect: "inputs" (one forward pass), "gradients" (one backward pass), "kronecker" (`sweeps` passes).
        unit: the Fisher's gradient sample: "token", "sequence" or "batch".
        clip: in the Kronecker factors, the gradient of a token counts at most `clip` times the median of its sequence;
            0 for no limit.
        labels: "empirical" takes the data's next tokens, "sampled" draws them from the model's own distribution.
        exclude: regular expressions; a layer whose name one of them matches is not collected.
        loss: `loss(model, batch)` gives a vector of unreduced losses; None is next-token cross-entropy. With padding,
            it runs the model once on all rows of the batch: texts that it compares are rows of one batch.
        track: wraps the batches of each pass to show progress.

    Raises:
        GfwsvdError: unknown settings, no batch, sequences too long for the model or of tokens it does not have, NaN or
            inf in a layer's activations or gradients or in the loss, a user's loss together with sampled labels, or
            none for a model that predicts no next tokens.
    """
    collect = frozenset(collect)
    check_settings(unit, labels, sweeps, clip)
    if not collect <= {INPUTS, GRADIENTS, KRONECKER}:
        raise GfwsvdError(f"collect must be among inputs, gradients, kronecker, got {', '.join(sorted(collect))}")
    if labels == "sampled" and loss is not None:
        raise GfwsvdError("labels 'sampled' belong to the next-token loss; with a loss of your own, sample inside it")
    if not collect:
        linears = find_linears(model, exclude=exclude)
        layers = {name: LayerStatistics(*_sizes(module)) for name, module in linears.items()}
        return Statistics(layers, collect, settings={}, model_sha256=fingerprint(linears))
    batches = [dict(batch) for batch in batches]
    if not batches:
        raise GfwsvdError("calibration needs at least one batch, got none; give a longer text or more sequences")
    for batch in batches:
        if "input_ids" in batch:
            check_tokens(model, batch["input_ids"])
    settings = {"unit": unit, "labels": labels, "sweeps": sweeps, "clip": clip, "seed": seed}
    run = loss or (_forward if collect == {INPUTS} else _causal_lm_loss(labels, seed))
    with frozen(model):
        linears = find_linears(model, exclude=exclude)
        leaders = _input_leaders(model, linears, batches[0], loss or _forward)
        reached = {name: linears[name] for name in linears if name in leaders}
        if not reached:
            raise GfwsvdError(f"no linear layer of {type(model).__name__} ran in the forward pass of the first batch")
        statistics = Statistics(
            {name: LayerStatistics(*_sizes(module)) for name, module in reached.items()},
            collected=collect,
            settings=settings,
            data_sha256=data_sha256(batches),
            model_sha256=fingerprint(reached),
            unreached=tuple(name for name in linears if name not in leaders),
        )
        collector = _Collector(model, reached, leaders, statistics, run)
        passes = sweeps if KRONECKER in collect else 1
        for number in range(passes):
            collector.run_pass(batches, number, passes, track)
        collector.finish()
    return statistics


def data_sha256(batches: Iterable[Batch]) -> str:
    """A digest of the names, shapes and values of all tensors of `batches`, whatever their split into batches."""
    digest = hashlib.sha256()
    for batch in batches:
        for row in range(_first_tensor(batch).shape[0]):
            for name in sorted(batch):
                value = batch[name][row].detach().cpu().contiguous()
                digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
                digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_settings(unit: str, labels: str, sweeps: int, clip: float) -> None:
    """Raises GfwsvdError unless these are settings that `calibrate` takes."""
    if unit not in UNITS:
        raise GfwsvdError(f"unit must be one of {', '.join(UNITS)}, got {unit!r}")
    if labels not in LABELS:
        raise GfwsvdError(f"labels must be one of {', '.join(LABELS)}, got {labels!r}")
    if sweeps < 1:
        raise GfwsvdError(f"sweeps must be at least 1, got {sweeps}")
    if not 0 <= clip < float("inf"):
        raise GfwsvdError(f"clip must be a number of medians, or 0 for no limit, got {clip}")


def _sizes(module: nn.Module) -> tuple[int, int]:
    d_out, d_in = dense_weight(module).shape
    return d_in, d_out


def _first_tensor(batch: Batch) -> Tensor:
    return next(iter(batch.values()))


def _to_device(batch: Batch, model: nn.Module) -> Batch:
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in batch.items()}


def _forward(model: nn.Module, batch: Batch) -> Any:
    return model(**{name: value for name, value in batch.items() if name != "labels"})


@torch.no_grad()
def _input_leaders(model: nn.Module, linears: Mapping[str, nn.Module], batch: Batch, run: Loss) -> dict[str, str]:
    """For each layer that one forward pass reaches, the first layer that took the very same input (itself, mostly)."""
    inputs: dict[str, list[Tensor]] = {}
    with watch(linears, on_input=lambda name, x: inputs.setdefault(name, []).append(x)):
        run(model, _to_device(batch, model))
    firsts: dict[tuple[int, ...], str] = {}
    return {name: firsts.setdefault(tuple(map(id, seen)), name) for name, seen in inputs.items()}


def _causal_lm_loss(labels: str, seed: int) -> Loss:
    """Next-token cross-entropy of each predicted token; sampled labels depend on `seed` and the text alone."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        output = _forward(model, batch)
        if not hasattr(output, "logits") or not is_causal(model):
            raise GfwsvdError(f"{type(model).__name__} gives no logits of next tokens: give a loss of your own")
        logits = output.logits[:, :-1]
        targets = batch.get("labels", ids)[:, 1:]
        valid = targets != -100
        if mask is not None:
            valid = valid & mask[:, 1:].bool() & mask[:, :-1].bool()
        logits = logits[valid]
        texts = ids if mask is None else [row[kept] for row, kept in zip(ids, mask.bool(), strict=True)]
        chosen = targets[valid] if labels == "empirical" else _sample(logits.detach(), valid, texts, seed)
        return F.cross_entropy(logits.float(), chosen, reduction="none")

    return loss


def _sample(logits: Tensor, valid: Tensor, texts: Iterable[Tensor], seed: int) -> Tensor:
    """Labels drawn from `logits`, with one generator per text, so that neither batching nor padding changes them."""
    drawn = []
    for text, part in zip(texts, logits.split(valid.sum(1).tolist()), strict=True):
        key = hashlib.sha256(f"{seed} ".encode() + text.long().cpu().numpy().tobytes()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
        uniform = torch.rand(part.shape[0], 1, generator=generator, dtype=torch.float64).to(part.device)
        total = part.double().softmax(-1).cumsum(-1)
        drawn.append((total < uniform * total[:, -1:]).sum(-1))
    return torch.cat(drawn)


def _is_finite(values: Tensor) -> bool:
    """Whether no entry is NaN or inf, in one pass over memory: either makes the sum NaN or inf."""
    return bool(torch.isfinite(values.sum(dtype=torch.float32)))


class _Collector:
    """The state of one calibration: routes what the hooks see to the statistics of its layer."""

    def __init__(
        self,
        model: nn.Module,
        linears: Mapping[str, nn.Module],
        leaders: Mapping[str, str],
        statistics: Statistics,
        loss: Loss,
    ) -> None:
        self.model, self.linears, self.leaders, self.statistics, self.loss = model, linears, leaders, statistics, loss
        self.collected = statistics.collected
        self.mask: Tensor | None = None  # (B, S) of the batch in flight, None without padding
        self.num_sequences = 0
        self.sweeps: dict[str, Sweep] = {}
        self.sketches: dict[str, Any] = {}
        self.first_pass = True

    def run_pass(self, batches: Sequence[Batch], number: int, passes: int, track: Track) -> None:
        """One pass: a sweep of the power iteration where Kronecker factors are wanted; the first also takes moments."""
        began = time.perf_counter()
        self.first_pass = number == 0
        if KRONECKER in self.collected:
            unit = self.statistics.settings["unit"]
            self.sweeps = {
                name: Sweep(stats, unit=unit, sketch_seed=index if self.first_pass else None)
                for index, (name, stats) in enumerate(self.statistics.layers.items())
            }
        backward = bool(self.collected & {GRADIENTS, KRONECKER})
        callbacks = {"on_gradient": self._see_gradient} if backward else {}
        with watch(self.linears, on_input=self._see_input, **callbacks), torch.set_grad_enabled(backward):
            for batch in track(batches, f"calibration pass {number + 1} of {passes}"):
                self._run_batch(_to_device(batch, self.model), backward=backward)
        unseen = [name for name, stats in self.statistics.layers.items() if not stats.gradient_scale]
        if backward and unseen:
            raise GfwsvdError(
                f"no gradient comes to {', '.join(unseen)}: the loss does not depend on them; exclude them"
            )
        for name, sweep in self.sweeps.items():
            sketch = sweep.finish()
            if sketch is not None:
                self.sketches[name] = sketch
        self.statistics.seconds += (time.perf_counter() - began,)

    def finish(self) -> None:
        """What can only be said once all passes are done."""
        layers = self.statistics.layers
        for name, sketch in self.sketches.items():
            layers[name].kronecker_residual = sketch.residual(layers[name])
        for name, leader in self.leaders.items():
            layers[name].input_moment, layers[name].input_abs = layers[leader].input_moment, layers[leader].input_abs

    def _run_batch(self, batch: Batch, *, backward: bool) -> None:
        mask = batch.get("attention_mask")
        self.mask = mask.bool() if mask is not None and not mask.bool().all() else None
        self.num_sequences = _first_tensor(batch).shape[0]
        if backward:
            losses = self.loss(self.model, batch)
            if not isinstance(losses, Tensor) or not losses.requires_grad or losses.numel() == 0:
                raise GfwsvdError(
                    f"the loss must be a tensor of at least one value that depends on the linear layers, got {losses}; "
                    f"a batch for the next-token loss needs a sequence of two tokens that are no padding"
                )
            total = losses.sum()
            if not torch.isfinite(total):
                raise GfwsvdError("the calibration loss is NaN or inf; check the batch's text and the model's weights")
            if self.first_pass:
                self.statistics.num_losses += losses.numel()
            total.backward()
        else:
            self.loss(self.model, batch)
        if self.first_pass:
            self.statistics.num_sequences += self.num_sequences

    def _see_input(self, name: str, x: Tensor) -> None:
        if not _is_finite(x):
            raise GfwsvdError(f"the activations that enter layer {name} hold NaN or inf; expected finite numbers")
        if not torch.is_grad_enabled() and not self.collected & {GRADIENTS, KRONECKER}:
            self._add_input(name, self._rows(name, x)[0])

    def _see_gradient(self, name: str, x: Tensor, g: Tensor) -> None:
        if not _is_finite(g):
            raise GfwsvdError(f"the gradients that leave layer {name} hold NaN or inf; expected finite numbers")
        stats = self.statistics.layers[name]
        x, offsets = self._rows(name, x)
        g, _ = self._rows(name, g)
        if not stats.gradient_scale and g.any():  # zeros say nothing of the scale of what may follow
            stats.gradient_scale = power_of_two_scale(g)
        g = g * (stats.gradient_scale or 1.0)
        if self.first_pass:
            self._add_input(name, x)
            if GRADIENTS in self.collected:
                accumulate_outputs(stats, x, g)
        if KRONECKER in self.collected:
            clip = self.statistics.settings["clip"]
            self.sweeps[name].accumulate(x, clip_tokens(x, g, offsets, clip=clip), offsets)

    def _add_input(self, name: str, x: Tensor) -> None:
        stats = self.statistics.layers[name]
        stats.num_tokens += x.shape[0]
        if INPUTS in self.collected and self.leaders[name] == name:
            accumulate_inputs(stats, x)

    def _rows(self, name: str, values: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of a layer's tensor that are no padding, (T, D), and the offsets of their sequences."""
        rows = values.reshape(-1, values.shape[-1])
        rows = rows.float() if rows.dtype == torch.float64 else rows  # the statistics are float32
        tokens, mask = rows.shape[0], self.mask
        if tokens == self.num_sequences:  # a pooled layer: one row for each sequence
            return rows, torch.arange(tokens + 1, device=rows.device)
        if tokens % self.num_sequences or mask is not None and tokens != mask.numel():
            raise GfwsvdError(
                f"layer {name} sees {tokens} rows in a batch of {self.num_sequences} sequences"
                f"{'' if mask is None else f' of {mask.shape[1]} tokens'}: expected one for every token; exclude it"
            )
        if mask is None:
            return rows, torch.arange(0, tokens + 1, tokens // self.num_sequences, device=rows.device)
        return rows[mask.flatten()], F.pad(mask.sum(1).cumsum(0), (1, 0))
