"""The kernels of csrc/ (CUDA C++), on tensors: what `lowrank_group` computes for few tokens.

The extension is optional: `GFWSVD_BUILD_CUDA=1 pip install .` or `make extension` builds it where nvcc is. It takes
bfloat16 and float16 with D_IN a multiple of 8, on GPUs of compute capability 8.0 or later. Nothing here falls back to
another implementation: `available` and `fits` say beforehand what can be called.
"""

from functools import cache, lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gfwsvd_kernels import layout
from gfwsvd_kernels.layout import Layout, Operands

DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


@cache
def module() -> ModuleType | None:
    """The compiled module `_C`, or None where it was not built. Importing it touches no GPU."""
    try:
        return import_module("gfwsvd_kernels._C")
    except ModuleNotFoundError:
        return None


def _built() -> ModuleType:
    found = module()
    if found is None:
        raise RuntimeError("the extension gfwsvd_kernels._C was not built: `make extension` builds it where nvcc is")
    return found


def available(device: torch.device | int | None = None) -> bool:
    """Whether the extension was built, and for an architecture that this CUDA device (default: the current) runs."""
    built = module()
    if built is None or not torch.cuda.is_available():
        return False
    return runs_on(torch.cuda.get_device_capability(device), built.ARCHS)


def runs_on(capability: tuple[int, int], archs: str) -> bool:
    """Whether code for one of `archs` ("80,90a") runs there: its major version from its minor on; 90a only 9.0."""
    for arch in archs.split(","):
        major, minor = int(arch.rstrip("af")[:-1]), int(arch.rstrip("af")[-1])
        if capability == (major, minor) or (arch.isdigit() and capability[0] == major and capability[1] >= minor):
            return True
    return False


def fits(kernel: str, x: Tensor, sizes: Layout) -> bool:
    """Whether `kernel` ("decode", "persistent") takes such an x (T, D_IN) and group, where it is available."""
    num_tokens, d_in = x.shape
    aligned = x.data_ptr() % 16 == 0 and x.stride(1) == 1 and (num_tokens == 1 or x.stride(0) % layout.ALIGN == 0)
    return x.dtype in DTYPES and aligned and _has_plan(kernel, num_tokens, d_in, sizes, x.device.index)


@lru_cache(maxsize=4096)
def _has_plan(kernel: str, num_tokens: int, d_in: int, sizes: Layout, device: int) -> bool:
    try:
        plan(kernel, num_tokens, d_in, sizes, **_built().limits(device))
    except ValueError:
        return False
    return True


def plan(kernel: str, num_tokens: int, d_in: int, sizes: Layout, **device: int) -> dict[str, int]:
    """The launch on a device (`arch` 90, `num_sms` 132, `shared_bytes` 232448, `cluster`, `stages`); needs no GPU.

    `grid` blocks of `threads`, one a multiprocessor, in clusters of `cluster`, with `shared_bytes` of shared memory, of
    which `stages` of `stage_bytes` are the ring.

    Raises:
        ValueError: sizes that the kernel does not take, or that do not fit the device.
    """
    function = getattr(_built(), f"{kernel}_plan")
    return function(num_tokens=num_tokens, d_in=d_in, sizes=sizes.sizes, silu_mul=sizes.silu_mul, **device)


def decode(
    x: Tensor,
    operands: Operands,
    sizes: Layout,
    y: Tensor,
    *,
    cluster: int = 0,
    stages: int = 0,
) -> None:
    """y (T, out_width) of x (T, D_IN) with 1 <= T <= 8, in one launch that adds in no fixed order.

    `operands` and `sizes` are those of a `LowRankGroup`. `cluster` (1, 2, 4 or 8 blocks; 1 before
    compute capability 9.0) and `stages` of the ring are for measurements; 0 is the default. Can be captured in a graph
    once a first call of the same sizes has been made.

    Raises:
        RuntimeError: the extension was not built, or a CUDA error.
        TypeError: a dtype other than bfloat16 and float16, or tensors that differ in it.
        ValueError: sizes, strides or alignments that do not fit.
    """
    _launch("decode", x, operands, sizes, y, cluster, stages)


def persistent(
    x: Tensor,
    operands: Operands,
    sizes: Layout,
    y: Tensor,
    *,
    cluster: int = 0,
    stages: int = 0,
) -> None:
    """As `decode`, with 1 <= T <= 64, in one cooperative launch that gives the same bits on every call."""
    _launch("persistent", x, operands, sizes, y, cluster, stages)


def _launch(
    name: str,
    x: Tensor,
    operands: Operands,
    sizes: Layout,
    y: Tensor,
    cluster: int,
    stages: int,
) -> None:
    function = getattr(_built(), name)
    if not x.is_cuda:
        raise ValueError(f"x must be on a CUDA device, got {x.device}")
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        function(
            **arguments(x, operands, sizes, y),
            device=x.device.index,
            stream=stream,
            cluster=cluster,
            stages=stages,
        )


def arguments(
    x: Tensor,
    operands: Operands,
    sizes: Layout,
    y: Tensor,
) -> dict[str, Any]:
    """What the compiled functions are told of these tensors; checks what they cannot see."""
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be one of {tuple(DTYPES)}, got {x.dtype}")
    if x.ndim != 2 or x.stride(1) != 1:
        raise ValueError(f"x must be (T, D_IN) with contiguous rows, got {tuple(x.shape)}, strides {x.stride()}")
    num_tokens, d_in = x.shape
    down, up, bias, table, workspace = operands
    _expect("down", down, (sizes.rank, d_in), x.dtype, x)
    _expect("up", up, (sizes.up_numel,), x.dtype, x)
    _expect("y", y, (num_tokens, sizes.out_width), x.dtype, x)
    _expect("table", table, (table.numel(),), torch.int32, x)
    _expect("workspace", workspace, (workspace.numel(),), torch.int32, x)
    if bias is not None:
        _expect("bias", bias, (sum(p.d_out for p in sizes.projections),), x.dtype, x)
    return {
        "x": x.data_ptr(),
        "down": down.data_ptr(),
        "up": up.data_ptr(),
        "bias": 0 if bias is None else bias.data_ptr(),
        "table": table.data_ptr(),
        "workspace": workspace.data_ptr(),
        "y": y.data_ptr(),
        "num_tokens": num_tokens,
        "d_in": d_in,
        "stride_xt": x.stride(0) if num_tokens > 1 else d_in,
        "dtype": DTYPES[x.dtype],
        "sizes": sizes.sizes,
        "silu_mul": sizes.silu_mul,
        "table_numel": table.numel(),
        "workspace_numel": workspace.numel(),
    }


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, x: Tensor) -> None:
    got = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, strides {tensor.stride()}"
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {got}")
    if tuple(tensor.shape) != shape or tensor.device != x.device or not tensor.is_contiguous():
        raise ValueError(f"{name} must be {shape} on {x.device}, contiguous, got {got}")
