"""Rank allocation: how many ranks each layer gets, and which layers stay dense.

One definition of the ratio everywhere: `keep` is what the compressed linear layers cost over what the dense ones cost.
The cost is the number of parameters stored, or for global ranks a time (`latency.py`). No allocation exceeds it.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .bounds import Bound
from .errors import GfwsvdError

RANKS = ("uniform", "global")
STORAGE = ("pivoted", "factors")  # how a low-rank layer is stored


@dataclass(frozen=True)
class Candidate:
    """A layer in the allocation.

    Attributes:
        spectrum: its whitened singular values, descending, (min(D_OUT, D_IN),).
        pivoted: whether ranks are stored in the pivoted form (`pivot.py`), with the order of its outputs, where that is
            less than two factors.
        bound: what shares of the dense parameters it may store.
    """

    d_out: int
    d_in: int
    spectrum: Tensor
    pivoted: bool = False
    bound: Bound = Bound()

    @property
    def dense(self) -> int:
        return self.d_out * self.d_in

    @property
    def largest_rank(self) -> int:
        """The largest rank that stores less than the dense weight, which is exact; 0 where none does."""
        return self.largest_within(self.dense - 1)

    def largest_within(self, budget: int) -> int:
        """The largest rank below D_OUT and D_IN that stores no more than `budget`; 0 where none does."""
        return bisect_right(range(1, min(self.d_out, self.d_in)), budget, key=self.stored)

    def pivots(self, rank: int) -> bool:
        """Whether `rank` is stored in the pivoted form."""
        return self.pivoted and rank**2 > self.d_out

    def stored(self, rank: int | None) -> int:
        """Parameters stored at `rank`, or dense when it is None; it grows with the rank."""
        return self.dense if rank is None else stored(self.d_out, self.d_in, rank, self.pivots(rank))

    def states(self, multiple: int, most: int | None = None) -> list[int | None]:
        """What the layer may be within its bound, in ascending order of parameters: ranks, and None for dense.

        Ranks are multiples of `multiple`, or the largest rank where that is too small for one. Where none lies between
        the ends of the bound, it is the last below; where none does, there is no state.

        Args:
            most: parameters to store at most, below those of the bound's upper end.
        """
        most = int(self.bound.high * self.dense) if most is None else most
        largest = self.largest_within(min(most, self.dense - 1))
        ranks = list(range(multiple, largest + 1, multiple)) or [largest] * (largest > 0)
        states = [*ranks, *[None] * (most >= self.dense)]
        return [state for state in states if self.reaches_bound(state)] or states[-1:]

    def reaches_bound(self, rank: int | None) -> bool:
        """Whether `rank` stores no less than the bound's lower end."""
        return self.stored(rank) >= self.bound.low * self.dense

    def two_factors(self, rank: int, multiple: int, cost: "Cost") -> int:
        """The largest rank of two factors, a multiple, which neither stores nor costs more than `rank` as it is stored,
        and reaches the bound; 0 where none does."""
        other = replace(self, pivoted=False)
        ranks = range(multiple, other.largest_within(self.stored(rank)) + 1, multiple)
        return max((r for r in ranks if cost(other, r) <= cost(self, rank) and other.reaches_bound(r)), default=0)

    def tails(self) -> Tensor:
        """Loss at each rank 0 .. min(D_OUT, D_IN), float64."""
        energy = self.spectrum.double().square()
        return torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])

    def lost_share(self, rank: int) -> float:
        """Loss at `rank` over that of a layer that is zero, 0 to 1."""
        tails = self.tails()
        return (tails[rank] / tails[0]).item() if tails[0] > 0 else 0.0


Cost = Callable[[Candidate, int | None], float]  # of a layer at a rank, or dense; `Candidate.stored` is one


def stored(d_out: int, d_in: int, rank: int, pivoted: bool) -> int:
    """Numbers that a layer stores at `rank`, the order of the outputs of a pivoted one included."""
    return rank * (d_in + d_out - rank) + d_out if pivoted else rank * (d_in + d_out)


def check_keep(keep: float) -> None:
    """GfwsvdError unless `keep` is a share in (0, 1]."""
    if not 0 < keep <= 1:
        raise GfwsvdError(
            f"keep must be a share of parameters in (0, 1], got {keep}; for 20 % fewer parameters say keep 0.8"
        )


def check_ranks(ranks: str, rank_multiple: int) -> None:
    """GfwsvdError unless `ranks` is one of `RANKS` and `rank_multiple` at least 1."""
    if ranks not in RANKS:
        raise GfwsvdError(f"ranks must be one of {', '.join(RANKS)}, got {ranks!r}")
    if rank_multiple < 1:
        raise GfwsvdError(f"rank multiple must be at least 1, got {rank_multiple}")


def check_storage(storage: str) -> None:
    """GfwsvdError unless `storage` is one of `STORAGE`."""
    if storage not in STORAGE:
        raise GfwsvdError(f"storage must be one of {', '.join(STORAGE)}, got {storage!r}")


def allocate(
    candidates: Mapping[str, Candidate],
    *,
    keep: float,
    ranks: str,
    rank_multiple: int = 1,
    cost: Cost = Candidate.stored,
) -> dict[str, int | None]:
    """The rank of every layer, None for one that stays dense.

    Args:
        candidates: layers by name.
        keep: share of the dense layers' cost to spend, in (0, 1]; at 1 every layer stores what its bound allows.
        ranks: "uniform" gives each layer the same share of its own parameters, which is `keep` where no bound clips it;
            where some do, the share of the others is such that all store `keep`. "global" minimises the summed loss
            under the shared budget with one Lagrange multiplier, and leaves a layer dense where that is cheaper.
        rank_multiple: ranks are multiples of it, as far as a layer (with "uniform", its share) is large enough.
        cost: what global ranks spend, positive. A state of a layer that costs no less than a better one is not taken.

    Raises:
        GfwsvdError: unknown `ranks`, `keep` or `rank_multiple` out of range, a bound that no rank of its layer keeps,
            or a budget below the smallest ranks.
    """
    check_keep(keep)
    check_ranks(ranks, rank_multiple)
    states = {name: _states(name, layer, rank_multiple) for name, layer in candidates.items()}
    if keep == 1:
        return {name: possible[-1] for name, possible in states.items()}
    if ranks == "uniform":
        return _uniform(candidates, states, keep, rank_multiple)
    return _global(candidates, states, keep, rank_multiple, cost)


def why_dense(layer: Candidate, *, keep: float, rank_multiple: int, cost: Cost) -> str:
    """Why `allocate` left a layer dense."""
    if layer.states(rank_multiple) == [None] and layer.bound.low:
        return "its bound asks for it"
    if keep == 1:
        return "keep is 1"
    if len(_Choices(layer, layer.states(rank_multiple), cost).ranks) == 1:
        return "no rank costs less"
    return "what it costs is worth more here than in other layers"


def _states(name: str, layer: Candidate, multiple: int) -> list[int | None]:
    states = layer.states(multiple)
    if not states:
        least = layer.stored(1) / layer.dense
        raise GfwsvdError(
            f"the bound {layer.bound.low:g}:{layer.bound.high:g} of layer {name} ({layer.d_out} x {layer.d_in}) allows "
            f"no rank: rank 1 stores {least:.4f}; raise its upper end to "
            f"{'that' if least < 1 else '1, which lets it stay dense'}, or exclude the layer"
        )
    return states


def _uniform(
    candidates: Mapping[str, Candidate], states: Mapping[str, list[int | None]], keep: float, multiple: int
) -> dict[str, int | None]:
    ends = {
        name: (layer.stored(states[name][0]) if layer.bound.low else 0, layer.stored(states[name][-1]))
        for name, layer in candidates.items()
    }

    def shares(share: float) -> dict[str, int]:
        """Parameters of each layer at the common share, clipped."""
        return {
            name: min(max(int(share * layer.dense), ends[name][0]), ends[name][1]) for name, layer in candidates.items()
        }

    dense = sum(layer.dense for layer in candidates.values())
    least = sum(shares(0).values())
    if least > keep * dense:
        raise GfwsvdError(_too_small(keep, least / dense, multiple, candidates))
    share = keep
    if any(not low <= keep * candidates[name].dense <= high for name, (low, high) in ends.items()):
        share = _boundary(0.0, 1.0, lambda share: sum(shares(share).values()) <= keep * dense)
    chosen: dict[str, int | None] = {}
    for name, most in shares(share).items():
        layer = candidates[name]
        found = layer.states(multiple, most)
        if not found:
            raise GfwsvdError(
                f"keep {keep} of layer {name} ({layer.d_out} x {layer.d_in}) is less than rank 1 stores; raise keep, "
                f"exclude the layer, or take global ranks"
            )
        chosen[name] = found[-1]
    return chosen


class _Choices:
    """The states one layer may take, in ascending order of cost and descending of loss."""

    def __init__(self, layer: Candidate, states: list[int | None], cost: Cost) -> None:
        self.ranks: list[int | None] = []
        costs: list[float] = []
        for rank in reversed(states):
            if (price := cost(layer, rank)) < min(costs, default=math.inf):
                self.ranks.insert(0, rank)
                costs.insert(0, price)
        self.costs = torch.tensor(costs, dtype=torch.float64)
        self.losses = layer.tails().cpu()[[-1 if rank is None else rank for rank in self.ranks]]

    def best(self, multiplier: float) -> int:
        return int(torch.argmin(self.losses + multiplier * self.costs))


def _global(
    candidates: Mapping[str, Candidate],
    states: Mapping[str, list[int | None]],
    keep: float,
    multiple: int,
    cost: Cost,
) -> dict[str, int | None]:
    dense = sum(cost(layer, None) for layer in candidates.values())
    budget = keep * dense
    choices = {name: _Choices(layer, states[name], cost) for name, layer in candidates.items()}

    def pick(multiplier: float) -> dict[str, int]:
        return {name: choice.best(multiplier) for name, choice in choices.items()}

    def spent(picked: Mapping[str, int]) -> float:
        return sum(choices[name].costs[index].item() for name, index in picked.items())

    least = spent(dict.fromkeys(choices, 0))
    if least > budget:
        raise GfwsvdError(_too_small(keep, least / dense, multiple, candidates))
    high = max(choice.losses[0].item() / choice.costs[0].item() for choice in choices.values()) + 1e-300
    while spent(pick(high)) > budget:
        high *= 4
    picked = pick(_boundary(high, 0.0, lambda multiplier: spent(pick(multiplier)) <= budget))
    _spend(picked, choices, budget - spent(picked))
    return {name: choices[name].ranks[index] for name, index in picked.items()}


def _boundary(good: float, bad: float, fits: Callable[[float], bool]) -> float:
    """The value nearest to `bad` that `fits`, as `good` does."""
    for _ in range(100):
        middle = (good + bad) / 2
        if middle in (good, bad):  # no number is between them
            break
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def _too_small(keep: float, needed: float, multiple: int, candidates: Mapping[str, Candidate]) -> str:
    bounds = any(layer.bound.low for layer in candidates.values())
    return (
        f"keep {keep} is below what the smallest ranks{' within the bounds' if bounds else ''} need: {needed:.4f} at "
        f"rank multiple {multiple}; raise keep or lower the rank multiple{' or the bounds' if bounds else ''}"
    )


def _spend(picked: dict[str, int], choices: Mapping[str, _Choices], left_over: float) -> None:
    """Gives what the multiplier left of the budget to the steps that lower the loss most for their cost."""
    while True:
        best_gain, best_step = 0.0, None
        for name, index in picked.items():
            choice = choices[name]
            prices = choice.costs[index + 1 :] - choice.costs[index]
            gains = torch.where(prices <= left_over, (choice.losses[index] - choice.losses[index + 1 :]) / prices, 0.0)
            if gains.numel() and gains.max() > best_gain:
                step = int(gains.argmax())
                best_gain, best_step = gains[step].item(), (name, index + 1 + step, prices[step].item())
        if best_step is None:
            return
        name, index, price = best_step
        picked[name], left_over = index, left_over - price
