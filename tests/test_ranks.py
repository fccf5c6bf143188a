"""Rank allocation: never over the budget, and as good as one multiplier for all layers can be."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gfwsvd.bounds import Bound
from gfwsvd.errors import GfwsvdError
from gfwsvd.ranks import RANKS, Candidate, allocate


def _layer(d_out, d_in, *, decay=1.0, scale=1.0, seed=0):
    size = min(d_out, d_in)
    noise = torch.rand(size, generator=torch.Generator().manual_seed(seed + d_out * d_in), dtype=torch.float64)
    return Candidate(
        d_out, d_in, (scale * (0.5 + noise) * torch.arange(1, size + 1) ** -decay).sort(descending=True)[0]
    )


def _pivoted(candidates):
    return {name: replace(layer, pivoted=True) for name, layer in candidates.items()}


MODEL = {
    "q": _layer(24, 24, decay=0.5),
    "k": _layer(8, 24, decay=0.1, scale=3),
    "up": _layer(64, 24, decay=1.5),
    "down": _layer(24, 64, decay=0.2, scale=0.1),
}


def _stored(candidates, ranks, cost=Candidate.stored):
    return sum(cost(candidates[name], rank) for name, rank in ranks.items())


def _dense(candidates, cost=Candidate.stored):
    return sum(cost(layer, None) for layer in candidates.values())


def _loss(candidates, ranks):
    return sum(0.0 if rank is None else candidates[name].tails()[rank].item() for name, rank in ranks.items())


@st.composite
def models(draw):
    layers = {}
    for index in range(draw(st.integers(1, 3))):
        d_out, d_in = draw(st.integers(2, 9)), draw(st.integers(2, 9))
        spectrum = draw(st.lists(st.floats(0, 1e3), min_size=min(d_out, d_in), max_size=min(d_out, d_in)))
        spectrum = torch.tensor(sorted(spectrum, reverse=True), dtype=torch.float64)
        layers[str(index)] = Candidate(d_out, d_in, spectrum, draw(st.booleans()))
    return layers


@given(models(), st.floats(0.01, 1), st.sampled_from(RANKS), st.integers(1, 4))
def test_an_allocation_stays_within_the_budget_or_says_that_none_does(candidates, keep, ranks, multiple):
    try:
        chosen = allocate(candidates, keep=keep, ranks=ranks, rank_multiple=multiple)
    except GfwsvdError as error:
        assert "keep" in str(error)
        return
    assert list(chosen) == list(candidates)
    assert _stored(candidates, chosen) <= keep * _dense(candidates)
    for name, rank in chosen.items():
        layer = candidates[name]
        assert rank is None or 1 <= rank < min(layer.d_out, layer.d_in)
        assert rank is None or layer.stored(rank) < layer.dense, "a low-rank layer stores less than the dense one"


@given(models(), st.floats(0.05, 1), st.floats(0.05, 1), st.sampled_from(RANKS), st.integers(1, 3))
def test_a_larger_keep_is_allocated_where_a_smaller_one_is_and_loses_no_more(candidates, one, other, ranks, multiple):
    try:
        less = allocate(candidates, keep=min(one, other), ranks=ranks, rank_multiple=multiple)
    except GfwsvdError:
        return
    more = allocate(candidates, keep=max(one, other), ranks=ranks, rank_multiple=multiple)
    total = sum(layer.tails()[0].item() for layer in candidates.values())
    assert _loss(candidates, more) <= _loss(candidates, less) + 1e-9 * total
    if ranks == "uniform":
        assert all(layer.stored(more[name]) >= layer.stored(less[name]) for name, layer in candidates.items())


def _all_choices(candidates, cost=Candidate.stored):
    """Cost and loss of every allocation there is at rank multiple 1."""
    states = [
        [rank for rank in range(1, min(layer.d_out, layer.d_in)) if layer.stored(rank) < layer.dense] + [None]
        for layer in candidates.values()
    ]
    for combination in itertools.product(*states):
        ranks = dict(zip(candidates, combination, strict=True))
        yield _stored(candidates, ranks, cost), _loss(candidates, ranks)


def _hull(points):
    """The corners of the lower convex hull of (stored, loss), from the least stored on, while the loss falls."""
    corners = []
    for point in sorted(points):
        if corners and point[1] >= corners[-1][1]:
            continue
        while len(corners) > 1 and (corners[-1][1] - corners[-2][1]) * (point[0] - corners[-2][0]) >= (
            point[1] - corners[-2][1]
        ) * (corners[-1][0] - corners[-2][0]):
            corners.pop()
        corners.append(point)
    return corners


@given(models(), st.floats(0.2, 0.99))
def test_global_loses_no_more_than_the_last_corner_of_the_hull_within_the_budget(candidates, keep):
    """A multiplier reaches exactly the corners of the convex hull of all allocations: between two of them the optimum
    may be lower than what it finds, by less than the loss between the corners."""
    points = list(_all_choices(candidates))
    budget = keep * _dense(candidates)
    affordable = [loss for stored, loss in points if stored <= budget]
    if not affordable:
        with pytest.raises(GfwsvdError, match="smallest ranks"):
            allocate(candidates, keep=keep, ranks="global")
        return
    found = _loss(candidates, allocate(candidates, keep=keep, ranks="global"))
    corner = [loss for stored, loss in _hull(points) if stored <= budget][-1]
    total = sum(layer.tails()[0].item() for layer in candidates.values())
    assert min(affordable) - 1e-9 * total <= found <= corner + 1e-9 * total


@given(models(), st.data())
def test_global_is_the_optimum_where_the_budget_is_a_corner_of_the_hull(candidates, data):
    points = list(_all_choices(candidates))
    corners = [point for point in _hull(points) if point[0] < _dense(candidates)]
    if not corners:
        return
    stored, loss = data.draw(st.sampled_from(corners))
    keep = (stored + 0.5) / _dense(candidates)
    total = sum(layer.tails()[0].item() for layer in candidates.values())
    assert _loss(candidates, allocate(candidates, keep=keep, ranks="global")) <= loss + 1e-9 * total


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.7, 0.9])
def test_global_loses_less_than_uniform_at_the_same_keep(keep):
    uniform, shared = (allocate(MODEL, keep=keep, ranks=ranks) for ranks in RANKS)
    assert _loss(MODEL, shared) < 0.9 * _loss(MODEL, uniform)


@given(models(), st.floats(0.5, 0.99))
def test_global_never_loses_more_than_uniform_by_more_than_the_gap_to_the_next_corner(candidates, keep):
    try:
        uniform = allocate(candidates, keep=keep, ranks="uniform")
    except GfwsvdError:
        return
    shared = allocate(candidates, keep=keep, ranks="global")
    corners = _hull(_all_choices(candidates))
    index = max(index for index, (stored, _) in enumerate(corners) if stored <= keep * _dense(candidates))
    gap = corners[index][1] - corners[min(index + 1, len(corners) - 1)][1]
    total = sum(layer.tails()[0].item() for layer in candidates.values())
    assert _loss(candidates, shared) <= _loss(candidates, uniform) + gap + 1e-9 * total


@pytest.mark.parametrize("keep", [0.4, 0.8])
def test_global_does_not_depend_on_the_unit_of_the_loss(keep):
    plain = allocate(MODEL, keep=keep, ranks="global")
    for unit in (1e-12, 1e12):
        scaled = {name: Candidate(c.d_out, c.d_in, c.spectrum * unit**0.5) for name, c in MODEL.items()}
        assert allocate(scaled, keep=keep, ranks="global") == plain


def test_global_spends_the_budget_to_less_than_one_step():
    for keep in torch.linspace(0.3, 0.95, 40).tolist():
        chosen = allocate(MODEL, keep=keep, ranks="global")
        left_over = keep * _dense(MODEL) - _stored(MODEL, chosen)
        for name, rank in chosen.items():
            layer = MODEL[name]
            steps = [] if rank is None else [layer.dense - layer.stored(rank)]
            if rank is not None and layer.stored(rank + 1) < layer.dense:
                steps.append(layer.d_out + layer.d_in)
            assert all(step > left_over for step in steps), f"{name} could have had more"


def test_a_layer_stays_dense_where_it_is_worth_its_parameters():
    candidates = {
        "precious": Candidate(16, 16, torch.full((16,), 100.0)),
        "cheap": Candidate(64, 64, torch.full((64,), 0.01)),
    }
    chosen = allocate(candidates, keep=0.5, ranks="global")
    assert chosen["precious"] is None
    assert chosen["cheap"] is not None


def test_a_weight_of_zeros_gets_the_smallest_rank():
    candidates = {"zero": Candidate(16, 16, torch.zeros(16)), "other": _layer(16, 16, decay=0)}
    assert allocate(candidates, keep=0.6, ranks="global")["zero"] == 1
    only_zero = {"zero": Candidate(16, 16, torch.zeros(16))}
    assert _stored(only_zero, allocate(only_zero, keep=0.5, ranks="global")) <= 128


@pytest.mark.parametrize("multiple", [1, 2, 3, 4])
@pytest.mark.parametrize("ranks", RANKS)
def test_ranks_are_multiples_where_the_layer_is_large_enough(ranks, multiple):
    for name, rank in allocate(MODEL, keep=0.8, ranks=ranks, rank_multiple=multiple).items():
        assert rank is None or rank % multiple == 0, name


def test_a_layer_too_small_for_the_multiple_takes_what_fits():
    candidates = {"small": _layer(6, 6), "large": _layer(64, 64)}
    for ranks in RANKS:
        chosen = allocate(candidates, keep=0.8, ranks=ranks, rank_multiple=8)
        assert chosen["small"] in (2, None)
        assert chosen["large"] is not None and chosen["large"] % 8 == 0


def test_a_layer_that_no_rank_makes_smaller_stays_dense_in_a_global_allocation():
    candidates = {"scores": _layer(1, 64), "pair": _layer(2, 2), "large": _layer(64, 64, decay=0)}
    for keep in (0.1, 0.5, 0.9):
        chosen = allocate(candidates, keep=keep, ranks="global")
        assert chosen["scores"] is None and chosen["pair"] is None
        assert _stored(candidates, chosen) <= keep * _dense(candidates)


def test_uniform_gives_every_layer_its_share_to_less_than_one_step():
    for keep in (0.3, 0.5, 0.8, 0.999):
        for name, rank in allocate(MODEL, keep=keep, ranks="uniform").items():
            layer = MODEL[name]
            assert layer.stored(rank) <= keep * layer.dense < layer.stored(rank + 1)


def test_uniform_names_the_layer_for_which_the_share_buys_no_rank():
    with pytest.raises(GfwsvdError, match="scores.*global"):
        allocate({"large": _layer(64, 64), "scores": _layer(1, 64)}, keep=0.8, ranks="uniform")
    with pytest.raises(GfwsvdError, match="k"):
        allocate(MODEL, keep=0.02, ranks="uniform")


@pytest.mark.parametrize("ranks", RANKS)
def test_keep_one_leaves_every_layer_dense(ranks):
    assert allocate(MODEL, keep=1, ranks=ranks) == dict.fromkeys(MODEL)


@pytest.mark.parametrize("keep", [0, -0.5, 1.0001, 80, math.nan, math.inf])
@pytest.mark.parametrize("ranks", RANKS)
def test_a_keep_that_is_no_share_is_refused(keep, ranks):
    with pytest.raises(GfwsvdError, match=r"keep must be .*\(0, 1\]"):
        allocate(MODEL, keep=keep, ranks=ranks)


@pytest.mark.parametrize("keep", [0.5, 1])
def test_unknown_ranks_are_refused_with_those_there_are(keep):
    with pytest.raises(GfwsvdError, match="uniform, global, got 'adaptive'"):
        allocate(MODEL, keep=keep, ranks="adaptive")


@pytest.mark.parametrize("multiple", [0, -8])
def test_a_rank_multiple_below_one_is_refused(multiple):
    with pytest.raises(GfwsvdError, match="rank multiple"):
        allocate(MODEL, keep=0.5, ranks="global", rank_multiple=multiple)


def test_a_budget_below_the_smallest_ranks_says_which_keep_would_do():
    with pytest.raises(GfwsvdError, match="smallest ranks") as caught:
        allocate(MODEL, keep=0.2, ranks="global", rank_multiple=8)
    needed = float(str(caught.value).split("need: ")[1].split()[0])
    assert allocate(MODEL, keep=needed + 1e-4, ranks="global", rank_multiple=8)


@pytest.mark.parametrize("pivoted", [False, True])
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 200))
def test_the_largest_rank_within_a_budget_is_the_last_that_fits(pivoted, d_out, d_in, budget):
    layer = Candidate(d_out, d_in, torch.empty(0), pivoted)
    fitting = [rank for rank in range(1, min(d_out, d_in)) if layer.stored(rank) <= budget]
    assert layer.largest_within(budget) == max(fitting, default=0)


def test_a_pivoted_layer_has_more_ranks_in_the_same_size():
    """At keep 0.8 a square layer has 0.55 of its ranks instead of 0.4, but for the order of its outputs."""
    layer = Candidate(1000, 1000, torch.empty(0))
    assert layer.largest_within(800_000) == 400
    assert replace(layer, pivoted=True).largest_within(800_000) == 551
    assert replace(layer, pivoted=True).stored(551) == 551 * (2000 - 551) + 1000
    assert replace(layer, pivoted=True).stored(31) == layer.stored(31)  # where the order would outweigh the saving


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("ranks", RANKS)
def test_a_pivoted_allocation_loses_less_within_the_same_budget(ranks, keep):
    model = {"q": _layer(256, 256, decay=0.5), "up": _layer(768, 256, decay=0.3), "down": _layer(256, 768, decay=0.4)}
    chosen, pivoted = (allocate(layers, keep=keep, ranks=ranks) for layers in (model, _pivoted(model)))
    assert _stored(_pivoted(model), pivoted) <= keep * _dense(model)
    assert _loss(model, pivoted) < 0.98 * _loss(model, chosen)


@given(st.floats(0.01, 0.99))
def test_a_share_of_binary_fractions_does_not_lose_a_rank_to_rounding(share):
    layer = Candidate(64, 64, torch.ones(64))
    rank = max(1, int(share * 31))
    chosen = allocate({"layer": layer}, keep=layer.stored(rank) / layer.dense, ranks="uniform")
    assert chosen == {"layer": rank}


# ---------------------------------------------------------------------------------------------------------- bounds

BOUNDS = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(lambda ends: Bound(*sorted(ends)))


@given(models(), st.data(), st.floats(0.05, 1), st.sampled_from(RANKS), st.integers(1, 3))
def test_an_allocation_keeps_bounds_and_budget_or_says_that_none_does(candidates, data, keep, ranks, multiple):
    candidates = {name: replace(layer, bound=data.draw(BOUNDS)) for name, layer in candidates.items()}
    try:
        chosen = allocate(candidates, keep=keep, ranks=ranks, rank_multiple=multiple)
    except GfwsvdError as error:
        assert "bound" in str(error) or "keep" in str(error)
        return
    assert _stored(candidates, chosen) <= keep * _dense(candidates)
    for name, rank in chosen.items():
        layer = candidates[name]
        assert layer.stored(rank) <= layer.bound.high * layer.dense
        if not layer.reaches_bound(rank):  # then no rank lies between the ends, and this is the last one below
            assert layer.states(multiple) == [rank]


@given(models(), st.data(), st.floats(0.3, 0.99))
def test_bounded_global_loses_no_more_than_the_last_corner_of_the_hull(candidates, data, keep):
    bound = Bound(data.draw(st.floats(0, 0.5)), 1.0)
    candidates = {name: replace(layer, bound=bound) for name, layer in candidates.items()}
    states = [layer.states(1) for layer in candidates.values()]
    allocations = [dict(zip(candidates, ranks, strict=True)) for ranks in itertools.product(*states)]
    points = [(_stored(candidates, ranks), _loss(candidates, ranks)) for ranks in allocations]
    budget = keep * _dense(candidates)
    if min(stored for stored, _ in points) > budget:
        with pytest.raises(GfwsvdError, match="smallest ranks"):
            allocate(candidates, keep=keep, ranks="global")
        return
    found = _loss(candidates, allocate(candidates, keep=keep, ranks="global"))
    corner = [loss for stored, loss in _hull(points) if stored <= budget][-1]
    total = sum(layer.tails()[0].item() for layer in candidates.values())
    assert found <= corner + 1e-9 * total


def _bounded(**bounds):
    return {name: replace(layer, bound=Bound(*bounds.get(name, ()))) for name, layer in MODEL.items()}


@pytest.mark.parametrize("ranks", RANKS)
def test_a_layer_bound_to_one_stays_dense_and_the_others_pay_for_it(ranks):
    bounded = _bounded(down=(1, 1))
    free, chosen = (allocate(layers, keep=0.8, ranks=ranks) for layers in (_bounded(down=(0, 0.8)), bounded))
    assert chosen["down"] is None and free["down"] is not None
    assert _stored(bounded, chosen) <= 0.8 * _dense(bounded)
    of_others = [sum(MODEL[name].stored(x[name]) for name in MODEL if name != "down") for x in (chosen, free)]
    assert of_others[0] < of_others[1]


def test_uniform_shares_out_what_bounds_leave_to_less_than_one_step_of_each_layer():
    for bounds in ({"down": (0.9, 1)}, {"down": (0, 0.3)}, {"up": (0.7, 0.75), "q": (0, 0.2)}):
        bounded = _bounded(**bounds)
        chosen = allocate(bounded, keep=0.6, ranks="uniform")
        shares = {name: bounded[name].stored(rank) / bounded[name].dense for name, rank in chosen.items()}
        free = [shares[name] for name in MODEL if name not in bounds]
        steps = {name: (layer.d_out + layer.d_in) / layer.dense for name, layer in MODEL.items()}
        assert max(free) - min(free) < max(steps[name] for name in MODEL if name not in bounds)
        left_over = 0.6 * _dense(MODEL) - _stored(bounded, chosen)
        assert 0 <= left_over < sum(layer.d_out + layer.d_in for layer in MODEL.values())


@pytest.mark.parametrize("ranks", RANKS)
def test_at_keep_one_each_layer_stores_what_its_bound_allows(ranks):
    chosen = allocate(_bounded(q=(0, 0.5), down=(0.7, 0.7)), keep=1, ranks=ranks)
    assert (chosen["k"], chosen["up"]) == (None, None)
    assert MODEL["q"].stored(chosen["q"]) <= 288 < MODEL["q"].stored(chosen["q"] + 1)
    assert MODEL["down"].stored(chosen["down"]) <= 0.7 * 1536 < MODEL["down"].stored(chosen["down"] + 1)


@pytest.mark.parametrize("ranks", RANKS)
def test_bounds_beyond_keep_are_refused_with_the_keep_that_would_do(ranks):
    bounded = _bounded(up=(0.9, 1), down=(0.9, 1))
    with pytest.raises(GfwsvdError, match="within the bounds need.*or the bounds") as caught:
        allocate(bounded, keep=0.5, ranks=ranks)
    needed = float(str(caught.value).split("need: ")[1].split()[0])
    assert allocate(bounded, keep=needed + 0.04, ranks=ranks), "uniform counts no rank where nothing is asked"
    with pytest.raises(GfwsvdError, match="keep"):
        allocate(bounded, keep=needed - 1e-4, ranks=ranks)


@pytest.mark.parametrize("ranks", RANKS)
def test_a_bound_that_allows_no_rank_names_the_layer_and_what_would_do(ranks):
    with pytest.raises(GfwsvdError, match=r"0:0.05 of layer q \(24 x 24\) allows no rank: rank 1 stores 0.0833"):
        allocate(_bounded(q=(0, 0.05)), keep=0.8, ranks=ranks)
    scores = {"scores": replace(_layer(1, 64), bound=Bound(0, 0.9)), "large": _layer(64, 64)}
    with pytest.raises(GfwsvdError, match="scores.*raise its upper end to 1, which lets it stay dense"):
        allocate(scores, keep=0.8, ranks=ranks)


@pytest.mark.parametrize("ranks", RANKS)
def test_ranks_within_bounds_are_multiples(ranks):
    bounded = {name: replace(layer, bound=Bound(0.4, 0.9)) for name, layer in MODEL.items() if name != "k"}
    for name, rank in allocate(bounded, keep=0.8, ranks=ranks, rank_multiple=3).items():
        assert rank % 3 == 0 and 0.4 <= bounded[name].stored(rank) / bounded[name].dense <= 0.9
