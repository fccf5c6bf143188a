"""One gain for each output of the low-rank layers, by which the compressed model comes closest to the dense one.

Factors are the best for each layer by itself: by its metrics no factor times an output would make its error smaller.
But errors meet in the model, where they shrink and turn what later layers see, and that a gain of each output can take
back in part. Let outputs y = Ŵ x of a layer become (1 + a) y. One backward pass gives the slopes of the loss by all a
at once, `sum <g_i, y_i>`, and the layer's metrics half of its curvature by each a_i, `left_ii (Ŵ right Ŵᵀ)_ii`. From
both comes a Newton step, drawn towards zero by how large gains are expected to be beforehand (`spread`). Steps of
different layers add up, for the same errors call for all of them, so only a share of each is made, and smaller ones
until the loss of held-out batches falls.

Gains are multiplied into the factors: they take no memory and no time.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batches import data_sha256, num_rows, num_tokens, split_rows
from .errors import GfwsvdError
from .joint import See, first_tokens, measured, placed
from .layers import LowRankLinear
from .losses import Batch, Loss, divergence
from .methods import Method
from .metrics import Metric, diagonal, multiply
from .ranked import rank, shared_errors
from .track import Track
from .work import Work

STEP_TOKENS = 4096  # of a step, at least, where the batches hold so many
HELDOUT_TOKENS = 4096  # at the end of the batches, likewise
SMALLEST = 1e-6  # standard deviation of gains beforehand
MOMENTUM = 0.6  # of a step goes into the next one
FIRST_RATE = 0.1  # the share of a step that is tried first
FASTER, SLOWER, TRIES = 1.25, 0.5, 6  # what it is multiplied by where the loss fell, and where not; how often at most


def check_gains(gains: int, row: Method) -> None:
    """GfwsvdError unless so many steps of `gains` can follow a compression by the method `row`."""
    if not isinstance(gains, int) or gains < 0:
        raise GfwsvdError(f"gains must be a whole number of steps from 0 on, got {gains!r}")
    if gains and not row.predicts_loss:
        raise GfwsvdError(
            f"gains are sized by metrics that predict the loss, and those of method {row.name} do not: leave them out"
        )


class Fitted(NamedTuple):
    """Gains of the outputs of low-rank layers.

    Attributes:
        gains: by layer, (D_OUT,) float64.
        losses: mean loss of the compressed model on the held-out batches without gains and after each step, in nats
            for a loss in nats.
    """

    gains: dict[str, Tensor]
    losses: list[float]


def spread(lost: Iterable[float]) -> float:
    """How far gains are expected to be from one beforehand, as a standard deviation: as far as outputs are from those
    of the dense layers, in root mean square over the layers, of which each lost a share (`Candidate.lost_share`)."""
    shares = list(lost)
    return max(math.sqrt(sum(shares) / len(shares)), SMALLEST)


def half_curvature(layer: LowRankLinear, left: Metric, right: Metric) -> Tensor:
    """`left_ii (Ŵ right Ŵᵀ)_ii` of the layer's weight Ŵ, (D_OUT,) float64: what the square of an output's gain, less
    one, costs by metrics that predict the loss."""
    up, down = layer.factors(torch.float64)
    inner = down @ multiply(right, down.T)
    squares = ((up @ inner) * up).sum(1)
    return squares if left is None else squares * diagonal(left).to(squares)


def fitted_gains(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    layers: Mapping[str, LowRankLinear],
    batches: Sequence[Batch],
    *,
    steps: int,
    curvatures: Mapping[str, Tensor],
    deviation: float,
    loss: Loss | None = None,
    work: Work | None = None,
    track: Track[Any],
) -> Fitted:
    """Fits gains in `steps`, each on further batches, after the last ones on the first again. `model` has its own
    layers again at the end, also after an error; `layers` have their gains.

    Args:
        linears: the dense layers, which are in the model.
        layers: low-rank ones, as two factors, for their places.
        batches: at least two, or without a `loss` one of several sequences; in a job of several processes the same in
            all, which share them. The last ones are held out, and what does not lower their loss is not done.
        curvatures: `half_curvature` of each of the layers.
        deviation: of the gains from one that is expected beforehand, see `spread`.
        loss: by default the divergence of the model's predictions from those of the dense one.
        work: where the gains are kept after each step; a later call of the same arguments goes on from there.

    Raises:
        GfwsvdError: for too few batches, when the loss is NaN or inf, and see `work.Work`.
    """
    if len(batches) == 1 and loss is None:
        batches = split_rows(batches, -(-num_rows(batches[0]) // 2))
    if len(batches) < 2:
        raise GfwsvdError(
            "gains are fitted on some text and judged by other: expected at least 2 batches, or 2 sequences unless the "
            "loss is one of your own, got 1: give more text, or no gains"
        )
    heldout = first_tokens(batches[::-1], HELDOUT_TOKENS)[: len(batches) // 2]
    parts = _parts(batches[: len(batches) - len(heldout)])
    kept = None if work is None else _Kept(work, layers, batches, steps)
    loss = loss or divergence(lambda model: placed(model, linears))
    ups = {name: layer.up.detach().clone() for name, layer in layers.items()}

    def place(gains: Mapping[str, Tensor]) -> None:
        for name, layer in layers.items():
            layer.up.data.copy_(gains[name][:, None] * ups[name])

    def judge(gains: Mapping[str, Tensor], title: str) -> float:
        place(gains)
        return measured(model, layers, heldout, loss, title=title, track=track)[0]

    now = None if kept is None else kept.load()
    if now is None:
        ones = {name: torch.ones(len(up), dtype=torch.float64, device=up.device) for name, up in ups.items()}
        now = _State(ones, None, [judge(ones, f"loss before {steps} steps of gains")], FIRST_RATE)
    place(now.gains)
    for number in range(len(now.losses) - 1, steps):
        title = f"gains, step {number + 1} of {steps}"
        part = parts[number % len(parts)]
        _, slopes = measured(model, layers, part, loss, see=output_slopes(layers), title=title, track=track)
        ridge = 0.5 / (deviation**2 * sum(map(num_tokens, part)))
        newton = _newton(slopes, curvatures, now.gains, ridge)
        now = _stepped(now, newton, judge, title)
        place(now.gains)
        if kept is not None:
            kept.save(now)
    return Fitted(now.gains, now.losses)


class _State(NamedTuple):
    """After some steps: the gains, the last step if the loss fell, all losses, and the next share."""

    gains: dict[str, Tensor]
    velocity: dict[str, Tensor] | None
    losses: list[float]
    rate: float


def _stepped(
    now: _State, newton: dict[str, Tensor], judge: Callable[[Mapping[str, Tensor], str], float], title: str
) -> _State:
    """The state after a share of a step by which the loss falls, or the same gains where it does not."""
    gains, velocity, losses, rate = now
    step = newton if velocity is None else {name: newton[name] + MOMENTUM * velocity[name] for name in newton}
    for _ in range(TRIES):
        found = {name: gain * (1 + rate * step[name]) for name, gain in gains.items()}
        if (loss := judge(found, f"{title}, {rate:.2g} of it")) < losses[-1]:
            return _State(found, step, [*losses, loss], rate * FASTER)
        step, rate = newton, rate * SLOWER
    return _State(gains, None, [*losses, losses[-1]], rate)


class _Kept:
    """The last state on disk, so that an interrupted fit goes on after its last step."""

    def __init__(self, work: Work, layers: Mapping[str, LowRankLinear], batches: Sequence[Batch], steps: int) -> None:
        about = {name: layer.rank for name, layer in layers.items()}, data_sha256(batches), steps
        self.work, self.layers = work, layers
        self.name = f"gains-{hashlib.sha256(repr(about).encode()).hexdigest()}"

    def load(self) -> _State | None:
        if (found := self.work.load(self.name)) is None:
            return None
        tensors, values = found
        of_both = [
            {name: tensors[f"{what} {name}"].to(layer.up.device) for name, layer in self.layers.items()}
            for what in ("gains", "velocity")
            if f"{what} {next(iter(self.layers))}" in tensors
        ]
        return _State(of_both[0], of_both[1] if len(of_both) > 1 else None, values["losses"], values["rate"])

    def save(self, state: _State) -> None:
        """All ranks of a job have the same state; rank 0 writes it."""
        tensors = {f"gains {name}": value for name, value in state.gains.items()}
        tensors |= {f"velocity {name}": value for name, value in (state.velocity or {}).items()}
        with shared_errors():
            if rank() == 0:
                self.work.save(self.name, tensors, {"losses": state.losses, "rate": state.rate})


def output_slopes(layers: Mapping[str, LowRankLinear]) -> See:
    """The slope (D_OUT,) of the loss by the gain of each output, `sum <g_i, y_i>` with y = Ŵ x."""

    def see(name: str, x: Tensor, g: Tensor) -> Tensor:
        y = F.linear(F.linear(x, layers[name].weight), layers[name].up)
        return (g.float() * y.float()).flatten(0, -2).sum(0, dtype=torch.float64)

    return see


def _newton(
    slopes: Mapping[str, Tensor], curvatures: Mapping[str, Tensor], gains: Mapping[str, Tensor], ridge: float
) -> dict[str, Tensor]:
    """What to add to the gains, relative to them, if each layer's step were the only one."""
    return {
        name: -0.5 * slopes[name].to(gain) / (curvatures[name].to(gain) * gain.square() + ridge)
        for name, gain in gains.items()
    }


def _parts(batches: Sequence[Batch]) -> list[Sequence[Batch]]:
    """The batches in their order, in parts of `STEP_TOKENS`; what is left over at the end goes to the last one."""
    parts: list[Sequence[Batch]] = []
    while batches:
        part = first_tokens(batches, STEP_TOKENS)
        batches = batches[len(part) :]
        if parts and sum(map(num_tokens, part)) < STEP_TOKENS:
            parts[-1] = [*parts[-1], *part]
        else:
            parts.append(part)
    return parts
