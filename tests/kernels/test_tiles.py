"""The choice of tiles and the shares of work."""

import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from gfwsvd_kernels import tiles

PLANS = [
    (num_tiles, steps, programs)
    for num_tiles in (1, 2, 3, 20, 36, 72, 132, 136, 263, 272, 528)
    for steps in (1, 2, 7, 8, 9, 100, 512)
    for programs in (1, 3, 7, 132, 264)
]


def test_a_plan_gives_every_step_of_every_tile_to_one_program():
    for num_tiles, steps, programs in PLANS:
        plan = tiles.plan(num_tiles, steps, programs)
        assert 1 <= plan.programs <= programs
        owners = torch.zeros(num_tiles, steps, dtype=torch.int32)
        for program in range(plan.programs):
            for tile, first, count in plan.segments(program):
                assert count > 0 and first + count <= steps
                owners[tile, first : first + count] += 1
        assert (owners == 1).all(), (num_tiles, steps, programs)


def test_no_program_has_more_than_one_step_over_its_equal_part():
    for num_tiles, steps, programs in PLANS:
        plan = tiles.plan(num_tiles, steps, programs)
        work = [sum(count for _, _, count in plan.segments(program)) for program in range(plan.programs)]
        assert max(work) == plan.longest and min(work) > 0
        fair = -(-num_tiles * steps // programs)
        assert plan.longest == fair or (plan.longest - plan.waves * steps == min(tiles.LEAST_STEPS, steps) > 0)


def test_a_tile_is_added_to_as_rarely_as_stream_k_would():
    for num_tiles, steps, programs in PLANS:
        plan = tiles.plan(num_tiles, steps, programs)
        additions = sum(len(plan.segments(program)) for program in range(plan.programs))
        assert additions <= num_tiles + plan.programs


def test_programs_read_the_same_tokens_at_the_same_time():
    """D = 1024 on the reference machine: the blocks of 20 tiles start at six places, the last steps elsewhere."""
    plan = tiles.plan(20, 512, 132)
    starts = Counter(plan.segments(program)[0][1] for program in range(plan.programs))
    assert [count for _, count in starts.most_common(6)] == [20] * 6
    assert all(first >= 6 * plan.share for first, _ in starts.most_common()[6:])


@pytest.mark.parametrize("rows, cols", [(16, 16), (16, 32), (128, 256)])
def test_tiles_are_counted_that_meet_the_triangle(rows, cols):
    tile = tiles.Tile(rows, cols, 16, 4, 2)
    for width in (1, 15, 16, 17, 33, 48, 150, 576, 1000):
        corners = [(i, j) for i in range(0, width, rows) for j in range(0, width, cols)]
        assert tile.in_triangle(width) == sum(j <= min(i + rows, width) - 1 for i, j in corners)


def chosen(tokens: int, width: int, out: torch.Tensor | None = None, target: tiles.Target = tiles.H200) -> tiles.Tile:
    x = torch.empty(tokens, width, dtype=torch.bfloat16, device="meta")
    out = torch.empty(width, width, device="meta") if out is None else out
    return tiles.gram_plan(tiles.gram_candidates(target, x.dtype, out, x, x), target, tokens, width)[0]


def test_wide_tiles_are_taken_where_they_load_less():
    narrow, wide = tiles.ALIGNED["gram"][90][2], tiles.LARGE["gram"][90][2]
    assert chosen(8192, 4096) == chosen(32768, 1024) == wide
    assert chosen(8192, 128) == chosen(8192, 384) == narrow  # one tile or six: wide ones would be wasted on the corner
    assert chosen(2048, 1024) == narrow  # few tokens: narrow tiles keep more SMs busy
    packed, odd_rows = torch.empty(4096 * 4097 // 2, device="meta"), torch.empty(4096, 4100, device="meta")[:, :4096]
    assert chosen(8192, 4096, packed) == chosen(8192, 4096, odd_rows) == narrow
    assert chosen(8192, 4096, target=tiles.Target(80, 108)) == tiles.ALIGNED["gram"][80][2]


def test_the_quadratic_form_takes_tall_tiles_where_they_keep_all_sms_busy():
    A = torch.empty(1024, 1024, device="meta")
    small, tall = tiles.ALIGNED["quadratic_form"][90][2], tiles.LARGE["quadratic_form"][90][2]
    for tokens, expected in ((2048, small), (8192, tall)):
        x = torch.empty(tokens, 1024, dtype=torch.bfloat16, device="meta")
        assert tiles.quadratic_form_tile(tiles.H200, x.dtype, x, A) == expected
    assert tiles.quadratic_form_tile(tiles.H200, torch.float32, x, A) == tiles.ALIGNED["quadratic_form"][90][4]
    assert tiles.quadratic_form_tile(tiles.H200, x.dtype, x[:, ::2], A) == tiles.UNALIGNED["quadratic_form"]


def test_deterministic_mode_asks_for_no_number_of_sms():
    both = [tiles.ALIGNED["gram"][90][2], tiles.LARGE["gram"][90][2]]
    torch.use_deterministic_algorithms(True)
    try:
        plans = {tiles.gram_plan(both, tiles.Target(90, sms), 8192, 4096) for sms in (1, 78, 132, 10_000)}
    finally:
        torch.use_deterministic_algorithms(False)
    ((_, plan),) = plans
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
