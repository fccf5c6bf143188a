"""Calibration: passes over the data that fill the statistics of every layer, streaming."""

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from . import ranked
from .batches import data_sha256, fitted, hold_out, num_rows
from .budget import Collected, layer_groups
from .checks import check_tokens
from .errors import GfwsvdError
from .hooks import frozen, watch
from .layers import dense_weight, find_linears, fingerprint, layer_device, model_device, weight_shape
from .losses import Batch, Loss, forward, next_token_loss
from .memory import divided, recomputing
from .methods import GRADIENTS, INPUTS, KRONECKER
from .passes import Passes
from .statistics import LABELS, UNITS, LayerStatistics
from .track import Track, silent
from .work import Work

CLIP = 3.0


@dataclass
class Statistics:
    """The statistics of a model's layers and how they came about.

    Attributes:
        layers: by module name; after a calibration with `work`, or read from a directory, their tensors are in files.
        collected: which of "inputs", "gradients", "kronecker" they hold.
        settings: unit, labels, sweeps, online, clip, seed and start of the Kronecker factors.
        num_losses: loss terms (predicted tokens) of one pass.
        num_sequences: sequences of one pass.
        num_heldout: sequences that were kept out of all sums, to judge these by.
        num_skipped: sequences whose loss was NaN or inf, which are left out of all that.
        batch_rows: most sequences of a batch after memory ran out; 0 if it did not.
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
    num_skipped: int = 0
    batch_rows: int = 0
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
    device_memory: int | None = None,
    host_memory: int | None = None,
    work: Work | None = None,
    track: Track = silent,
) -> Statistics:
    """Collects the statistics of every linear layer of `model` in up to `sweeps` passes over `batches`.

    No gradient outlives the backward pass of its layer. The model is left as it was, whatever happens.

    Args:
        batches: needed where something is collected: mappings of tensors, each with "input_ids" or whatever the model
            takes, (B, S) first; a 0 in "attention_mask" (B, S) keeps a position out of all statistics.
        collect: "inputs" (one forward pass), "gradients" (one backward pass), "kronecker" (`sweeps` passes).
        unit: the Fisher's gradient sample: "token", "sequence" or "batch".
        tolerance: a layer is not swept again once its `convergence` is not above it.
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
        device_memory, host_memory: bytes to stay within: the layers are collected in groups, each of which takes passes
            of its own, with the same result. On the CPU the lower one counts. None for no limit. Only with `work` the
            statistics of one group leave memory before those of the next come.
        work: an open folder (`gfwsvd.work.open_work`) for what is done: a calibration of the same arguments goes on
            from there, and the layers' tensors are read from there when they are needed.
        track: wraps the batches of each pass to show progress.

    In a job of several processes (`torch.distributed`, initialised) each takes its share of the batches, and all end
    with the same statistics. A sequence with a loss of NaN or inf is left out with a warning, up to one of 20; where
    memory runs out, batches are halved with a warning. Where rows belong together, with a loss of your own or the unit
    "batch", a whole batch is left out, and none is halved. With `work`, Ctrl-C ends it after the batch in hand.

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
        layers = {name: LayerStatistics(*weight_shape(module)[::-1]) for name, module in linears.items()}
        return Statistics(layers, collect, settings={}, model_sha256=fingerprint(linears))
    batches = [dict(batch) for batch in batches]
    if not batches:
        raise GfwsvdError("calibration needs at least one batch, got none; give a longer text or more sequences")
    for batch in batches:
        if "input_ids" in batch:
            check_tokens(model, batch["input_ids"])
    backward = bool(collect & {GRADIENTS, KRONECKER})
    batches, heldout_batches = hold_out(
        batches, heldout if heldout is not None or backward else 0, whole=loss is not None
    )
    settings = {"unit": unit, "labels": labels, "sweeps": sweeps, "tolerance": tolerance, "online": online}
    settings |= {"clip": clip, "seed": seed, "start": None if start is None else start.data_sha256}
    run = loss or (forward if collect == {INPUTS} else next_token_loss(labels, seed))
    with frozen(model), contextlib.ExitStack() as stack:
        linears = find_linears(model, exclude=exclude)
        splits, first, rows = loss is None and unit != "batch", batches[:1], 0
        leaders, rows = fitted(
            lambda parts: input_leaders(model, linears, parts[0], loss or forward), first, rows, splits=splits
        )
        reached = {name: linears[name] for name in linears if name in leaders}
        if not reached:
            raise GfwsvdError(f"no linear layer of {type(model).__name__} ran in the forward pass of the first batch")
        sizes = {name: weight_shape(module)[::-1] for name, module in reached.items()}
        if start is not None:
            _check_start(start, sizes)
        limits: dict[str, Any] = {"device_memory": device_memory, "host_memory": host_memory, "backward": backward}
        collected = Collected(sizes, leaders, collect=collect, sweeps=sweeps + (start is not None), online=online)

        def divide() -> dict[str, Any]:
            (groups, recomputed), most = fitted(
                lambda parts: divided(model, reached, collected, parts[0], run, **limits), first, rows, splits=splits
            )
            return {"groups": groups, "recomputed": recomputed, "batch_rows": most}

        division: dict[str, Any] = {"groups": layer_groups(collected, []), "recomputed": False, "batch_rows": rows}
        if device_memory is not None or host_memory is not None:
            division = _agreed(divide, work)
        if division["recomputed"]:
            stack.enter_context(recomputing(model))
        groups = division["groups"]
        passes = Passes(
            model=model,
            linears=reached,
            leaders=leaders,
            sizes=sizes,
            devices={name: layer_device(module) for name, module in reached.items()},
            start={} if start is None else start.layers,
            batches=_share(batches, online=online),
            heldout=heldout_batches,
            num_sequences=sum(map(num_rows, [*batches, *heldout_batches])),
            batch_rows=division["batch_rows"],
            loss=run,
            collect=collect,
            settings=settings,
            splits=splits,
            work=work,
            track=track,
        )
        found = []
        for index, names in enumerate(groups):
            title = "" if len(groups) == 1 else f", layers {index + 1} of {len(groups)}"
            found.append(passes.complete(names, f"group-{index}", title))
        return Statistics(
            {name: stats for group in found for name, stats in group.layers.items()},
            collected=collect,
            settings=settings,
            num_losses=found[0].num_losses,
            num_sequences=found[0].num_sequences,
            num_heldout=found[0].num_heldout,
            num_skipped=found[0].num_skipped,
            batch_rows=found[-1].batch_rows,
            data_sha256=data_sha256([*batches, *heldout_batches]),
            model_sha256=fingerprint(reached),
            unreached=tuple(name for name in linears if name not in leaders),
            seconds=tuple(map(sum, zip_longest(*(group.seconds for group in found), fillvalue=0.0))),
        )


def about_calibration(
    model: nn.Module, batches: Sequence[Batch], *, start: Statistics | None = None, **settings: Any
) -> dict[str, Any]:
    """What the work of a `calibrate` of these arguments depends on, for `gfwsvd.work.open_work`.

    Args:
        settings: plain JSON values, by the names of `calibrate`.
    """
    linears = find_linears(model)
    return {
        "model_sha256": fingerprint(linears),
        "dtypes": sorted({str(dense_weight(module).dtype) for module in linears.values()}),
        "data_sha256": data_sha256(batches),
        "batches": [num_rows(batch) for batch in batches],
        "start": None if start is None else start.data_sha256,
        "sums": "triangles",  # they were squares once: states of those cannot go on
        "groups": "first fit",  # nor those of groups made otherwise
        "processes": ranked.world_size(),
        **settings,
    }


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


def _check_start(start: Statistics, sizes: Mapping[str, tuple[int, int]]) -> None:
    """GfwsvdError unless `start` has Kronecker factors of all layers, of (d_in, d_out)."""
    for name, (d_in, d_out) in sizes.items():
        found = start.layers.get(name)
        if found is None or KRONECKER not in start.collected or (found.d_in, found.d_out) != (d_in, d_out):
            raise GfwsvdError(
                f"the statistics to start from have no Kronecker factors of layer {name} of weight {(d_out, d_in)}: "
                "they belong to another model, or to a method that collects none"
            )


def _share(batches: Sequence[Batch], *, online: bool) -> Sequence[Batch]:
    """The batches of this process of a job."""
    processes = ranked.world_size()
    if processes > 1 and (online or len(batches) < processes):
        raise GfwsvdError(
            f"{processes} processes need as many batches, got {len(batches)}, and no online weights, which follow the "
            "order of the samples: take smaller batches or fewer processes"
        )
    return ranked.share(batches)


def _to_device(batch: Batch, model: nn.Module) -> Batch:
    device = model_device(model)
    return {name: value.to(device) for name, value in batch.items()}


@torch.no_grad()
def input_leaders(model: nn.Module, linears: Mapping[str, nn.Module], batch: Batch, run: Loss) -> dict[str, str]:
    """For each layer that one forward pass reaches, the first layer that took the very same input (itself, mostly)."""
    inputs: dict[str, list[Tensor]] = {}
    with watch(linears, on_input=lambda name, x: inputs.setdefault(name, []).append(x)):
        run(model, _to_device(batch, model))
    firsts: dict[tuple[int, ...], str] = {}
    return {name: firsts.setdefault(tuple(map(id, seen)), name) for name, seen in inputs.items()}


def _agreed(find: Callable[[], dict[str, Any]], work: Work | None) -> dict[str, Any]:
    """What rank 0 finds of how to divide the layers: for all processes, and for good, since memory may be measured
    otherwise when the work goes on."""
    found: dict[str, Any] = ranked.gathered(work.values("division") if work and work.has("division") else find())[0]
    if work is not None and ranked.rank() == 0:
        work.save("division", {}, found)
    return found
