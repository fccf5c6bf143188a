"""The choice of tiles and the shares of work."""

import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import places

from gfwsvd_kernels import plan as plans
from gfwsvd_kernels import tiles

PLANS = [
    (num_tiles, steps, programs)
    for num_tiles in (1, 2, 3, 20, 36, 72, 132, 136, 263, 272, 528)
    for steps in (1, 2, 7, 8, 9, 100, 512)
    for programs in (1, 3, 7, 132, 264)
]


def test_a_plan_gives_every_step_of_every_tile_to_one_program():
    for num_tiles, steps, programs in PLANS:
        plan = plans.plan(num_tiles, steps, programs)
        assert 1 <= plan.programs <= programs
        owners = torch.zeros(num_tiles, steps, dtype=torch.int32)
        for program in range(plan.programs):
            for tile, first, count in plan.segments(program):
                assert count > 0 and first + count <= steps
                owners[tile, first : first + count] += 1
        assert (owners == 1).all(), (num_tiles, steps, programs)


def busiest(plan: plans.Plan) -> int:
    """Steps of the busiest program, its additions counted as what could be multiplied meanwhile."""
    segments = [plan.segments(program) for program in range(plan.programs)]
    return max(sum(count for *_, count in own) + plans.ADDITION_STEPS * len(own) for own in segments)


def test_no_program_is_busier_than_with_equal_shares_or_equal_parts_of_tiles():
    for num_tiles, steps, programs in PLANS:
        plan = plans.plan(num_tiles, steps, programs)
        work = [sum(count for _, _, count in plan.segments(program)) for program in range(plan.programs)]
        assert max(work) == plan.longest
        least, rest = min(plans.LEAST_STEPS, steps), num_tiles % programs
        if rest:
            part = max(-(-steps // (programs // rest)), least)
            assert busiest(plan) <= plan.waves * (steps + plans.ADDITION_STEPS) + part + plans.ADDITION_STEPS
            assert plan.longest - plan.waves * steps >= max(-(-rest * steps // programs), least)


def test_a_tile_is_added_to_as_rarely_as_stream_k_would():
    for num_tiles, steps, programs in PLANS:
        plan = plans.plan(num_tiles, steps, programs)
        additions = sum(len(plan.segments(program)) for program in range(plan.programs))
        assert additions <= num_tiles + plan.programs


def test_programs_read_the_same_tokens_at_the_same_time():
    """D = 1024 on the reference machine: the blocks of 20 tiles start at six places, the last steps elsewhere."""
    plan = plans.plan(20, 2048, 132)
    starts = Counter(plan.segments(program)[0][1] for program in range(plan.programs))
    assert [count for _, count in starts.most_common(6)] == [20] * 6
    assert all(first >= 6 * plan.share for first, _ in starts.most_common()[6:])


@pytest.mark.parametrize("rows, cols", [(16, 16), (16, 32), (64, 16), (128, 256)])
def test_tiles_are_counted_that_make_up_squares_of_the_triangle(rows, cols):
    tile = tiles.Tile(rows, cols, 16, 4, 2)
    for width in (1, 15, 16, 17, 33, 48, 150, 576, 1000):
        corners = places(tile, width)
        assert tile.in_triangle(width) == len(set(corners)) == len(corners)
        needed = {(i, j) for i in range(0, width, rows) for j in range(0, width, cols) if j <= min(i + rows, width) - 1}
        assert needed <= set(corners)


def test_deterministic_mode_asks_for_no_number_of_sms():
    tile = tiles.Tile(128, 128, 64, 8, 4)
    torch.use_deterministic_algorithms(True)
    try:
        found = {plans.gram_plan(tile, tiles.Target(90, sms), 8192, 4096) for sms in (1, 78, 132, 10_000)}
    finally:
        torch.use_deterministic_algorithms(False)
    (plan,) = found
    assert [plan.segments(program) for program in (0, plan.programs - 1)] == [[(0, 0, 128)], [(527, 0, 128)]]


def test_rows_that_cannot_be_read_in_vectors_get_the_small_tile():
    aligned, unaligned = torch.empty(8, 64), torch.empty(8, 63)
    shipped = tiles.ALIGNED["gram"][90][4]
    assert tiles.tile("gram", tiles.H200, torch.float32, aligned) == shipped
    assert tiles.tile("gram", tiles.H200, torch.float32, aligned[:, :40]) == shipped
    for odd in (unaligned, aligned[:, 1:], aligned.mT, aligned[:, ::2], torch.empty(1, 1)):
        assert tiles.tile("gram", tiles.H200, torch.float32, aligned, odd) == tiles.UNALIGNED["gram"]


def test_occupancy_is_what_the_scarcest_resource_allows():
    assert tiles.blocks_per_sm(128, 0, 8) == 2  # registers: 65536 / (128 x 256)
    assert tiles.blocks_per_sm(129, 0, 8) == 1  # they come in eights
    assert tiles.blocks_per_sm(32, 100 * 1024, 4) == 2  # shared memory: 228 / (100 + 1)
    assert tiles.blocks_per_sm(32, 100 * 1024, 4, arch=80) == 0  # 100 / (100 + 1)
    assert tiles.blocks_per_sm(16, 0, 16) == 4  # threads: 2048 / 512
    assert tiles.blocks_per_sm(16, 0, 1) == 32  # blocks


@pytest.mark.parametrize("capability, arch", [((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((10, 3), 100), ((12, 0), 80)])
def test_a_gpu_gets_the_tiles_of_its_architecture(monkeypatch, capability, arch):
    gpu = SimpleNamespace(major=capability[0], minor=capability[1], multi_processor_count=7, name="a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert tiles.target(torch.device("cuda")) == (arch, 7)


def test_an_older_gpu_is_refused_by_name(monkeypatch):
    gpu = SimpleNamespace(major=7, minor=5, multi_processor_count=7, name="Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    with pytest.raises(ValueError, match=re.escape("8.0 or later, got 7.5 (Tesla T4)")):
        tiles.target(torch.device("cuda"))


def test_a_stride_that_would_overflow_an_offset_is_refused():
    huge = torch.empty(2**23, 4, device="meta")
    tiles.check_strides(x=huge)  # more elements than 2**24, small strides
    with pytest.raises(
        ValueError, match=re.escape("x must have strides below 8388608 elements on a GPU, got strides (1, 8388608)")
    ):
        tiles.check_strides(x=torch.empty(4, 2**23, device="meta").mT)
