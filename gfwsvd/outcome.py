"""What a compression did, layer by layer: the report that is written beside a model."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .batches import HELDOUT_SHARE
from .bounds import Bound
from .checkpoint import MANIFEST, read_manifest
from .errors import GfwsvdError
from .methods import KRONECKER, METHODS, Method
from .solve import Built, Solution
from .statistics import LayerStatistics

_SPECTRUM_POINTS = 64  # of a spectrum in the report
_DERIVED = ("metrics", "unjudged")  # what the JSON of a report says beside its fields


@dataclass
class LayerReport:
    """What became of one linear layer, and how sound its numbers are.

    Attributes:
        kind: "lowrank" (two factors), "pivoted" or "dense"; `reason` says why a layer stayed dense, or is stored as two
            factors where it was to be pivoted.
        bits: of the factors where they are whole numbers, with scales; else None.
        stored, dense: numbers stored now and before, biases aside.
        predicted_loss: the method's objective at the rank: nats per predicted token where the method predicts the loss.
        rounding_loss: what the rounding of the stored numbers to half precision, or to `bits`, adds to it; else None.
        metrics: which of `guard.CHOICES` the layer was factored by.
        heldout_losses: objective of each choice by held-out tokens, at the rank of uniform ranks, in nats per token;
            empty where nothing was compared.
        damping_left, damping_right: added to the diagonals of the metrics, relative to their means.
        condition_left, condition_right: of the damped metrics, estimated.
        convergence: of the Kronecker power iteration: the sine of the last sweep's turn; None where it is not used.
        kronecker_residual: share of the Fisher block's energy that its Kronecker fit misses.
        bound: shares of `dense` that it had to store at least and at most; None where nothing was asked.
        loss_scale: what its predicted losses were multiplied by in the allocation, after rounds; else None.
        gain: root mean square of what the gains of its outputs differ from one; None without gains.
        spectrum, spectrum_index: some whitened singular values and their positions, from 0.
    """

    name: str
    kind: str
    d_in: int
    d_out: int
    rank: int | None
    stored: int
    dense: int
    predicted_loss: float = 0.0
    rounding_loss: float | None = None
    metrics: str = ""
    heldout_losses: dict[str, float] = field(default_factory=dict)
    damping_left: float | None = None
    damping_right: float | None = None
    condition_left: float | None = None
    condition_right: float | None = None
    convergence: float | None = None
    kronecker_residual: float | None = None
    reason: str = ""
    bound: list[float] | None = None
    spectrum: list[float] = field(default_factory=list)
    spectrum_index: list[int] = field(default_factory=list)
    bits: int | None = None
    loss_scale: float | None = None
    gain: float | None = None


@dataclass
class CompressionReport:
    """What a compression did.

    Attributes:
        keep: asked share of the compressed linear layers' parameters, or with a latency table of their time.
        kept: achieved `stored / dense` of those layers.
        stored, dense: parameters of those layers (weights), now and before.
        model_stored, model_dense: parameters of the whole model, shared ones once.
        model_bytes, model_dense_bytes: what they take, now and before; None in reports of versions that did not count.
        predicts_loss: whether predicted losses are in nats per predicted token.
        seconds: wall time of the factorisation, calibration aside.
        provenance: where the numbers come from: calibration data, settings, latency table, versions.
        time_kept: their time now over that before, as the latency table predicts it; None without one.
        guard: whether held-out tokens could change the metrics of a layer.
        bits: of the factors of low-rank layers where they are whole numbers, else None.
        round_losses: mean loss of the compressed model, as two factors, at the first ranks and after each round of
            allocation, in this order: divergence from the dense model, or the loss that was given; the ranks of the
            lowest were taken. Empty without rounds.
        gain_losses: the same on the batches held out from gains, without them and after each step. Empty where there
            are no gains.
    """

    method: str
    keep: float
    kept: float
    ranks: str
    rank_multiple: int
    storage: str
    damping: float
    stored: int
    dense: int
    model_stored: int
    model_dense: int
    predicts_loss: bool
    seconds: float
    layers: list[LayerReport]
    provenance: dict[str, Any]
    time_kept: float | None = None
    guard: bool = False
    bits: int | None = None
    model_bytes: int | None = None
    model_dense_bytes: int | None = None
    round_losses: list[float] = field(default_factory=list)
    gain_losses: list[float] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, int] | None:
        """How many layers were factored by each of `guard.CHOICES`, of those that held-out tokens judged; None where
        they judged none."""
        counts = Counter(layer.metrics for layer in self.layers if layer.heldout_losses)
        return dict(counts.most_common()) or None

    @property
    def unjudged(self) -> str | None:
        """Why the guard judged no metrics though it was on and there were some to choose, and what to do; else None."""
        row = METHODS.get(self.method)
        if not self.guard or row is None or None in row.matrices or self.metrics:
            return None
        return (
            f"no held-out tokens to judge metrics by, so all are two-sided: expected one of {HELDOUT_SHARE} sequences, "
            f"got none of {self.provenance.get('num_sequences')}; calibrate on {HELDOUT_SHARE} sequences or more, by a "
            "loss of your own in batches no larger than that share, or with --heldout N; --no-guard asks for none"
        )

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values: its fields, `metrics` and `unjudged`."""
        return {**asdict(self), **{name: getattr(self, name) for name in _DERIVED}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "CompressionReport":
        """The report of `to_json`'s values; GfwsvdError where they are not one."""
        try:
            fields = {name: values[name] for name in values if name not in _DERIVED}
            return cls(**{**fields, "layers": [LayerReport(**layer) for layer in values["layers"]]})
        except (KeyError, TypeError) as error:
            raise GfwsvdError(f"not a compression report of this version of gfwsvd: {error}") from error


def layer_report(
    name: str,
    solution: Solution,
    chosen: Built | None,
    stats: LayerStatistics,
    row: Method,
    *,
    loss_scale: float | None,
    gains: Tensor | None,
) -> LayerReport:
    """The report of one layer.

    Args:
        chosen: the low-rank layer and its rounding loss; None where it stays dense, whose reason is the caller's.
        loss_scale: of its predicted losses after rounds; None without.
        gains: of its outputs, (d_out,); None without.
    """
    candidate, spectrum = solution.candidate, solution.candidate.spectrum
    points = torch.linspace(0, len(spectrum) - 1, min(_SPECTRUM_POINTS, len(spectrum))).round().long().unique()
    kronecker = KRONECKER in row.needs
    layer, rounding = chosen or (None, None)
    reason = ""
    if layer is not None and candidate.pivoted and layer.kind == "lowrank":
        few = not candidate.pivots(layer.rank)
        reason = "two factors: " + (
            "smaller at so low a rank" if few else "pivoted, rounding would lose more than it saves"
        )
    return LayerReport(
        name=name,
        kind="dense" if layer is None else layer.kind,
        d_in=candidate.d_in,
        d_out=candidate.d_out,
        rank=None if layer is None else layer.rank,
        bits=None if layer is None else layer.bits,
        stored=candidate.dense if layer is None else layer.stored,
        dense=candidate.dense,
        predicted_loss=0.0 if layer is None else candidate.tails()[layer.rank].item(),
        rounding_loss=rounding,
        convergence=stats.convergence[-1] if kronecker else None,
        kronecker_residual=stats.kronecker_residual if kronecker else None,
        reason=reason,
        bound=None if candidate.bound == Bound() else list(candidate.bound),
        spectrum=spectrum[points].tolist(),
        spectrum_index=points.tolist(),
        loss_scale=loss_scale,
        gain=None if gains is None else (gains - 1).square().mean().sqrt().item(),
        **solution.soundness,
    )


def read_report(folder: Path) -> CompressionReport:
    """The report in the manifest of a checkpoint; GfwsvdError where there is none, or none of this version."""
    if (details := read_manifest(folder).get("report")) is None:
        raise GfwsvdError(f"{folder} has no {MANIFEST}, it was saved again: give the folder of gfwsvd compress")
    return CompressionReport.from_json(details)
