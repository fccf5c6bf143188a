"""Tile sizes and shares of work by architecture: tables, for an operator that updates its output cannot be autotuned.

The entries come from ahead-of-time compilation: tiles that neither spill nor lose their tensor-core instructions on the
architecture. `tests/kernels/test_aot.py` compiles every one of them again.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


class Target(NamedTuple):
    """What a launcher must know of a device: an architecture that the tables have, and the number of its SMs."""

    arch: int
    num_sms: int


H200 = Target(90, 132)  # the reference machine, which Triton's interpreter stands in for


@dataclass(frozen=True)
class Tile:
    """A block of rows x cols of the output, reduced in steps of depth."""

    rows: int
    cols: int
    depth: int
    num_warps: int
    num_stages: int
    per_sm: int = 1  # programs of a persistent grid that an SM holds at once
    bulk_add: bool = False  # tiles are added to memory by the copy engine (TMA), where it can address them

    @property
    def group(self) -> int:
        """Squares of tiles on the edge of a block of the triangle that is computed in one go: 1024 rows."""
        return max(1024 // max(self.rows, self.cols), 1)

    def in_triangle(self, width: int) -> int:
        """How many tiles make up the squares that meet the lower triangle of a square matrix."""
        side = max(self.rows, self.cols)
        edge = -(-width // side)
        return edge * (edge + 1) // 2 * (side // self.rows) * (side // self.cols)

    def options(self) -> dict[str, int | bool]:
        """What a launch is told besides block sizes; multiply-adds are fused by choice, not by a changing default."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


# Offsets of at most 128 rows and 128 columns below this, or of 256 contiguous rows, stay within 31 bits. Tensors may be
# larger: bases have 64 bits.
MAX_STRIDE = 2**23

# kernel -> architecture -> bytes per element of the operands -> tile
ALIGNED: dict[str, dict[int, dict[int, Tile]]] = {
    "gram": {
        80: {2: Tile(128, 128, 32, 8, 4), 4: Tile(64, 64, 32, 4, 3, per_sm=2)},
        90: {2: Tile(128, 128, 64, 8, 4), 4: Tile(64, 128, 32, 4, 3, per_sm=2)},
        100: {2: Tile(128, 128, 64, 8, 4), 4: Tile(128, 128, 32, 8, 2)},
    },
    "gram_bulk": {  # rows of out that the copy engine can address too
        80: {},
        90: {2: Tile(128, 128, 64, 8, 3, per_sm=2, bulk_add=True)},
        100: {2: Tile(128, 128, 64, 8, 3, per_sm=2, bulk_add=True)},
    },
    "gram_split": {  # the other operand float32
        80: {4: Tile(64, 64, 32, 4, 3, per_sm=2)},
        90: {4: Tile(128, 128, 32, 8, 3)},
        100: {4: Tile(128, 128, 32, 8, 3)},
    },
    "quadratic_form": {
        80: {2: Tile(128, 128, 32, 8, 3), 4: Tile(64, 64, 32, 4, 3)},
        90: {2: Tile(128, 128, 64, 8, 3), 4: Tile(128, 128, 32, 8, 3)},
        100: {2: Tile(128, 128, 64, 8, 3), 4: Tile(128, 128, 32, 8, 3)},
    },
    "scores": {
        80: {2: Tile(128, 128, 32, 8, 4), 4: Tile(64, 64, 32, 4, 3)},
        90: {2: Tile(128, 128, 64, 8, 4), 4: Tile(128, 128, 32, 8, 2)},
        100: {2: Tile(128, 128, 64, 8, 4), 4: Tile(128, 128, 32, 8, 2)},
    },
    "apply": {  # always float32
        80: {4: Tile(64, 64, 32, 4, 3)},
        90: {4: Tile(128, 64, 32, 8, 3)},
        100: {4: Tile(128, 128, 32, 8, 2)},
    },
    "linear": {
        80: {2: Tile(128, 128, 32, 8, 4), 4: Tile(64, 64, 32, 4, 3)},
        90: {2: Tile(128, 128, 64, 8, 4), 4: Tile(128, 128, 32, 8, 2)},
        100: {2: Tile(128, 128, 64, 8, 4), 4: Tile(128, 128, 32, 8, 2)},
    },
}

# Tiles of half-precision operands read by the copy engine that are worth a measurement: `python -m benchmarks.tiles`.
# All of them compile for sm_90 without spills.
CANDIDATES: dict[str, tuple[Tile, ...]] = {
    "gram": (
        Tile(128, 128, 64, 8, 4),
        Tile(128, 128, 64, 8, 4, bulk_add=True),
        Tile(128, 128, 64, 4, 4),
        Tile(128, 128, 64, 4, 3, per_sm=2),
        Tile(128, 128, 64, 4, 3, per_sm=2, bulk_add=True),
        Tile(128, 128, 64, 8, 3, per_sm=2, bulk_add=True),
        Tile(128, 128, 128, 8, 3),
        Tile(128, 128, 128, 8, 3, bulk_add=True),
        Tile(128, 256, 64, 8, 3),
        Tile(128, 256, 64, 8, 3, bulk_add=True),
        Tile(128, 256, 64, 8, 4),
        Tile(128, 256, 64, 8, 4, bulk_add=True),
        Tile(256, 128, 64, 8, 3),
        Tile(256, 128, 64, 8, 3, bulk_add=True),
        Tile(256, 128, 64, 8, 4, bulk_add=True),
        Tile(64, 256, 64, 4, 4),
        Tile(64, 256, 64, 4, 4, bulk_add=True),
    ),
    "quadratic_form": (
        Tile(128, 128, 64, 8, 4),
        Tile(128, 128, 64, 8, 3),
        Tile(128, 128, 64, 4, 4),
        Tile(128, 128, 64, 4, 3),
        Tile(128, 128, 128, 8, 3),
        Tile(128, 256, 64, 8, 3),
        Tile(128, 256, 64, 8, 4),
        Tile(256, 128, 64, 8, 3),
        Tile(256, 128, 64, 8, 4),
    ),
}

# Rows that are not contiguous, or start at no multiple of 16 elements, need an address for each element, hence more
# registers and smaller tiles.
UNALIGNED: dict[str, Tile] = {
    "gram": Tile(64, 64, 32, 8, 2),
    "gram_split": Tile(64, 64, 32, 8, 2),
    "quadratic_form": Tile(64, 64, 32, 8, 2),
    "scores": Tile(64, 64, 32, 8, 2),
    "apply": Tile(64, 64, 32, 8, 2),
    "linear": Tile(64, 64, 32, 8, 2),
}


def target(device: torch.device) -> Target:
    """The target that a device is; the reference machine for a CPU (the interpreter) or a device without data.

    Raises:
        ValueError: a GPU older than compute capability 8.0.
    """
    if device.type != "cuda":
        return H200
    properties = torch.cuda.get_device_properties(device)
    if properties.major < 8:
        found = f"{properties.major}.{properties.minor} ({properties.name})"
        raise ValueError(f"the CUDA kernels need compute capability 8.0 or later, got {found}: run on the CPU instead")
    # Consumer parts (8.6, 8.9, 12.0) have the shared memory and the instructions that the 8.0 tiles are made for.
    return Target({9: 90, 10: 100}.get(properties.major, 80), properties.multi_processor_count)


def tile(kernel: str, target: Target, dtype: torch.dtype, *tensors: Tensor) -> Tile:
    """The tile of a kernel that multiplies in dtype and addresses these tensors."""
    if _is_aligned(*tensors):
        return ALIGNED[kernel][target.arch][dtype.itemsize]
    return UNALIGNED[kernel]


def gram_tile(target: Target, dtype: torch.dtype, out: Tensor, x: Tensor, other: Tensor) -> Tile:
    """The tile of the Gram kernel that multiplies in dtype; where it can, the copy engine adds to `out`."""
    bulk = ALIGNED["gram_bulk"][target.arch].get(dtype.itemsize)
    return bulk if bulk and by_descriptors(target, out, x, other) else tile("gram", target, dtype, x, other)


def _is_aligned(*tensors: Tensor) -> bool:
    """Whether rows can be read 16 bytes at a time. Triton looks for multiples of 16 elements, so this does too."""
    return all(
        tensor.storage_offset() * tensor.element_size() % 16 == 0
        and tensor.stride(-1) == 1
        and all(stride % 16 == 0 for stride in tensor.stride()[:-1])
        for tensor in tensors
    )


# Shared memory of an SM, of which each block takes 1 KB more than it asks for; of the parts that run the tiles of 8.0,
# 8.6 and 8.9 have the least.
SM_SHARED_BYTES = {80: 100 * 1024, 90: 228 * 1024, 100: 228 * 1024}


def blocks_per_sm(registers: int, shared_bytes: int, num_warps: int, arch: int = H200.arch) -> int:
    """How many blocks an SM holds: the least that registers (in eights a thread), shared memory and threads allow."""
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * num_warps)
    by_shared = SM_SHARED_BYTES[arch] // (shared_bytes + 1024)
    return min(by_registers, by_shared, 2048 // (32 * num_warps), 32)


def by_descriptors(target: Target, *tensors: Tensor) -> bool:
    """Whether the copy engine of the device, if it has one, can address these matrices."""
    return target.arch >= 90 and all(tensor.ndim == 2 for tensor in tensors) and _is_aligned(*tensors)


def interpreted_bf16(operand: Tensor) -> bool:
    """Whether a kernel must multiply in float32 because Triton's interpreter gets bfloat16 wrong."""
    return operand.dtype == torch.bfloat16 and operand.device.type == "cpu"


def check_strides(**tensors: Tensor) -> None:
    """Refuse strides with which an offset within a tile would overflow the 32 bits that the kernels give it."""
    for name, tensor in tensors.items():
        if tensor.numel() and max(tensor.stride()) >= MAX_STRIDE:
            found = f"got strides {tensor.stride()}: pass a contiguous copy"
            raise ValueError(f"{name} must have strides below {MAX_STRIDE} elements on a GPU, {found}")


LEAST_STEPS = 8  # of tokens that are worth the addition of a tile to memory
ADDITION_STEPS = 8  # that a program could multiply while it adds a tile


class Plan(NamedTuple):
    """Who computes what of the (tile, step) pairs of a triangle: stream-K, but programs keep to the same tokens.

    A program owns `waves` whole tiles. The `rest` of the tiles, fewer than there are programs, are cut: first each tile
    into as many blocks of `share` steps as it holds, one a program, then what is left, the last steps of all these
    tiles in a row, into ranges of `span` steps that may cross from tile to tile. But for these last steps, programs
    that run at the same time read the same tokens, so that x comes from memory about once. Ranges across whole tiles
    would start anywhere: D = 1024 would read a long x from memory seven times.
    """

    programs: int
    waves: int
    rest: int
    steps: int
    share: int
    span: int

    @property
    def longest(self) -> int:
        """Steps of the busiest program."""
        return self.waves * self.steps + (self.share if self.rest else 0)

    def segments(self, program: int) -> list[tuple[int, int, int]]:
        """What a program does, in its order: tiles, and of each the first step and how many."""
        found = [(wave * self.programs + program, 0, self.steps) for wave in range(self.waves)]
        shared_from = self.waves * self.programs
        blocks_of_a_tile, tail = divmod(self.steps, self.share)
        num_blocks = blocks_of_a_tile * self.rest
        if program < num_blocks:
            return [*found, (shared_from + program % self.rest, program // self.rest * self.share, self.share)]
        begin = (program - num_blocks) * self.span
        end = min(begin + self.span, self.rest * tail)
        while begin < end:
            nth, skipped = divmod(begin, tail)
            count = min(tail - skipped, end - begin)
            found.append((shared_from + nth, self.steps - tail + skipped, count))
            begin += count
        return found


@cache
def plan(num_tiles: int, steps: int, programs: int) -> Plan:
    """For at most so many programs: the rest in equal shares, or each of its tiles in equally many parts.

    Equal shares are shorter, but ranges that cross tiles are added to memory once a tile, and nobody multiplies in the
    meantime.
    """
    waves, rest = divmod(num_tiles, programs)
    if not rest:
        return Plan(programs, waves, 0, steps, steps, steps)
    least = min(LEAST_STEPS, steps)
    share = max(-(-rest * steps // programs), least)
    part = max(-(-steps // (programs // rest)), least)
    tail = steps % share
    additions = -(-share // tail) + 1 if tail and share != tail else 1
    span = share
    if part + ADDITION_STEPS <= share + ADDITION_STEPS * additions:
        share, tail = part, steps % part
        span = tail or share
    needed = steps // share * rest + -(-rest * tail // span)
    return Plan(programs if waves else needed, waves, rest, steps, share, span)


def gram_plan(tile: Tile, target: Target, num_tokens: int, width: int) -> Plan:
    """In deterministic mode every tile of `out` has one program, and nothing depends on the number of SMs."""
    num_tiles = tile.in_triangle(width)
    deterministic = torch.are_deterministic_algorithms_enabled()
    return plan(num_tiles, -(-num_tokens // tile.depth), num_tiles if deterministic else target.num_sms * tile.per_sm)


# By tokens, at most: rows of a weight that a program multiplies, and how many of their columns (of 2 bytes) in a step
SKINNY = {1: Tile(8, 1, 512, 4, 1), 2: Tile(4, 2, 512, 2, 1), 4: Tile(2, 4, 512, 2, 1), 8: Tile(2, 8, 512, 2, 1)}


def skinny_tile(dtype: torch.dtype, num_tokens: int) -> Tile:
    """The tile for a few tokens through a weight in dtype."""
    tile = SKINNY[next(tokens for tokens in SKINNY if num_tokens <= tokens)]
    return replace(tile, depth=2 * tile.depth // dtype.itemsize)
