"""Latency tables: interpolated, monotone, written whole; and allocations that spend time, against brute force."""

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_ranks import _dense, _hull, _loss, _stored

from gfwsvd.errors import GfwsvdError
from gfwsvd.folders import sealed
from gfwsvd.latency import LatencyTable, measure_latency
from gfwsvd.layers import find_linears, weight_shape
from gfwsvd.ranks import Candidate, allocate
from tiny_models import tiny_model

ABOUT = {"device": "hand-made", "dtype": "float32", "tokens": 1, "torch": "2.11"}


def table(**shapes):
    """Of times by shape, such as d8x8=(dense, {rank: lowrank}, {rank: pivoted})."""
    us = {
        tuple(map(int, name[1:].split("x"))): {"dense": {0: dense}, "lowrank": lowrank, "pivoted": pivoted}
        for name, (dense, lowrank, pivoted) in shapes.items()
    }
    return LatencyTable(**ABOUT, us=us)


def test_times_between_ranks_are_interpolated_and_rise_with_the_rank():
    found = table(d64x64=(100.0, {8: 20.0, 16: 40.0, 24: 30.0, 31: 50.0}, {16: 60.0, 63: 110.0}))
    times = [found.time((64, 64), "lowrank", rank) for rank in range(1, 32)]
    assert times == sorted(times)
    at = {1: 20, 8: 20, 12: 30, 16: 40, 20: 40, 24: 40, 31: 50}
    assert {rank: times[rank - 1] for rank in at} == pytest.approx(at)
    assert found.cost(Candidate(64, 64, torch.empty(0), pivoted=True), 63) == 110
    assert found.cost(Candidate(64, 64, torch.empty(0), pivoted=True), 8) == 20, "two factors at so low a rank"
    assert found.cost(Candidate(64, 64, torch.empty(0)), None) == 100
    assert found.share([((64, 64), "dense", 0), ((64, 64), "lowrank", 12)]) == pytest.approx(130 / 200)


def test_the_break_even_is_the_largest_share_of_a_form_that_is_faster_than_dense():
    found = table(
        d64x64=(100.0, {8: 20.0, 16: 99.0, 24: 101.0}, {16: 60.0, 48: 90.0, 63: 110.0}), d8x8=(1.0, {1: 2.0}, {})
    )
    assert found.break_even((64, 64)) == (48 * (128 - 48) + 64) / 64**2
    assert found.break_even((8, 8)) is None


@st.composite
def timed_models(draw):
    layers, us = {}, {}
    time = st.floats(0.1, 100)
    for index in range(draw(st.integers(1, 3))):
        shape = d_out, d_in = draw(st.integers(2, 9)), draw(st.integers(2, 9))
        spectrum = draw(st.lists(st.floats(0, 1e3), min_size=min(shape), max_size=min(shape)))
        spectrum = torch.tensor(sorted(spectrum, reverse=True), dtype=torch.float64)
        layers[str(index)] = Candidate(d_out, d_in, spectrum, draw(st.booleans()))
        ranks = [1, min(shape)]
        forms = {kind: {rank: draw(time) for rank in ranks} for kind in ("lowrank", "pivoted")}
        us[shape] = {"dense": {0: draw(time)}, **forms}
    return layers, LatencyTable(**ABOUT, us=us)


@given(timed_models(), st.floats(0.05, 1))
def test_an_allocation_by_time_is_within_the_budget_and_near_the_optimum(model, keep):
    """As near as a multiplier comes: no worse than the last corner of the hull, and at keep 1 all dense."""
    candidates, latency = model
    budget = keep * _dense(candidates, latency.cost)
    states = [layer.states(1) for layer in candidates.values()]
    allocations = [dict(zip(candidates, ranks, strict=True)) for ranks in itertools.product(*states)]
    points = [(_stored(candidates, ranks, latency.cost), _loss(candidates, ranks)) for ranks in allocations]
    affordable = [loss for time, loss in points if time <= budget * (1 - 1e-12)]
    if not affordable:
        return
    chosen = allocate(candidates, keep=keep, ranks="global", cost=latency.cost)
    assert _stored(candidates, chosen, latency.cost) <= budget * (1 + 1e-12)
    corner = [loss for time, loss in _hull(points) if time <= budget * (1 - 1e-12)]
    total = sum(layer.tails()[0].item() for layer in candidates.values())
    best = min(loss for time, loss in points if time <= budget * (1 + 1e-12))
    assert best - 1e-9 * total <= _loss(candidates, chosen) <= (corner or affordable)[-1] + 1e-9 * total
    for name, rank in chosen.items():
        layer = candidates[name]
        assert rank is None or latency.cost(layer, rank) < latency.cost(layer, None), "dense is exact and no slower"


@given(timed_models(), st.data())
def test_an_allocation_by_time_is_the_optimum_where_the_budget_is_a_corner_of_the_hull(model, data):
    candidates, latency = model
    states = [layer.states(1) for layer in candidates.values()]
    allocations = [dict(zip(candidates, ranks, strict=True)) for ranks in itertools.product(*states)]
    points = [(_stored(candidates, ranks, latency.cost), _loss(candidates, ranks)) for ranks in allocations]
    dense = _dense(candidates, latency.cost)
    corners = [point for point in _hull(points) if point[0] < dense * (1 - 1e-9)]
    if not corners:
        return
    time, loss = data.draw(st.sampled_from(corners))
    chosen = allocate(candidates, keep=time / dense * (1 + 1e-10), ranks="global", cost=latency.cost)
    total = sum(layer.tails()[0].item() for layer in candidates.values())
    assert _loss(candidates, chosen) <= loss + 1e-9 * total


def test_a_layer_stays_dense_where_no_rank_is_faster_whatever_it_stores():
    candidates = {name: Candidate(*shape, torch.ones(8)) for name, shape in {"slow": (8, 8), "fast": (8, 16)}.items()}
    latency = table(d8x8=(10.0, {1: 10.0, 7: 12.0}, {}), d8x16=(100.0, {1: 10.0, 7: 90.0}, {}))
    chosen = allocate(candidates, keep=0.5, ranks="global", cost=latency.cost)
    assert chosen["slow"] is None and chosen["fast"] is not None
    with pytest.raises(GfwsvdError, match="smallest ranks need: 0.1818"):
        allocate(candidates, keep=0.15, ranks="global", cost=latency.cost)


def test_ranks_chosen_by_time_are_multiples():
    candidates = {"a": Candidate(64, 64, torch.linspace(2, 1, 64)), "b": Candidate(64, 64, torch.linspace(9, 1, 64))}
    latency = table(d64x64=(100.0, {1: 10.0, 31: 90.0}, {}))
    ranks = allocate(candidates, keep=0.6, ranks="global", rank_multiple=8, cost=latency.cost).values()
    assert any(ranks) and all(rank is None or rank % 8 == 0 for rank in ranks)


def test_measuring_covers_every_shape_form_and_rank_that_compression_may_take():
    model, seen = tiny_model("llama"), []

    def track(items, description):
        seen.append(len(items))
        return items

    found = measure_latency(model, tokens=3, step=16, track=track)
    assert set(found.us) == {weight_shape(module) for module in find_linears(model).values()} and seen[0] > 0
    assert (found.tokens, found.dtype, found.torch) == (3, "float32", torch.__version__) and "CPU" in found.device
    for d_out, d_in in found.us:
        for pivoted in (False, True):
            layer = Candidate(d_out, d_in, torch.empty(0), pivoted)
            times = [found.cost(layer, rank) for rank in [None, *range(1, layer.largest_rank + 1)]]
            assert all(0.01 < us < 1e5 for us in times)


def test_a_table_survives_its_file(tmp_path):
    found = table(d8x8=(10.5, {1: 1.25, 3: 2.0}, {3: 2.5}), d1x8=(3.0, {}, {}))
    found.save(tmp_path / "new" / "table.json")
    assert LatencyTable.load(tmp_path / "new" / "table.json") == found
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["table.json"]


def test_a_changed_or_malformed_file_is_refused(tmp_path):
    file = tmp_path / "table.json"
    table(d8x8=(10.5, {1: 1.25}, {3: 2.5})).save(file)
    good = json.loads(file.read_text())
    changed = {
        "does not have the digest": {**good, "tokens": 2},
        "version 1, .* has None": {"tokens": 2},
        "no latency table": sealed({"latency_version": 1, **ABOUT}),
        "expected times of dense": sealed(
            {**ABOUT, "latency_version": 1, "layers": [{**good["layers"][0], "dense": [[5, 1.0]]}]}
        ),
        "positive microseconds": sealed(
            {**ABOUT, "latency_version": 1, "layers": [{**good["layers"][0], "dense": [[0, -1.0]]}]}
        ),
    }
    for message, content in changed.items():
        file.write_text(json.dumps(content))
        with pytest.raises(GfwsvdError, match=message):
            LatencyTable.load(file)
    file.write_text(json.dumps(good)[:50])
    with pytest.raises(GfwsvdError, match="cut short or changed"):
        LatencyTable.load(file)


def test_a_shape_or_rank_that_was_not_measured_is_refused():
    found = table(d8x8=(10.0, {1: 1.0, 2: 2.0}, {}))
    with pytest.raises(GfwsvdError, match=r"no layer of \(8, 16\).*gfwsvd latency"):
        found.check([(8, 8), (8, 16)])
    with pytest.raises(GfwsvdError, match="rank 3 or more"):
        found.time((8, 8), "lowrank", 3)


@pytest.mark.parametrize("options", [{"tokens": 0}, {"tokens": 1, "step": 0}])
def test_numbers_below_one_are_refused(options):
    with pytest.raises(GfwsvdError, match="at least 1"):
        measure_latency(tiny_model("llama"), **options)
