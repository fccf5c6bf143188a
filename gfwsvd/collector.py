"""What the hooks of a calibration see, brought to the statistics of the layer it belongs to."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batches import NotFinite, num_rows, run_finite
from .errors import GfwsvdError
from .hooks import watch
from .kronecker import Sketch, Sweep
from .layers import model_device
from .losses import Batch, Loss
from .methods import GRADIENTS, INPUTS, KRONECKER
from .statistics import (
    HELDOUT_TOKENS,
    LayerStatistics,
    accumulate_inputs,
    accumulate_outputs,
    clip_tokens,
    power_of_two_scale,
    sequences,
    settle,
)


@dataclass
class Group:
    """Layers whose statistics are collected together, and how far that has come.

    Attributes:
        layers: by name.
        number: passes that are done.
        rows: sequences that the present pass has seen, of those of this process.
        num_losses, num_sequences: of the first pass.
        num_heldout: sequences that are held out.
        num_skipped: sequences that are left out of all that, for NaN or inf.
        seconds: wall time of each pass, the present one included.
        batch_rows: most sequences at a time, since memory was short; 0 for no limit.
        sweeps: of the present pass, by layer.
        sketches: of the first pass, by layer.
    """

    layers: dict[str, LayerStatistics]
    number: int = 0
    rows: int = 0
    num_losses: int = 0
    num_sequences: int = 0
    num_heldout: int = 0
    num_skipped: int = 0
    seconds: list[float] = field(default_factory=list)
    batch_rows: int = 0
    sweeps: dict[str, Sweep] = field(default_factory=dict)
    sketches: dict[str, Sketch] = field(default_factory=dict)


class Collector:
    """Runs batches through a model and collects the statistics of a group of its layers."""

    def __init__(
        self,
        model: nn.Module,
        linears: Mapping[str, nn.Module],
        leaders: Mapping[str, str],
        group: Group,
        loss: Loss,
        *,
        collect: frozenset[str],
        clip: float,
    ) -> None:
        self.model, self.leaders, self.group, self.loss = model, leaders, group, loss
        self.linears = {name: linears[name] for name in group.layers}
        self.collect, self.clip = collect, clip
        self.backward = bool(collect & {GRADIENTS, KRONECKER})
        # Of the batch in flight:
        self.num_sequences = self.num_losses = self.width = 0  # width: tokens of a row with padding, 0 without any
        self.kept = self.offsets = torch.empty(0)  # with padding, which tokens are none, and the offsets of sequences
        self.sums: list[tuple[str, Tensor]] = []  # of tensors that were seen: NaN or inf where an entry is

    def collect_batch(self, batch: Batch) -> None:
        """Adds a batch to all sums of the present pass.

        Raises:
            NotFinite: for NaN or inf in the forward pass; with `backward` nothing was added then.
            GfwsvdError: for NaN or inf in gradients, or rows that are no tokens.
        """
        group = self.group
        active = {name: self.linears[name] for name in group.sweeps or group.layers}
        callbacks = {"on_gradient": self._see_gradient} if self.backward else {}
        with watch(active, on_input=self._see_input, **callbacks), torch.set_grad_enabled(self.backward):
            self._run(batch)
        for stats in group.layers.values():
            settle(stats.squared_parts)
        for sweep in group.sweeps.values():
            sweep.settle()
        if group.number == 0:
            group.num_losses += self.num_losses
            group.num_sequences += self.num_sequences

    def hold_out(self, batches: Iterable[Batch], num_heldout: int, *, splits: bool) -> tuple[int, str]:
        """Keeps some tokens of each layer of sequences that are in no sum; returns what `run_finite` does."""
        rows: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.linears}
        quota = max(1, HELDOUT_TOKENS // num_heldout)

        def keep(name: str, x: Tensor, g: Tensor) -> None:
            x, g, offsets = self._scaled_rows(name, x, g)
            for part in sequences(offsets):
                step = -(-(part.stop - part.start) // quota)
                chosen = slice(part.start + step // 2, part.stop, step)
                rows[name].append((x[chosen].bfloat16(), g[chosen].bfloat16()))

        with watch(self.linears, on_input=self._see_input, on_gradient=keep):
            left_out = run_finite(self._run, batches, splits=splits)
        if not any(rows.values()):
            return left_out
        for name, stats in self.group.layers.items():
            stats.heldout_x, stats.heldout_g = (torch.cat(parts) for parts in zip(*rows[name], strict=True))
            stats.heldout_lengths = [len(x) for x, _ in rows[name]]
        return left_out

    def check_gradients(self) -> None:
        """GfwsvdError if no gradient has come to some layer."""
        unseen = [name for name, stats in self.group.layers.items() if not stats.gradient_scale]
        if self.backward and unseen:
            raise GfwsvdError(
                f"no gradient comes to {', '.join(unseen)}: the loss does not depend on them; exclude them"
            )

    def finish(self) -> None:
        """What can only be said once all passes are done."""
        layers = self.group.layers
        for name, sketch in self.group.sketches.items():
            layers[name].kronecker_residual = sketch.residual(layers[name])
        for name, stats in layers.items():
            leader = layers[self.leaders[name]]
            for shared in ("input_moment", "input_abs", "heldout_x"):
                setattr(stats, shared, getattr(leader, shared))
            if (parts := leader.squared_parts.get("input_moment")) is not None:
                stats.squared_parts["input_moment"] = parts

    def _run(self, batch: Batch) -> None:
        device = model_device(self.model)
        batch = {name: value.to(device) for name, value in batch.items()}
        self.num_sequences, self.width, self.sums = num_rows(batch), 0, []
        mask = batch.get("attention_mask")
        if mask is not None and not mask.bool().all():
            self.width, self.kept = mask.shape[1], mask.flatten().nonzero()[:, 0]
            self.offsets = F.pad(mask.bool().sum(1).cumsum(0), (1, 0)).cpu()
        losses = self.loss(self.model, batch)
        if name := self._not_finite():
            raise NotFinite(f"the activations that enter layer {name} hold NaN or inf; expected finite numbers")
        if not self.backward:
            return
        if not isinstance(losses, Tensor) or not losses.requires_grad or losses.numel() == 0:
            raise GfwsvdError(
                f"the loss must be a tensor of at least one value that depends on the linear layers, got {losses}; "
                f"a batch for the next-token loss needs a sequence of two tokens that are no padding"
            )
        total = losses.sum()
        if not torch.isfinite(total):
            raise NotFinite("the calibration loss is NaN or inf; check the batch's text and the model's weights")
        self.num_losses = losses.numel()
        total.backward()
        if name := self._not_finite():
            raise GfwsvdError(f"the gradients that leave layer {name} hold NaN or inf; expected finite numbers")

    def _not_finite(self) -> str | None:
        """The first layer of which a tensor seen since the last call holds NaN or inf. It is asked once for all
        tensors, since an answer waits for the GPU."""
        seen, self.sums = self.sums, []
        return next((name for name, total in seen if not math.isfinite(total)), None)

    def _see_input(self, name: str, x: Tensor) -> None:
        self.sums.append((name, x.detach().sum(dtype=torch.float32)))
        if not self.backward:
            self._add_input(name, *self._rows(name, x))

    def _see_gradient(self, name: str, x: Tensor, g: Tensor) -> None:
        stats = self.group.layers[name]
        x, g, offsets = self._scaled_rows(name, x, g)
        if self.group.number == 0:
            self._add_input(name, x, offsets)
            if GRADIENTS in self.collect:
                accumulate_outputs(stats, x, g, offsets)
        if KRONECKER in self.collect:
            self.group.sweeps[name].accumulate(x, clip_tokens(x, g, offsets, clip=self.clip), offsets)

    def _scaled_rows(self, name: str, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rows of inputs and of scaled gradients that are no padding, and the offsets of their sequences."""
        self.sums.append((name, g.sum(dtype=torch.float32)))
        stats = self.group.layers[name]
        x, offsets = self._rows(name, x)
        g, _ = self._rows(name, g)
        if not stats.gradient_scale and g.any():  # zeros say nothing of the scale of what may follow
            stats.gradient_scale = power_of_two_scale(g)
        return x, g * (stats.gradient_scale or 1.0), offsets

    def _add_input(self, name: str, x: Tensor, offsets: Tensor) -> None:
        stats = self.group.layers[name]
        stats.num_tokens += x.shape[0]
        stats.num_parts += len(sequences(offsets))
        if INPUTS in self.collect and self.leaders[name] == name:
            accumulate_inputs(stats, x, offsets)

    def _rows(self, name: str, values: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of a layer's tensor that are no padding, (T, D), and the offsets of their sequences."""
        rows = values.reshape(-1, values.shape[-1])
        rows = rows.float() if rows.dtype == torch.float64 else rows  # the statistics are float32
        tokens = rows.shape[0]
        if tokens == self.num_sequences:  # a pooled layer: one row for each sequence
            return rows, torch.arange(tokens + 1)
        if tokens % self.num_sequences or self.width and tokens != self.num_sequences * self.width:
            raise GfwsvdError(
                f"layer {name} sees {tokens} rows in a batch of {self.num_sequences} sequences"
                f"{f' of {self.width} tokens' if self.width else ''}: expected one for every token; exclude it"
            )
        if not self.width:
            return rows, torch.arange(0, tokens + 1, tokens // self.num_sequences)
        return rows[self.kept.to(rows.device)], self.offsets
