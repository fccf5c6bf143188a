"""How the factors of a group of projections lie in memory, for the kernels of `lowrank_group`.

Projections of one group read the same input x (T, D_IN): q, k and v, or gate and up, or a single layer. With R_i the
rank of projection i, z = x downᵀ (T, sum R_i) serves all of them, and y_i = z_i up_i + bias_i. In the pivoted form
(PIFA, ICML 2025) R_i of the outputs are z_i itself, and up_i has columns for the others only.

* `down` (sum R_i, D_IN): the down factors, one under the other.
* `up`, flat: each up_i (R_i, PITCH_i) rank-major, so that a slice of the rank is one contiguous piece. Its columns come
  in the order of the outputs, in blocks of OUT_BLOCK outputs; each block is padded with zero columns to a multiple of
  ALIGN, so that it starts on 16 bytes and its length in bytes is a multiple of 16.
* `table`, int32: a record of `FIELDS` for each projection; then for each the PITCH_i columns at which its blocks start,
  and their end (`bounds`); then, in a group with a pivoted projection, for each output the column of up_i it has, or
  -1 - k where it is the k-th entry of z_i (`source`).
* `workspace`, int32: sums in float32 (`acc_tokens` rows, the columns of all up_i) and counters, both zero between
  calls, and room for z.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

OUT_BLOCK = 512  # outputs that one program finishes
ALIGN = 8  # elements: 16 bytes of a half-precision type
FEW_TOKENS = 8  # up to here the rank is split over programs that add to y
SOME_TOKENS = 64  # up to here one persistent launch computes z, waits, and computes y
MAX_CHUNK = 64  # ranks of one program where the rank is split
BARRIERS = 2 * 2  # counters, behind those of the blocks: of arrivals and departures at two points of a launch

FIELDS = (
    "z_start",  # first column of z_i in z
    "rank",
    "chunk",  # ranks of one program where the rank is split
    "first_program",  # of those
    "up_start",  # first element of up_i in up
    "pitch",
    "acc_start",  # first column of up_i among the columns of all
    "out_start",  # first output among the outputs of all
    "d_out",
    "first_block",  # of the blocks of outputs; the same for all projections that make up one output
    "bounds_start",  # in the table; so is the next
    "source_start",
)


class Projection(NamedTuple):
    """The sizes of one projection: `pitch` columns of up, padding included; `chunk` ranks for one program."""

    rank: int
    d_out: int
    pitch: int
    pivoted: int
    chunk: int


@dataclass(frozen=True)
class Layout:
    """The sizes of a group; with `silu_mul` its two projections make up one output, silu(y_0) y_1."""

    projections: tuple[Projection, ...]
    silu_mul: bool

    @classmethod
    def of(cls, sizes: Sequence[int], silu_mul: bool) -> "Layout":
        """From the numbers of all projections in a row, as the operator takes them."""
        width = len(Projection._fields)
        return cls(tuple(Projection(*sizes[i : i + width]) for i in range(0, len(sizes), width)), silu_mul)

    @property  # not cached: torch.compile cannot trace the lock of a cached one
    def sizes(self) -> list[int]:
        return [size for projection in self.projections for size in projection]

    @cached_property
    def pivoted(self) -> bool:
        return any(projection.pivoted for projection in self.projections)

    @cached_property
    def rank(self) -> int:
        return sum(projection.rank for projection in self.projections)

    @cached_property
    def acc_width(self) -> int:
        """Columns of up of all projections."""
        return sum(projection.pitch for projection in self.projections)

    @cached_property
    def out_width(self) -> int:
        """Columns of y."""
        return self.projections[0].d_out if self.silu_mul else sum(p.d_out for p in self.projections)

    @cached_property
    def num_blocks(self) -> int:
        return self._first_blocks[-1]

    @cached_property
    def num_programs(self) -> int:
        """Of the launch that splits the rank."""
        return sum(-(-p.rank // p.chunk) for p in self.projections)

    @cached_property
    def _first_blocks(self) -> list[int]:
        blocks = [-(-p.d_out // OUT_BLOCK) for p in self.projections]
        return [0, 0, blocks[0]] if self.silu_mul else [0, *accumulate(blocks)]

    @cached_property
    def up_numel(self) -> int:
        return sum(p.rank * p.pitch for p in self.projections)

    def records(self) -> list[dict[str, int]]:
        """What the table says of each projection, by the names of `FIELDS`."""
        found = []
        z = program = up = acc = out = 0
        bounds = len(FIELDS) * len(self.projections)
        source = bounds + sum(-(-p.d_out // OUT_BLOCK) + 1 for p in self.projections)
        for projection, block in zip(self.projections, self._first_blocks, strict=False):
            rank, d_out, pitch, _, chunk = projection
            values = (z, rank, chunk, program, up, pitch, acc, out, d_out, block, bounds, source)
            found.append(dict(zip(FIELDS, values, strict=True)))
            z, program, up = z + rank, program - (-rank // chunk), up + rank * pitch
            acc, out, bounds = acc + pitch, out + d_out, bounds - (-d_out // OUT_BLOCK) + 1
            source += d_out if self.pivoted else 0
        return found

    @property
    def acc_tokens(self) -> int:
        """Rows of sums: the persistent launch adds up in memory only what is pivoted."""
        return SOME_TOKENS if self.pivoted else FEW_TOKENS

    @property
    def workspace_numel(self) -> int:
        return self.z_start + SOME_TOKENS * self.rank

    @property
    def sync_start(self) -> int:
        """Where the counters begin in the workspace: behind the sums."""
        return self.acc_tokens * self.acc_width

    @property
    def z_start(self) -> int:
        """Where z begins in the workspace, at a multiple of 16 bytes; in the dtype of x, 4 bytes an element at most."""
        return -(-(self.sync_start + self.num_blocks + BARRIERS) // 4) * 4


class Operands(NamedTuple):
    """The tensors of a group, laid out as above."""

    down: Tensor
    up: Tensor
    bias: Tensor | None
    table: Tensor
    workspace: Tensor


def columns(d_out: int, pivots: Tensor | None) -> tuple[list[int], Tensor]:
    """For one projection the bounds of its blocks (the last is the pitch) and its source (D_OUT,) int32 on the CPU."""
    is_pivot = torch.zeros(d_out, dtype=torch.bool)
    if pivots is not None:
        is_pivot[pivots] = True
    bounds, source = [0], torch.empty(d_out, dtype=torch.int32)
    for start in range(0, d_out, OUT_BLOCK):
        rest = (~is_pivot[start : start + OUT_BLOCK]).nonzero()[:, 0]
        source[start + rest] = bounds[-1] + torch.arange(len(rest), dtype=torch.int32)
        bounds.append(bounds[-1] - (-len(rest) // ALIGN) * ALIGN)
    if pivots is not None:
        source[pivots] = -1 - torch.arange(len(pivots), dtype=torch.int32)
    return bounds, source


def rank_chunks(rows: Sequence[tuple[int, int]], num_sms: int) -> list[int]:
    """Ranks of one program for each projection (rank, elements that a rank costs), at most MAX_CHUNK of them.

    The programs carry nearly the same load: the least with which there are no more programs than SMs, if there is one.
    """
    loads = sorted({cost * chunk for rank, cost in rows for chunk in range(1, min(rank, MAX_CHUNK) + 1)})

    def chunks(load: int) -> list[int]:
        return [max(1, min(rank, MAX_CHUNK, load // cost)) for rank, cost in rows]

    low, high = 0, len(loads) - 1
    while low < high:
        middle = (low + high) // 2
        programs = sum(-(-rank // chunk) for (rank, _), chunk in zip(rows, chunks(loads[middle]), strict=True))
        low, high = (low, middle) if programs <= num_sms else (middle + 1, high)
    return chunks(loads[low])
