"""Tile sizes and shares of work by architecture: tables, for an operator that updates its output cannot be autotuned.

The entries come from ahead-of-time compilation: tiles that neither spill nor lose their tensor-core instructions on the
architecture. `tests/kernels/test_aot.py` compiles every one of them again.
"""

import math
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
        90: {2: Tile(128, 128, 64, 8, 4), 4: Tile(64, 64, 32, 4, 3, per_sm=2)},
        100: {2: Tile(128, 128, 64, 8, 4), 4: Tile(128, 128, 32, 8, 2)},
    },
    "gram_split": {  # the other operand float32
        80: {4: Tile(64, 64, 32, 4, 3, per_sm=2)},
        90: {4: Tile(128, 128, 32, 8, 3)},
        100: {4: Tile(128, 128, 32, 8, 3)},
    },
    "quadratic_form": {
        80: {2: Tile(128, 128, 32, 8, 3), 4: Tile(64, 64, 32, 4, 3)},
        90: {2: Tile(256, 128, 64, 8, 3), 4: Tile(128, 128, 32, 8, 3)},
        100: {2: Tile(256, 128, 64, 8, 3), 4: Tile(128, 128, 32, 8, 3)},
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
# All of them compiled for sm_90 without spills when they were entered.
CANDIDATES: dict[str, tuple[Tile, ...]] = {
    "gram": (
        Tile(128, 128, 64, 8, 4),
        Tile(128, 128, 64, 4, 4),
        Tile(128, 128, 64, 4, 3, per_sm=2),
        Tile(128, 128, 128, 8, 3),
        Tile(128, 256, 64, 8, 3),
        Tile(128, 256, 64, 8, 4),
        Tile(256, 128, 64, 8, 3),
        Tile(64, 256, 64, 4, 4),
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


known_target = cache(target)  # asking a GPU what it is takes the host long


def tile(kernel: str, target: Target, dtype: torch.dtype, *tensors: Tensor) -> Tile:
    """The tile of a kernel that multiplies in dtype and addresses these tensors."""
    if _is_aligned(*tensors):
        return ALIGNED[kernel][target.arch][dtype.itemsize]
    return UNALIGNED[kernel]


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


# Of a factor and one or two tokens: rows that a program multiplies, tokens, columns (of 2 bytes) in a step; the first
# whose programs fill the GPU's places without much of a remainder, else the last
SKINNY = {
    1: (Tile(2, 1, 1024, 4, 1, per_sm=9), Tile(8, 1, 512, 4, 1, per_sm=4)),
    2: (Tile(4, 2, 512, 2, 1, per_sm=6),),
}
# The same for factors in eight bits, by architecture: the fastest on an H200, which spill on 8.0
SKINNY_WHOLE = {
    80: {1: Tile(2, 1, 1024, 8, 1), 2: Tile(2, 2, 512, 4, 1)},
    90: {1: Tile(2, 1, 1024, 4, 1), 2: Tile(4, 2, 512, 2, 1)},
    100: {1: Tile(2, 1, 1024, 4, 1), 2: Tile(4, 2, 512, 2, 1)},
}
MOST_WASTE = 1.2  # of the places that programs have in their last wave


def skinny_tile(target: Target, dtype: torch.dtype, num_tokens: int, rows: int) -> Tile:
    """The tile for a few tokens through a factor of so many rows in dtype."""
    for tile in SKINNY[num_tokens]:
        places = -(-rows // tile.rows) / (tile.per_sm * target.num_sms)
        if places <= 1 or math.ceil(places) <= MOST_WASTE * places:
            break
    return replace(tile, depth=2 * tile.depth // dtype.itemsize)


class Few(NamedTuple):
    """How a launch for a few tokens on tensor cores shares its work."""

    rows: int  # of a program
    split: int  # warps that share the columns, 64 each in turn; of silu_mul half of them for each projection
    across: int  # warps that share the rows
    depth: int  # steps in shared memory or on their way there


# Tokens of a block -> kernel -> for at most FEW_ROWS rows of its factors an SM, and for more. More tokens than the
# largest block has are matrix products.
FEW: dict[int, dict[str, tuple[Few, Few]]] = {
    8: {
        "down": (Few(16, 8, 1, 4), Few(16, 4, 1, 6)),
        "up": (Few(16, 8, 1, 4), Few(32, 2, 2, 8)),
        "silu_mul": (Few(32, 4, 2, 4),) * 2,
    },
    16: {
        "down": (Few(16, 4, 1, 6), Few(32, 2, 2, 8)),
        "up": (Few(16, 8, 1, 3), Few(32, 2, 2, 8)),
        "silu_mul": (Few(32, 4, 2, 4),) * 2,
    },
}
FEW_ROWS = 30  # so that programs of 16 rows, of which two fit an SM, run all at once
FEW_TOKENS = max(FEW)


def few_block(num_tokens: int) -> int:
    """The tokens of the block that so many go into."""
    return min(block for block in FEW if block >= num_tokens)


def few_shape(kernel: str, target: Target, block: int, rows: int) -> Few:
    """The shape of a launch over so many rows in all."""
    return FEW[block][kernel][rows > FEW_ROWS * target.num_sms]
