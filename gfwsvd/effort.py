"""What a compression does, as steps of which a machine's curves (`hardware.py`) tell the time.

Counted from the code, token by token and layer by layer. A pass over memory counts as one move where it reads a tensor
and writes one, and as a part of it where it only reads.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType

import torch

from .hardware import Hardware
from .quantise import GROUP
from .ranks import Candidate
from .statistics import PART_PROBES

NO_SPECTRUM = torch.empty(0)  # of a `Candidate` that is not chosen for
Ranks = Mapping[str, int | None]  # of layers by name, None of a dense one


@dataclass(frozen=True)
class Shape:
    """What the cost of a compression depends on of a model.

    Attributes:
        linears: (d_in, d_out) of the layers that are compressed, by name.
        leaders: of each, the first layer with the same input.
        parameters: numbers that the model stores, shared ones once.
        embedding: those of them that a token reads one row of.
        vocabulary: outputs of the language-model head; 0 without one.
        hidden: width of the residual stream.
        blocks: decoder layers.
        heads, head_dim: of the attention, for queries.
        dtype: of the weights, such as "bfloat16".
        itemsize: bytes of one of them.
        positions: most tokens of a sequence; None for any number.
        others: (d_in, d_out) of the linear layers that are left out, by name: they run, and stay as they are.
    """

    linears: Mapping[str, tuple[int, int]]
    leaders: Mapping[str, str]
    parameters: int
    embedding: int
    vocabulary: int
    hidden: int
    blocks: int
    heads: int
    head_dim: int
    dtype: str
    itemsize: int
    positions: int | None = None
    others: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def running(self) -> dict[str, tuple[int, int]]:
        """(d_in, d_out) of all linear layers but the language-model head."""
        return {**self.linears, **self.others}

    @property
    def dense(self) -> int:
        """Weights of the layers that are compressed."""
        return sum(d_in * d_out for d_in, d_out in self.linears.values())

    @property
    def widest(self) -> int:
        """The most outputs that a layer has: the hidden width of an MLP."""
        return max(d_out for _, d_out in self.running.values())

    @property
    def largest(self) -> int:
        """Numbers of the largest tensor."""
        return max(self.vocabulary * self.hidden, *(d_in * d_out for d_in, d_out in self.running.values()))

    def leads(self, name: str) -> bool:
        """Whether a layer is the first with its input."""
        return self.leaders[name] == name


@dataclass(frozen=True)
class Step:
    """Something that is done several times: see `Hardware.curves` for its name and size."""

    curve: str
    size: float
    times: float
    flops: float = 0.0


def flops(steps: Iterable[Step]) -> float:
    """Floating point operations of all steps, those of products alone; a multiply-add is two."""
    return sum(step.flops for step in steps)


def seconds(steps: Iterable[Step], hardware: Hardware) -> float:
    """The time that all steps take one after the other."""
    return sum(step.times * hardware.curves[step.curve].seconds(step.size) for step in steps)


def product(dtype: str, rows: float, columns: float, inner: float, times: float = 1.0) -> Step:
    """A product of matrices (ROWS, INNER) and (INNER, COLUMNS)."""
    count = rows * columns * inner
    return Step(f"matmul {dtype}", count ** (1 / 3), times, 2 * count * times)


def thin(dtype: str, rows: float, inner: float, times: float = 1.0) -> Step:
    """A product of matrices (ROWS, INNER) and (INNER, PART_PROBES), which takes far longer than a cube of as many
    operations."""
    count = rows * inner
    return Step(f"thin {dtype}", count**0.5, times, 2 * PART_PROBES * count * times)


def moves(numbers: float, times: float, itemsize: int = 4) -> Step:
    """Passes over a tensor."""
    return Step("move", numbers * itemsize, times)


def model_pass(
    shape: Shape,
    tokens: int,
    seq_len: int,
    *,
    backward: bool = True,
    times: float = 1.0,
    ranks: Ranks = MappingProxyType({}),
) -> list[Step]:
    """A forward pass over a batch of `tokens`, and the backward pass to the inputs of all layers; no weight has a
    gradient.

    Args:
        ranks: of the layers that are two factors.
    """
    ways = times * (1 + backward)
    steps = [step for name in shape.running for step in _layer(shape, name, tokens, ranks.get(name), ways)]
    steps.append(product(shape.dtype, tokens, shape.vocabulary, shape.hidden, ways))
    # Half of the attention is masked; two products forward, and five backward, which forms the weights again
    attention = shape.blocks * shape.heads * tokens / seq_len / 2 * (7 if backward else 2)
    steps.append(product(shape.dtype, seq_len, seq_len, shape.head_dim, attention * times))
    # Norms, rotary embeddings, residual sums and sums of gradients: 15 of 55 forward; the activation: 2 of 7
    share = times * shape.blocks
    steps.append(moves(tokens * shape.hidden, share * (55 if backward else 15)))
    steps.append(moves(tokens * shape.widest, share * (7 if backward else 2)))
    # The loss, in float32: predicted rows, softmax, and the way back
    steps.append(moves(tokens * shape.vocabulary, times * 11 * backward))
    return steps


def _layer(shape: Shape, name: str, tokens: int, rank: int | None, times: float) -> list[Step]:
    """The products of a layer, dense or of two factors."""
    d_in, d_out = shape.running[name]
    widths = (d_in, d_out) if rank is None else (d_in, rank, d_out)
    return [product(shape.dtype, tokens, after, before, times) for before, after in pairwise(widths)]


def costs(shape: Shape, tokens: int, *, ranks: Ranks, times: float) -> list[Step]:
    """What it takes beside a pass over batches of `tokens` to see what the error of each layer costs."""
    steps = []
    casts = 3 * 0.75 * (shape.itemsize < 4)  # of both outputs and the gradient to float32
    for name, rank in ranks.items():
        if rank is not None:
            for form in (rank, None):
                steps += _layer(shape, name, tokens, form, times)
            # Their difference, its product with the gradient, the sum
            steps.append(moves(tokens * shape.linears[name][1], times * (3.5 + casts)))
    return steps


def slopes(shape: Shape, tokens: int, *, ranks: Ranks, times: float) -> list[Step]:
    """What it takes beside a pass over batches of `tokens` to see the slopes of the loss by gains of all outputs."""
    steps = []
    casts = 2 * 0.75 * (shape.itemsize < 4)  # of output and gradient to float32
    for name, rank in ranks.items():
        if rank is not None:
            steps += _layer(shape, name, tokens, rank, times)
            steps.append(moves(tokens * shape.linears[name][1], times * (2 + casts)))
    return steps


EXCHANGES = 0.5  # of pivots, times the square root of the rows: counted for random weights, 192 to 1536 rows


def factorisation(
    shape: Shape,
    d_in: int,
    d_out: int,
    *,
    keep: float,
    sides: tuple[bool, bool],
    pivoted: bool,
    heldout: int,
    bits: int | None,
) -> list[Step]:
    """The new form of a layer, from statistics to factors, in float64; the guard tries one choice of metrics.

    Args:
        sides: whether the left and the right metric are full matrices.
        heldout: tokens that the guard judges by, 0 for none.
        bits: that factors are rounded to, or None for their dtype.
    """
    candidate = Candidate(d_out, d_in, NO_SPECTRUM, pivoted)
    rank, most = candidate.largest_within(int(keep * candidate.dense)), candidate.largest_rank
    small, large = min(d_in, d_out), max(d_in, d_out)
    inner_full = sides[1] if d_out >= d_in else sides[0]  # the metric of the smaller side
    steps = []
    for width, full in ((d_out, sides[0]), (d_in, sides[1])):
        if full:
            # A symmetric, damped copy; the condition number, by twelve products and solves
            steps += [Step("cholesky", width, 1, width**3 / 3), moves(width**2, 14 + 12, 8)]
            steps.append(product("float64", d_in * d_out / width, width, width))
    steps.append(product("float64", small, small, large))
    steps += [Step("eigh", small, 1, 9 * small**3), moves(d_in * d_out, 4, 8)]
    guarded = bool(heldout and all(sides))
    for columns in (most, *[rank] * guarded):
        steps.append(product("float64", large, columns, small))
        if inner_full:
            steps.append(product("float64", large, small, small))
            steps.append(_scaled("solve", small, small, columns, 1))
    if guarded:
        steps += [product("float64", d_out, d_in, rank), product("float64", heldout, d_out, d_in, 2)]
    if candidate.pivots(rank):
        steps += _pivoting(d_out, d_in, rank)
    if bits is not None or shape.itemsize < 4:  # what rounding costs, of both forms
        forms = 1 + candidate.pivots(rank)
        steps += [
            product("float64", d_out, d_in, rank, 2 * forms),
            product("float64", d_out, d_out, d_in, forms * sides[0]),
        ]
        steps.append(product("float64", d_out, d_in, d_in, forms * sides[1]))
        if bits is not None:  # magnitudes, steps and their rounding
            steps.append(moves(rank * (d_in + d_out), 6 * forms, 8))
        if bits == 4:
            steps += _fitting(d_out, d_in, rank, full=sides[1])
    return steps


def _fitting(d_out: int, d_in: int, rank: int, *, full: bool) -> list[Step]:
    """Two factors in four bits, fitted to each other by a metric over inputs that is `full` or a diagonal."""
    steps = [_scaled("qr", rank, rank, rank, 8 / 3), product("float64", rank, rank, d_in + d_out)]
    if full:
        steps += [Step("cholesky", d_in, 1, d_in**3 / 3), moves(d_in**2, 14 + 12, 8)]
        steps.append(product("float64", rank, d_in, d_in, 2))
    steps += [product("float64", rank, rank, d_in), product("float64", rank, d_in, d_out, 2)]
    steps += [Step("cholesky", rank, 1, rank**3 / 3), _scaled("solve", d_out, rank, rank, 1, 2)]
    # Errors of a column change those before it in their group, errors of a group those before it
    for rows, width, fed in ((rank, d_in, full), (d_out, rank, True)):
        steps += [product("float64", rows, width, width, fed / 2), moves(rows * width, 6 + fed * GROUP / 2, 8)]
    return steps


def _pivoting(rows: int, columns: int, rank: int) -> list[Step]:
    rest = rows - rank
    return [
        _scaled("qr", rows, rank, rank, 8 / 3),
        _scaled("lu", rows, rank, rank, 2 / 3),
        _scaled("solve", rest, rank, rank, 1),
        moves(rows * rank, EXCHANGES * rows**0.5 * 5, 8),
        Step("lu", rank, 1, 2 / 3 * rank**3),
        _scaled("solve", rest, rank, rank, 1, 2),
        product("float64", rank, columns, rank),
    ]


def _scaled(curve: str, rows: float, columns: float, inner: float, coefficient: float, times: float = 1.0) -> Step:
    """What takes `coefficient` operations for each of ROWS x COLUMNS x INNER, as the square case does."""
    count = rows * columns * inner
    return Step(curve, count ** (1 / 3), times, coefficient * count * times)
