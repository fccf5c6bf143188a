"""Times of dense and low-rank layers on one machine, measured once, for an allocation that spends time.

A table holds the microseconds of a call of each shape in each form at a grid of ranks. In between they are
interpolated, after they were made to rise with the rank: what a lower rank took, a higher one takes at least.
"""

import functools
import json
import math
import os
import platform
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import GfwsvdError
from .folders import check_seal, read_json, sealed, write_text
from .layers import LowRankLinear, dense_weight, find_linears, weight_shape
from .ranks import Candidate, stored
from .track import Track, silent

LATENCY_VERSION = 1
STEP = 64
_ROUNDS = 5  # over all layers; of each layer the fastest counts, since what else runs can only slow it
_SECONDS = 0.02  # of a layer in a round, at least
_FORMS = {"lowrank": False, "pivoted": True}  # kinds of low-rank layers: whether pivoted

Shape = tuple[int, int]  # (D_OUT, D_IN)


@dataclass(frozen=True)
class LatencyTable:
    """Microseconds of layers, and where they were measured.

    Attributes:
        device: name of the processor or GPU.
        dtype: of the weights.
        tokens: rows of the input.
        torch: its version.
        us: by shape and kind ("dense", "lowrank", "pivoted") the times at some ranks; a dense layer has the rank 0.
    """

    device: str
    dtype: str
    tokens: int
    torch: str
    us: Mapping[Shape, Mapping[str, Mapping[int, float]]]

    def __post_init__(self) -> None:
        for shape, kinds in self.us.items():
            if kinds.keys() != {"dense", *_FORMS} or list(kinds["dense"]) != [0]:
                raise GfwsvdError(f"expected times of dense, lowrank and pivoted layers of {shape}, got {list(kinds)}")
            for us in (us for times in kinds.values() for us in times.values()):
                if not 0 < us < float("inf"):
                    raise GfwsvdError(f"times must be positive microseconds, got {us} in those of {shape}")

    def cost(self, layer: Candidate, rank: int | None) -> float:
        """Microseconds of a layer at `rank`, or dense when it is None: a `ranks.Cost`."""
        kind = "dense" if rank is None else "pivoted" if layer.pivots(rank) else "lowrank"
        return self.time((layer.d_out, layer.d_in), kind, rank or 0)

    def time(self, shape: Shape, kind: str, rank: int) -> float:
        """Microseconds of a layer; GfwsvdError for a shape that was not measured, or a rank above all that were."""
        self.check([shape])
        ranks, us = self._curves[shape, kind]
        index = bisect_left(ranks, rank)
        if index == len(ranks):
            raise GfwsvdError(f"the latency table has no {kind} layer of {shape} with rank {rank} or more: {_ADVICE}")
        if index == 0:
            return us[0]
        share = (rank - ranks[index - 1]) / (ranks[index] - ranks[index - 1])
        return us[index - 1] + share * (us[index] - us[index - 1])

    def break_even(self, shape: Shape) -> float | None:
        """The largest share of the dense parameters, among the ranks measured, that takes less time than the dense
        layer, in the form that stores it; None where none does."""
        dense = self.time(shape, "dense", 0)
        faster = [
            stored(*shape, rank, pivoted) / math.prod(shape)
            for kind, pivoted in _FORMS.items()
            for rank in self.us[shape][kind]
            if self.time(shape, kind, rank) < dense
        ]
        return max(faster, default=None)

    def share(self, layers: Iterable[tuple[Shape, str, int]]) -> float:
        """The time of layers, of each its shape, kind and rank, over that of dense ones in their place."""
        layers = list(layers)
        return sum(self.time(*layer) for layer in layers) / sum(self.time(shape, "dense", 0) for shape, _, _ in layers)

    def check(self, shapes: Iterable[Shape]) -> None:
        """GfwsvdError unless all shapes (D_OUT, D_IN) were measured."""
        missing = sorted(set(shapes) - self.us.keys())
        if missing:
            raise GfwsvdError(f"the latency table has no layer of {missing[0]} outputs and inputs: {_ADVICE}")

    def about(self) -> dict[str, Any]:
        """Where it was measured, as plain JSON values."""
        return {name: getattr(self, name) for name in _ABOUT}

    @functools.cached_property
    def _curves(self) -> dict[tuple[Shape, str], tuple[list[int], list[float]]]:
        return {
            (shape, kind): (sorted(times), list(accumulate((times[rank] for rank in sorted(times)), max)))
            for shape, kinds in self.us.items()
            for kind, times in kinds.items()
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the table as a JSON file, whole or not at all; GfwsvdError where that fails."""
        layers = [
            {"d_out": d_out, "d_in": d_in, **{kind: list(times.items()) for kind, times in kinds.items()}}
            for (d_out, d_in), kinds in self.us.items()
        ]
        described = sealed({"latency_version": LATENCY_VERSION, **self.about(), "layers": layers})
        write_text(Path(path), json.dumps(described, indent=1) + "\n", what="latency table")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "LatencyTable":
        """The table of a file; GfwsvdError for one that is none, of another version, cut short or changed."""
        file = Path(path).expanduser()
        found = read_json(file)
        if found.get("latency_version") != LATENCY_VERSION:
            raise GfwsvdError(
                f"expected a latency table of version {LATENCY_VERSION}, {file} has {found.get('latency_version')!r}: "
                f"{_ADVICE}"
            )
        check_seal(file, found)
        try:
            us = {
                (layer["d_out"], layer["d_in"]): {kind: dict(layer[kind]) for kind in ("dense", *_FORMS)}
                for layer in found["layers"]
            }
            return cls(**{name: found[name] for name in _ABOUT}, us=us)
        except (KeyError, TypeError, ValueError) as error:
            raise GfwsvdError(f"{file} is no latency table ({type(error).__name__}: {error}): {_ADVICE}") from error


_ABOUT = ("device", "dtype", "tokens", "torch")
_ADVICE = "measure this model again with gfwsvd latency"


def measure_latency(model: nn.Module, *, tokens: int, step: int = STEP, track: Track[Any] = silent) -> LatencyTable:
    """The times of the model's linear layers, and of low-rank ones in their place, where the model is.

    Every shape is measured once dense and in both low-rank forms at the multiples of `step` that store less, and the
    largest such rank: random weights without bias, called as torch calls them, launches included. The fastest of
    several rounds over all counts. On a CPU, with torch's number of threads as it is.

    Args:
        tokens: rows of the input.
        step: between the ranks.
        track: wraps the loop to show progress.

    Raises:
        GfwsvdError: for a number below 1, or a model without linear layers.
    """
    if min(tokens, step) < 1:
        raise GfwsvdError(f"tokens and step must be at least 1, got {tokens} and {step}")
    linears = list(find_linears(model).values())
    like, shapes = dense_weight(linears[0]), sorted(set(map(weight_shape, linears)))
    grid = [(shape, kind, rank) for shape in shapes for kind, rank in _grid(*shape, step)]
    us: dict[Shape, dict[str, dict[int, float]]] = {
        shape: {kind: {} for kind in ("dense", *_FORMS)} for shape in shapes
    }
    for shape, kind, rank in track(grid * _ROUNDS, f"latency: {len(shapes)} shapes, {tokens} tokens"):
        times = us[shape][kind]
        times[rank] = min(times.get(rank, float("inf")), _measured(shape, kind, rank, tokens, like))
    return LatencyTable(
        _device_name(like.device), str(like.dtype).removeprefix("torch."), tokens, str(torch.__version__), us
    )


def _grid(d_out: int, d_in: int, step: int) -> list[tuple[str, int]]:
    grid = [("dense", 0)]
    for kind, pivoted in _FORMS.items():
        layer = Candidate(d_out, d_in, torch.empty(0), pivoted)
        ranks = sorted({*range(step, layer.largest_rank + 1, step), layer.largest_rank} - {0})
        grid += [(kind, rank) for rank in ranks if layer.pivots(rank) == pivoted]
    return grid


@torch.inference_mode()
def _measured(shape: Shape, kind: str, rank: int, tokens: int, like: Tensor) -> float:
    """Microseconds of one call, the median of a round."""
    from torch.utils.benchmark import Timer  # here: it takes a tenth of the time to import gfwsvd

    d_out, d_in = shape
    if kind == "dense":
        layer: nn.Module = nn.Linear(d_in, d_out, bias=False)
    else:
        layer = LowRankLinear(d_in, d_out, rank, pivoted=_FORMS[kind], bias=False)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        if layer.order is not None:
            layer.order.copy_(torch.randperm(d_out))
    layer, x = layer.to(like.device, like.dtype), torch.randn(tokens, d_in).to(like)
    timer = Timer("layer(x)", globals={"layer": layer, "x": x}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=_SECONDS).median * 1e6


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} CPU, {capability}, {torch.get_num_threads()} threads"
