"""How the factors of a group lie in memory."""

import pytest
import torch
from group_cases import factors, group_of

from gfwsvd_kernels import LowRankGroup, layout
from gfwsvd_kernels.layout import Layout


def test_up_lies_in_blocks_that_start_on_16_bytes_with_zeros_between():
    projection = factors(8, 3, 1200, True, False, dtype=torch.float32, device="cpu")
    group = LowRankGroup([projection])
    (record,) = group.layout.records()
    bounds = group.table[record["bounds_start"] : record["bounds_start"] + 4].tolist()
    source = group.table[record["source_start"] :].tolist()
    assert all(bound % layout.ALIGN == 0 for bound in bounds) and bounds[-1] == record["pitch"]
    pivots = projection.pivots.tolist()
    rest = [output for output in range(1200) if output not in pivots]
    up = group.up.view(3, -1)
    for number, output in enumerate(rest):
        block = output // layout.OUT_BLOCK
        assert bounds[block] <= source[output] < bounds[block + 1]
        assert torch.equal(up[:, source[output]], projection.up[number])
    assert [source[pivot] for pivot in pivots] == [-1, -2, -3]
    assert up.count_nonzero() == projection.up.count_nonzero()


@pytest.mark.parametrize("num_sms", [1, 4, 132])
def test_slices_of_the_rank_cover_it_and_carry_nearly_the_same_load(num_sms):
    rows = [(1632, 8192), (400, 5120), (400, 5120)]
    chunks = layout.rank_chunks(rows, num_sms)
    assert all(1 <= chunk <= layout.MAX_CHUNK for chunk in chunks)
    if num_sms == 132:
        programs = sum(-(-rank // chunk) for (rank, _), chunk in zip(rows, chunks, strict=True))
        loads = [cost * chunk for (_, cost), chunk in zip(rows, chunks, strict=True)]
        assert programs <= 132 and max(loads) - min(loads) <= max(cost for _, cost in rows)
        assert max(loads) <= 1.15 * sum(rank * cost for rank, cost in rows) / 132


def test_a_layout_comes_back_from_its_sizes():
    projections, activation = group_of("pivoted_gate_up", torch.float32)
    group = LowRankGroup(projections, activation=activation)
    assert Layout.of(group.layout.sizes, True) == group.layout
    assert group.layout.out_width == 520 and group.layout.rank == 27
    assert group.up.numel() == group.layout.up_numel and group.workspace.numel() == group.layout.workspace_numel
