"""Groups of projections, and what they compute in float64."""

import torch
from kernel_cases import DEVICE
from torch import Tensor

from gfwsvd_kernels import Factors

# name -> (D_IN, (rank, D_OUT, pivoted, with bias) of each projection, activation)
GROUPS: dict[str, tuple[int, list[tuple[int, int, bool, bool]], str | None]] = {
    "one": (40, [(5, 33, False, False)], None),
    "one_with_bias": (40, [(16, 64, False, True)], None),
    "rank_one": (9, [(1, 1, False, False)], None),  # a bias would cancel the rounding of z, or not, by luck
    "several_blocks": (70, [(17, 1030, False, True)], None),
    "qkv": (64, [(24, 96, False, True), (7, 32, False, False), (9, 32, False, True)], None),
    "gate_up": (48, [(19, 520, False, False), (8, 520, False, True)], "silu_mul"),
    "pivoted": (40, [(21, 90, True, True)], None),
    "pivoted_all": (40, [(12, 12, True, False)], None),
    "pivoted_several_blocks": (33, [(12, 1030, True, False)], None),
    "pivoted_qkv": (64, [(24, 96, True, True), (7, 32, True, False), (9, 32, False, True)], None),
    "pivoted_gate_up": (48, [(19, 520, True, True), (8, 520, True, False)], "silu_mul"),
}


def group_of(name: str, dtype: torch.dtype, device: str = DEVICE) -> tuple[list[Factors], str | None]:
    """The factors of a case, of outputs of order one, and its activation."""
    d_in, projections, activation = GROUPS[name]
    return [factors(d_in, *projection, dtype=dtype, device=device) for projection in projections], activation


def factors(
    d_in: int, rank: int, d_out: int, pivoted: bool, with_bias: bool, *, dtype: torch.dtype, device: str = DEVICE
) -> Factors:
    pivots = torch.randperm(d_out)[:rank].to(device) if pivoted else None
    down = torch.randn(rank, d_in) / d_in**0.5
    up = torch.randn(d_out - rank if pivoted else d_out, rank) / rank**0.5
    bias = torch.randn(d_out).to(device, dtype) if with_bias else None
    return Factors(down.to(device, dtype), up.to(device, dtype), bias, pivots)


def in_whole_numbers(projection: Factors) -> Factors:
    """Factors in int8 that stand for about the same numbers, and use up their range."""
    down, up = projection.down.float(), projection.up.float()
    scales = torch.stack((down.abs().amax(1), up.abs().amax(0) if len(up) else down.new_ones(len(down)))) * 128 / 127
    scales = scales.bfloat16().float()
    down_steps, up_steps = down / scales[0][:, None] * 128, up / scales[1] * 128
    down_steps, up_steps = (steps.round().clamp(-127, 127).to(torch.int8) for steps in (down_steps, up_steps))
    return projection._replace(down=down_steps, up=up_steps, scales=scales.to(projection.down.dtype))


def floats(projection: Factors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """down and up as the numbers that they stand for."""
    down, up = projection.down.to(dtype), projection.up.to(dtype)
    if projection.scales is None:
        return down, up
    of_down, of_up = projection.scales.to(dtype) / 128
    return down * of_down[:, None], up * of_up


def dense(projection: Factors, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The weight (D_OUT, D_IN) and bias that a projection stands for."""
    down, up = floats(projection, dtype)
    weight = up @ down
    if projection.pivots is not None:
        rest = torch.ones(projection.d_out, dtype=torch.bool, device=down.device)
        rest[projection.pivots] = False
        whole = down.new_empty(projection.d_out, down.shape[1])
        whole[projection.pivots], whole[rest] = down, weight
        weight = whole
    bias = projection.bias.to(dtype) if projection.bias is not None else weight.new_zeros(len(weight))
    return weight, bias


def oracle(x: Tensor, projections: list[Factors], activation: str | None) -> Tensor:
    """In float64, from the definition."""
    parts = [torch.nn.functional.linear(x.double(), *dense(projection)) for projection in projections]
    return torch.nn.functional.silu(parts[0]) * parts[1] if activation == "silu_mul" else torch.cat(parts, -1)


def by_torch(x: Tensor, projections: list[Factors], activation: str | None) -> Tensor:
    """As a model would compute it in the dtype of x: two products a projection, the intermediate rounded."""
    parts = []
    for projection in projections:
        bias, pivots = projection.bias, projection.pivots
        down, up = floats(projection, x.dtype)
        z = x @ down.mT
        y = z @ up.mT
        if pivots is not None:
            rest = torch.ones(len(pivots) + len(up), dtype=torch.bool, device=x.device)
            rest[pivots] = False
            whole = x.new_empty(*x.shape[:-1], len(rest))
            whole[..., pivots], whole[..., rest] = z, y
            y = whole
        parts.append(y if bias is None else y + bias)
    return torch.nn.functional.silu(parts[0]) * parts[1] if activation == "silu_mul" else torch.cat(parts, -1)
