"""Calibration: passes over the data that fill the statistics of every layer, streaming."""

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_tokens
from .errors import GfwsvdError
from .hooks import frozen, watch
from .kronecker import Sweep
from .layers import dense_weight, find_linears, fingerprint
from .losses import Batch, Loss, forward, next_token_loss
from .methods import GRADIENTS, INPUTS, KRONECKER
from .statistics import (
    LABELS,
    UNITS,
    LayerStatistics,
    accumulate_inputs,
    accumulate_outputs,
    clip_tokens,
    power_of_two_scale,
    sequences,
)

CLIP = 3.0
HELDOUT_SHARE = 16  # one sequence of so many is held out
HELDOUT_TOKENS = 512  # most tokens of them to keep of each layer

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
        settings: unit, labels, sweeps, online, clip, seed and start of the Kronecker factors.
        num_losses: loss terms (predicted tokens) of one pass.
        num_sequences: sequences of one pass.
        num_heldout: sequences that were kept out of all sums.
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
    num_heldout: int = 0
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
    tolerance: float = 0.0,
    online: bool = False,
    clip: float = CLIP,
    seed: int = 0,
    heldout: int | None = None,
    start: Statistics | None = None,
    exclude: Iterable[str] = (),
    loss: Loss | None = None,
    track: Track = silent,
) -> Statistics:
    """Collects the statistics of every linear layer of `model` in up to `sweeps` passes over `batches`.

    No gradient outlives the backward pass of its layer. The model is left as it was, whatever happens.

    Args:
        batches: needed where something is collected: mappings of tensors, each with "input_ids" or whatever the model
            takes, (B, S) first; a 0 in "attention_mask" (B, S) keeps a position out of all statistics.
        collect: "inputs" (one forward pass), "gradients" (one backward pass), "kronecker" (`sweeps` passes).
        unit: the Fisher's gradient sample: "token", "sequence" or "batch".
        tolerance: stop before `sweeps` passes once no layer's `convergence` is above it.
        online: within a pass, weigh samples by the factors of the samples before them, in place of the last pass's.
        clip: in the Kronecker factors, the gradient of a token counts at most `clip` times the median of its sequence;
            0 for no limit.
        labels: "empirical" takes the data's next tokens, "sampled" draws them from the model's own distribution.
        heldout: of the last sequences, how many to keep out of all sums; up to 512 of their tokens are stored, by which
            `compress` tells whether a layer's metrics hold for text they have not seen. Default: one of 16, where
            gradients are collected. With a loss of your own only whole batches, as many as these hold.
        start: earlier statistics whose Kronecker factors the power iteration goes on from, in place of the identity.
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
    check_settings(unit, labels, sweeps, clip, tolerance)
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
    backward = bool(collect & {GRADIENTS, KRONECKER})
    batches, heldout_batches = _hold_out(
        batches, heldout if heldout is not None or backward else 0, whole=loss is not None
    )
    settings = {"unit": unit, "labels": labels, "sweeps": sweeps, "tolerance": tolerance, "online": online}
    settings |= {"clip": clip, "seed": seed, "start": None if start is None else start.data_sha256}
    run = loss or (forward if collect == {INPUTS} else next_token_loss(labels, seed))
    with frozen(model):
        linears = find_linears(model, exclude=exclude)
        leaders = _input_leaders(model, linears, batches[0], loss or forward)
        reached = {name: linears[name] for name in linears if name in leaders}
        if not reached:
            raise GfwsvdError(f"no linear layer of {type(model).__name__} ran in the forward pass of the first batch")
        statistics = Statistics(
            {name: LayerStatistics(*_sizes(module)) for name, module in reached.items()},
            collected=collect,
            settings=settings,
            num_heldout=sum(_num_rows(batch) for batch in heldout_batches),
            data_sha256=data_sha256([*batches, *heldout_batches]),
            model_sha256=fingerprint(reached),
            unreached=tuple(name for name in linears if name not in leaders),
        )
        if start is not None:
            _start_from(statistics, start)
        collector = _Collector(model, reached, leaders, statistics, run)
        passes = sweeps if KRONECKER in collect else 1
        for number in range(passes):
            collector.run_pass(batches, number, passes, track)
            turns = [stats.convergence[-1] for stats in statistics.layers.values() if stats.convergence]
            if turns and max(turns) <= tolerance:
                break
        collector.hold_out(heldout_batches, track)
        collector.finish()
    return statistics


def data_sha256(batches: Iterable[Batch]) -> str:
    """A digest of the names, shapes and values of all tensors of `batches`, whatever their split into batches."""
    digest = hashlib.sha256()
    for batch in batches:
        for row in range(_num_rows(batch)):
            for name in sorted(batch):
                value = batch[name][row].detach().cpu().contiguous()
                digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
                digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_settings(unit: str, labels: str, sweeps: int, clip: float, tolerance: float = 0.0) -> None:
    """Raises GfwsvdError unless these are settings that `calibrate` takes."""
    if unit not in UNITS:
        raise GfwsvdError(f"unit must be one of {', '.join(UNITS)}, got {unit!r}")
    if labels not in LABELS:
        raise GfwsvdError(f"labels must be one of {', '.join(LABELS)}, got {labels!r}")
    if sweeps < 1:
        raise GfwsvdError(f"sweeps must be at least 1, got {sweeps}")
    if not 0 <= clip < float("inf"):
        raise GfwsvdError(f"clip must be a number of medians, or 0 for no limit, got {clip}")
    if not 0 <= tolerance <= 1:
        raise GfwsvdError(f"tolerance must be the sine of an angle, 0 to 1, got {tolerance}")


def _hold_out(batches: Sequence[Batch], heldout: int | None, *, whole: bool) -> tuple[list[Batch], list[Batch]]:
    """The batches without the last `heldout` sequences, and these; with `whole`, no batch is cut, since its rows may
    belong together."""
    total = sum(map(_num_rows, batches))
    count = total // HELDOUT_SHARE if heldout is None else heldout
    if not 0 <= count < total:
        raise GfwsvdError(f"heldout must be from 0 to less than the {total} sequences there are, got {heldout}")
    if whole:
        last = len(batches)
        while (left := count - _num_rows(batches[last - 1])) >= 0:
            last, count = last - 1, left
        return list(batches[:last]), list(batches[last:])
    kept: list[Batch] = []
    held: list[Batch] = []
    seen = 0
    for batch in batches:
        first = total - count - seen  # of the held-out rows of this batch
        seen += _num_rows(batch)
        for part, rows in ((kept, slice(0, max(first, 0))), (held, slice(max(first, 0), None))):
            if _num_rows(chosen := {name: value[rows] for name, value in batch.items()}):
                part.append(chosen)
    return kept, held


def _start_from(statistics: Statistics, start: Statistics) -> None:
    """Gives the layers the Kronecker factors of earlier statistics; GfwsvdError unless these have all of them."""
    for name, stats in statistics.layers.items():
        found = start.layers.get(name)
        if found is None or found.left is None or (found.d_in, found.d_out) != (stats.d_in, stats.d_out):
            raise GfwsvdError(
                f"the statistics to start from have no Kronecker factors of layer {name} of weight "
                f"{(stats.d_out, stats.d_in)}: they belong to another model, or to a method that collects none"
            )
        stats.left, stats.right = found.left, found.right


def _sizes(module: nn.Module) -> tuple[int, int]:
    d_out, d_in = dense_weight(module).shape
    return d_in, d_out


def _num_rows(batch: Batch) -> int:
    return next(iter(batch.values())).shape[0]


def _to_device(batch: Batch, model: nn.Module) -> Batch:
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in batch.items()}


@torch.no_grad()
def _input_leaders(model: nn.Module, linears: Mapping[str, nn.Module], batch: Batch, run: Loss) -> dict[str, str]:
    """For each layer that one forward pass reaches, the first layer that took the very same input (itself, mostly)."""
    inputs: dict[str, list[Tensor]] = {}
    with watch(linears, on_input=lambda name, x: inputs.setdefault(name, []).append(x)):
        run(model, _to_device(batch, model))
    firsts: dict[tuple[int, ...], str] = {}
    return {name: firsts.setdefault(tuple(map(id, seen)), name) for name, seen in inputs.items()}


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
        self.num_sequences = self.num_losses = 0  # of the batch in flight
        self.sweeps: dict[str, Sweep] = {}
        self.sketches: dict[str, Any] = {}
        self.first_pass = True

    def run_pass(self, batches: Sequence[Batch], number: int, passes: int, track: Track) -> None:
        """One pass: a sweep of the power iteration where Kronecker factors are wanted; the first also takes moments."""
        began = time.perf_counter()
        self.first_pass = number == 0
        if KRONECKER in self.collected:
            settings = self.statistics.settings
            self.sweeps = {
                name: Sweep(
                    stats,
                    unit=settings["unit"],
                    online=settings["online"],
                    sketch_seed=index if self.first_pass else None,
                )
                for index, (name, stats) in enumerate(self.statistics.layers.items())
            }
        backward = bool(self.collected & {GRADIENTS, KRONECKER})
        callbacks = {"on_gradient": self._see_gradient} if backward else {}
        with watch(self.linears, on_input=self._see_input, **callbacks), torch.set_grad_enabled(backward):
            for batch in track(batches, f"calibration pass {number + 1} of {passes}"):
                self._run_batch(_to_device(batch, self.model), backward=backward)
                if self.first_pass:
                    self.statistics.num_losses += self.num_losses
                    self.statistics.num_sequences += self.num_sequences
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

    def hold_out(self, batches: Sequence[Batch], track: Track) -> None:
        """Keeps some tokens of each layer of sequences that are in no sum."""
        if not batches:
            return
        rows: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.linears}
        quota = max(1, HELDOUT_TOKENS // self.statistics.num_heldout)

        def keep(name: str, x: Tensor, g: Tensor) -> None:
            x, g, offsets = self._scaled_rows(name, x, g)
            for part in sequences(offsets):
                step = -(-(part.stop - part.start) // quota)
                chosen = slice(part.start + step // 2, part.stop, step)
                rows[name].append((x[chosen].bfloat16(), g[chosen].bfloat16()))

        with watch(self.linears, on_input=self._see_input, on_gradient=keep):
            for batch in track(batches, "held-out tokens"):
                self._run_batch(_to_device(batch, self.model), backward=True)
        for name, stats in self.statistics.layers.items():
            stats.heldout_x, stats.heldout_g = (torch.cat(parts) for parts in zip(*rows[name], strict=True))

    def finish(self) -> None:
        """What can only be said once all passes are done."""
        layers = self.statistics.layers
        for name, sketch in self.sketches.items():
            layers[name].kronecker_residual = sketch.residual(layers[name])
        for name, leader in self.leaders.items():
            for shared in ("input_moment", "input_abs", "heldout_x"):
                setattr(layers[name], shared, getattr(layers[leader], shared))
            if (parts := layers[leader].squared_parts.get("input_moment")) is not None:
                layers[name].squared_parts["input_moment"] = parts

    def _run_batch(self, batch: Batch, *, backward: bool) -> None:
        mask = batch.get("attention_mask")
        self.mask = mask.bool() if mask is not None and not mask.bool().all() else None
        self.num_sequences = _num_rows(batch)
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
            self.num_losses = losses.numel()
            total.backward()
        else:
            self.loss(self.model, batch)

    def _see_input(self, name: str, x: Tensor) -> None:
        if not _is_finite(x):
            raise GfwsvdError(f"the activations that enter layer {name} hold NaN or inf; expected finite numbers")
        if not torch.is_grad_enabled() and not self.collected & {GRADIENTS, KRONECKER}:
            self._add_input(name, *self._rows(name, x))

    def _see_gradient(self, name: str, x: Tensor, g: Tensor) -> None:
        stats = self.statistics.layers[name]
        x, g, offsets = self._scaled_rows(name, x, g)
        if self.first_pass:
            self._add_input(name, x, offsets)
            if GRADIENTS in self.collected:
                accumulate_outputs(stats, x, g, offsets)
        if KRONECKER in self.collected:
            clip = self.statistics.settings["clip"]
            self.sweeps[name].accumulate(x, clip_tokens(x, g, offsets, clip=clip), offsets)

    def _scaled_rows(self, name: str, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rows of inputs and of scaled gradients that are no padding, and the offsets of their sequences."""
        if not _is_finite(g):
            raise GfwsvdError(f"the gradients that leave layer {name} hold NaN or inf; expected finite numbers")
        stats = self.statistics.layers[name]
        x, offsets = self._rows(name, x)
        g, _ = self._rows(name, g)
        if not stats.gradient_scale and g.any():  # zeros say nothing of the scale of what may follow
            stats.gradient_scale = power_of_two_scale(g)
        return x, g * (stats.gradient_scale or 1.0), offsets

    def _add_input(self, name: str, x: Tensor, offsets: Tensor) -> None:
        stats = self.statistics.layers[name]
        stats.num_tokens += x.shape[0]
        stats.num_parts += len(sequences(offsets))
        if INPUTS in self.collected and self.leaders[name] == name:
            accumulate_inputs(stats, x, offsets)

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
