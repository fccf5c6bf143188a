"""The shapes to measure: linear layers of models that people compress, their ranks, token counts and sequences."""

from collections.abc import Iterator, Sequence
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
    def label(self) -> str:
        """The case in the words of a table."""
        is_map = self.rank or self.seq_len
        words = [f"{self.d_in}->{self.d_out}" if is_map else f"D={self.d_in}"]
        sizes = {"R": self.rank, "T": self.tokens, "S": self.seq_len}
        words += [f"{letter}={size}" for letter, size in sizes.items() if size]
        return " ".join(words)


class Grid(NamedTuple):
    """What to measure: layers, token counts, shares of the parameters kept, sequence lengths."""

    layers: Sequence[Layer]
    tokens: Sequence[int]
    keeps: Sequence[float] = KEEPS
    seq_lens: Sequence[int] = (512, 2048)

    def shapes(self) -> list[tuple[int, int]]:
        """(D_OUT, D_IN) of the layers, each once."""
        return list(dict.fromkeys((layer.d_out, layer.d_in) for layer in self.layers))


def rank(d_out: int, d_in: int, keep: float) -> int:
    """The rank of a layer by the uniform rule, a multiple of 16 wherever the layer can afford one."""
    candidate = Candidate(d_out, d_in, torch.empty(0))  # the uniform rule asks for no spectrum
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
