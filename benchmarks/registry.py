"""The operators under test: their cases, inputs, work, float64 oracle and providers, one table entry each.

Work is that of the operator, not of a provider: the fewest floating-point operations and bytes of memory that any
implementation needs. TFLOP/s and GB/s of a dense layer or a full product are therefore effective ones, and all
providers of a case can be compared by them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import groups, shapes
from benchmarks import providers as by
from benchmarks.providers import Inputs, Provider
from benchmarks.shapes import Case, Grid, GroupCase

AnyCase = Case | GroupCase


@dataclass(frozen=True)
class Op:
    """An operator. `base` is the provider that others are compared with; `least_sets` inputs rotate while it is timed.

    `headlines` are the cases that stand for it in the README. `lower` says that the result is the lower triangle of
    `out`, full or packed, to which the operator adds.
    """

    cases: Callable[[Grid], Iterator[Any]]
    tokens: tuple[int, ...]
    inputs: Callable[[Any, torch.dtype, torch.device], Inputs]
    flops: Callable[[Any], int]
    bytes: Callable[[Any, int], int]
    oracle: Callable[[Inputs], Tensor]
    providers: dict[str, Provider]
    base: str
    headlines: tuple[AnyCase, ...]
    lower: bool = False
    least_sets: int = 1


def _triangle(width: int) -> int:
    return width * (width + 1) // 2


def _metric(width: int, device: torch.device) -> Tensor:
    """A positive semi-definite matrix of entries of order one, float32."""
    factor = torch.randn(width, width, device=device)
    return factor @ factor.mT / width


# The Gram matrix: out += tril(xᵀ diag(weight) y)


def gram_inputs(
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    *,
    weighted: bool = False,
    two: bool = False,
    packed: bool = False,
) -> Inputs:
    x = torch.randn(case.tokens, case.d_in, device=device, dtype=dtype)
    inputs = {"out": torch.randn(case.d_in, case.d_in, device=device), "x": x}
    if packed:
        rows, cols = torch.tril_indices(case.d_in, case.d_in, device=device)
        inputs |= {"out": torch.randn(_triangle(case.d_in), device=device), "places": rows * case.d_in + cols}
    if weighted:
        inputs["weight"] = torch.rand(case.tokens, device=device)
    if two:
        inputs["other"] = torch.randn_like(x)
    return inputs


def gram_oracle(i: Inputs) -> Tensor:
    x = i["x"].double()
    y = i["other"].double() if "other" in i else x
    product = (x.mT * i["weight"].double() if "weight" in i else x.mT) @ y
    return i["out"].double() + (product.view(-1)[i["places"]] if "places" in i else product)


def gram_flops(case: Case) -> int:
    """One multiplication and one addition for each token and entry of the triangle."""
    return 2 * case.tokens * _triangle(case.d_in)


def gram_bytes(case: Case, size: int, *, operands: int = 1, weight: int = 0) -> int:
    """The operands and the weights read, the float32 triangle read and written."""
    return case.tokens * (operands * case.d_in * size + weight) + 2 * 4 * _triangle(case.d_in)


_SQUARE = (Case(8192, 4096, 4096),)
_gram = by.ours("gram", "gram_accumulate", "out", "x", "weight", "other")
_blas = {"mm": by.plain(by.mm, adds=False), "mm_add": by.plain(by.mm_add), "addmm": by.plain(by.addmm)}
_gram_op = partial(
    Op,
    cases=shapes.square_cases,
    tokens=(2048, 8192, 32768),
    flops=gram_flops,
    oracle=gram_oracle,
    headlines=_SQUARE,
    lower=True,
)


# The quadratic form: q_t = x_tᵀ A x_t


def quadratic_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    A = _metric(case.d_in, device)
    return {"x": torch.randn(case.tokens, case.d_in, device=device, dtype=dtype), "A": A, "A_cast": A.to(dtype)}


def quadratic_bytes(case: Case, size: int) -> int:
    """The tokens and the float32 triangle read, one float32 a token written."""
    return case.tokens * (case.d_in * size + 4) + 4 * _triangle(case.d_in)


def scale_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    g = torch.randn(case.tokens, case.d_in, device=device, dtype=dtype)
    return quadratic_inputs(case, dtype, device) | {"g": g, "scale": 1 / case.d_in}


def scale_bytes(case: Case, size: int) -> int:
    """What the form reads and writes, the other side read, its scaled rows written."""
    return quadratic_bytes(case, size) + 2 * case.tokens * case.d_in * size


def quadratic_oracle(i: Inputs) -> Tensor:
    return ((i["x"].double() @ i["A"].double()) * i["x"].double()).sum(-1)


def scale_oracle(i: Inputs) -> Tensor:
    return (i["scale"] * quadratic_oracle(i)).sqrt()[:, None] * i["g"].double()


# The sequence unit: out += tril(sum_s G_s A G_sᵀ), G_s = g_sᵀ x_s


def sequence_inputs(case: Case, dtype: torch.dtype, device: torch.device, *, metric: bool = True) -> Inputs:
    A = _metric(case.d_in, device) if metric else None
    starts = [*range(0, case.tokens, case.seq_len), case.tokens]
    return {
        "out": torch.randn(case.d_out, case.d_out, device=device),
        "x": torch.randn(case.tokens, case.d_in, device=device, dtype=dtype),
        "g": torch.randn(case.tokens, case.d_out, device=device, dtype=dtype),
        "A": A,
        "A_cast": None if A is None else A.to(dtype),
        "cu_seqlens": torch.tensor(starts, device=device),
        "seq_len": case.seq_len,
    }


def sequence_oracle(i: Inputs) -> Tensor:
    out = i["out"].double()
    for x, g in zip(i["x"].double().split(i["seq_len"]), i["g"].double().split(i["seq_len"]), strict=True):
        G = g.mT @ x
        out.addmm_(G if i["A"] is None else G @ i["A"].double(), G.mT)
    return out


def sequence_flops(case: Case, *, metric: bool = True) -> int:
    """The cheaper of two routes a sequence: gᵀ (K g) with K = x A xᵀ, or (G A) Gᵀ with G = gᵀ x."""
    full, rest = divmod(case.tokens, case.seq_len)
    lengths = {case.seq_len: full, rest: 1}

    def one(tokens: int) -> int:
        token_space = tokens * (metric * case.d_in**2 + tokens * (case.d_in + case.d_out) + _triangle(case.d_out))
        feature_space = case.d_in * (case.d_out * (tokens + metric * case.d_in) + _triangle(case.d_out))
        return 2 * min(token_space, feature_space)

    return sum(count * one(tokens) for tokens, count in lengths.items() if tokens)


def sequence_bytes(case: Case, size: int, *, metric: bool = True) -> int:
    """The tokens of both sides and the float32 triangle of A read, the float32 triangle of out read and written."""
    tokens = case.tokens * (case.d_in + case.d_out) * size
    return tokens + 4 * (metric * _triangle(case.d_in) + 2 * _triangle(case.d_out))


_sequence_op = partial(
    Op,
    cases=shapes.sequence_cases,
    tokens=(8192,),
    oracle=sequence_oracle,
    providers={
        "ours": by.ours("sequence", "sequence_unit_step", "out", "x", "g", "A", "cu_seqlens"),
        "form_G": by.plain(by.form_G),
        "form_G_cast": by.plain(by.form_G_cast),
    },
    base="form_G",
    headlines=(Case(8192, 4096, 4096, seq_len=512),),
    lower=True,
)


# The compressed layer: y = (x downᵀ) upᵀ


def lowrank_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    down = (torch.randn(case.rank, case.d_in, device=device) / case.d_in**0.5).to(dtype)
    up = (torch.randn(case.d_out, case.rank, device=device) / case.rank**0.5).to(dtype)
    return {
        "x": torch.randn(case.tokens, case.d_in, device=device, dtype=dtype),
        "down": down,
        "up": up,
        "bias": None,
        "weight": by.product(up, down).to(dtype),  # the same map, for the dense layer
    }


def lowrank_oracle(i: Inputs) -> Tensor:
    return i["x"].double() @ i["down"].double().mT @ i["up"].double().mT


def lowrank_bytes(case: Case, size: int) -> int:
    """Both factors and x read, y written; the intermediate (T, R) need not leave the chip."""
    return (case.rank + case.tokens) * (case.d_in + case.d_out) * size


# Groups of compressed layers


def _gate_up(tokens: tuple[int, ...], pivoted: bool = False) -> tuple[GroupCase, ...]:
    cases = shapes.group_cases(Grid(shapes.MODELS["llama-3.1-8b"], tokens, (0.8,)), pivoted=pivoted)
    return tuple(case for case in cases if case.group == "gate_up")


_group_op = partial(
    Op,
    tokens=(1, 8, 64, 4096),
    inputs=groups.inputs,
    flops=groups.flops,
    bytes=groups.num_bytes,
    oracle=groups.oracle,
    base="dense",
    least_sets=8,
)

OPS: dict[str, Op] = {
    "gram_accumulate": _gram_op(
        inputs=gram_inputs,
        bytes=gram_bytes,
        providers={"ours": _gram, **_blas, "symmetric": by.SYMMETRIC, "quack": by.QUACK, "flash_muon": by.FLASH_MUON},
        base="mm",
    ),
    "gram_accumulate_weighted": _gram_op(
        inputs=partial(gram_inputs, weighted=True),
        bytes=partial(gram_bytes, weight=4),
        providers={"ours": _gram, **_blas},
        base="mm",
    ),
    "gram_accumulate_two": _gram_op(
        inputs=partial(gram_inputs, two=True),
        bytes=partial(gram_bytes, operands=2),
        providers={"ours": _gram, **_blas},
        base="mm",
    ),
    "gram_accumulate_packed": _gram_op(
        inputs=partial(gram_inputs, packed=True),
        bytes=gram_bytes,
        providers={"ours": _gram, "mm_gather": by.plain(by.mm_gather)},
        base="mm_gather",
    ),
    "quadratic_form": Op(
        cases=shapes.square_cases,
        tokens=(2048, 8192, 32768),
        inputs=quadratic_inputs,
        flops=gram_flops,
        bytes=quadratic_bytes,
        oracle=quadratic_oracle,
        providers={
            "ours": by.ours("quadform", "quadratic_form", "x", "A"),
            "ours_cast": by.ours("quadform", "quadratic_form", "x", "A_cast"),
            "naive": by.plain(by.naive),
            "compiled": by.COMPILED_NAIVE,
        },
        base="naive",
        headlines=_SQUARE,
    ),
    "quadratic_form_scale": Op(
        cases=shapes.square_cases,
        tokens=(2048, 8192, 32768),
        inputs=scale_inputs,
        flops=gram_flops,
        bytes=scale_bytes,
        oracle=scale_oracle,
        providers={
            "ours": by.ours("quadform", "quadratic_form_scale", "x", "A", "g", "scale"),
            "naive": by.plain(by.naive_scale),
            "compiled": by.COMPILED_NAIVE_SCALE,
        },
        base="naive",
        headlines=_SQUARE,
    ),
    "sequence_unit_step": _sequence_op(inputs=sequence_inputs, flops=sequence_flops, bytes=sequence_bytes),
    "sequence_unit_step_identity": _sequence_op(
        inputs=partial(sequence_inputs, metric=False),
        flops=partial(sequence_flops, metric=False),
        bytes=partial(sequence_bytes, metric=False),
    ),
    "lowrank_linear": Op(
        cases=shapes.lowrank_cases,
        tokens=(1, 8, 64, 4096),
        inputs=lowrank_inputs,
        flops=lambda case: 2 * case.tokens * case.rank * (case.d_in + case.d_out),
        bytes=lowrank_bytes,
        oracle=lowrank_oracle,
        providers={
            "ours": by.ours("lowrank", "lowrank_linear", "x", "down", "up", "bias"),
            "dense": by.plain(by.dense),
            "two_matmuls": by.plain(by.two_matmuls),
            "compiled": by.COMPILED_MATMULS,
        },
        base="dense",
        headlines=(Case(1, 14336, 4096, rank=shapes.rank(14336, 4096, 0.8)),),
        least_sets=8,  # a layer's factors are read once a token and then pushed out of the cache by the other layers'
    ),
    "lowrank_group": _group_op(cases=shapes.group_cases, providers=groups.PROVIDERS, headlines=_gate_up((1, 64, 4096))),
    "lowrank_group_pivoted": _group_op(
        cases=partial(shapes.group_cases, pivoted=True),
        providers=groups.PIVOTED_PROVIDERS,
        headlines=_gate_up((1, 64, 4096), pivoted=True),
    ),
    "lowrank_group_int8": _group_op(
        cases=partial(shapes.group_cases, pivoted=True),
        tokens=(1, 2, 64),
        inputs=partial(groups.inputs, int8=True),
        bytes=groups.num_bytes_int8,
        providers=groups.INT8_PROVIDERS,
        headlines=_gate_up((1,), pivoted=True),
    ),
}
