"""The operators on a GPU: dispatch, large shapes, and what an interpreter cannot show (bfloat16, concurrency)."""

import pytest
import torch
from group_cases import GROUPS, by_torch, factors, group_of, oracle
from kernel_cases import DTYPES, assert_as_good_as, least_eigenvalue, truncation_bound, with_nan_above_diagonal

from gfwsvd_kernels import (
    Factors,
    LowRankGroup,
    decode,
    gram,
    gram_accumulate,
    lowrank_linear,
    pack,
    quadratic_form,
    quadratic_form_scale,
    sequence_unit_step,
    symmetrize,
    tiles,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

SIZES = [(5, 3), (700, 333), (4096, 1024), (1000, 2048)]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def gram_tiles(dtype: torch.dtype, out: torch.Tensor, x: torch.Tensor) -> list[tiles.Tile]:
    """The shipped tile, and a wide and a tall one."""
    target = tiles.target(x.device)
    found = [tiles.tile("gram", target, dtype, x)]
    if dtype.itemsize == 2 and tiles.by_descriptors(target, out, x):
        found += [tiles.Tile(128, 256, 64, 8, 3), tiles.Tile(256, 128, 64, 8, 3)]
    return found


def metric(width: int) -> torch.Tensor:
    factor = normal(width, width + 3)
    return factor @ factor.mT / width


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_gram_accumulate_agrees_with_float64(size, dtype, weighted):
    x = normal(*size, dtype=dtype)
    weight = torch.rand(size[0], device="cuda") if weighted else None
    scaled = x if weight is None else (x.float() * weight.sqrt()[:, None]).to(dtype)
    exact = x.double() if weight is None else x.double() * weight.double().sqrt()[:, None]
    out = torch.zeros(size[1], size[1], device="cuda")
    gram_accumulate(out, x, weight)
    peer = scaled.mT @ scaled if dtype == torch.float32 else torch.mm(scaled.mT, scaled, out_dtype=torch.float32)
    assert_as_good_as(peer.tril(), out, (exact.mT @ exact).tril())
    assert least_eigenvalue(out) > -1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(100_000, 200), (4096, 1024), (8192, 4096), (513, 2000), (31, 4100)])
def test_every_step_of_every_tile_is_added_exactly_once(size, dtype):
    """Integers, so that any order of additions gives the same bits and a lost or doubled one shows."""
    x = torch.randint(-3, 4, size, device="cuda").to(dtype)
    expected = (x.double().mT @ x.double()).tril()
    packed = torch.zeros(size[1] * (size[1] + 1) // 2, device="cuda")
    gram_accumulate(packed, x)
    assert torch.equal(symmetrize(packed).double().tril(), expected)
    out = torch.zeros_like(expected, dtype=torch.float32)
    for tile in gram_tiles(dtype, out, x):
        out.zero_()
        gram.gram_accumulate(out, x, tile=tile)
        assert torch.equal(out.double(), expected)


def test_deterministic_mode_repeats_bit_for_bit():
    x = normal(50_000, 300, dtype=torch.bfloat16)
    results = [torch.zeros(300, 300, device="cuda") for _ in range(3)]
    torch.use_deterministic_algorithms(True)
    try:
        for out in results:
            gram_accumulate(out, x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_tiles_agree_with_float64_and_leave_the_upper_triangle_alone(dtype, weighted):
    x, weight = normal(5000, 2048, dtype=dtype), torch.rand(5000, device="cuda") if weighted else None
    scaled = x if weight is None else (x.float() * weight.sqrt()[:, None]).to(dtype)
    start = normal(2048, 2048)
    for tile in gram_tiles(dtype, start, x):
        out = with_nan_above_diagonal(start)
        gram.gram_accumulate(out, x, weight, tile=tile)
        expected = start.double().tril() + (scaled.double().mT @ scaled.double()).tril()
        peer = start.tril() + torch.mm(scaled.mT, scaled, out_dtype=torch.float32).tril()
        assert_as_good_as(peer, out.tril(), expected)
        assert torch.equal(out.isnan(), torch.ones_like(out, dtype=torch.bool).triu(1))


@pytest.mark.parametrize("size", SIZES)
def test_a_bfloat16_and_a_float32_operand_are_multiplied_as_well_as_in_float32(size):
    x = normal(*size, dtype=torch.bfloat16)
    other = x.float() * (1 + 2.0**-12)  # would round back to x
    out, oracle = torch.zeros(size[1], size[1], device="cuda"), x.double().mT @ other.double()
    gram.gram_accumulate(out, x, other=other)
    truncation = truncation_bound(3, size[0])
    assert_as_good_as((x.float().mT @ other).tril(), out, oracle.tril(), truncation=truncation)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quadratic_form_agrees_with_float64(size, dtype):
    x, A = normal(*size, dtype=dtype), metric(size[1])
    oracle, rounded = (((x.double() @ matrix.double()) * x.double()).sum(1) for matrix in (A, A.to(dtype)))
    peer = rounded if size[0] < 100 else ((x @ A.to(dtype)).float() * x.float()).sum(1)  # few may be right by luck
    q = quadratic_form(x, with_nan_above_diagonal(A))
    assert_as_good_as(peer, q, oracle)
    assert_as_good_as(peer, quadratic_form(x, pack(A)), oracle)
    assert_as_good_as(peer, quadratic_form(x, A.to(dtype)), oracle)
    assert torch.equal(q, quadratic_form(x, with_nan_above_diagonal(A)))  # whichever program arrives last


@pytest.mark.parametrize("size", [*SIZES, (20_000, 1024)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scaled_rows_agree_with_float64_and_repeat_bit_for_bit(size, dtype):
    x, g, A = normal(*size, dtype=dtype), normal(size[0], 777, dtype=dtype), metric(size[1])
    q, scaled = quadratic_form_scale(x, pack(A), g, 1 / size[1])
    form, rounded = (((x.double() @ matrix.double()) * x.double()).sum(1) for matrix in (A, A.to(dtype)))
    peer = rounded if size[0] < 100 else ((x @ A.to(dtype)).float() * x.float()).sum(1)  # few may be right by luck
    assert_as_good_as(peer, q, form)
    exact, peer = ((found / size[1]).sqrt()[:, None] * g.double() for found in (form, rounded))
    assert_as_good_as(peer.to(dtype), scaled, exact)
    for _ in range(5):
        again = quadratic_form_scale(x, pack(A), g, 1 / size[1])
        assert torch.equal(again[0], q) and torch.equal(again[1], scaled)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_metric", [False, True])
def test_sequence_unit_step_agrees_with_float64(dtype, with_metric):
    lengths = [1, 512, 0, 300, 77]
    cu_seqlens = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    x, g = normal(sum(lengths), 640, dtype=dtype), normal(sum(lengths), 384, dtype=dtype)
    A = metric(640) if with_metric else None
    oracle = torch.zeros(384, 384, device="cuda", dtype=torch.float64)
    for xs, gs in zip(x.double().split(lengths), g.double().split(lengths), strict=True):
        G = gs.mT @ xs
        oracle += G @ (G.mT if A is None else A.double() @ G.mT)
    out = torch.zeros(384, 384, device="cuda")
    sequence_unit_step(out, x, g, None if A is None else with_nan_above_diagonal(A), cu_seqlens)
    truncation = 0.0 if with_metric else truncation_bound(3, sum(lengths))
    assert_as_good_as(oracle.tril(), out, oracle.tril(), truncation=truncation)
    assert least_eigenvalue(out) > -1e-5


@pytest.mark.parametrize("num_tokens", [1, 16, 17, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lowrank_linear_agrees_with_float64_and_has_gradients(num_tokens, dtype):
    x, down, up, bias = (
        normal(*shape, dtype=dtype).requires_grad_() for shape in ((num_tokens, 300), (77, 300), (515, 77), (515,))
    )
    y = lowrank_linear(x, down, up, bias)
    oracle = x.double() @ down.double().mT @ up.double().mT + bias.double()
    peer = torch.nn.functional.linear(torch.nn.functional.linear(x, down), up, bias)
    assert_as_good_as(peer, y, oracle)
    actual, expected = (torch.autograd.grad(out.float().square().mean(), (x, down, up, bias)) for out in (y, peer))
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * expected[0].abs().max().item())


def test_more_than_two_to_the_31_elements_are_addressed():
    x = torch.zeros(2**31 // 64 + 1000, 64, device="cuda", dtype=torch.float16)
    x[-1] = 1
    out = torch.zeros(64, 64, device="cuda")
    gram_accumulate(out, x)
    assert torch.equal(out, torch.ones(64, 64, device="cuda").tril())
    assert quadratic_form(x, torch.eye(64, device="cuda"))[-1] == 64


def test_a_double_is_refused_on_a_gpu():
    with pytest.raises(TypeError, match="x must be one of .* on cuda, got torch.float64"):
        quadratic_form(normal(4, 4, dtype=torch.float64), normal(4, 4, dtype=torch.float64))


@pytest.mark.parametrize(
    "name", ["gram_accumulate", "packed", "quadratic_form", "quadratic_form_scale", "sequence_unit_step"]
)
def test_a_captured_graph_replays_the_same_sum(name):
    x, A, cu_seqlens = normal(300, 64), metric(64), torch.tensor([0, 40, 300], device="cuda")
    call = {
        "gram_accumulate": lambda out: gram_accumulate(out, x),
        "packed": lambda out: gram_accumulate(out.view(-1)[:2080], x),
        "quadratic_form": lambda out: out[0].add_(quadratic_form(x, A)[:64]),
        "quadratic_form_scale": lambda out: out.add_(quadratic_form_scale(x, A, x, 0.5)[1][:64]),
        "sequence_unit_step": lambda out: sequence_unit_step(out, x, x, A, cu_seqlens),
    }[name]
    once, replayed = torch.zeros(2, 64, 64, device="cuda")
    call(once)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(replayed)
    for _ in range(3):
        graph.replay()
    torch.testing.assert_close(replayed, 3 * once)


def test_a_compiled_graph_runs_the_kernels():
    x, out = normal(100, 64), torch.zeros(64, 64, device="cuda")
    torch.compile(gram_accumulate, fullgraph=True)(out, x)
    assert_as_good_as((x.double().mT @ x.double()).tril(), out, (x.double().mT @ x.double()).tril())
    A = metric(64)
    compiled = torch.compile(quadratic_form_scale, fullgraph=True)(x, A, x, 0.5)
    torch.testing.assert_close(compiled, quadratic_form_scale(x, A, x, 0.5))


@pytest.mark.parametrize("case", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 65])
def test_a_group_agrees_with_float64_call_after_call(case, dtype, num_tokens):
    projections, activation = group_of(case, dtype)
    group = LowRankGroup(projections, activation=activation)
    for _ in range(3):
        x = normal(num_tokens, projections[0].down.shape[1], dtype=dtype)
        peer, exact = (form(x, projections, activation) for form in (by_torch, oracle))
        assert_as_good_as(peer, group(x), exact)


LARGE = {  # of Llama-3.1-8B: (rank, D_OUT) of each projection, activation
    "qkv": ([(1632, 4096), (640, 1024), (640, 1024)], None),
    "gate_up": ([(2544, 14336), (2544, 14336)], "silu_mul"),
}


def large_group(name: str, dtype: torch.dtype, pivoted: bool) -> tuple[list[Factors], str | None]:
    sizes, activation = LARGE[name]
    return [factors(4096, rank, d_out, pivoted, False, dtype=dtype) for rank, d_out in sizes], activation


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 5, 8, 16, 48, 300])
def test_a_group_of_a_real_model_agrees_with_float64(name, pivoted, num_tokens):
    projections, activation = large_group(name, torch.bfloat16, pivoted)
    group, x = LowRankGroup(projections, activation=activation), normal(num_tokens, 4096, dtype=torch.bfloat16)
    assert_as_good_as(by_torch(x, projections, activation), group(x), oracle(x, projections, activation))


# (rank, D_OUT, pivoted, with bias) of each projection, activation; several programs and steps, odd ranks and widths
FEW = {
    "one": ([(43, 97, False, False)], None),
    "wide": ([(300, 5001, False, True)], None),
    "tall": ([(4099, 70, False, False)], None),
    "pivots_alone": ([(12, 12, True, True)], None),
    "mixed": ([(1003, 1530, True, True), (65, 301, False, False), (7, 64, True, True)], None),
    "gate_up": ([(277, 1111, False, True), (1030, 1111, False, False)], "silu_mul"),
    "pivoted_gate_up": ([(277, 1111, True, True), (611, 1111, True, False)], "silu_mul"),
    "mixed_gate_up": ([(77, 333, False, False), (211, 333, True, False)], "silu_mul"),
}


@pytest.fixture
def few_alone(monkeypatch):
    """No other way through a group is open."""
    for name in ("skinny", "matmuls"):
        monkeypatch.delattr(decode, name)


@pytest.mark.parametrize("case", FEW)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d_in", [8, 1096])
def test_a_few_tokens_on_tensor_cores_agree_with_float64_and_repeat_bit_for_bit(few_alone, case, dtype, d_in):
    sizes, activation = FEW[case]
    projections = [factors(d_in, *one, dtype=dtype) for one in sizes]
    group = LowRankGroup(projections, activation=activation)
    for num_tokens in (8, 3, 5, 4):
        x = normal(num_tokens, 2 * d_in, dtype=dtype)[:, :d_in]
        y = group(x)
        assert_as_good_as(by_torch(x, projections, activation), y, oracle(x, projections, activation))
        assert all(torch.equal(y, group(x)) for _ in range(3))


def test_tokens_at_an_odd_address_are_matrix_products(monkeypatch):
    monkeypatch.delattr(decode, "few")
    projections = [factors(64, 24, 96, True, True, dtype=torch.bfloat16)]
    x = normal(4 * 64 + 1, dtype=torch.bfloat16)[1:].view(4, 64)
    assert_as_good_as(by_torch(x, projections, None), LowRankGroup(projections)(x), oracle(x, projections, None))


@pytest.mark.parametrize("num_tokens", [1, 5, 48])
def test_a_graph_replays_a_group_on_new_inputs(num_tokens):
    projections, activation = large_group("qkv", torch.bfloat16, True)
    group, x = LowRankGroup(projections, activation=activation), normal(num_tokens, 4096, dtype=torch.bfloat16)
    group(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = group(x)
    for _ in range(3):
        x.copy_(normal(num_tokens, 4096))
        y.fill_(float("nan"))
        graph.replay()
        assert_as_good_as(by_torch(x, projections, activation), y, oracle(x, projections, activation))


@pytest.mark.parametrize("num_tokens", [2, 4, 48])
def test_a_deterministic_group_repeats_bit_for_bit(num_tokens):
    projections, activation = large_group("gate_up", torch.float16, False)
    group, x = LowRankGroup(projections, activation=activation), normal(num_tokens, 4096, dtype=torch.float16)
    torch.use_deterministic_algorithms(True)
    try:
        first = group(x)
        assert all(torch.equal(first, group(x)) for _ in range(20))
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_compiled_group_runs_its_kernels():
    projections, activation = group_of("pivoted_gate_up", torch.bfloat16)
    group, x = LowRankGroup(projections, activation=activation), normal(4, 48, dtype=torch.bfloat16)
    compiled = torch.compile(group, fullgraph=True)
    for _ in range(3):
        assert_as_good_as(by_torch(x, projections, activation), compiled(x), oracle(x, projections, activation))
