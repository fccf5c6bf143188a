"""Groups of low-rank projections: inputs, work, float64 oracle, and who computes them.

The factors are the same for everyone. Those who do not know of groups or of pivots get what they need: each projection
by itself, the order that puts pivoted outputs in their places, one dense weight for all.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import providers as by
from benchmarks.providers import Call, Inputs, Missing, Provider
from benchmarks.shapes import GroupCase
from gfwsvd.quantise import eight_bits
from gfwsvd_kernels import Factors, LowRankGroup
from gfwsvd_kernels.layout import SKINNY_TOKENS, UNIT, Operands
from gfwsvd_kernels.tiles import FEW_TOKENS


def inputs(case: GroupCase, dtype: torch.dtype, device: torch.device, *, int8: bool = False) -> Inputs:
    """`factors` has (down, up) of each projection, `orders` where its outputs are in [z, y], None if y has them all.

    With `int8` ours get factors in eight bits, and all others, and "half", the same numbers in `dtype`.
    """
    activation = "silu_mul" if case.silu_mul else None
    projections = [
        _factors(case.d_in, rank, d_out, case.pivoted, dtype, device)
        for rank, d_out in zip(case.ranks, case.d_outs, strict=True)
    ]
    rounded = [_eight_bits(p) for p in projections] if int8 else projections
    if int8:
        projections = [_in_dtype(p) for p in rounded]
    found: Inputs = {
        "x": torch.randn(case.tokens, case.d_in, device=device, dtype=dtype),
        "factors": [(p.down, p.up) for p in projections],
        "orders": [_order(p, device) for p in projections],
        "silu_mul": case.silu_mul,
        # In float32, at whose products racecheck does not stop
        "weight": torch.cat([by.product(_whole_up(p).float(), p.down.float()) for p in projections]).to(dtype),
    }
    if case.pivoted:
        found["unpivoted"] = _buffers([Factors(p.down, _whole_up(p)) for p in projections], activation)
    if int8:
        found["half"] = _buffers(projections, activation)
    return found | _buffers(rounded, activation)


def _factors(d_in: int, rank: int, d_out: int, pivoted: bool, dtype: torch.dtype, device: torch.device) -> Factors:
    """Random factors that make outputs of order one."""
    down = torch.randn(rank, d_in, device=device) / d_in**0.5
    up = torch.randn(d_out - pivoted * rank, rank, device=device) / rank**0.5
    pivots = torch.randperm(d_out)[:rank].sort().values if pivoted else None
    return Factors(down.to(dtype), up.to(dtype), None, pivots)


def _eight_bits(p: Factors) -> Factors:
    """With scales that are powers of two, so that the same numbers fit a narrow dtype."""
    up, down, scales = eight_bits(p.up, p.down, dtype=p.up.dtype)
    return p._replace(up=up, down=down, scales=scales.log2().round().exp2())


def _in_dtype(p: Factors) -> Factors:
    assert p.scales is not None
    down, up = (UNIT * part.float() for part in (p.down, p.up))
    dtype = p.scales.dtype
    return Factors((down * p.scales[0][:, None]).to(dtype), (up * p.scales[1]).to(dtype), p.bias, p.pivots)


def _order(p: Factors, device: torch.device) -> Tensor | None:
    if p.pivots is None:
        return None
    is_pivot = torch.zeros(p.d_out, dtype=torch.bool)
    is_pivot[p.pivots] = True
    order = torch.empty(p.d_out, dtype=torch.int64)
    order[p.pivots] = torch.arange(len(p.pivots))
    order[~is_pivot] = torch.arange(len(p.pivots), p.d_out)
    return order.to(device)


def _whole_up(p: Factors) -> Tensor:
    """(D_OUT, R): with it the projection computes the same without pivots."""
    order = _order(p, p.up.device)
    if order is None:
        return p.up
    return torch.cat((torch.eye(p.up.shape[1], dtype=p.up.dtype, device=p.up.device), p.up))[order]


def _buffers(projections: Sequence[Factors], activation: str | None) -> Inputs:
    """The arguments of the operator and of its single implementations, laid out by the module."""
    group = LowRankGroup(projections, activation=activation)
    return {**group.operands._asdict(), "operands": group.operands, "layout": group.layout, "sizes": group.layout.sizes}


def oracle(i: Inputs) -> Tensor:
    x, factors = i["x"].double(), [(down.double(), up.double()) for down, up in i["factors"]]
    return apart(x, factors, i["orders"], i["silu_mul"])


def flops(case: GroupCase) -> int:
    """The products: one multiplication and one addition for each token and entry of the factors."""
    return 2 * case.tokens * case.num_weights


def num_bytes(case: GroupCase, size: int) -> int:
    """Factors and x read, y written. Where the pivots are is not counted: the next layer's weights can absorb that."""
    return size * (case.num_weights + case.tokens * (case.d_in + case.out_width))


def num_bytes_int8(case: GroupCase, size: int) -> int:
    """The same of factors in eight bits, whose scales are of `size`."""
    return num_bytes(case, size) - (size - 1) * case.num_weights + 2 * size * sum(case.ranks)


def _joined(parts: Sequence[Tensor], silu_mul: bool) -> Tensor:
    if silu_mul:
        return F.silu(parts[0]) * parts[1]
    return torch.cat(list(parts), -1) if len(parts) > 1 else parts[0]


def apart(
    x: Tensor,
    factors: Sequence[tuple[Tensor, Tensor]],
    orders: Sequence[Tensor | None],
    silu_mul: bool,
) -> Tensor:
    """Each projection by itself in two products, then side by side or multiplied."""
    parts = []
    for (down, up), order in zip(factors, orders, strict=True):
        z = F.linear(x, down)
        y = F.linear(z, up)
        parts.append(y if order is None else torch.cat((z, y), -1).index_select(-1, order))
    return _joined(parts, silu_mul)


def _dense_call(i: Inputs) -> Tensor:
    y = F.linear(i["x"], i["weight"])
    return _joined(y.chunk(2, -1) if i["silu_mul"] else [y], i["silu_mul"])


_ARGUMENTS = ("x", "factors", "orders", "silu_mul")


def _two_matmuls(i: Inputs) -> Tensor:
    return apart(*(i[name] for name in _ARGUMENTS))


def _imported(module: str) -> Any:
    try:
        return import_module(f"gfwsvd_kernels.{module}")
    except ImportError as error:
        raise Missing(f"gfwsvd_kernels.{module} is not there: {error}") from error


def _at_most(tokens: int | None, i: Inputs) -> None:
    if tokens and len(i["x"]) > tokens:
        raise Missing(f"takes at most {tokens} tokens")


def in_triton(name: str, most_tokens: int | None = None) -> Provider:
    """One implementation by itself, whichever the operator would choose; on a CPU in the interpreter."""

    def load(device: torch.device) -> Call:
        by.needs_triton(device)
        launch = getattr(_imported("decode"), name)

        def call(i: Inputs) -> Tensor:
            _at_most(most_tokens, i)
            return launch(i["x"], i["operands"], i["layout"])

        return call

    return Provider(load)


def _few(device: torch.device) -> Call:
    """A few tokens on tensor cores, which the interpreter does not have."""
    if device.type != "cuda":
        raise Missing("needs a GPU")
    few = _imported("few")

    def call(i: Inputs) -> Tensor:
        _at_most(FEW_TOKENS, i)
        if not few.takes(i["x"], i["operands"]):
            raise Missing("takes factors in half precision, of inputs in multiples of 8")
        return few.few(i["x"], i["operands"], i["layout"])

    return call


_OURS = by.ours("decode", "lowrank_group", "x", *Operands._fields, "sizes", "silu_mul")


def _of_others(name: str) -> Provider:
    """Ours with the buffers that the inputs hold under a name."""

    def load(device: torch.device) -> Call:
        call = _OURS.load(device)
        return lambda i: call(i | i[name])

    return Provider(load)


PROVIDERS: dict[str, Provider] = {
    "ours": _OURS,
    "ours_skinny": in_triton("skinny", SKINNY_TOKENS),
    "ours_few": Provider(_few),
    "ours_matmuls": in_triton("matmuls"),
    "dense": by.plain(_dense_call),
    "two_matmuls": by.plain(_two_matmuls),
    "compiled": by.compiled(apart, *_ARGUMENTS),
}
# Ours without pivots, at the same rank: the same map from R D_OUT entries of up instead of R (D_OUT - R)
PIVOTED_PROVIDERS = PROVIDERS | {"unpivoted": _of_others("unpivoted")}
INT8_PROVIDERS = {"ours": _OURS, "half": _of_others("half"), "dense": PROVIDERS["dense"]}
