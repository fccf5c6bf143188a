"""Every op in plain torch: its definition, and the fast path on a CPU.

Arguments are taken as checked (`ops.py` does that), so any device works. The work is cut so that one triangle costs
little more than half of a full product and temporaries are bounded.
"""

from collections.abc import Iterator
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from gfwsvd_kernels.layout import UNIT, Layout

# Measured (docs/kernels.md). Smaller blocks save a little more on idle cores, but each product makes the threads wait
# for each other, which costs far more than it saves where cores are shared.
BLOCK = 192  # up to this width a triangle is computed as a full square
CHUNK = 2048  # tokens at a time: bounds the scaled, upcast and intermediate copies


def pack(lower: Tensor) -> Tensor:
    """The lower triangle of `lower` (D, D), diagonal included, row by row: (D (D + 1) / 2,), half the memory.

    Row i starts at i (i + 1) / 2. The strict upper triangle of `lower` is never used. Any dtype; returns a new tensor.
    `symmetrize` is the way back.
    """
    if lower.ndim != 2 or lower.shape[0] != lower.shape[1]:
        raise ValueError(f"lower must be (D, D), got {tuple(lower.shape)}")
    packed = lower.new_empty(triangle(lower.shape[0]))
    for i, j in _row_blocks(lower.shape[0]):
        packed[triangle(i) : triangle(j)] = _packed_rows(lower[i:j, :j])
    return packed


def symmetrize(lower: Tensor) -> Tensor:
    """The full symmetric matrix whose lower triangle, diagonal included, is that of `lower`.

    `lower` is (..., D, D), of which the strict upper triangle is never used, so it may hold anything, NaN too; or one
    packed triangle, (D (D + 1) / 2,). Any dtype; returns a new tensor. The two halves of the result are equal bit for
    bit.
    """
    if lower.ndim == 1:
        return _unpacked(lower)
    if lower.ndim < 2 or lower.shape[-1] != lower.shape[-2]:
        raise ValueError(f"lower must be (..., D, D) or packed, (D (D + 1) / 2,), got {tuple(lower.shape)}")
    return lower.tril() + lower.tril(-1).mT


def _unpacked(packed: Tensor) -> Tensor:
    width = (isqrt(8 * packed.shape[0] + 1) - 1) // 2
    if triangle(width) != packed.shape[0]:
        raise ValueError(f"a packed triangle must have D (D + 1) / 2 elements, got {packed.shape[0]}")
    full = packed.new_empty(width, width)
    for i, j in _row_blocks(width, max(BLOCK, 2**22 // max(width, 1))):  # few launches on a GPU, small temporaries
        rows = _lower_rows(packed, i, j)
        full[i:j, :i], full[:i, i:j] = rows[:, :i], rows[:, :i].mT
        full[i:j, i:j] = symmetrize(rows[:, i:])
    return full


def triangle(width: int) -> int:
    """How many entries a triangle has, and where row `width` of a packed one starts."""
    return width * (width + 1) // 2


def _row_blocks(width: int, block: int = BLOCK) -> Iterator[tuple[int, int]]:
    return ((i, min(i + block, width)) for i in range(0, width, block))


def _lower_rows(matrix: Tensor, i: int, j: int) -> Tensor:
    """Rows i to j of a lower triangle, full or packed: (j - i, j), zeros above the diagonal."""
    if matrix.ndim == 2:
        return matrix[i:j, :j].tril(i)
    rows = matrix.new_zeros(j - i, j)
    return rows.masked_scatter_(_in_triangle(rows), matrix[triangle(i) : triangle(j)])


def _packed_rows(rows: Tensor) -> Tensor:
    """The packed form of the last rows of a square lower triangle."""
    return rows.masked_select(_in_triangle(rows))  # on a CPU twice as fast as rows[mask]


def _in_triangle(rows: Tensor) -> Tensor:
    """Which entries of the last rows of a square are in its lower triangle."""
    return torch.ones_like(rows, dtype=torch.bool).tril_(rows.shape[1] - rows.shape[0])


def gram_accumulate(out: Tensor, x: Tensor, weight: Tensor | None = None, other: Tensor | None = None) -> None:
    for t in range(0, x.shape[0], CHUNK):
        rows = slice(t, t + CHUNK)
        left = x[rows].to(out.dtype)
        right = left if other is None else other[rows].to(out.dtype)
        if weight is not None:
            # sqrt(w) on both sides: what is summed stays a Gram matrix however the products are rounded
            root = weight[rows, None].sqrt()
            left, right = (left * root,) * 2 if other is None else (left * root, right * root)
        _add_lower_product(out, left, right)


def _add_lower_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Lower triangle of out += that of leftᵀ right: one rectangle by GEMM, then the two triangles beside it.

    Into a packed triangle, a block of rows at a time.
    """
    if out.ndim == 1:
        for i, j in _row_blocks(left.shape[1]):
            out[triangle(i) : triangle(j)] += _packed_rows(left[:, i:j].mT @ right[:, :j])
        return
    width = out.shape[0]
    if width <= BLOCK:
        out += (left.mT @ right).tril_()  # adds an exact zero above the diagonal
        return
    half = (width // 2 + 15) // 16 * 16
    out[half:, :half].addmm_(left[:, half:].mT, right[:, :half])
    _add_lower_product(out[:half, :half], left[:, :half], right[:, :half])
    _add_lower_product(out[half:, half:], left[:, half:], right[:, half:])


def quadratic_form(x: Tensor, A: Tensor) -> Tensor:
    q = x.new_zeros(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
    for i, j in _row_blocks(x.shape[1]):
        rows = _lower_rows(A, i, j).to(q.dtype)
        rows = rows + rows.tril(i - 1)  # of 2 tril(A, -1) + diag(A)
        for t in range(0, x.shape[0], CHUNK):
            chunk = x[t : t + CHUNK, :j].to(q.dtype)
            q[t : t + CHUNK] += (chunk @ rows.mT).mul_(chunk[:, i:j]).sum(1)
    return q


def quadratic_form_scale(x: Tensor, A: Tensor, g: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q = quadratic_form(x, A)
    root = (scale * q).clamp_(min=0).sqrt_()
    return q, (g * root[:, None]).to(g.dtype).contiguous()


def sequence_unit_step(out: Tensor, x: Tensor, g: Tensor, A: Tensor | None, cu_seqlens: Tensor) -> None:
    metric = None if A is None else symmetrize(A)
    offsets = cu_seqlens.tolist()
    for start, stop in zip(offsets[:-1], offsets[1:], strict=True):
        if start < stop:
            xs, gs = x[start:stop].to(out.dtype), g[start:stop].to(out.dtype)
            in_token_space = token_space_is_cheaper(stop - start, xs.shape[1], gs.shape[1], metric is not None)
            (_add_in_token_space if in_token_space else _add_in_feature_space)(out, xs, gs, metric)


def token_space_is_cheaper(num_tokens: int, d_in: int, d_out: int, has_metric: bool) -> bool:
    """Compare the multiply-adds of gᵀ(K g), K = x A xᵀ, with those of (G A) Gᵀ, G = gᵀx, for one sequence."""
    token_space = num_tokens * (has_metric * d_in**2 + num_tokens * (d_in + d_out) + d_out**2 // 2)
    feature_space = d_out * d_in * (num_tokens + has_metric * d_in + d_out // 2)
    return token_space <= feature_space


def _add_in_feature_space(out: Tensor, x: Tensor, g: Tensor, metric: Tensor | None) -> None:
    G = g.mT @ x
    gram_accumulate(out, G.mT, other=None if metric is None else (G @ metric).mT)


def _add_in_token_space(out: Tensor, x: Tensor, g: Tensor, metric: Tensor | None) -> None:
    y = x if metric is None else x @ metric
    e = torch.zeros_like(g)  # K g, K being formed in row blocks of its lower triangle
    for i in range(0, x.shape[0], CHUNK):
        j = min(i + CHUNK, x.shape[0])
        if i:
            K = y[i:j] @ x[:i].mT
            e[i:j] += K @ g[:i]
            e[:i] += K.mT @ g[i:j]
        e[i:j] += (y[i:j] @ x[i:j].mT) @ g[i:j]
    gram_accumulate(out, g, other=e)


def lowrank_linear(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(F.linear(x, down), up, bias)


def lowrank_group(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    table: Tensor,
    scales: Tensor | None,
    sizes: list[int],
    silu_mul: bool,
) -> Tensor:
    layout = Layout.of(sizes, silu_mul)
    if scales is not None:
        unit = x.new_full((), UNIT)  # brings whole numbers to the dtype of x
        down, up = down * unit, up * unit
    zs, parts = [], []
    for p, record in zip(layout.projections, layout.records, strict=True):
        start, columns = record["up_start"], slice(record["z_start"], record["z_start"] + p.pitch)
        z = F.linear(x, down[columns])
        z = z if scales is None else z * scales[0, columns]
        to_up = z if scales is None else z * scales[1, columns]
        zs.append(z)
        parts.append(F.linear(to_up, up[start : start + p.rows * p.pitch].view(p.rows, p.pitch)))
    y = torch.cat(parts, -1)
    if layout.pivoted:
        source = table[layout.sources_start :].long()
        y = torch.cat((y, *zs), -1)[..., torch.where(source < 0, layout.sums_width - 1 - source, source)]
    y = y if bias is None else y + bias
    return F.silu(y[..., : layout.out_width]) * y[..., layout.out_width :] if silu_mul else y
