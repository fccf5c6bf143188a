"""Who computes an operator: this project, and the ways in which others do it.

A provider is loaded for a device and then called with the inputs of one problem. Nothing third-party is imported before
it is loaded; what cannot run here says why with `Missing`.
"""

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gfwsvd_kernels import reference

Inputs = dict[str, Any]
Call = Callable[[Inputs], Tensor]


class Missing(Exception):
    """Why a provider cannot run here."""


class Provider(NamedTuple):
    """`adds` is False for one that gives the product alone, where the operator adds it to `out`."""

    load: Callable[[torch.device], Call]
    adds: bool = True


def plain(call: Call, adds: bool = True) -> Provider:
    """A provider that is a function of the inputs, the same on every device."""
    return Provider(lambda device: call, adds)


def ours(module: str, name: str, *arguments: str) -> Provider:
    """The Triton launcher `gfwsvd_kernels.<module>.<name>` on a GPU, the reference on a CPU."""

    def load(device: torch.device) -> Call:
        home = import_module(f"gfwsvd_kernels.{module}") if device.type == "cuda" else reference
        function = getattr(home, name)

        def call(inputs: Inputs) -> Tensor:
            result = function(*(inputs.get(argument) for argument in arguments))
            if isinstance(result, tuple):  # the form and the rows scaled by it, which tell all
                return result[-1]
            return inputs["out"] if result is None else result

        return call

    return Provider(load)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with float32 sums and a float32 result."""
    if a.dtype == torch.float32:
        return a @ b
    # torch has the half-precision product with float32 output on CUDA only
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _operands(i: Inputs) -> tuple[Tensor, Tensor]:
    """The operands of the product: x scaled by the root of the weights if there are any, and once more or `other`."""
    x = i["x"]
    if "weight" in i:
        x = x * i["weight"].sqrt().to(x.dtype)[:, None]
    return x, i["other"] if "other" in i else x


def mm(i: Inputs) -> Tensor:
    """The full product alone: the least that a BLAS can do."""
    x, y = _operands(i)
    return product(x.mT, y)


def mm_add(i: Inputs) -> Tensor:
    return i["out"].add_(mm(i))


def addmm(i: Inputs) -> Tensor:
    """The full product added to `out` by the BLAS itself, in place."""
    x, y = _operands(i)
    if x.dtype == torch.float32 or not x.is_cuda:
        return i["out"].addmm_(x.mT.float(), y.float())
    return torch.addmm(i["out"], x.mT, y, out_dtype=torch.float32, out=i["out"])


def mm_gather(i: Inputs) -> Tensor:
    """The full product, whose lower triangle is gathered into a packed `out`."""
    return i["out"].add_(mm(i).view(-1)[i["places"]])


def _peer(module: str, package: str, device: torch.device) -> Any:
    try:
        found = import_module(module)
    except ImportError as error:
        raise Missing(f"not installed: {package}") from error
    if device.type != "cuda":
        raise Missing(f"{package} needs a GPU")
    return found


def _quack(device: torch.device) -> Call:
    gemm_symmetric = _peer("quack.gemm_interface", "quack-kernels", device).gemm_symmetric
    return lambda i: gemm_symmetric(i["x"].mT, i["x"], out_dtype=torch.float32)


def _flash_muon(device: torch.device) -> Call:
    matmul_transpose = _peer("flash_muon", "flash-muon", device).matmul_transpose
    return lambda i: matmul_transpose(i["x"].mT)


def needs_triton(device: torch.device) -> None:
    """Stop a provider that launches Triton kernels where neither a GPU nor the interpreter could run them."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise Missing("needs a GPU, or TRITON_INTERPRET=1")


def _symmetric(device: torch.device) -> Call:
    """One triangle of tiles, each written twice: what the kernels for Muon do, without their package."""
    needs_triton(device)
    symmetric_product = import_module("benchmarks.peers").symmetric_product
    return lambda i: symmetric_product(i["x"])


SYMMETRIC = Provider(_symmetric, adds=False)
QUACK = Provider(_quack, adds=False)
FLASH_MUON = Provider(_flash_muon, adds=False)


def _naive(x: Tensor, A: Tensor) -> Tensor:
    return ((x @ A) * x).sum(-1, dtype=torch.float32)


def naive(i: Inputs) -> Tensor:
    """With the whole (T, D) product in memory, and A in the dtype of x beforehand, which favours it."""
    return _naive(i["x"], i["A_cast"])


def _naive_scale(x: Tensor, A: Tensor, g: Tensor, scale: float) -> Tensor:
    return g * (scale * _naive(x, A)).clamp(min=0).sqrt()[:, None].to(g.dtype)


def naive_scale(i: Inputs) -> Tensor:
    """`naive`, and its root multiplied onto the other side."""
    return _naive_scale(i["x"], i["A_cast"], i["g"], i["scale"])


def form_G(i: Inputs) -> Tensor:
    """Each gradient G = gᵀ x, then G A Gᵀ, all in float32."""
    for x, g in zip(i["x"].split(i["seq_len"]), i["g"].split(i["seq_len"]), strict=True):
        G = product(g.mT, x)
        i["out"].addmm_(G if i["A"] is None else G @ i["A"], G.mT)
    return i["out"]


def form_G_cast(i: Inputs) -> Tensor:
    """As `form_G`, but G and G A are rounded to the dtype of x: fast products, an error of that dtype's size."""
    for x, g in zip(i["x"].split(i["seq_len"]), i["g"].split(i["seq_len"]), strict=True):
        G = product(g.mT, x).to(x.dtype)
        i["out"] += product(G if i["A"] is None else G @ i["A_cast"], G.mT)
    return i["out"]


def dense(i: Inputs) -> Tensor:
    return F.linear(i["x"], i["weight"])


def _two_matmuls(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return F.linear(F.linear(x, down), up)


def two_matmuls(i: Inputs) -> Tensor:
    return _two_matmuls(i["x"], i["down"], i["up"])


def compiled(function: Callable[..., Tensor], *arguments: str) -> Provider:
    """`torch.compile` of a function of some of the inputs, compiled anew for each problem."""

    def load(device: torch.device) -> Call:
        torch.compiler.reset()  # after a few shapes torch would go on uncompiled, or with shapes left open
        call = torch.compile(function, dynamic=False)
        return lambda i: call(*(i[argument] for argument in arguments))

    return Provider(load)


COMPILED_NAIVE = compiled(_naive, "x", "A_cast")
COMPILED_MATMULS = compiled(_two_matmuls, "x", "down", "up")
COMPILED_NAIVE_SCALE = compiled(_naive_scale, "x", "A_cast", "g", "scale")
