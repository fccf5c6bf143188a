"""How the factors of a group lie in memory."""

import torch
from group_cases import factors, group_of

from gfwsvd_kernels import LowRankGroup, layout
from gfwsvd_kernels.layout import Layout


def test_rows_start_on_16_bytes_with_zeros_behind_and_the_table_says_whose_they_are():
    pivoted = factors(8, 3, 12, True, False, dtype=torch.float32, device="cpu")
    whole = factors(8, 9, 5, False, False, dtype=torch.float32, device="cpu")
    group = LowRankGroup([pivoted, whole])
    assert group.down.shape == (8 + 16, 8)
    assert torch.equal(group.down[:3], pivoted.down) and torch.equal(group.down[8:17], whole.down)
    assert not group.down[3:8].any() and not group.down[17:].any()
    pivots = pivoted.pivots.tolist()
    rest = [output for output in range(12) if output not in pivots]
    first, second = group.layout.records
    assert group.table[group.layout.pivots_start :][:24].tolist() == pivots + [-1] * 21
    assert group.table[first["places_start"] :][:9].tolist() == rest
    assert group.table[second["places_start"] :][:5].tolist() == [12, 13, 14, 15, 16]
    source = group.table[group.layout.sources_start :].tolist()
    assert [source[pivot] for pivot in pivots] == [-1, -2, -3] and [source[output] for output in rest] == [*range(9)]
    assert source[12:] == [9, 10, 11, 12, 13]
    for projection, record in ((pivoted, first), (whole, second)):
        assert record["pitch"] % layout.ALIGN == 0 and record["z_start"] % layout.ALIGN == 0
        rows = group.up[record["up_start"] :][: record["rows"] * record["pitch"]].view(record["rows"], record["pitch"])
        rank = projection.up.shape[1]
        assert torch.equal(rows[:, :rank], projection.up) and not rows[:, rank:].any()


def test_a_layout_comes_back_from_its_sizes():
    projections, activation = group_of("pivoted_gate_up", torch.float32)
    group = LowRankGroup(projections, activation=activation)
    assert Layout.of(group.layout.sizes, True) == group.layout
    assert group.layout.out_width == 520 and group.layout.z_width == 24 + 8
    assert group.up.numel() == group.layout.up_numel == 501 * 24 + 512 * 8
