"""The operators as torch sees them: schemas, tracing, dispatch, and what they say to bad arguments."""

import re
import subprocess
import sys

import pytest
import torch

import gfwsvd_kernels
from gfwsvd_kernels import (
    gram_accumulate,
    lowrank_linear,
    pack,
    quadratic_form,
    quadratic_form_scale,
    sequence_unit_step,
    symmetrize,
)

T, D, D_OUT, R = 6, 5, 4, 2
PACKED, PACKED_OUT = 15, 10  # entries of the triangles of D and D_OUT


def zeros(*shape: int, **options: object) -> torch.Tensor:
    return torch.zeros(*shape, **options)


def valid_arguments() -> dict[str, list[tuple]]:
    x, g, A = torch.randn(T, D), torch.randn(T, D_OUT), torch.eye(D)
    down, up, bias = (torch.randn(*shape, requires_grad=True) for shape in ((R, D), (D_OUT, R), (D_OUT,)))
    cu_seqlens = torch.tensor([0, 2, T])
    return {
        "gram_accumulate": [
            (zeros(D, D), x, None, None),
            (zeros(D, D), x.bfloat16(), torch.rand(T), x.bfloat16()),
            (zeros(PACKED), x, None, None),
        ],
        "quadratic_form": [(x, A), (x.double(), A.double()), (x, pack(A)), (x.bfloat16(), A.bfloat16())],
        "quadratic_form_scale": [(x, A, g, 0.5), (x.bfloat16(), pack(A), g.bfloat16().mT.contiguous().mT, 1.0)],
        "sequence_unit_step": [
            (zeros(D_OUT, D_OUT), x, g, A, cu_seqlens),
            (zeros(D_OUT, D_OUT), x, g, None, cu_seqlens),
            (zeros(PACKED_OUT), x, g, pack(A), cu_seqlens),
        ],
        "lowrank_linear": [(torch.randn(T, D), down, up, bias), (torch.randn(2, 3, D), down, up, None)],
    }


CALLS = [
    pytest.param(name, args, id=f"{name}-{i}") for name, all in valid_arguments().items() for i, args in enumerate(all)
]


@pytest.mark.parametrize("name, args", CALLS)
def test_torch_finds_nothing_wrong_with_the_registration(name, args):
    torch.library.opcheck(getattr(torch.ops.gfwsvd, name), args)


@pytest.mark.parametrize("name, args", CALLS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_graph_holds_the_operator_whole_and_gives_the_same(name, args, dynamic):
    op = getattr(gfwsvd_kernels, name)

    def around(*args: torch.Tensor | float | None) -> tuple[torch.Tensor, ...]:
        updated, *rest = (arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args)
        result = op(updated, *rest)
        results = result if isinstance(result, tuple) else (updated if result is None else result,)
        return tuple(tensor * 2 for tensor in results)

    torch._dynamo.reset()
    compiled = torch.compile(around, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), around(*args))


def test_a_compiled_low_rank_layer_has_the_same_gradients():
    x, down, up, bias = (torch.randn(*shape, requires_grad=True) for shape in ((T, D), (R, D), (D_OUT, R), (D_OUT,)))
    torch._dynamo.reset()
    compiled = torch.compile(lowrank_linear, fullgraph=True, backend="aot_eager")
    gradients = [
        torch.autograd.grad(f(x, down, up, bias).sum(), (x, down, up, bias)) for f in (compiled, lowrank_linear)
    ]
    torch.testing.assert_close(*gradients)


def test_statistics_of_tensors_that_need_gradients_carry_none():
    x, out = torch.randn(T, D, requires_grad=True), zeros(D, D)
    gram_accumulate(out, x)
    assert not out.requires_grad
    with pytest.raises(RuntimeError, match="no autograd formula"):
        quadratic_form(x, torch.eye(D)).sum().backward()


def test_symmetrize_mirrors_the_lower_triangle():
    lower = torch.tensor([[1.0, float("nan")], [2.0, 3.0]])
    assert symmetrize(torch.stack([lower, lower])).tolist() == [[[1.0, 2.0], [2.0, 3.0]]] * 2
    for wrong in ((2, 3), ()):
        with pytest.raises(ValueError, match=re.escape(f"(..., D, D) or packed, (D (D + 1) / 2,), got {wrong}")):
            symmetrize(torch.zeros(wrong))
    with pytest.raises(ValueError, match=re.escape("must have D (D + 1) / 2 elements, got 4")):
        symmetrize(zeros(4))


@pytest.mark.parametrize("width", [0, 1, 2, 45, 192, 193, 500])
def test_a_packed_triangle_holds_the_rows_one_after_another_and_becomes_the_same_matrix(width):
    lower = torch.randn(width, width).masked_fill(torch.ones(width, width, dtype=torch.bool).triu(1), float("nan"))
    packed = pack(lower)
    assert torch.equal(packed, torch.cat([lower[i, : i + 1] for i in range(width)]) if width else zeros(0))
    assert torch.equal(symmetrize(packed), symmetrize(lower))
    for wrong in (zeros(2, 3), zeros(3), zeros(2, 2, 2)):
        with pytest.raises(ValueError, match=re.escape(f"lower must be (D, D), got {tuple(wrong.shape)}")):
            pack(wrong)


# The arguments that a case does not replace.
GOOD = {
    gram_accumulate: {"out": zeros(D, D), "x": zeros(T, D)},
    quadratic_form: {"x": zeros(T, D), "A": zeros(D, D)},
    quadratic_form_scale: {"x": zeros(T, D), "A": zeros(D, D), "g": zeros(T, D_OUT), "scale": 1.0},
    sequence_unit_step: {
        "out": zeros(D_OUT, D_OUT),
        "x": zeros(T, D),
        "g": zeros(T, D_OUT),
        "A": None,
        "cu_seqlens": torch.tensor([0, 2, T]),
    },
    lowrank_linear: {"x": zeros(T, D), "down": zeros(R, D), "up": zeros(D_OUT, R)},
}
DOUBLE, ELSEWHERE = {"dtype": torch.float64}, {"device": "meta"}
BAD = [
    (gram_accumulate, {"x": zeros(T)}, ValueError, r"x must be 2-dimensional .* got \(6,\)"),
    (gram_accumulate, {"x": zeros(T, D).int()}, TypeError, "x must be one of .* got torch.int32"),
    (gram_accumulate, {"x": zeros(T, D, **DOUBLE)}, TypeError, "out must be .* torch.float64 .* got .* torch.float32"),
    (gram_accumulate, {"out": zeros(4, D)}, ValueError, r"out must be \(5, 5\) .* got \(4, 5\)"),
    (gram_accumulate, {"out": zeros(D, D).half()}, TypeError, "out must be .* got .* torch.float16"),
    (gram_accumulate, {"out": zeros(D, D, **DOUBLE)}, TypeError, "out must be .* got .* torch.float64"),
    (gram_accumulate, {"out": zeros(D, D, **ELSEWHERE)}, ValueError, "out must be .* on cpu, got .* on meta"),
    (gram_accumulate, {"out": zeros(D, D).mT}, ValueError, r"out must have contiguous rows .* got strides \(1, 5\)"),
    (gram_accumulate, {"out": zeros(1, D).expand(D, D)}, ValueError, r"contiguous rows .* got strides \(0, 1\)"),
    (gram_accumulate, {"weight": zeros(5)}, ValueError, r"weight must be \(6,\) .* got \(5,\)"),
    (
        gram_accumulate,
        {"weight": zeros(T).half()},
        TypeError,
        "weight must be .* torch.float32 .* got .* torch.float16",
    ),
    (gram_accumulate, {"weight": -torch.ones(T)}, ValueError, "weight must be non-negative, got a minimum of -1"),
    (gram_accumulate, {"other": zeros(T, 4)}, ValueError, r"other must be \(6, 5\) .* got \(6, 4\)"),
    (gram_accumulate, {"other": zeros(T, D).half()}, TypeError, "other must be .* got .* torch.float16"),
    (gram_accumulate, {"out": zeros(14)}, ValueError, r"packed out must be \(15,\) .* got \(14,\)"),
    (gram_accumulate, {"out": zeros(15).half()}, TypeError, "packed out must be .* got .* torch.float16"),
    (gram_accumulate, {"out": zeros(15, **ELSEWHERE)}, ValueError, "packed out must be .* on cpu, got .* on meta"),
    (gram_accumulate, {"out": zeros(30)[::2]}, ValueError, "packed out must be contiguous, got stride 2"),
    (quadratic_form, {"x": zeros(2, T, D)}, ValueError, r"x must be 2-dimensional .* got \(2, 6, 5\)"),
    (quadratic_form, {"A": zeros(4, 4)}, ValueError, r"A must be \(5, 5\) .* got \(4, 4\)"),
    (quadratic_form, {"A": zeros(D, D).half()}, TypeError, "A must be .* torch.float32 .* got .* torch.float16"),
    (quadratic_form, {"x": zeros(T, D).half(), "A": zeros(D, D).bfloat16()}, TypeError, "A must be .* torch.float32"),
    (quadratic_form, {"A": zeros(16)}, ValueError, r"packed A must be \(15,\) .* got \(16,\)"),
    (quadratic_form, {"A": zeros(1).expand(15)}, ValueError, "packed A must be contiguous, got stride 0"),
    (quadratic_form_scale, {"A": zeros(4, 4)}, ValueError, r"A must be \(5, 5\) .* got \(4, 4\)"),
    (quadratic_form_scale, {"g": zeros(T)}, ValueError, r"g must be 2-dimensional .* got \(6,\)"),
    (quadratic_form_scale, {"g": zeros(5, D_OUT)}, ValueError, r"g must be \(6, 4\) .* got \(5, 4\)"),
    (quadratic_form_scale, {"g": zeros(T, D_OUT).half()}, TypeError, "g must be .* got .* torch.float16"),
    (quadratic_form_scale, {"g": zeros(T, D_OUT, **ELSEWHERE)}, ValueError, "g must be .* on cpu, got .* on meta"),
    (quadratic_form_scale, {"scale": -1.0}, ValueError, "scale must be non-negative, got -1.0"),
    (quadratic_form_scale, {"scale": float("nan")}, ValueError, "scale must be non-negative, got nan"),
    (sequence_unit_step, {"out": zeros(15)}, ValueError, r"packed out must be \(10,\) .* got \(15,\)"),
    (sequence_unit_step, {"A": zeros(10)}, ValueError, r"packed A must be \(15,\) .* got \(10,\)"),
    (sequence_unit_step, {"x": zeros(T)}, ValueError, "x must be 2-dimensional"),
    (sequence_unit_step, {"g": zeros(T)}, ValueError, "g must be 2-dimensional"),
    (sequence_unit_step, {"g": zeros(5, D_OUT)}, ValueError, r"g must be \(6, 4\) .* got \(5, 4\)"),
    (sequence_unit_step, {"g": zeros(T, D_OUT).half()}, TypeError, "g must be .* got .* torch.float16"),
    (sequence_unit_step, {"out": zeros(D, D)}, ValueError, r"out must be \(4, 4\) .* got \(5, 5\)"),
    (sequence_unit_step, {"A": zeros(4, 4)}, ValueError, r"A must be \(5, 5\) .* got \(4, 4\)"),
    (sequence_unit_step, {"cu_seqlens": zeros(2)}, TypeError, "cu_seqlens must be int32 or int64, got torch.float32"),
    (sequence_unit_step, {"cu_seqlens": torch.tensor(T)}, ValueError, r"cu_seqlens must be \(N \+ 1,\) .* got \(\)"),
    (sequence_unit_step, {"cu_seqlens": zeros(0).int()}, ValueError, r"cu_seqlens must be \(N \+ 1,\) .* got \(0,\)"),
    (sequence_unit_step, {"cu_seqlens": zeros(2, **ELSEWHERE).int()}, ValueError, r"on cpu, got \(2,\) on meta"),
    (sequence_unit_step, {"cu_seqlens": torch.tensor([0, 2])}, ValueError, "end at T = 6, got 0 and 2"),
    (sequence_unit_step, {"cu_seqlens": torch.tensor([2, T])}, ValueError, "start at 0 .* got 2 and 6"),
    (sequence_unit_step, {"cu_seqlens": torch.tensor([0, 5, 3, T])}, ValueError, "cu_seqlens must not decrease"),
    (lowrank_linear, {"x": zeros(T, D) * 1j}, TypeError, "x must be one of .* got torch.complex64"),
    (
        lowrank_linear,
        {"x": torch.tensor(1.0)},
        ValueError,
        r"must be \(..., D_IN\), .* got \(\), \(2, 5\) and \(4, 2\)",
    ),
    (lowrank_linear, {"down": zeros(D)}, ValueError, r"got \(6, 5\), \(5,\) and \(4, 2\)"),
    (lowrank_linear, {"down": zeros(R, 4)}, ValueError, r"down must be \(2, 5\) .* got \(2, 4\)"),
    (lowrank_linear, {"down": zeros(R, D).half()}, TypeError, "down must be .* got .* torch.float16"),
    (lowrank_linear, {"down": zeros(0, D), "up": zeros(D_OUT, 0)}, ValueError, "rank R must be at least 1"),
    (lowrank_linear, {"up": zeros(D_OUT, 3)}, ValueError, r"up must be \(4, 2\) .* got \(4, 3\)"),
    (lowrank_linear, {"bias": zeros(3)}, ValueError, r"bias must be \(4,\) .* got \(3,\)"),
]


@pytest.mark.parametrize("op, changed, error, message", BAD)
def test_a_bad_argument_is_named_with_what_was_expected_and_what_came(op, changed, error, message):
    with pytest.raises(error, match=message):
        op(**GOOD[op] | changed)


@pytest.mark.parametrize("op", GOOD)
def test_the_arguments_that_the_bad_cases_start_from_are_good(op):
    op(**GOOD[op])


def test_tracing_checks_the_arguments_too():
    with pytest.raises(ValueError, match=r"A must be \(5, 5\) .* on meta, got \(4, 4\)"):
        quadratic_form(zeros(T, D, **ELSEWHERE), zeros(4, 4, **ELSEWHERE))


def test_an_import_brings_neither_triton_nor_a_cuda_context():
    script = (
        "import sys, torch, gfwsvd_kernels; "
        "assert not any('triton' in name.split('.')[0] for name in sys.modules); "
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_call_on_the_cpu_loads_no_launcher():
    script = (
        "import sys, torch, gfwsvd_kernels; "
        "gfwsvd_kernels.gram_accumulate(torch.zeros(2, 2), torch.ones(3, 2)); "
        "assert 'gfwsvd_kernels.gram' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
