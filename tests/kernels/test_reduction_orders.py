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
# What programs do -> (tokens, width, SMs): small, for the interpreter takes its time for every step of every tile
CASES = {
    "whole tiles": (90, 70, 1),
    "waves and a rest": (150, 40, 5),
    "blocks and their tails": (330, 20, 12),
    "ranges across tiles": (811, 30, 3),
}
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


def plan(tokens: int, width: int, num_sms: int) -> plans.Plan:
    return plans.plan(TILE.in_triangle(width), -(-tokens // TILE.depth), num_sms)


def accumulated(x: torch.Tensor, num_sms: int) -> torch.Tensor:
    """What the kernel adds to zeros."""
    out = torch.zeros(x.shape[1], x.shape[1])
    gram.gram_accumulate(out, x, tile=TILE, target=tiles.Target(90, num_sms))
    return out


def emulated(x: torch.Tensor, plan: plans.Plan, order: Sequence[int]) -> torch.Tensor:
    """The same additions without Triton: float32 in a tile, step by step, then into `out` as programs arrive."""
    tokens, width = x.shape
    corners = places(TILE, width)
    side = TILE.rows * 8  # with room for the edges of the last tiles
    padded = np.zeros((plan.steps * TILE.depth, side), dtype=np.float32)
    padded[:tokens, :width] = x.numpy()
    out = np.zeros((side, side), dtype=np.float32)
    for program in order:
        for tile, first, count in plan.segments(program):
            i, j = corners[tile]
            acc = np.zeros((TILE.rows, TILE.cols), dtype=np.float32)
            for step in range(first, first + count):
                steps = slice(step * TILE.depth, (step + 1) * TILE.depth)
                left = np.ascontiguousarray(padded[steps, i : i + TILE.rows])
                right = np.ascontiguousarray(padded[steps, j : j + TILE.cols])
                acc = np.matmul(left.T, right) + acc
            out[i : i + TILE.rows, j : j + TILE.cols] += acc
    return torch.from_numpy(out[:width, :width]).tril()


def orders(programs: int, count: int) -> list[list[int]]:
    """By number, from the last to the first, and at random."""
    found = [list(range(programs)), list(range(programs))[::-1]]
    return found + [torch.randperm(programs).tolist() for _ in range(count - 2)]


def test_the_cases_are_what_their_names_say():
    found = [plan(*case) for case in CASES.values()]
    assert [(p.waves > 0, p.rest > 0) for p in found] == [(True, False), (True, True), (False, True), (False, True)]
    assert all(p.steps % p.share for p in found[1:])
    across = [any(len(p.segments(program)) > p.waves + 1 for program in range(p.programs)) for p in found]
    assert across == [False, False, False, True]


@pytest.mark.parametrize("case", CASES)
def test_the_emulation_has_the_bits_of_the_kernel_in_any_order_of_arrival(case):
    tokens, width, num_sms = CASES[case]
    x, shares = torch.randn(tokens, width), plan(*CASES[case])
    for order in orders(shares.programs, 3):
        with arriving(order):
            assert torch.equal(accumulated(x, num_sms).tril(), emulated(x, shares, order))


@pytest.mark.parametrize("case", CASES)
def test_every_order_of_arrival_adds_every_step_of_every_tile_exactly_once(case):
    """Integers, whose sums are exact, so that one lost or doubled step shows in any order."""
    x, shares = torch.randint(-3, 4, CASES[case][:2]).float(), plan(*CASES[case])
    expected = (x.double().mT @ x.double()).tril()
    for order in orders(shares.programs, 20):
        assert torch.equal(emulated(x, shares, order).double(), expected)


@pytest.mark.parametrize("case", CASES)
def test_every_order_of_arrival_stays_within_the_bound_of_float32_sums(case):
    x, shares = torch.randn(CASES[case][:2]), plan(*CASES[case])
    exact = (x.double().mT @ x.double()).tril()
    additions = len(x) + 2 * shares.steps  # of products, of steps and into `out`
    bound = additions * ROUNDING * (x.double().abs().mT @ x.double().abs()).tril()
    results = [emulated(x, shares, order) for order in orders(shares.programs, 20)]
    assert all(((result.double() - exact).abs() <= bound).all() for result in results)
    if shares.steps // shares.share > 1:  # a tile of three or more additions: the order shows in the bits
        assert any(not torch.equal(a, b) for a, b in itertools.pairwise(results))


def test_deterministic_mode_gives_the_same_bits_on_any_machine_in_any_order():
    """6 tiles of 13 steps, which otherwise 40 SMs would cut."""
    x = torch.randn(200, 40)
    assert plan(*x.shape, 40).share < 13
    expected = emulated(x, plan(*x.shape, 6), range(6))
    torch.use_deterministic_algorithms(True)
    try:
        for num_sms, order in zip((5, 40), orders(6, 3)[1:], strict=True):
            with arriving(order):
                assert torch.equal(accumulated(x, num_sms).tril(), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_last_to_arrive_gives_the_quadratic_form_the_same_bits_in_any_order():
    """4 blocks of rows of A by 2 blocks of tokens, whose partial sums cancel: another order would show."""
    x, A = torch.randn(20, 60), torch.randn(60, 60)
    A = A + A.mT
    tile = tiles.Tile(16, 16, 16, 4, 2)
    expected = quadform.quadratic_form(x, A, tile=tile)
    for order in orders(8, 5):
        with arriving(order):
            assert torch.equal(quadform.quadratic_form(x, A, tile=tile), expected)


def test_partial_sums_are_added_by_the_last_to_arrive_alone():
    """Integers: a sum taken before all have arrived, or twice, is not this one."""
    x, A = torch.randint(-3, 4, (20, 60)).float(), torch.randint(-3, 4, (60, 60)).float()
    A = A + A.mT
    exact = ((x.double() @ A.double()) * x.double()).sum(1)
    for order in orders(8, 5):
        with arriving(order):
            q = quadform.quadratic_form(x, A, tile=tiles.Tile(16, 16, 16, 4, 2))
        assert torch.equal(q.double(), exact)
