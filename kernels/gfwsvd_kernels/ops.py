"""The operators: schema, argument checks, dispatch and gradients, each stated once.

An operator is `torch.ops.gfwsvd.<name>` and the function of that name here. On a CPU it runs its definition in
`reference.py`; on a CUDA device a Triton launcher, whose module is imported at the first call. Both, and the shape-only
version that `torch.compile` traces, check their arguments with the same function. `TypeError` is for dtypes,
`ValueError` for shapes, strides, devices, values.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from gfwsvd_kernels import reference
from gfwsvd_kernels.layout import Layout, Operands

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FLOATS_CPU = (*FLOATS, torch.float64)


def gram_accumulate(out: Tensor, x: Tensor, weight: Tensor | None = None, other: Tensor | None = None) -> None:
    """Add the lower triangle of `xᵀ diag(weight) y` to that of `out`, in place; y is `other` if given, else x.

    Args:
        out: (D, D) float32, rows contiguous; float64 where x is. Only the lower triangle, diagonal included, is
            updated; the strict upper one keeps its values, whatever they are. Or the triangle alone, packed row by row
            as `pack` does: (D (D + 1) / 2,), contiguous. `symmetrize(out)` gives the full matrix of both.
        x: (T, D) float32, float16 or bfloat16 (float64 on a CPU), any strides. T = 0 does nothing.
        weight: (T,) of out's dtype, non-negative. `sqrt(weight)` multiplies both operands, so the sum is positive
            semi-definite to fp32 rounding. A negative weight is an error on a CPU; on a GPU, where looking would stall
            the stream, it gives NaN.
        other: (T, D) of x's dtype. The caller promises that the sum is symmetric: nothing else makes one triangle
            enough.

    Products accumulate in out's dtype. On a GPU weighted rows are written to memory first, at most 256 MB an operand at
    a time, rounded to their own dtype again: keep weights of order one, or float16 overflows. There several programs
    may add to one tile, in no fixed order, unless `torch.use_deterministic_algorithms(True)` asks for the same bits
    every time. No gradient flows through this operator.

    Raises:
        TypeError: a dtype not listed above.
        ValueError: shapes that do not fit, rows of out or a packed out that are not contiguous, different devices, a
            negative weight on a CPU; on a GPU, strides of 2²³ elements or more, or a GPU older than 8.0.
    """
    _gram_accumulate(out, x, weight, other)


def quadratic_form(x: Tensor, A: Tensor) -> Tensor:
    """Row by row `x_tᵀ A x_t`: (T,) float32, or float64 where x is.

    Args:
        x: (T, D) float32, float16 or bfloat16 (float64 on a CPU), any strides.
        A: (D, D) float32 (float64 where x is) or x's dtype, any strides, symmetric. Only its lower triangle counts: the
            rest may hold anything. Or that triangle packed, (D (D + 1) / 2,), contiguous. On a GPU a float32 A is
            rounded to a half-precision x's dtype first (float16: relative to the largest entry of each row), into a
            temporary (D, D) matrix of that dtype; products and sums are not rounded to it.

    Rounding can turn a zero of a positive semi-definite A into a small negative number: clamp before using it as a
    weight. The result does not depend on the order in which a GPU runs its programs. No gradient is defined.

    Raises:
        TypeError: a dtype not listed above.
        ValueError: shapes that do not fit, a packed A that is not contiguous, different devices; on a GPU, strides of
            2²³ elements or more, or a GPU older than 8.0.
    """
    return _quadratic_form(x, A)


def quadratic_form_scale(x: Tensor, A: Tensor, g: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`q_t = x_tᵀ A x_t`, and the rows of g scaled by its root: `(q, sqrt(max(scale q_t, 0)) g_t)`.

    `gram_accumulate` of the scaled rows is `scale sum_t q_t g_t g_tᵀ`, what it gives for g with the weights `scale q`.

    Args:
        x, A: as in `quadratic_form`.
        g: (T, D_G) of x's dtype, any strides.
        scale: non-negative. The scaled rows are rounded to g's dtype: choose it so that `scale q` is of order one, or
            float16 overflows.

    Returns:
        q, as from `quadratic_form`, and the scaled rows, (T, D_G) contiguous, of g's dtype. Where rounding took a zero
        of q below zero, the row is zero. Neither depends on the order in which a GPU runs its programs. No gradient is
        defined.

    Raises:
        TypeError: a dtype not listed above.
        ValueError: as `quadratic_form`, or a scale that is negative or NaN.
    """
    return _quadratic_form_scale(x, A, g, scale)


def sequence_unit_step(out: Tensor, x: Tensor, g: Tensor, A: Tensor | None, cu_seqlens: Tensor) -> None:
    """Add the lower triangle of `sum_s G_s A G_sᵀ`, `G_s = g_sᵀ x_s` for each sequence s, to that of `out`, in place.

    One half of a power-iteration step with sequences as samples; with the roles of x and g exchanged it is the other
    half. It never needs the gradients G_s: `G_s A G_sᵀ = g_sᵀ (K_s g_s)` with `K_s = x_s A x_sᵀ`.

    Args:
        out: (D_OUT, D_OUT) or packed, as in `gram_accumulate`.
        x: (T, D_IN) float32, float16 or bfloat16 (float64 on a CPU), any strides: the tokens of all sequences, one
            after another.
        g: (T, D_OUT) of x's dtype, any strides.
        A: (D_IN, D_IN) float32 (float64 where x is), symmetric positive semi-definite; only its lower triangle is read.
            It may be packed. None is the identity.
        cu_seqlens: (N + 1,) int32 or int64 on x's device: 0, the ends of the N sequences in ascending order, T.
            Sequences may be empty and of any lengths. The values are checked on a CPU; on a GPU, where looking would
            stall the stream, they are the caller's to get right.

    Raises:
        TypeError: a dtype not listed above.
        ValueError: shapes that do not fit, different devices, offsets that do not cut T tokens (on a CPU).
    """
    _sequence_unit_step(out, x, g, A, cu_seqlens)


def lowrank_linear(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
    """`(x downᵀ) upᵀ + bias`: (..., D_OUT).

    Args:
        x: (..., D_IN) float32, float16 or bfloat16 (float64 on a CPU), any strides; may be empty.
        down: (R, D_IN) with R >= 1, up: (D_OUT, R), bias: (D_OUT,) or None, all of x's dtype, any strides.

    Sums are accumulated in float32 and the intermediate (..., R) is rounded to x's dtype, as two `torch.nn.Linear`
    would do. Differentiable in every tensor; the backward pass recomputes the intermediate.

    Raises:
        TypeError: dtypes that differ or are not listed above.
        ValueError: shapes that do not fit, a rank of zero, different devices.
    """
    return _lowrank_linear(x, down, up, bias)


def lowrank_group(x: Tensor, operands: Operands, layout: Layout) -> Tensor:
    """What a `LowRankGroup` computes of x (..., D_IN); the other arguments are its tensors and sizes (`layout.py`).

    Raises:
        TypeError: x of another dtype than the factors.
        ValueError: x of another width, or on another device.
    """
    if not x.is_cuda or torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
        return _lowrank_group(x, *operands, layout.sizes, layout.silu_mul)
    _check_input(x, operands)  # a token has no time to dispatch
    return _launch("gfwsvd_kernels.decode", "group", x, operands, layout)


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> None:
    if tuple(tensor.shape) == shape and tensor.dtype == dtype and tensor.device == like.device:
        return
    error = TypeError if tensor.dtype != dtype else ValueError
    raise error(
        f"{name} must be {shape} {dtype} on {like.device}, got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
    )


def _expect_float(name: str, tensor: Tensor) -> None:
    allowed = FLOATS if tensor.is_cuda else FLOATS_CPU
    if tensor.dtype not in allowed:
        raise TypeError(f"{name} must be one of {allowed} on {tensor.device.type}, got {tensor.dtype}")


def _expect_tokens(name: str, tensor: Tensor) -> None:
    _expect_float(name, tensor)
    if tensor.ndim != 2:
        raise ValueError(f"{name} must be 2-dimensional (tokens, features), got {tuple(tensor.shape)}")


def _expect_symmetric(name: str, matrix: Tensor, width: int, x: Tensor, dtype: torch.dtype | None = None) -> None:
    """A full matrix, or its packed triangle."""
    dtype = dtype or _accumulator_dtype(x)
    if matrix.ndim != 1:
        return _expect(name, matrix, (width, width), dtype, x)
    _expect(f"packed {name}", matrix, (reference.triangle(width),), dtype, x)
    if width > 1 and matrix.stride(0) != 1:
        raise ValueError(f"packed {name} must be contiguous, got stride {matrix.stride(0)}")


def _expect_accumulator(out: Tensor, width: int, x: Tensor) -> None:
    _expect_symmetric("out", out, width, x)
    if out.ndim == 2 and width > 1 and (out.stride(1) != 1 or out.stride(0) < width):
        raise ValueError(f"out must have contiguous rows (strides (>= {width}, 1)), got strides {out.stride()}")


def _accumulator_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_gram(out: Tensor, x: Tensor, weight: Tensor | None = None, other: Tensor | None = None) -> None:
    _expect_tokens("x", x)
    num_tokens, width = x.shape
    _expect_accumulator(out, width, x)
    if weight is not None:
        _expect("weight", weight, (num_tokens,), out.dtype, x)
    if other is not None:
        _expect("other", other, (num_tokens, width), x.dtype, x)


def _check_gram_values(out: Tensor, x: Tensor, weight: Tensor | None = None, other: Tensor | None = None) -> None:
    if weight is not None and weight.numel() and (least := weight.min().item()) < 0:
        raise ValueError(f"weight must be non-negative, got a minimum of {least:.6g}: clamp or drop those tokens")


def _check_quadratic_form(x: Tensor, A: Tensor) -> None:
    _expect_tokens("x", x)
    _expect_symmetric("A", A, x.shape[1], x, x.dtype if A.dtype == x.dtype else None)


def _check_quadratic_form_scale(x: Tensor, A: Tensor, g: Tensor, scale: float) -> None:
    _check_quadratic_form(x, A)
    _expect_tokens("g", g)
    _expect("g", g, (x.shape[0], g.shape[1]), x.dtype, x)
    if not scale >= 0:
        raise ValueError(f"scale must be non-negative, got {scale}")


def _check_sequence(out: Tensor, x: Tensor, g: Tensor, A: Tensor | None, cu_seqlens: Tensor) -> None:
    _expect_tokens("x", x)
    _expect_tokens("g", g)
    _expect("g", g, (x.shape[0], g.shape[1]), x.dtype, x)
    _expect_accumulator(out, g.shape[1], x)
    if A is not None:
        _expect_symmetric("A", A, x.shape[1], x)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.device != x.device:
        got = f"{tuple(cu_seqlens.shape)} on {cu_seqlens.device}"
        raise ValueError(f"cu_seqlens must be (N + 1,) on {x.device}, got {got}")


def _check_sequence_values(out: Tensor, x: Tensor, g: Tensor, A: Tensor | None, cu_seqlens: Tensor) -> None:
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != x.shape[0]:
        raise ValueError(f"cu_seqlens must start at 0 and end at T = {x.shape[0]}, got {first} and {last}")
    if (cu_seqlens[1:] < cu_seqlens[:-1]).any():
        raise ValueError("cu_seqlens must not decrease: it holds the offsets at which sequences start, then T")


def _check_lowrank(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> None:
    _expect_float("x", x)
    if x.ndim < 1 or down.ndim != 2 or up.ndim != 2:
        shapes = f"{tuple(x.shape)}, {tuple(down.shape)} and {tuple(up.shape)}"
        raise ValueError(f"x, down and up must be (..., D_IN), (R, D_IN) and (D_OUT, R), got {shapes}")
    rank, d_out = down.shape[0], up.shape[0]
    if rank == 0:
        raise ValueError("the rank R must be at least 1, got down of shape (0, D_IN): a zero map needs no operator")
    _expect("down", down, (rank, x.shape[-1]), x.dtype, x)
    _expect("up", up, (d_out, rank), x.dtype, x)
    if bias is not None:
        _expect("bias", bias, (d_out,), x.dtype, x)


def _check_group(x: Tensor, *arguments: Any) -> None:
    _check_input(x, Operands(*arguments[:-2]))


def _check_input(x: Tensor, operands: Operands) -> None:
    down = operands.down
    _expect_float("x", x)
    if x.ndim < 1:
        raise ValueError(f"x must be (..., {down.shape[1]}), got a tensor without dimensions")
    _expect("x", x, (*x.shape[:-1], down.shape[1]), operands.dtype, down)


def _nothing(*args: Any) -> None:
    """What an operator that only updates its output returns, and the value check of one that has none."""


def _launch(module: str, name: str, first: Tensor, *args: Any) -> Any:
    launcher = getattr(import_module(module), name)
    if first.get_device() == torch.cuda.current_device():  # to ask costs less than to change
        return launcher(first, *args)
    with torch.cuda.device(first.device):  # Triton launches on the current device, whatever holds the tensors
        return launcher(first, *args)


def _define(
    definition: Callable[..., Any],
    launcher: str,
    check: Callable[..., None],
    check_values: Callable[..., None] = _nothing,
    shape_only: Callable[..., Any] = _nothing,
    mutates: tuple[str, ...] = (),
) -> Any:
    """Declare an operator: `definition` on a CPU, the function of that name in module `launcher` on CUDA."""
    name = definition.__name__

    def on_cpu(*args: Any) -> Any:
        check(*args)
        check_values(*args)
        return definition(*args)

    def on_cuda(*args: Any) -> Any:
        check(*args)
        return _launch(launcher, name, *args)

    def fake(*args: Any) -> Any:
        check(*args)
        return shape_only(*args)

    schema = torch.library.infer_schema(definition, mutates_args=mutates)
    op = torch.library.custom_op(f"gfwsvd::{name}", on_cpu, mutates_args=mutates, device_types="cpu", schema=schema)
    op.register_kernel("cuda")(on_cuda)
    op.register_fake(fake)
    return op


_gram_accumulate = _define(
    reference.gram_accumulate, "gfwsvd_kernels.gram", _check_gram, _check_gram_values, mutates=("out",)
)
_quadratic_form = _define(
    reference.quadratic_form,
    "gfwsvd_kernels.quadform",
    _check_quadratic_form,
    shape_only=lambda x, A: x.new_empty(x.shape[0], dtype=_accumulator_dtype(x)),
)
_quadratic_form_scale = _define(
    reference.quadratic_form_scale,
    "gfwsvd_kernels.quadform",
    _check_quadratic_form_scale,
    shape_only=lambda x, A, g, scale: (x.new_empty(x.shape[0], dtype=_accumulator_dtype(x)), g.new_empty(g.shape)),
)
_sequence_unit_step = _define(
    reference.sequence_unit_step,
    "gfwsvd_kernels.sequence",
    _check_sequence,
    _check_sequence_values,
    mutates=("out",),
)
_lowrank_linear = _define(
    reference.lowrank_linear,
    "gfwsvd_kernels.lowrank",
    _check_lowrank,
    shape_only=lambda x, down, up, bias: x.new_empty((*x.shape[:-1], up.shape[0])),
)
_lowrank_group = _define(
    reference.lowrank_group,
    "gfwsvd_kernels.decode",
    _check_group,
    shape_only=lambda x, *args: x.new_empty((*x.shape[:-1], Layout.of(*args[-2:]).out_width)),
)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    x, down, up, bias = inputs
    ctx.save_for_backward(x, down, up)


def _lowrank_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, down, up = ctx.saved_tensors
    needs_x, needs_down, needs_up, needs_bias = ctx.needs_input_grad
    x2d, grad2d = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    grad_z = grad2d @ up
    return (
        (grad_z @ down).view(x.shape) if needs_x else None,
        grad_z.mT @ x2d if needs_down else None,
        grad2d.mT @ (x2d @ down.mT) if needs_up else None,
        grad2d.sum(0) if needs_bias else None,
    )


_lowrank_linear.register_autograd(_lowrank_backward, setup_context=_save_for_backward)
