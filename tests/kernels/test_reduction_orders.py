"""The order of additions, emulated bit for bit: what depends on which program arrives first, and what does not."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from kernel_cases import places
from triton.runtime import interpreter

from gfwsvd_kernels import gram, quadform, tiles
from gfwsvd_kernels import plan as plans

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter alone runs programs in order")

TILE = tiles.Tile(16, 32, 16, 4, 2)
TOKENS, WIDTH = 330, 70  # 12 tiles of 21 steps, many of them ragged
MACHINES = (1, 2, 5, 12, 40)  # numbers of SMs: whole tiles alone, waves and a rest, blocks and ranges
ROUNDING = 2.0**-24


@contextmanager
def arriving(order: Sequence[int]) -> Iterator[None]:
    """Run the programs of a grid in this order; the interpreter runs them by their number, z fastest."""
    place = interpreter.interpreter_builder.set_grid_idx

    def reordered(x: int, y: int, z: int) -> None:
        shape = interpreter.interpreter_builder.grid_dim
        if np.prod(shape) != len(order):  # another kernel, before the one in question
            return place(x, y, z)
        place(*map(int, np.unravel_index(order[np.ravel_multi_index((x, y, z), shape)], shape)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.interpreter_builder, "set_grid_idx", reordered)
        yield


def plan(num_sms: int) -> plans.Plan:
    return plans.plan(TILE.in_triangle(WIDTH), -(-TOKENS // TILE.depth), num_sms)


def accumulated(x: torch.Tensor, num_sms: int) -> torch.Tensor:
    """What the kernel adds to zeros."""
    out = torch.zeros(WIDTH, WIDTH)
    gram.gram_accumulate(out, x, tile=TILE, target=tiles.Target(90, num_sms))
    return out


def emulated(x: torch.Tensor, plan: plans.Plan, order: Sequence[int]) -> torch.Tensor:
    """The same additions without Triton: float32 in a tile, step by step, then into `out` as programs arrive."""
    corners = places(TILE, WIDTH)
    rows, cols = TILE.rows * 8, TILE.cols * 4  # with room for the edges of the last tiles
    padded = np.zeros((plan.steps * TILE.depth, max(rows, cols)), dtype=np.float32)
    padded[:TOKENS, :WIDTH] = x.numpy()
    out = np.zeros((rows, cols), dtype=np.float32)
    for program in order:
        for tile, first, count in plan.segments(program):
            i, j = corners[tile]
            acc = np.zeros((TILE.rows, TILE.cols), dtype=np.float32)
            for step in range(first, first + count):
                tokens = slice(step * TILE.depth, (step + 1) * TILE.depth)
                left = np.ascontiguousarray(padded[tokens, i : i + TILE.rows])
                right = np.ascontiguousarray(padded[tokens, j : j + TILE.cols])
                acc = np.matmul(left.T, right) + acc
            out[i : i + TILE.rows, j : j + TILE.cols] += acc
    return torch.from_numpy(out[:WIDTH, :WIDTH]).tril()


def orders(programs: int, count: int) -> list[list[int]]:
    """By number, from the last to the first, and at random."""
    found = [list(range(programs)), list(range(programs))[::-1]]
    return found + [torch.randperm(programs).tolist() for _ in range(count - 2)]


@pytest.mark.parametrize("num_sms", MACHINES)
def test_the_emulation_has_the_bits_of_the_kernel_in_any_order_of_arrival(num_sms):
    x = torch.randn(TOKENS, WIDTH)
    for order in orders(plan(num_sms).programs, 4):
        with arriving(order):
            assert torch.equal(accumulated(x, num_sms).tril(), emulated(x, plan(num_sms), order))


def test_every_order_of_arrival_adds_every_step_of_every_tile_exactly_once():
    """Integers, whose sums are exact, so that one lost or doubled step shows in any order."""
    x = torch.randint(-3, 4, (TOKENS, WIDTH)).float()
    expected = (x.double().mT @ x.double()).tril()
    for num_sms in MACHINES:
        for order in orders(plan(num_sms).programs, 20):
            assert torch.equal(emulated(x, plan(num_sms), order).double(), expected)


def test_every_order_of_arrival_stays_within_the_bound_of_float32_sums():
    x = torch.randn(TOKENS, WIDTH)
    exact = (x.double().mT @ x.double()).tril()
    bound = (TOKENS + 42) * ROUNDING * (x.double().abs().mT @ x.double().abs()).tril()  # at most 21 + 21 more additions
    results = []
    for num_sms in MACHINES:
        for order in orders(plan(num_sms).programs, 20):
            results.append(emulated(x, plan(num_sms), order))
            assert ((results[-1].double() - exact).abs() <= bound).all()
    assert any(not torch.equal(a, b) for a, b in itertools.pairwise(results))  # the order shows in the bits


def test_deterministic_mode_gives_the_same_bits_on_any_machine_in_any_order():
    x = torch.randn(TOKENS, WIDTH)
    expected = emulated(x, plan(12), range(12))
    torch.use_deterministic_algorithms(True)
    try:
        for num_sms, order in zip(MACHINES, orders(12, len(MACHINES)), strict=True):
            with arriving(order):
                assert torch.equal(accumulated(x, num_sms).tril(), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_last_to_arrive_gives_the_quadratic_form_the_same_bits_in_any_order():
    """5 blocks of rows of A by 3 blocks of tokens, whose partial sums cancel: another order would show."""
    x, A = torch.randn(40, 70), torch.randn(70, 70)
    A = A + A.mT
    tile = tiles.Tile(16, 16, 16, 4, 2)
    expected = quadform.quadratic_form(x, A, tile=tile)
    for order in orders(15, 8):
        with arriving(order):
            assert torch.equal(quadform.quadratic_form(x, A, tile=tile), expected)


def test_partial_sums_are_added_by_the_last_to_arrive_alone():
    """Integers: a sum taken before all have arrived, or twice, is not this one."""
    x, A = torch.randint(-3, 4, (40, 70)).float(), torch.randint(-3, 4, (70, 70)).float()
    A = A + A.mT
    exact = ((x.double() @ A.double()) * x.double()).sum(1)
    for order in orders(15, 8):
        with arriving(order):
            q = quadform.quadratic_form(x, A, tile=tiles.Tile(16, 16, 16, 4, 2))
        assert torch.equal(q.double(), exact)
