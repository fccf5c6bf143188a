"""How the factors of a group of projections lie in memory, for the kernels of `lowrank_group`.

Projections of one group read the same input x (T, D_IN): q, k and v, or gate and up, or a single layer. With R_i the
rank of projection i, z = x downᵀ (T, sum R_i) serves all of them, and y_i = z_i up_iᵀ + bias_i. In the pivoted form
(PIFA, ICML 2025) R_i of the outputs are z_i itself, and up_i has rows for the others only, in their order.

* `down` (sum PITCH_i, D_IN): the down factors, one under the other, each padded with zero rows to PITCH_i, the next
  multiple of ALIGN, so that all parts of z start on 16 bytes.
* `up`, flat: each up_i (ROWS_i, PITCH_i), its rows padded with zeros alike.
* `scales` (2, sum PITCH_i), of factors in int8: of the rows of down and of the columns of the up_i, zeros where padded.
  A number q of a factor stands for `UNIT` q of its scale.
* `table`, int32: a record of `FIELDS` for each projection; then for each row of `down` the output of all that it is, or
  -1 where it is no pivot (`pivots_start`); then for each projection the outputs that its rows of up make
  (`places_start`); then for each output of all projections, one after another, the column of the products z_i up_iᵀ of
  all that it is, or -1 - k where it is column k of z (`sources_start`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import torch
from torch import Tensor

ALIGN = 8  # elements: 16 bytes of a half-precision type
UNIT = 1 / 128  # so small that sums in float16 do not overflow where those of the factors themselves would not
SKINNY_TOKENS = 2  # up to here tensor cores would not help

FIELDS = (
    "z_start",  # first column of z_i in z
    "pitch",  # the rank, padded
    "rows",  # of up_i
    "up_start",  # first element of up_i in up
    "places_start",  # in the table
    "sums_start",  # first column of the products z_i up_iᵀ among those of all
    "out_start",  # first output among the outputs of all
    "d_out",
)


class Projection(NamedTuple):
    """The sizes of one projection; a pivoted one makes `rank` of its outputs without up."""

    rank: int
    d_out: int
    pivoted: int

    @property
    def pitch(self) -> int:
        return -(-self.rank // ALIGN) * ALIGN

    @property
    def rows(self) -> int:
        return self.d_out - self.rank if self.pivoted else self.d_out


@dataclass(frozen=True)
class Layout:
    """The sizes of a group; with `silu_mul` its two projections make up one output, silu(y_0) y_1."""

    projections: tuple[Projection, ...]
    silu_mul: bool

    @staticmethod
    def of(sizes: Sequence[int], silu_mul: bool) -> "Layout":
        """From the numbers of all projections in a row, as the operator takes them; what was derived from the same
        numbers before is not computed again."""
        return _layout(tuple(sizes), silu_mul)

    @property  # not cached: torch.compile cannot trace the lock of a cached one
    def sizes(self) -> list[int]:
        return [size for projection in self.projections for size in projection]

    @cached_property
    def pivoted(self) -> bool:
        return any(projection.pivoted for projection in self.projections)

    @cached_property
    def z_width(self) -> int:
        """Columns of z, padding included."""
        return sum(p.pitch for p in self.projections)

    @cached_property
    def sums_width(self) -> int:
        """Rows of up of all projections."""
        return sum(p.rows for p in self.projections)

    @cached_property
    def out_width(self) -> int:
        """Columns of y."""
        return self.projections[0].d_out if self.silu_mul else sum(p.d_out for p in self.projections)

    @cached_property
    def up_numel(self) -> int:
        return sum(p.rows * p.pitch for p in self.projections)

    @property
    def pivots_start(self) -> int:
        """Where the outputs of the rows of down begin in the table."""
        return len(FIELDS) * len(self.projections)

    @cached_property
    def sources_start(self) -> int:
        """Where the sources of all outputs begin in the table."""
        return self.pivots_start + self.z_width + self.sums_width

    @cached_property
    def records(self) -> list[dict[str, int]]:
        """What the table says of each projection, by the names of `FIELDS`."""
        found = []
        z = up = sums = out = 0
        places = self.pivots_start + self.z_width
        for p in self.projections:
            values = (z, p.pitch, p.rows, up, places + sums, sums, out, p.d_out)
            found.append(dict(zip(FIELDS, values, strict=True)))
            z, up, sums, out = z + p.pitch, up + p.rows * p.pitch, sums + p.rows, out + p.d_out
        return found

    def table(self, pivots: Sequence[Tensor | None]) -> Tensor:
        """The table (int32, on the CPU), given the outputs that are pivots of each projection."""
        records = torch.tensor([list(record.values()) for record in self.records]).flatten()
        of_down = torch.full((self.z_width,), -1)
        places, sources = [], []
        for p, record, chosen in zip(self.projections, self.records, pivots, strict=True):
            is_pivot = torch.zeros(p.d_out, dtype=torch.bool)
            source = torch.empty(p.d_out, dtype=torch.int64)
            first, z = 0 if self.silu_mul else record["out_start"], record["z_start"]
            if chosen is not None:
                is_pivot[chosen] = True
                source[chosen] = -1 - z - torch.arange(p.rank)
                of_down[z : z + p.rank] = first + chosen
            rest = (~is_pivot).nonzero()[:, 0]
            source[rest] = record["sums_start"] + torch.arange(p.rows)
            places.append(first + rest)
            sources.append(source)
        return torch.cat([records, of_down, *places, *sources]).to(torch.int32)


@cache
def _layout(sizes: tuple[int, ...], silu_mul: bool) -> Layout:
    width = len(Projection._fields)
    return Layout(tuple(Projection(*sizes[i : i + width]) for i in range(0, len(sizes), width)), silu_mul)


class Operands(NamedTuple):
    """The tensors of a group, laid out as above."""

    down: Tensor
    up: Tensor
    bias: Tensor | None
    table: Tensor
    scales: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """Of the inputs."""
        return (self.down if self.scales is None else self.scales).dtype
