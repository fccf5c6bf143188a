"""The shapes to measure: linear layers of models that people compress, their ranks, token counts and sequences."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch

from gfwsvd.ranks import Candidate, allocate


class Layer(NamedTuple):
    """A linear layer (D_OUT, D_IN). Layers of one group read the same input, so one launch could serve them all."""

    name: str
    d_out: int
    d_in: int
    group: str


def _decoder(hidden: int, intermediate: int, keys: int) -> tuple[Layer, ...]:
    return (
        Layer("q", hidden, hidden, "qkv"),
        Layer("k", keys, hidden, "qkv"),
        Layer("v", keys, hidden, "qkv"),
        Layer("o", hidden, hidden, "o"),
        Layer("gate", intermediate, hidden, "gate_up"),
        Layer("up", intermediate, hidden, "gate_up"),
        Layer("down", hidden, intermediate, "down"),
    )


# From the published configurations: hidden size, intermediate size, key-value heads x head size.
MODELS: dict[str, tuple[Layer, ...]] = {
    "llama-3.1-8b": _decoder(4096, 14336, 8 * 128),
    "llama-2-7b": _decoder(4096, 11008, 32 * 128),
    "qwen3-8b": _decoder(4096, 12288, 8 * 128),
    "mistral-7b": _decoder(4096, 14336, 8 * 128),
    "tiny": _decoder(48, 80, 32),  # no model: for a first look on a CPU
}
KEEPS = (0.8, 0.7, 0.5)
RANK_MULTIPLE = 16


class Case(NamedTuple):
    """One problem of an operator; for a symmetric matrix D_OUT = D_IN is its width."""

    tokens: int
    d_out: int
    d_in: int
    rank: int = 0
    seq_len: int = 0

    @property
    def name(self) -> str:
        """What the case is of, whatever the tokens and the rank."""
        return f"{self.d_in}->{self.d_out}"

    @property
    def label(self) -> str:
        """The case in the words of a table."""
        is_map = self.rank or self.seq_len
        words = [self.name if is_map else f"D={self.d_in}"]
        sizes = {"R": self.rank, "T": self.tokens, "S": self.seq_len}
        words += [f"{letter}={size}" for letter, size in sizes.items() if size]
        return " ".join(words)

    def with_tokens(self, tokens: int) -> "Case":
        """The same problem of other tokens, its sequences no longer than they are."""
        return self._replace(tokens=tokens, seq_len=min(self.seq_len, tokens))


class GroupCase(NamedTuple):
    """Projections of one input, each with its outputs and its rank; with `silu_mul` two that make up one output."""

    tokens: int
    group: str
    d_in: int
    d_outs: tuple[int, ...]
    ranks: tuple[int, ...]
    pivoted: bool
    silu_mul: bool

    @property
    def name(self) -> str:
        """What the case is of, whatever the tokens and the ranks."""
        return f"{self.group} {self.d_in}->{'+'.join(map(str, self.d_outs))}"

    @property
    def label(self) -> str:
        """The case in the words of a table."""
        return f"{self.name} R={'+'.join(map(str, self.ranks))} T={self.tokens}"

    def with_tokens(self, tokens: int) -> "GroupCase":
        """The same problem of other tokens."""
        return self._replace(tokens=tokens)

    @property
    def out_width(self) -> int:
        """Columns of the result."""
        return self.d_outs[0] if self.silu_mul else sum(self.d_outs)

    @property
    def num_weights(self) -> int:
        """Entries of the factors; a pivoted output needs none in `up`."""
        return sum(
            rank * (self.d_in + d_out - self.pivoted * rank)
            for d_out, rank in zip(self.d_outs, self.ranks, strict=True)
        )


class Grid(NamedTuple):
    """What to measure: layers, token counts, shares of the parameters kept, sequence lengths."""

    layers: Sequence[Layer]
    tokens: Sequence[int]
    keeps: Sequence[float] = KEEPS
    seq_lens: Sequence[int] = (512, 2048)

    def shapes(self) -> list[tuple[int, int]]:
        """(D_OUT, D_IN) of the layers, each once."""
        return list(dict.fromkeys((layer.d_out, layer.d_in) for layer in self.layers))

    def groups(self) -> list[tuple[str, int, tuple[int, ...]]]:
        """(name, D_IN, D_OUT of each) of the layers that read one input, each once. A model's come in a row."""
        runs = [(name, list(run)) for name, run in groupby(self.layers, lambda layer: layer.group)]
        return list(dict.fromkeys((name, run[0].d_in, tuple(one.d_out for one in run)) for name, run in runs))


def rank(d_out: int, d_in: int, keep: float, pivoted: bool = False) -> int:
    """The rank of a layer by the uniform rule, a multiple of 16 wherever the layer can afford one.

    In the pivoted form R (D_IN + D_OUT - R) numbers are stored, so the same share of them has a higher rank.
    """
    candidate = Candidate(d_out, d_in, torch.empty(0), pivoted)  # the uniform rule asks for no spectrum
    found = allocate({"layer": candidate}, keep=keep, ranks="uniform", rank_multiple=RANK_MULTIPLE)["layer"]
    if found is None:
        raise ValueError(f"keep {keep} leaves a layer of {d_out} x {d_in} dense: measure the shares below 1")
    return found


def square_cases(grid: Grid) -> Iterator[Case]:
    """A symmetric matrix for each width that is an input or an output of some layer."""
    widths = sorted({width for shape in grid.shapes() for width in shape})
    return (Case(tokens, width, width) for tokens in grid.tokens for width in widths)


def sequence_cases(grid: Grid) -> Iterator[Case]:
    """Every layer, the tokens cut into sequences of each length; a shorter batch is one sequence."""
    return (
        Case(tokens, d_out, d_in, seq_len=seq_len)
        for tokens in grid.tokens
        for seq_len in dict.fromkeys(min(length, tokens) for length in grid.seq_lens)
        for d_out, d_in in grid.shapes()
    )


def lowrank_cases(grid: Grid) -> Iterator[Case]:
    """Every layer at every share kept."""
    return (
        Case(tokens, d_out, d_in, rank=rank(d_out, d_in, keep))
        for keep in grid.keeps
        for tokens in grid.tokens
        for d_out, d_in in grid.shapes()
    )


def group_cases(grid: Grid, *, pivoted: bool = False) -> Iterator[GroupCase]:
    """Every group of layers at every share kept, few tokens first; gate and up come with their activation."""
    return (
        GroupCase(
            tokens, name, d_in, d_outs, tuple(rank(d, d_in, keep, pivoted) for d in d_outs), pivoted, name == "gate_up"
        )
        for keep in grid.keeps
        for tokens in grid.tokens
        for name, d_in, d_outs in grid.groups()
        for ranks in [tuple(rank(d_out, d_in, keep, pivoted) for d_out in d_outs)]
    )
