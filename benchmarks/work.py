"""What one launch of each kernel does, counted from its arguments and its grid: for the predictions of `model`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.shapes import Case, GroupCase
from gfwsvd_kernels import few
from gfwsvd_kernels.plan import Plan


@dataclass(frozen=True)
class Work:
    """What one launch does. Tiles count whole, and each of the products that make up one more precise product.

    `blocks` are those that do not return at once, `step_bytes` what a block loads in one step of its pipeline.
    """

    blocks: int
    flops: int
    half: bool
    dram_bytes: int
    l2_bytes: int
    step_bytes: int


L2_BYTES = 60e6  # of an H200
FEW_COLUMNS = few.CHUNK.value  # that a warp multiplies in a step


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def _products(a: dict[str, Any], x: torch.Tensor) -> int:
    """Products of the tensor cores for one product: TF32 needs three to be as good as float32."""
    return 3 if x.dtype == torch.float32 or a.get("UPCAST") else 1


def _tensor(operand: Any) -> torch.Tensor:
    """The tensor itself, or that of a tensor descriptor."""
    return getattr(operand, "base", operand)


def _gram(a: dict[str, Any], grid: tuple[int, ...], case: Case) -> Work:
    x, y, rows, cols, width = _tensor(a["x_ptr"]), _tensor(a["y_ptr"]), a["BLOCK_I"], a["BLOCK_J"], a["width"]
    plan = Plan(grid[0], a["waves"], a["rest"], a["steps"], a["share"], a["span"])
    num_tiles = plan.waves * plan.programs + plan.rest
    additions = sum(len(plan.segments(program)) for program in range(plan.programs))
    step_bytes = a["BLOCK_T"] * (rows * x.element_size() + cols * y.element_size())
    count = 3 if a["SPLIT_BF16"] else _products(a, x)
    operands = width * (x.element_size() + (y.element_size() if y is not x else 0))
    return Work(
        blocks=plan.programs,
        flops=2 * rows * cols * a["BLOCK_T"] * plan.longest * plan.programs * count,  # as if all were the busiest
        half=a["SPLIT_BF16"] or count == 1,
        dram_bytes=a["num_tokens"] * operands + 8 * width * (width + 1) // 2,
        l2_bytes=num_tiles * plan.steps * step_bytes + additions * rows * cols * 8,
        step_bytes=step_bytes,
    )


def _quadratic_form(a: dict[str, Any], grid: tuple[int, ...], case: Case) -> Work:
    x, rows, cols, tokens, width = a["x_ptr"], a["BLOCK_T"], a["BLOCK_I"], a["num_tokens"], a["width"]
    col_blocks = cdiv(width, cols)
    row_blocks = grid[0] // col_blocks
    size = x.element_size()
    count = _products(a, x)
    walked = cols * col_blocks * (col_blocks + 1) // 2  # columns of A under the diagonal, by all blocks of rows of A
    # each group of blocks of tokens walks A; it stays in L2 where it fits half of it
    triangle = size * width * (width + 1) // 2
    walks = cdiv(row_blocks, a["GROUP"]) if triangle > L2_BYTES / 2 else 1
    return Work(
        blocks=grid[0],
        flops=2 * row_blocks * rows * cols * walked * count,
        half=count == 1,
        dram_bytes=tokens * (width * size + 4) + walks * triangle,
        l2_bytes=row_blocks * walked * (rows + cols) * size + 8 * tokens * col_blocks,
        step_bytes=a["BLOCK_J"] * (rows + cols) * size,
    )


def _moved(blocks: int, num_bytes: int) -> Work:
    """Of a pass that multiplies no matrices."""
    return Work(blocks, flops=0, half=True, dram_bytes=num_bytes, l2_bytes=num_bytes, step_bytes=num_bytes // blocks)


def _prepare(a: dict[str, Any], grid: tuple[int, ...], case: Case) -> Work:
    entry = a["a_ptr"].element_size() + a["out_ptr"].element_size()
    return _moved(grid[0] * (grid[0] + 1) // 2, a["width"] * (a["width"] + 1) // 2 * entry)


def _row_powers(a: dict[str, Any], grid: tuple[int, ...], case: Case) -> Work:
    return _moved(grid[0], a["width"] * (a["width"] + 1) // 2 * a["a_ptr"].element_size())


def _scale_rows(a: dict[str, Any], grid: tuple[int, ...], case: Case) -> Work:
    entry = a["x_ptr"].element_size() + a["out_ptr"].element_size()
    return _moved(grid[0], a["num_rows"] * (a["width"] * entry + 4))


def _scores(a: dict[str, Any], grid: tuple[int, ...], case: Case) -> Work:
    y, x, rows, cols, width = a["y_ptr"], a["x_ptr"], a["BLOCK_M"], a["BLOCK_N"], a["width"]
    tokens = a["panel_stop"] - a["panel_start"]
    blocks = cdiv(tokens, rows) * cdiv(case.seq_len, cols)
    both = rows * y.element_size() + cols * x.element_size()
    count = _products(a, x)
    return Work(
        blocks=blocks,
        flops=2 * blocks * rows * cols * width * count,
        half=count == 1,
        dram_bytes=tokens * (width * (y.element_size() + x.element_size()) + 4 * case.seq_len),
        l2_bytes=blocks * (width * both + 4 * rows * cols),
        step_bytes=a["BLOCK_D"] * both,
    )


def _apply(a: dict[str, Any], grid: tuple[int, ...], case: Case) -> Work:
    g, rows, cols, width = a["g_ptr"], a["BLOCK_M"], a["BLOCK_O"], a["width"]
    tokens = a["panel_stop"] - a["panel_start"]
    blocks = cdiv(tokens, rows) * cdiv(width, cols)
    both = rows * 4 + cols * g.element_size()
    return Work(
        blocks=blocks,
        flops=2 * blocks * rows * cols * case.seq_len * 3,
        half=False,
        dram_bytes=tokens * (width * (g.element_size() + 4) + 4 * case.seq_len),
        l2_bytes=blocks * (case.seq_len * both + 4 * rows * cols),
        step_bytes=a["BLOCK_N"] * both,
    )


def _linear(a: dict[str, Any], grid: tuple[int, ...], case: Case) -> Work:
    x, weight, y, rows, cols = a["x_ptr"], a["weight_ptr"], a["y_ptr"], a["BLOCK_T"], a["BLOCK_O"]
    tokens, d_out, d_in = a["num_tokens"], a["d_out"], a["d_in"]
    blocks = cdiv(tokens, rows) * cdiv(d_out, cols)
    both = rows * x.element_size() + cols * weight.element_size()
    count = _products(a, x)
    results = y.element_size() * tokens * d_out
    return Work(
        blocks=blocks,
        flops=2 * blocks * rows * cols * d_in * count,
        half=count == 1,
        dram_bytes=d_in * (d_out * weight.element_size() + tokens * x.element_size()) + results,
        l2_bytes=blocks * d_in * both + results,
        step_bytes=a["BLOCK_I"] * both,
    )


def _skinny(a: dict[str, Any], grid: tuple[int, ...], read: int, weights: int) -> Work:
    """`read` elements beside the weights; the plain cores multiply, at a seventh of the rate of TF32."""
    size = a["y_ptr"].element_size()
    moved = size * (weights + a["num_tokens"] * read)
    return Work(
        blocks=grid[0],
        flops=7 * 2 * a["BLOCK_T"] * weights,
        half=False,
        dram_bytes=moved,
        l2_bytes=moved + size * a["BLOCK_T"] * weights // a["BLOCK_O"],
        step_bytes=2 * a["BLOCK_O"] * a["BLOCK_I"] * size,
    )


def _down(a: dict[str, Any], grid: tuple[int, ...], case: GroupCase) -> Work:
    return _skinny(a, grid, a["d_in"] + a["z_width"], a["down_ptr"].numel())


def _up(a: dict[str, Any], grid: tuple[int, ...], case: GroupCase) -> Work:
    return _skinny(a, grid, a["z_width"] + a["out_width"], a["up_ptr"].numel())


def _few(a: dict[str, Any], grid: tuple[int, ...], read: int, weights: int) -> Work:
    """The same on tensor cores, where all but the last step of weights and tokens is under way."""
    size, rows, tokens = a["y_ptr"].element_size(), a["BLOCK_O"], a["BLOCK_T"]
    moved = size * (weights + a["num_tokens"] * read)
    return Work(
        blocks=grid[0],
        flops=2 * tokens * weights,
        half=True,
        dram_bytes=moved,
        l2_bytes=moved + size * a["num_tokens"] * weights // rows,
        step_bytes=(a["DEPTH"] - 1) * a["SPLIT"] * FEW_COLUMNS * (rows + tokens) * size,
    )


def _few_down(a: dict[str, Any], grid: tuple[int, ...], case: GroupCase) -> Work:
    return _few(a, grid, a["d_in"] + a["z_width"], a["down_ptr"].numel())


def _few_up(a: dict[str, Any], grid: tuple[int, ...], case: GroupCase) -> Work:
    return _few(a, grid, a["z_width"] + a["out_width"], a["up_ptr"].numel())


def _finish(a: dict[str, Any], grid: tuple[int, ...], case: GroupCase) -> Work:
    size, tokens = a["y_ptr"].element_size(), a["num_tokens"]
    moved = size * tokens * (a["sums_width"] + a["out_width"] + a["PIVOTED"] * a["z_width"])
    blocks = grid[0] * grid[1]
    return Work(blocks, flops=0, half=True, dram_bytes=moved, l2_bytes=moved, step_bytes=moved // blocks)


class TorchWork(TorchDispatchMode):
    """Collects what torch itself launches: (name, work), from sizes alone, at the full rates of the card.

    Matrix products, and whatever else reads tensors and writes one. Views and new tensors without values cost nothing.
    """

    PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm)

    def __init__(self, num_sms: int) -> None:
        super().__init__()
        self.num_sms = num_sms
        self.found: list[tuple[str, Work]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        name = func.overloadpacket.__name__
        read = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        if is_view or "empty" in name or not read or not isinstance(result, Tensor):
            return result
        flops, half = 0, result.dtype.itemsize == 2
        if func.overloadpacket in self.PRODUCTS:
            rows, depth = read[-2].shape
            # float32 without TF32: the plain cores, at a seventh of its rate
            flops = 2 * rows * depth * read[-1].shape[1] * (1 if half else 7)
        moved = sum(tensor.numel() * tensor.element_size() for tensor in (*read, result))
        self.found.append((name, Work(self.num_sms, flops, half, moved, 0, moved)))
        return result


WORK: dict[str, Callable[[dict[str, Any], tuple[int, ...], Any], Work]] = {
    "gram_kernel": _gram,
    "quadratic_form_kernel": _quadratic_form,
    "prepare_kernel": _prepare,
    "row_powers_kernel": _row_powers,
    "scale_rows_kernel": _scale_rows,
    "scores_kernel": _scores,
    "apply_kernel": _apply,
    "linear_kernel": _linear,
    "down_kernel": _down,
    "up_kernel": _up,
    "few_down_kernel": _few_down,
    "few_up_kernel": _few_up,
    "few_silu_mul_kernel": _few_up,
    "finish_kernel": _finish,
}
