"""Tile sizes and split counts by architecture: tables, since an operator that updates its output cannot be autotuned.

The entries come from ahead-of-time compilation: tiles that neither spill nor lose their tensor-core instructions on the
architecture. `tests/kernels/test_aot.py` compiles every one of them again.
"""

from dataclasses import dataclass
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

    def options(self) -> dict[str, int | bool]:
        """What a launch is told besides block sizes; multiply-adds are fused by choice, not by a changing default."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


# Offsets of at most 128 rows and 128 columns below this stay within 31 bits. Tensors may be larger: bases have 64 bits.
MAX_STRIDE = 2**23

# kernel -> architecture -> bytes per element of the operands -> tile. Tiles of the Gram kernel are square.
ALIGNED: dict[str, dict[int, dict[int, Tile]]] = {
    "gram": {
        80: {2: Tile(128, 128, 32, 8, 4), 4: Tile(64, 64, 32, 4, 3)},
        90: {2: Tile(128, 128, 64, 8, 4), 4: Tile(128, 128, 32, 8, 2)},
        100: {2: Tile(128, 128, 64, 8, 4), 4: Tile(128, 128, 32, 8, 2)},
    },
    "quadratic_form": {
        80: {2: Tile(128, 128, 32, 8, 3), 4: Tile(64, 64, 32, 4, 3)},
        90: {2: Tile(128, 128, 32, 8, 3), 4: Tile(64, 64, 32, 4, 3)},
        100: {2: Tile(128, 128, 32, 8, 3), 4: Tile(64, 64, 32, 4, 3)},
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
    "linear_few": {
        80: {2: Tile(16, 32, 128, 4, 4), 4: Tile(16, 32, 64, 4, 4)},
        90: {2: Tile(16, 32, 128, 4, 4), 4: Tile(16, 32, 64, 4, 4)},
        100: {2: Tile(16, 32, 128, 4, 4), 4: Tile(16, 32, 64, 4, 4)},
    },
    "split_rank": {  # rows: tokens; cols: of up; depth: of x and down; both for slices of 16 ranks
        80: {2: Tile(16, 512, 256, 4, 4), 4: Tile(16, 256, 64, 4, 3)},
        90: {2: Tile(16, 512, 256, 4, 6), 4: Tile(16, 256, 64, 4, 4)},
        100: {2: Tile(16, 512, 256, 4, 6), 4: Tile(16, 256, 64, 4, 4)},
    },
    "persistent": {  # rows: tokens, at least; cols: of up; depth: of x and down, and of z and up
        80: {2: Tile(16, 32, 128, 4, 4), 4: Tile(16, 32, 32, 4, 3)},
        90: {2: Tile(16, 32, 128, 4, 5), 4: Tile(16, 32, 32, 4, 3)},
        100: {2: Tile(16, 64, 64, 8, 3), 4: Tile(16, 32, 32, 8, 3)},
    },
}

# Rows that are not contiguous, or start at no multiple of 16 elements, need an address for each element, hence more
# registers and smaller tiles.
UNALIGNED: dict[str, Tile] = {
    "gram": Tile(64, 64, 32, 8, 2),
    "quadratic_form": Tile(64, 64, 32, 8, 2),
    "scores": Tile(64, 64, 32, 8, 2),
    "apply": Tile(64, 64, 32, 8, 2),
    "linear": Tile(64, 64, 32, 8, 2),
    "linear_few": Tile(16, 32, 64, 4, 2),
    "split_rank": Tile(16, 128, 64, 4, 2),
    "persistent": Tile(16, 32, 32, 4, 2),
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
    if all(_is_aligned(tensor) for tensor in tensors):
        return ALIGNED[kernel][target.arch][dtype.itemsize]
    return UNALIGNED[kernel]


def _is_aligned(tensor: Tensor) -> bool:
    """Whether rows can be read 16 bytes at a time. Triton looks for multiples of 16 elements, so this does too."""
    offset = tensor.storage_offset() * tensor.element_size()
    return offset % 16 == 0 and tensor.stride(1) == 1 and tensor.stride(0) % 16 == 0


def interpreted_bf16(operand: Tensor) -> bool:
    """Whether a kernel must multiply in float32 because Triton's interpreter gets bfloat16 wrong."""
    return operand.dtype == torch.bfloat16 and operand.device.type == "cpu"


def check_strides(**tensors: Tensor) -> None:
    """Refuse strides with which an offset within a tile would overflow the 32 bits that the kernels give it."""
    for name, tensor in tensors.items():
        if tensor.numel() and max(tensor.stride()) >= MAX_STRIDE:
            found = f"got strides {tensor.stride()}: pass a contiguous copy"
            raise ValueError(f"{name} must have strides below {MAX_STRIDE} elements on a GPU, {found}")


def token_splits(num_tokens: int, num_tiles: int, num_sms: int, least_tokens: int) -> int:
    """Into how many parts to cut the tokens, so that the programs, one for each output tile and part, fill the SMs.

    The smallest count that keeps 90 % of the SMs busy over all waves of programs, else the one that keeps most busy,
    among those that leave each part `least_tokens` and make at most eight waves, beyond which SMs hardly idle.
    """
    most = max(1, min(num_tokens // least_tokens, 8 * num_sms // num_tiles))

    def busy(splits: int) -> float:
        programs = splits * num_tiles
        return programs / (-(-programs // num_sms) * num_sms)

    counts = range(1, most + 1)
    return next((count for count in counts if busy(count) >= 0.9), max(counts, key=busy))
