"""The passes over the data that fill the statistics of a group of layers: they go on where they were interrupted, are
shared among the processes of a job, and outlive a batch that is not finite or too large for memory."""

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any

import torch
from torch import Tensor, nn

from . import ranked
from .batches import fitted, halved, num_rows, run_finite, split_rows
from .collector import Collector, Group
from .errors import GfwsvdError
from .interrupts import noted_interrupts
from .kronecker import Sketch, Sweep
from .losses import Batch, Loss
from .methods import KRONECKER
from .packed import StoredLayer, pack_layers, unpack_layers
from .statistics import LayerStatistics
from .track import Track
from .work import Work

SNAPSHOT_SECONDS = 60.0  # between states of a pass, and at least so many times what writing one takes:
SNAPSHOT_COST = 20
SKIPPED_SHARE = 20  # a sequence whose loss is NaN or inf is left out, up to one of so many
_PROGRESS = ("number", "rows", "num_losses", "num_sequences", "num_heldout", "num_skipped", "seconds", "batch_rows")


@dataclass(frozen=True)
class Passes:
    """What the groups of a calibration have in common.

    Attributes:
        linears, leaders: of all groups; see `calibrate` for leaders.
        sizes, devices: (d_in, d_out) of each layer, in the model's order, and where its statistics are.
        start: earlier statistics whose Kronecker factors to go on from, by layer.
        batches: of this process. `heldout` is the same in all processes.
        num_sequences: of all processes together, those held out included.
        batch_rows: most sequences at a time, since memory was short; 0 for no limit.
        splits: whether batches may be split.
        work: keeps what is done, for all processes.
    """

    model: nn.Module
    linears: Mapping[str, nn.Module]
    leaders: Mapping[str, str]
    sizes: Mapping[str, tuple[int, int]]
    devices: Mapping[str, torch.device]
    start: Mapping[str, LayerStatistics]
    batches: Sequence[Batch]
    heldout: Sequence[Batch]
    num_sequences: int
    batch_rows: int
    loss: Loss
    collect: frozenset[str]
    settings: Mapping[str, Any]
    splits: bool
    work: Work | None
    track: Track[Batch]

    def complete(self, names: Sequence[str], label: str, title: str) -> Group:
        """The group of the layers `names` after all its passes. With `work` its tensors are in the file of the state
        `label`, and are not computed again where they are there already.

        Args:
            title: of the group, for people, or "".
        """
        if self.work is None or not self.work.has(label):
            group = self._complete(names, label, title)
            if self.work is None:
                return group
            if ranked.rank() == 0:
                tensors, entries = pack_layers(group.layers)
                progress = _progress(group)
                times = {"seconds": progress.pop("seconds")}  # apart, else the files of no two runs would be alike
                self.work.save(f"{label}-times", {}, times)
                self.work.save(label, tensors, {"entries": entries, "progress": progress})
                self.work.discard(f"{label}-passes")
            ranked.gathered(None)  # now all processes can read it
            self.work.discard(_own(label))
        values = self.work.values(label)
        file, unseen = self.work.file(label), self.work.digests(label)
        layers: dict[str, LayerStatistics] = {
            name: StoredLayer(file, entry, unseen) for name, entry in values["entries"].items()
        }
        return Group(layers, **values["progress"], **self.work.values(f"{label}-times"))

    def _complete(self, names: Sequence[str], label: str, title: str) -> Group:
        group = self._begun(names, label)
        while self._active(group):
            try:
                with noted_interrupts(self.work is not None) as interrupted:
                    self._run_pass(group, label, title, interrupted)
                continue
            except torch.OutOfMemoryError as error:
                reason = str(error)  # the error itself would keep the memory of the batch
            rows = halved(split_rows(self.batches, group.batch_rows), reason, splits=self.splits)
            group = self._again(group, names, label)
            group.batch_rows = rows
        self._hold_out(group, title)
        self._collector(group).finish()
        return group

    def _run_pass(self, group: Group, label: str, title: str, interrupted: Event) -> None:
        """A sweep of the power iteration where Kronecker factors are wanted; the first pass also takes moments. Ends
        after the batch in which it is interrupted, which is kept."""
        passes = self.settings["sweeps"] if KRONECKER in self.collect else 1
        collector = self._collector(group)
        batches = split_rows(self.batches, group.batch_rows, skip=group.rows)
        if len(group.seconds) == group.number:
            group.seconds.append(0.0)
        before, began = group.seconds[-1], time.perf_counter()
        kept, pause = began, SNAPSHOT_SECONDS
        for batch in self.track(batches, f"calibration pass {group.number + 1} of {passes}{title}"):
            splits = self.splits and collector.backward
            left_out, reason = run_finite(collector.collect_batch, [batch], splits=splits)
            if left_out and not collector.backward:  # what came before the NaN is in the sums
                raise GfwsvdError(reason)
            if left_out and group.number == 0:
                group.num_skipped += left_out
                self._check_left_out(group, reason)
                _warn_left_out(left_out, reason)
            group.rows += num_rows(batch)
            now = time.perf_counter()
            group.seconds[-1] = before + now - began
            if self.work is not None and (interrupted.is_set() or now - kept > pause):
                self.work.save(_own(label), *_state(group, layers=group.number == 0))
                kept = time.perf_counter()
                pause = max(SNAPSHOT_SECONDS, SNAPSHOT_COST * (kept - now))
            if interrupted.is_set():
                raise KeyboardInterrupt
        self._merge(group)
        if group.number == 0:
            collector.check_gradients()
        for name, sweep in group.sweeps.items():
            if (sketch := sweep.finish()) is not None:
                group.sketches[name] = sketch
        group.number, group.rows, group.sweeps = group.number + 1, 0, {}
        if self.work is not None:
            if ranked.rank() == 0:
                self.work.save(f"{label}-passes", *_state(group, layers=True))
            ranked.gathered(None)
        self._begin_pass(group)

    def _active(self, group: Group) -> bool:
        return bool(group.sweeps) if KRONECKER in self.collect else group.number == 0

    def _begin_pass(self, group: Group) -> None:
        """Gives the layers that have not converged their next sweep."""
        if KRONECKER not in self.collect or group.number == self.settings["sweeps"]:
            return
        seeds = {name: seed for seed, name in enumerate(self.sizes)}
        group.sweeps = {
            name: Sweep(
                stats,
                unit=self.settings["unit"],
                online=self.settings["online"],
                sketch_seed=None if group.number else seeds[name],
            )
            for name, stats in group.layers.items()
            if not group.number or stats.convergence[-1] > self.settings["tolerance"]
        }

    def _begun(self, names: Sequence[str], label: str) -> Group:
        """The group as far as it was kept."""
        found = None if self.work is None else self.work.load(f"{label}-passes")
        if found is None:
            layers = {name: LayerStatistics(*self.sizes[name]) for name in names}
            for name, stats in layers.items():
                if name in self.start:
                    factors = self.start[name].left, self.start[name].right
                    stats.left, stats.right = (None if it is None else it.to(self.devices[name]) for it in factors)
            group = Group(layers, batch_rows=self.batch_rows)
        else:
            group = self._restored(*found)
        self._begin_pass(group)
        begun = None if self.work is None else self.work.load(_own(label))
        if begun is None or begun[1]["progress"]["number"] != group.number:
            return group
        tensors, values = begun
        if group.number == 0:
            group = self._restored(tensors, values)
            self._begin_pass(group)
        vars(group).update(values["progress"])
        for name, sweep in group.sweeps.items():
            kept = values["sweeps"][name]
            own = {key: tensors[f"{name}/{key}"].to(self.devices[name]) for key in kept["tensors"]}
            sweep.restore(own, kept["values"])
        return group

    def _restored(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Group:
        layers = unpack_layers(tensors, values["entries"], self.devices)
        group = Group(layers, **values["progress"])
        seeds = {name: seed for seed, name in enumerate(self.sizes)}
        for name in values["sketches"]:
            group.sketches[name] = Sketch(layers[name], seeds[name])
            group.sketches[name].total = tensors[f"{name}/sketched"]
        return group

    def _hold_out(self, group: Group, title: str) -> None:
        """Whatever happens to sequences that are held out, the passes were not in vain."""
        collector, wanted = self._collector(group), sum(map(num_rows, self.heldout))
        group.num_heldout = wanted
        if not wanted or not collector.backward:
            return

        def hold_out(parts: list[Batch]) -> tuple[int, str]:
            return collector.hold_out(self.track(parts, f"held-out tokens{title}"), wanted, splits=self.splits)

        found, group.batch_rows = fitted(hold_out, self.heldout, group.batch_rows, splits=self.splits)
        left_out, reason = found
        if left_out:
            group.num_heldout -= left_out
            group.num_skipped += left_out
            _warn_left_out(left_out, reason)

    def _check_left_out(self, group: Group, reason: str) -> None:
        if group.num_skipped * SKIPPED_SHARE > self.num_sequences:
            raise GfwsvdError(
                f"{reason} ({group.num_skipped} of {self.num_sequences} sequences have such values, at most one of "
                f"{SKIPPED_SHARE} may be skipped)"
            )

    def _again(self, group: Group, names: Sequence[str], label: str) -> Group:
        """The group as it was at the last state, or at the start of the pass."""
        if self.work is not None or group.number == 0:
            return self._begun(names, label)
        group.rows = 0
        self._begin_pass(group)
        return group

    def _merge(self, group: Group) -> None:
        """Adds up what all processes of the job have seen in this pass."""
        if ranked.world_size() == 1:
            return
        grown: dict[str, float] = {}
        if group.number == 0:
            if 0 in (seen := ranked.gathered(group.num_sequences)):
                raise GfwsvdError(f"rank {seen.index(0)} got no sequence whose loss is finite: start fewer processes")
            counts = ("num_losses", "num_sequences", "num_skipped")
            vars(group).update(ranked.summed({name: getattr(group, name) for name in counts}))
            self._check_left_out(group, "NaN or inf in losses or activations")
            grown = {name: stats.merge() for name, stats in group.layers.items()}
        for name, sweep in group.sweeps.items():
            sweep.merge(grown.get(name, 1.0))

    def _collector(self, group: Group) -> Collector:
        return Collector(
            self.model, self.linears, self.leaders, group, self.loss, collect=self.collect, clip=self.settings["clip"]
        )


def _warn_left_out(left_out: int, reason: str) -> None:
    warnings.warn(f"{reason}; {left_out} sequences are left out", stacklevel=3)


def _own(label: str) -> str:
    """The state of this process within a pass."""
    return f"{label}-rank-{ranked.rank()}"


def _progress(group: Group) -> dict[str, Any]:
    return {name: getattr(group, name) for name in _PROGRESS}


def _state(group: Group, *, layers: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `Passes._begun` makes the group of again; without the layers where an earlier state has them."""
    tensors, entries = pack_layers(group.layers) if layers else ({}, {})
    values: dict[str, Any] = {"entries": entries, "progress": _progress(group), "sweeps": {}}
    values["sketches"] = list(group.sketches) if layers else []
    for name in values["sketches"]:
        tensors[f"{name}/sketched"] = group.sketches[name].total
    for name, sweep in group.sweeps.items():
        own, plain = sweep.state()
        tensors |= {f"{name}/{key}": tensor for key, tensor in own.items()}
        values["sweeps"][name] = {"tensors": list(own), "values": plain}
    return tensors, values
