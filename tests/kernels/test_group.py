"""LowRankGroup: layout, definition and Triton kernels against the projections in float64."""

import re

import pytest
import torch
from group_cases import GROUPS, by_torch, group_of, in_whole_numbers, oracle
from kernel_cases import DEVICE, DTYPES, assert_as_good_as
from torch import Tensor

from gfwsvd_kernels import Factors, LowRankGroup, decode, lowrank_linear, tiles
from gfwsvd_kernels.layout import Layout, Operands


def skinny(x: Tensor, operands: Operands, layout: Layout) -> Tensor:
    """The interpreter runs program by program: of many outputs each gets more than the shipped two or four."""
    few = DEVICE == "cpu" and layout.out_width > 500
    return decode.skinny(x, operands, layout, tile=tiles.Tile(16, len(x), 64, 4, 1) if few else None)


# name -> (launcher, the definition if None; a token count for half precision; another one)
LAUNCHERS = {
    "definition": (None, (20, 1)),
    "skinny": (skinny, (2, 1)),
    "matmuls": (decode.matmuls, (3, 1)),
}
RUNS = [
    (name, num_tokens, dtype)
    for name, (_, counts) in LAUNCHERS.items()
    for dtype in DTYPES
    for num_tokens in counts[: 2 if dtype == torch.float32 else 1]
]


def run(name: str, group: LowRankGroup, x: Tensor) -> Tensor:
    launch, _ = LAUNCHERS[name]
    if launch is None:
        return group(x)
    return launch(x, group.operands, group.layout)


def inputs(projections: list[Factors], *shape: int) -> Tensor:
    down = projections[0].down
    return torch.randn(*shape, down.shape[1], device=DEVICE).to(down.dtype)


@pytest.mark.parametrize("case", GROUPS)
@pytest.mark.parametrize("launcher, num_tokens, dtype", RUNS)
def test_a_group_computes_its_projections(case, launcher, num_tokens, dtype):
    projections, activation = group_of(case, dtype)
    x = inputs(projections, num_tokens)
    group = LowRankGroup(projections, activation=activation)
    y = run(launcher, group, x)
    assert y.dtype == dtype
    assert_as_good_as(by_torch(x, projections, activation), y, oracle(x, projections, activation))


@pytest.mark.parametrize("case", ["one_with_bias", "pivoted_all", "pivoted_qkv", "gate_up", "pivoted_gate_up"])
@pytest.mark.parametrize("launcher, num_tokens, dtype", RUNS)
def test_a_group_of_whole_numbers_computes_what_they_stand_for(case, launcher, num_tokens, dtype):
    projections, activation = group_of(case, dtype)
    x = inputs(projections, num_tokens)
    projections = [in_whole_numbers(projection) for projection in projections]
    group = LowRankGroup(projections, activation=activation)
    assert group.down.dtype == group.up.dtype == torch.int8
    y = run(launcher, group, x)
    assert y.dtype == dtype
    assert_as_good_as(by_torch(x, projections, activation), y, oracle(x, projections, activation))


@pytest.mark.parametrize("case", ["pivoted_qkv", "gate_up", "pivoted_gate_up"])
@pytest.mark.parametrize("num_tokens", [8, 19])
def test_a_pass_over_the_products_finishes_every_token(case, num_tokens):
    projections, activation = group_of(case, torch.float32)
    x = inputs(projections, num_tokens)
    y = run("matmuls", LowRankGroup(projections, activation=activation), x)
    assert_as_good_as(by_torch(x, projections, activation), y, oracle(x, projections, activation))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_sums_of_whole_numbers_stay_in_the_range_of_float16(launcher):
    projections, _ = group_of("one", torch.float16)
    projections = [in_whole_numbers(projection) for projection in projections]
    x = 200 * projections[0].down[:1].sign().half()
    assert (x @ projections[0].down.half().mT).isinf().any(), "without the unit one would not"
    y = run(launcher, LowRankGroup(projections), x)
    assert_as_good_as(by_torch(x, projections, None), y, oracle(x, projections, None))


@pytest.mark.parametrize("launcher", ["skinny", "matmuls"])
def test_nothing_outside_of_the_buffers_is_read_or_written(launcher):
    projections, activation = group_of("pivoted_qkv", torch.float32)
    group = LowRankGroup(projections, activation=activation)
    guards = []
    for name in ("down", "up", "bias"):
        buffer = getattr(group, name)
        guarded = torch.full((buffer.numel() + 32,), float("nan"), device=DEVICE)
        guarded[16:-16] = buffer.flatten()
        setattr(group, name, guarded[16:-16].view(buffer.shape))
        guards.append(guarded)
    x = inputs(projections, 2)
    y = run(launcher, group, x)
    assert_as_good_as(by_torch(x, projections, activation), y, oracle(x, projections, activation))
    assert all(guard[:16].isnan().all() and guard[-16:].isnan().all() for guard in guards)


def watched(monkeypatch) -> list[str]:
    """The names of the launchers that are asked from now on."""
    asked: list[str] = []
    for name in ("skinny", "few", "matmuls"):

        def launch(x, operands, layout, *, target=None, name=name):
            asked.append(name)
            return x.new_empty(len(x), layout.out_width)

        monkeypatch.setattr(decode, name, launch)
    return asked


def test_the_number_of_tokens_decides_the_launch(monkeypatch):
    asked = watched(monkeypatch)
    projections, _ = group_of("one", torch.float32)
    group = LowRankGroup(projections)
    buffers = (*group.operands, group.layout.sizes, False)
    for num_tokens in (1, 2, 3):
        decode.lowrank_group(inputs(projections, num_tokens), *buffers)
    assert asked == ["skinny", "skinny", "matmuls"]
    assert decode.lowrank_group(inputs(projections, 2, 0), *buffers).shape == (2, 0, 33)


@pytest.mark.parametrize(
    "case, dtype, num_tokens, expected",
    [
        ("one", torch.bfloat16, 2, "skinny"),
        ("one", torch.bfloat16, 3, "few"),
        ("one", torch.float16, 8, "few"),
        ("one", torch.bfloat16, 9, "few"),
        ("one", torch.bfloat16, 17, "matmuls"),
        ("one", torch.float32, 3, "matmuls"),
        ("rank_one", torch.bfloat16, 3, "matmuls"),  # of 9 inputs
    ],
)
def test_up_to_eight_tokens_in_half_precision_go_to_tensor_cores(monkeypatch, case, dtype, num_tokens, expected):
    asked = watched(monkeypatch)
    projections, _ = group_of(case, dtype, "cpu")
    group = LowRankGroup(projections).to("meta")
    x = torch.empty(num_tokens, group.d_in, dtype=dtype, device="meta")
    decode.group(x, group.operands, group.layout)
    assert asked == [expected]


def test_tensor_cores_get_neither_whole_numbers_nor_rows_off_16_bytes_nor_a_cpu(monkeypatch):
    asked = watched(monkeypatch)
    projections, _ = group_of("one", torch.float16, "cpu")
    group = LowRankGroup(projections)
    x = torch.empty(4, group.d_in, dtype=torch.float16)
    decode.group(x, group.operands, group.layout)
    group, x = group.to("meta"), torch.empty(4 * group.d_in + 1, dtype=torch.float16, device="meta")
    decode.group(x[1:].view(4, -1), group.operands, group.layout)
    whole = LowRankGroup([in_whole_numbers(projection) for projection in projections]).to("meta")
    decode.group(x[:-1].view(4, -1), whole.operands, whole.layout)
    assert asked == ["matmuls"] * 3


def test_leading_dimensions_are_kept_and_no_tokens_give_no_outputs():
    projections, activation = group_of("gate_up", torch.float32)
    group = LowRankGroup(projections, activation=activation)
    x = inputs(projections, 2, 3)
    torch.testing.assert_close(group(x), group(x.view(6, -1)).view(2, 3, -1))
    assert group(x[:, :0]).shape == (2, 0, 520)


def test_a_group_of_one_is_the_low_rank_linear_layer():
    (projection,), _ = group_of("one_with_bias", torch.float32)
    x = inputs([projection], 7)
    expected = lowrank_linear(x, projection.down, projection.up, projection.bias)
    torch.testing.assert_close(LowRankGroup([projection])(x), expected)


def test_torch_compile_traces_a_group_in_one_graph_and_the_operator_keeps_the_rules_of_operators():
    projections, activation = group_of("pivoted_gate_up", torch.float32)
    group = LowRankGroup(projections, activation=activation)
    x = inputs(projections, 4)
    compiled = torch.compile(group, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), group(x))
    buffers = (*group.operands, group.layout.sizes, group.layout.silu_mul)
    torch.library.opcheck(torch.ops.gfwsvd.lowrank_group.default, (x, *buffers))


def test_a_gradient_is_refused_not_lost():
    projections, _ = group_of("one", torch.float32)
    y = LowRankGroup(projections)(inputs(projections, 2).requires_grad_())
    with pytest.raises(RuntimeError, match="no autograd formula"):
        y.sum().backward()


def test_a_module_follows_to_another_dtype_and_has_no_state():
    projections, _ = group_of("pivoted_qkv", torch.float32)
    group = LowRankGroup(projections).to(torch.float64)
    x = torch.randn(3, 64, device=DEVICE, dtype=torch.float64)
    if DEVICE == "cpu":  # a GPU has no float64 kernels
        torch.testing.assert_close(group(x), oracle(x, projections, None), rtol=1e-12, atol=1e-12)
    assert group.state_dict() == {} and "pivoted" in repr(group)


# Bad input

GOOD = {"down": torch.zeros(2, 5), "up": torch.zeros(4, 2), "bias": torch.zeros(4), "pivots": None}
BAD = [
    ({"up": torch.zeros(4, 3)}, ValueError, r"down \(R, D_IN\) and up \(D_OUT, R\) with R >= 1, got .*'up': \(4, 3\)"),
    ({"down": torch.zeros(0, 5), "up": torch.zeros(4, 0)}, ValueError, "with R >= 1"),
    ({"down": torch.zeros(2)}, ValueError, "projection 1 must have down"),
    ({"down": torch.zeros(2, 6)}, ValueError, "projection 1 must read the 5 inputs of the first"),
    ({"bias": torch.zeros(3)}, ValueError, r"the bias of projection 1 must be \(4,\)"),
    ({"up": torch.zeros(4, 2).half()}, TypeError, "up of projection 1 must be torch.float32 .* got torch.float16"),
    ({"bias": torch.zeros(4, device="meta")}, ValueError, "bias of projection 1 must be on cpu, got meta"),
    ({"scales": torch.ones(2, 2)}, ValueError, r"scales of projection 1 must be \(2, 2\), or None in all"),
    ({"pivots": torch.tensor([0, 0]), "bias": None}, ValueError, "must be 2 distinct int64"),
    ({"pivots": torch.tensor([0, 6]), "bias": None}, ValueError, "must be outputs 0 to 5, got 0 to 6"),
    ({"pivots": torch.tensor([0]), "bias": None}, ValueError, "must be 2 distinct int64"),
    ({"pivots": torch.tensor([0.0, 1.0]), "bias": None}, ValueError, "must be 2 distinct int64"),
]


@pytest.mark.parametrize("changed, error, message", BAD)
def test_a_bad_projection_is_named_with_what_was_expected(changed, error, message):
    with pytest.raises(error, match=message):
        LowRankGroup([Factors(**GOOD), Factors(**GOOD | changed)])


def test_bad_whole_numbers_are_refused():
    whole = {"down": torch.ones(2, 5).to(torch.int8), "up": torch.ones(4, 2).to(torch.int8), "scales": torch.ones(2, 2)}
    with pytest.raises(TypeError, match="down must be floating-point, or int8 with scales, got torch.int8"):
        LowRankGroup([Factors(**whole | {"scales": None})])
    with pytest.raises(TypeError, match="down must be floating-point, or int8 with scales, got torch.float32"):
        LowRankGroup([Factors(**whole | {"down": torch.ones(2, 5)})])
    with pytest.raises(TypeError, match="up of projection 0 must be torch.int8 as the first, got torch.float32"):
        LowRankGroup([Factors(**whole | {"up": torch.ones(4, 2)})])
    with pytest.raises(TypeError, match="scales must be floating-point, got torch.int64"):
        LowRankGroup([Factors(**whole | {"scales": torch.ones(2, 2, dtype=torch.int64)})])
    with pytest.raises(ValueError, match=r"scales of projection 0 must be \(2, 2\)"):
        LowRankGroup([Factors(**whole | {"scales": torch.ones(2, 3)})])
    with pytest.raises(TypeError, match="x must be .* torch.float32"):
        LowRankGroup([Factors(**whole)])(torch.ones(1, 5).half())


def test_a_bad_group_is_refused():
    good = Factors(**GOOD)
    with pytest.raises(ValueError, match="at least one projection"):
        LowRankGroup([])
    with pytest.raises(ValueError, match=re.escape("activation must be one of (None, 'silu_mul'), got 'gelu'")):
        LowRankGroup([good], activation="gelu")
    for projections in ([good], [good, Factors(torch.zeros(2, 5), torch.zeros(6, 2))]):
        with pytest.raises(ValueError, match="two projections with the same number of outputs"):
            LowRankGroup(projections, activation="silu_mul")
    with pytest.raises(TypeError, match="down must be floating-point, or int8 with scales, got torch.int64"):
        LowRankGroup([Factors(torch.zeros(2, 5).long(), torch.zeros(4, 2).long())])
    with pytest.raises(ValueError, match=r"fewer than 2\^31 elements, got 2147483648"):
        LowRankGroup([Factors(torch.empty(2**15, 8, device="meta"), torch.empty(2**16, 2**15, device="meta"))])


def test_a_bad_input_is_refused():
    group = LowRankGroup([Factors(**GOOD)])
    with pytest.raises(ValueError, match=r"x must be \(3, 5\) .* got \(3, 4\)"):
        group(torch.zeros(3, 4))
    with pytest.raises(TypeError, match="x must be .* torch.float32 .* got .* torch.float16"):
        group(torch.zeros(3, 5).half())
    with pytest.raises(ValueError, match="tensor without dimensions"):
        group(torch.tensor(1.0))
