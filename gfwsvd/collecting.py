"""What the statistics of a calibration take beside its passes, as steps of `effort.py`."""

from collections.abc import Collection
from dataclasses import replace

from gfwsvd_kernels.reference import token_space_is_cheaper

from .effort import Shape, Step, moves, product, thin
from .kronecker import PROBES
from .methods import GRADIENTS, INPUTS


def collection(
    shape: Shape,
    tokens: int,
    *,
    sample: int | None = None,
    collect: Collection[str],
    first: bool,
    on_cpu: bool,
    times: float,
) -> list[Step]:
    """What the Kronecker factors of all layers add to a pass over batches of `tokens`, and in the first one those
    moments that are collected.

    Args:
        sample: tokens of a gradient sample of the Fisher information; None where each token is one.
    """
    # The norms of the factors, in float64, close the pass
    steps = [moves(width**2 / 2, 9, 8) for sizes in shape.linears.values() for width in sizes]
    dtype = "float32" if on_cpu else shape.dtype  # on a CPU sums and their operands are float32
    probed = "bfloat16" if dtype == "bfloat16" else "float32"
    cast = 1.5 * (shape.itemsize < 4)  # of rows to float32
    weighted = sample is None  # tokens are: by their norms or, from the second pass on, by quadratic forms
    for name in shape.linears:
        inputs = first and INPUTS in collect and shape.leads(name)
        outputs = first and GRADIENTS in collect
        for width, moved, grams in (
            (shape.linears[name][0], 1.5 + (0.5 + cast) * first + 1.5 * inputs, inputs),
            (shape.linears[name][1], 3.5 + (0.5 + cast) * first + (1.5 + cast) * outputs, outputs),
        ):
            # Of the factor, the moment and the form
            steps += triangles(dtype, width, tokens, times * (weighted * (2 - first) + grams), on_cpu=on_cpu)
            steps.append(thin(probed, tokens, width, times * 2 * (weighted + grams)))
            steps.append(product("float32", tokens, width, PROBES, times * 2 * first))
            steps.append(moves(tokens * width, times * (moved + 1.5 * weighted), shape.itemsize))
        if sample is not None:
            about: dict[str, bool] = {"first": first, "on_cpu": on_cpu}
            steps += _of_samples(shape, name, tokens, sample=sample, dtype=dtype, times=times, **about)
    return steps


def triangles(dtype: str, width: float, rows: float, times: float, *, on_cpu: bool) -> list[Step]:
    """Packed lower triangles of products of matrices (WIDTH, ROWS) and (ROWS, WIDTH): half of the operations."""
    step = product(dtype, width, width, rows, times / 2)
    if not on_cpu:
        return [step]
    # The curve is of squares: of fewer rows than columns, more entries of the triangle go with as many operations
    beyond = Step("fold", max(0.0, width**2 - step.size**2) ** 0.5, times * (rows < width))
    return [replace(step, curve="gram", times=times), beyond]


def _of_samples(
    shape: Shape, name: str, tokens: int, *, sample: int, dtype: str, first: bool, on_cpu: bool, times: float
) -> list[Step]:
    """What the Kronecker factors of a layer take where gradient samples are of `sample` tokens."""
    d_in, d_out = shape.linears[name]
    each, metric = times * tokens / sample, not first
    # The energy of each sample, by its gradient: squares, the same in float64, their sum
    steps = [product("float32", d_in, d_out, sample, each), moves(d_in * d_out, 3.5 * each)]
    steps.append(product("float32", PROBES, PROBES, sample, 2 * each * first))
    for inner, width in ((d_in, d_out), (d_out, d_in)):  # of the side that weighs, and of the factor
        route = _samples_on_cpu if on_cpu else _samples_on_gpu
        steps += route(dtype, tokens, sample, inner, width, metric=metric, times=times)
        # The norms of what samples add, by probes; the metric is made full for that and for the step
        steps += [thin("float32", tokens, width, times), thin("float32", sample, width, each)]
        steps += [thin("float32", sample, inner, 2 * each), thin("float32", inner, inner, each * metric)]
        steps.append(Step("symmetrize", inner, 2 * times * metric))
    casts = 5 * 1.5 * (shape.itemsize < 4)  # of rows to float32
    steps.append(moves(tokens * (d_in + d_out), times * casts, shape.itemsize))
    return steps


def _samples_on_cpu(
    dtype: str, tokens: int, sample: int, inner: int, width: int, *, metric: bool, times: float
) -> list[Step]:
    """Sample by sample, by its tokens or by its gradient, whichever takes less."""
    each = times * tokens / sample
    if token_space_is_cheaper(sample, inner, width, metric):
        steps = [product(dtype, sample, inner, inner, each * metric), product(dtype, sample, sample, inner, each)]
        steps.append(product(dtype, sample, sample, width, each))
        return steps + triangles(dtype, width, sample, each, on_cpu=True)
    steps = [product(dtype, width, inner, sample, each), product(dtype, width, inner, inner, each * metric)]
    return steps + triangles(dtype, width, inner, each, on_cpu=True)


def _samples_on_gpu(
    dtype: str, tokens: int, sample: int, inner: int, width: int, *, metric: bool, times: float
) -> list[Step]:
    """By tokens: in float32, of three products in TF32, but for those of two rows where no metric is between them."""
    each, pairs = times * tokens / sample, "float32" if metric else dtype
    steps = [product("float32", tokens, inner, inner, times * metric), product(pairs, sample, sample, inner, each)]
    steps.append(product("float32", sample, sample, width, each))
    parts = 1 if dtype == "float32" else 3  # of a float32 operand beside one in half precision
    return steps + triangles(dtype, width, tokens, times * parts, on_cpu=False)
