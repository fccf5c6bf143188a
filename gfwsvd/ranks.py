"""Rank allocation: how many ranks each layer gets, and which layers stay dense.

One definition of the ratio everywhere: `keep` is the number of parameters stored for the compressed linear layers over
the number that the dense ones have. No allocation exceeds it.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
    """

    d_out: int
    d_in: int
    spectrum: Tensor
    pivoted: bool = False

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

    def tails(self) -> Tensor:
        """Loss at each rank 0 .. min(D_OUT, D_IN), float64."""
        energy = self.spectrum.double().square()
        return torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])


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
    candidates: Mapping[str, Candidate], *, keep: float, ranks: str, rank_multiple: int = 1
) -> dict[str, int | None]:
    """The rank of every layer, None for one that stays dense.

    Args:
        candidates: layers by name.
        keep: share of parameters to store, in (0, 1]; at 1 every layer stays dense.
        ranks: "uniform" gives each layer the share `keep` of its own size; "global" minimises the summed loss under
            the shared budget with one Lagrange multiplier, and leaves a layer dense where that is cheaper.
        rank_multiple: ranks are multiples of it, as far as a layer (with "uniform", its share) is large enough.

    Raises:
        GfwsvdError: unknown `ranks`, `keep` or `rank_multiple` out of range, or a budget below the smallest ranks.
    """
    check_keep(keep)
    check_ranks(ranks, rank_multiple)
    if keep == 1:
        return dict.fromkeys(candidates)
    if ranks == "uniform":
        return {name: _uniform(name, layer, keep, rank_multiple) for name, layer in candidates.items()}
    return _global(candidates, keep, rank_multiple)


def _uniform(name: str, layer: Candidate, keep: float, multiple: int) -> int:
    affordable = layer.largest_within(int(keep * layer.dense))
    if affordable < 1:
        raise GfwsvdError(
            f"keep {keep} of layer {name} ({layer.d_out} x {layer.d_in}) is less than rank 1 stores; raise keep, "
            f"exclude the layer, or take global ranks"
        )
    return affordable // multiple * multiple or affordable


class _Choices:
    """The states one layer may take, in ascending order of parameters: some ranks, then dense."""

    def __init__(self, layer: Candidate, multiple: int) -> None:
        largest = layer.largest_rank
        ranks = list(range(multiple, largest + 1, multiple)) or ([largest] if largest else [])
        self.ranks: Sequence[int | None] = [*ranks, None]
        self.stored = torch.tensor([layer.stored(rank) for rank in self.ranks], dtype=torch.float64)
        tails = layer.tails().cpu()
        self.losses = torch.cat([tails[ranks], tails.new_zeros(1)])

    def best(self, multiplier: float) -> int:
        return int(torch.argmin(self.losses + multiplier * self.stored))


def _global(candidates: Mapping[str, Candidate], keep: float, multiple: int) -> dict[str, int | None]:
    budget = keep * sum(layer.dense for layer in candidates.values())
    choices = {name: _Choices(layer, multiple) for name, layer in candidates.items()}

    def pick(multiplier: float) -> dict[str, int]:
        return {name: choice.best(multiplier) for name, choice in choices.items()}

    def stored(picked: Mapping[str, int]) -> float:
        return sum(choices[name].stored[index].item() for name, index in picked.items())

    smallest = dict.fromkeys(choices, 0)
    if stored(smallest) > budget:
        raise GfwsvdError(
            f"keep {keep} is below what the smallest ranks need: {stored(smallest) / budget * keep:.4f} at rank "
            f"multiple {multiple}; raise keep or lower the rank multiple"
        )
    low, high = 0.0, max(choice.losses[0].item() / choice.stored[0].item() for choice in choices.values()) + 1e-300
    while stored(pick(high)) > budget:
        high *= 4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if stored(pick(middle)) > budget else (low, middle)
    picked = pick(high)
    _spend(picked, choices, budget - stored(picked))
    return {name: choices[name].ranks[index] for name, index in picked.items()}


def _spend(picked: dict[str, int], choices: Mapping[str, _Choices], left_over: float) -> None:
    """Gives what the multiplier left of the budget to the steps that lower the loss most per parameter."""
    while True:
        best_gain, best_step = 0.0, None
        for name, index in picked.items():
            choice = choices[name]
            prices = choice.stored[index + 1 :] - choice.stored[index]
            gains = torch.where(prices <= left_over, (choice.losses[index] - choice.losses[index + 1 :]) / prices, 0.0)
            if gains.numel() and gains.max() > best_gain:
                step = int(gains.argmax())
                best_gain, best_step = gains[step].item(), (name, index + 1 + step, prices[step].item())
        if best_step is None:
            return
        name, index, price = best_step
        picked[name], left_over = index, left_over - price
