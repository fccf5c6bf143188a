"""Ahead-of-time compilation, which needs no GPU: what the launchers would run, and what the compiler makes of it.

A launcher called on meta tensors inside `recorded_launches` launches nothing. Each launch that it would have done can
then be compiled exactly as at run time, with its flags and the specialisation on its arguments. For a table of all that
is shipped:

    python -m gfwsvd_kernels.testing 80 90 100      # one JSON object a line; sm_80, sm_90, sm_100
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from gfwsvd_kernels import Factors, LowRankGroup, decode, few, gram, layout, quadform, sequence, tiles

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
TYPES |= {torch.int8: "i8", torch.int32: "i32", torch.int64: "i64"}
_empty = partial(torch.empty, device="meta")
TENSOR_CORE = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")


@dataclass(frozen=True)
class Launch:
    """One launch: a kernel, its grid, its arguments by name and its options (num_warps, num_stages)."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]

    def source(self) -> ASTSource:
        """What the compiler is given: types, constants and alignments, as Triton derives them from the arguments."""
        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            aligned = False
            if isinstance(value, torch.Tensor):
                signature[parameter.name] = "*" + TYPES[value.dtype]
                aligned = value.storage_offset() * value.element_size() % 16 == 0
            elif isinstance(value, TensorDescriptor):
                signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
            elif isinstance(value, float) and not parameter.is_constexpr:
                signature[parameter.name] = "fp32"
            elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
                signature[parameter.name] = "constexpr"
                constants[(i,)] = value
            else:
                signature[parameter.name] = "i32" if value < 2**31 else "i64"
                aligned = value % 16 == 0 and not parameter.do_not_specialize
            if aligned:
                attributes[(i,)] = [["tt.divisibility", 16]]
        source = GluonASTSource if self.kernel.is_gluon() else ASTSource
        return source(self.kernel, signature, constants, attributes)


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a launch. Spills live on the stack; `tensor_core` names the PTX instructions found."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    blocks_per_sm: int
    tensor_core: tuple[str, ...]


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Collect the launches of Triton kernels instead of running them."""
    launches: list[Launch] = []

    def record(kernel: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        arguments = dict(zip(kernel.arg_names, args, strict=False))
        arguments |= {name: kwargs.pop(name) for name in kernel.arg_names if name in kwargs}
        launches.append(Launch(kernel, grid, arguments, kwargs))

    with patch.object(JITFunction, "run", record):
        yield launches


def compile_launch(launch: Launch, arch: int) -> Compiled:
    """Compile a launch for `sm_<arch>`; the `ptxas` and `cuobjdump` that come with Triton do the rest."""
    compiled = triton.compile(launch.source(), target=GPUTarget("cuda", arch, 32), options=launch.options)
    usage = _resource_usage(compiled.asm["cubin"])
    found = tuple(name for name in TENSOR_CORE if name in compiled.asm["ptx"])
    shared_bytes = compiled.metadata.shared
    per_sm = tiles.blocks_per_sm(usage["REG"], shared_bytes, launch.options["num_warps"], arch)
    return Compiled(usage["REG"], usage["STACK"] + usage["LOCAL"], shared_bytes, per_sm, found)


def _resource_usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


@cache
def shipped_launches(arch: int) -> tuple[Launch, ...]:
    """The launches that the operators make on an architecture: every tile, with all flags where they may matter.

    Groups use no tensor cores, or small tiles of them: what their other flags change is compiled for one architecture
    and in one dtype.
    """
    target = tiles.Target(arch, tiles.H200.num_sms)
    with recorded_launches() as launches:
        for dtype in (torch.bfloat16, torch.float32):
            _launch_all(dtype, 4096, target)
            _launch_other_flags(dtype, 4096, target)
        _launch_all(torch.float16, 4096, target)
        _launch_few(target)
        _launch_all(torch.float32, 4095, target)  # unaligned; 2-byte types have the same tiles and need fewer registers
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for pivoted in (False, True):  # gate and up do the most
                for whole in (False, True):
                    _launch_group(dtype, 4096, 2, target, with_bias=True, pivoted=pivoted, whole=whole)
        if arch == tiles.H200.arch:
            _launch_groups(target)
            _launch_ones(target)
    return tuple({(launch.source().hash(), str(launch.options)): launch for launch in launches}.values())


def _launch_all(dtype: torch.dtype, width: int, target: tiles.Target) -> None:
    x, weight, A = _empty(8192, width, dtype=dtype), _empty(8192), _empty(width, width)
    gram.gram_accumulate(A, x, weight, target=target)
    quadform.quadratic_form_scale(x, A, x, 1.0, target=target)
    for metric in (None, A):
        sequence.sequence_unit_step(A, x, x, metric, _empty(3, dtype=torch.int64), target=target)


def _launch_other_flags(dtype: torch.dtype, width: int, target: tiles.Target) -> None:
    x, weight, A = _empty(8192, width, dtype=dtype), _empty(8192), _empty(width, width)
    gram.gram_accumulate(A, x, target=target)
    gram.gram_accumulate(_packed(A), x, target=target)
    gram.gram_accumulate(_packed(A), x, weight, target=target)
    for out in (A, _packed(A)):
        gram.gram_accumulate(out, x, other=x.float(), target=target)
    gram.gram_accumulate(A, x, target=target, tile=tiles.tile("gram", target, dtype, x))
    quadform.quadratic_form(x, A, target=target)
    quadform.quadratic_form(x, A.to(dtype), target=target)
    quadform.quadratic_form(x, _packed(A), target=target)


def _packed(matrix: torch.Tensor) -> torch.Tensor:
    return _empty(matrix.shape[0] * (matrix.shape[0] + 1) // 2)


def _launch_groups(target: tiles.Target) -> None:
    """The other groups of projections: one, three with biases, gate and up; as they are and pivoted."""
    for count in (1, 2, 3):
        for pivoted in (False, True):
            _launch_group(torch.bfloat16, 4096, count, target, with_bias=count == 3, pivoted=pivoted)
    _launch_group(torch.float32, 4095, 2, target, with_bias=True, pivoted=True)


def _launch_group(
    dtype: torch.dtype,
    width: int,
    count: int,
    target: tiles.Target,
    *,
    with_bias: bool = False,
    pivoted: bool = False,
    whole: bool = False,
) -> None:
    group = _group(dtype, width, count, with_bias=with_bias, pivoted=pivoted, whole=whole)
    for num_tokens in (1, layout.SKINNY_TOKENS, 1000):
        x = _empty(num_tokens, width, dtype=dtype)
        decode.lowrank_group(x, *group.operands, group.layout.sizes, group.layout.silu_mul, target=target)


def _launch_few(target: tiles.Target) -> None:
    """All shapes for a few tokens, pivoted, which does the most; float16 is the same code with other instructions."""
    for block, shapes in tiles.FEW.items():
        x = _empty(block, 4096, dtype=torch.bfloat16)
        for count, up in ((2, "silu_mul"), (3, "up")):
            group = _group(torch.bfloat16, 4096, count, with_bias=True, pivoted=True)
            for both in zip(shapes["down"], shapes[up], strict=True):
                few.few(x, group.operands, group.layout, target=target, shapes=both)


def _group(
    dtype: torch.dtype, width: int, count: int, *, with_bias: bool, pivoted: bool, whole: bool = False
) -> LowRankGroup:
    """One projection, three, or two that make up one output, `width` to `width`; with `whole`, of whole numbers."""
    rank = 1632 // count
    stored = torch.int8 if whole else dtype
    projection = Factors(
        _empty(rank, width, dtype=stored),
        _empty(width - rank if pivoted else width, rank, dtype=stored),
        _empty(width, dtype=dtype) if with_bias else None,
        torch.arange(rank) if pivoted else None,
        _empty(2, rank, dtype=dtype) if whole else None,
    )
    return LowRankGroup([projection] * count, activation="silu_mul" if count == 2 else None)


def _launch_ones(target: tiles.Target) -> None:
    """Sizes and strides of one, which Triton turns into constants: other code, which must compile too."""
    one = _empty(1, 1)
    gram.gram_accumulate(one, one, one[0], target=target)
    quadform.quadratic_form_scale(one, one, one, 1.0, target=target)
    sequence.sequence_unit_step(one, one, one, one, _empty(2, dtype=torch.int64), target=target)


def report(arch: int, number: int) -> dict[str, Any]:
    """One of the shipped launches, by its number, and what became of it, as plain values."""
    launch = shipped_launches(arch)[number]
    kinds = (kind.replace("tensordesc<", "*").partition("[")[0] for kind in launch.source().signature.values())
    pointers = [kind for kind in kinds if kind.startswith("*")]
    flags = {name: value for name, value in launch.arguments.items() if name.isupper()} | launch.options
    name = {"kernel": launch.kernel.__name__, "arch": arch, "grid": launch.grid, "pointers": " ".join(pointers)}
    name["flags"] = flags
    return name | asdict(compile_launch(launch, arch))


def main() -> None:
    jobs = [(arch, number) for arch in map(int, sys.argv[1:]) for number in range(len(shipped_launches(arch)))]
    # Forks have what was imported and recorded already; nothing has been compiled, so there are no threads to lose
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1), mp_context=get_context("fork")) as pool:
        for row in pool.map(report, *zip(*jobs, strict=True)):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
