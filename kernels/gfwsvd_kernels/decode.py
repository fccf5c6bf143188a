"""`lowrank_group` on a GPU: which way a number of tokens goes.

Up to 8 tokens one launch splits the rank, up to 64 one persistent launch has a barrier: those of the CUDA C++ extension
where it is built and takes the group (`extension.fits`), else those in Triton. More tokens are matrix products, which
the BLAS does best, and one pass that finishes them where there is a pivot or an activation.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from gfwsvd_kernels import extension, tiles
from gfwsvd_kernels.finish import finish_products
from gfwsvd_kernels.layout import FEW_TOKENS, SOME_TOKENS, Layout, Operands
from gfwsvd_kernels.persistent import persistent
from gfwsvd_kernels.split_rank import split_rank


def matmuls(x: Tensor, operands: Operands, layout: Layout) -> Tensor:
    """y (T, out_width) of x (T, D_IN) for any number of tokens."""
    down, up, bias, table, _ = operands
    z = x @ down.mT
    finishes = layout.pivoted or layout.silu_mul
    stored = torch.float32 if finishes and tiles.interpreted_bf16(x) else x.dtype  # it truncates to bfloat16
    y = x.new_empty(len(x), layout.out_width, dtype=stored)
    sums = x.new_empty(len(x), layout.acc_width) if finishes else y
    for record in layout.records():
        start, rank, pitch = record["up_start"], record["rank"], record["pitch"]
        z_i = z[:, record["z_start"] : record["z_start"] + rank]
        up_i = up[start : start + rank * pitch].view(rank, pitch)
        if finishes:
            torch.mm(z_i, up_i, out=sums[:, record["acc_start"] : record["acc_start"] + pitch])
            continue
        outputs = slice(record["out_start"], record["out_start"] + record["d_out"])
        up_i = up_i[:, : record["d_out"]]
        if bias is None:
            torch.mm(z_i, up_i, out=y[:, outputs])
        else:
            torch.addmm(bias[outputs], z_i, up_i, out=y[:, outputs])
    if finishes:
        finish_products(y, sums, z, bias, table, layout)
    return y.to(x.dtype)


_has_extension = cache(extension.available)  # asking costs as much as launching


def lowrank_group(x: Tensor, *arguments: Any, target: tiles.Target | None = None) -> Tensor:
    """Launch; `arguments` are those of the operator after x."""
    *tensors, sizes, silu_mul = arguments
    operands, layout = Operands(*tensors), Layout.of(sizes, silu_mul)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if not len(rows):
        y = x.new_empty(0, layout.out_width)
    elif len(rows) > SOME_TOKENS:
        y = matmuls(rows, operands, layout)
    else:
        any_order = len(rows) <= FEW_TOKENS and not torch.are_deterministic_algorithms_enabled()
        compiled = "decode" if any_order else "persistent"
        if x.is_cuda and _has_extension(x.device) and extension.fits(compiled, rows, layout):
            y = x.new_empty(len(rows), layout.out_width)
            getattr(extension, compiled)(rows, operands, layout, y)
        else:
            launch = split_rank if any_order else persistent
            y = launch(rows, operands, layout, target=target)
    return y.view(*x.shape[:-1], layout.out_width)
