"""Layer groups within a memory budget, amounts of memory as text, and what more budget buys, for any model."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gfwsvd.budget import UNITS, Collected, Room, bytes_text, layer_groups, parse_bytes
from gfwsvd.calibration import calibrate, input_leaders
from gfwsvd.errors import GfwsvdError
from gfwsvd.kronecker import PROBES
from gfwsvd.layers import find_linears
from gfwsvd.losses import forward
from gfwsvd.methods import GRADIENTS, INPUTS, KRONECKER
from gfwsvd.packed import TENSORS
from gfwsvd.statistics import HELDOUT_TOKENS
from tiny_models import random_tokens, tiny_model

SIZES = st.integers(1, 5000)


COLLECT = st.sets(st.sampled_from([INPUTS, GRADIENTS, KRONECKER]), min_size=1).map(frozenset)


@st.composite
def models(draw):
    """Layers with their sizes, of each the first one of the same input, and what is collected of them."""
    sizes, leaders, families = {}, {}, []
    for number in range(draw(st.integers(1, 12))):
        name = f"layer{number}"
        if families and draw(st.booleans()):
            leader = draw(st.sampled_from(families))
            sizes[name], leaders[name] = (sizes[leader][0], draw(SIZES)), leader
        else:
            sizes[name], leaders[name] = (draw(SIZES), draw(SIZES)), name
            families.append(name)
    return Collected(sizes, leaders, draw(COLLECT), draw(st.integers(1, 4)), draw(st.booleans()))


@st.composite
def divided(draw):
    """A model whose layers are on some devices, and room on each for at least the layers of one input."""
    model = draw(models())
    places = {name: draw(st.sampled_from("abc")) for name in model.sizes}
    rooms = []
    for place in ("all", *sorted(set(places.values()))):
        layers = {name for name in places if place in ("all", places[name])}
        least = max(model.bytes(layers.intersection(family)) for family in model.families())
        extra = int(draw(st.floats(0, 1)) * (model.bytes(layers) - least))
        taken = draw(st.integers(0, 1000))
        rooms.append(Room(least + extra + taken, taken, layers, place))
    return model, rooms


def fits(model, room, names):
    return model.bytes(room.layers & set(names)) <= room.left


@given(divided())
def test_groups_hold_every_layer_once_fit_every_room_and_leave_none_that_would_have_taken_more(example):
    model, rooms = example
    groups = layer_groups(model, rooms)
    assert sorted(name for group in groups for name in group) == sorted(model.sizes)
    assert all(fits(model, room, group) for group in groups for room in rooms)
    for family in model.families():
        (place,) = (number for number, group in enumerate(groups) if set(family) <= set(group))
        for group in groups[:place]:
            assert not all(fits(model, room, group + family) for room in rooms), "an earlier group had room"
    assert layer_groups(model, []) == [[name for family in model.families() for name in family]]


@given(models(), st.integers(0, 10**12))
def test_layers_of_one_input_that_find_no_room_are_named_with_what_is_left(model, taken):
    least = max(map(model.bytes, model.families()))
    with pytest.raises(
        GfwsvdError, match="take .*: of .* on cuda:3 the model and a batch take .* for statistics; give"
    ):
        layer_groups(model, [Room(taken + least - 1, taken, model.sizes, "cuda:3")])
    with pytest.raises(GfwsvdError, match="none is left for statistics") as refusal:
        layer_groups(model, [Room(taken // 2, taken, model.sizes)])
    assert "-" not in str(refusal.value).replace("e-", ""), "no amount is negative"


@given(SIZES, SIZES, st.integers(1, 3))
def test_more_of_a_layer_takes_more_memory(d_in, d_out, sweeps):
    def size(d_in=d_in, d_out=d_out, **about):
        return Collected({"layer": (d_in, d_out)}, {"layer": "layer"}, **{"sweeps": sweeps, **about}).bytes(["layer"])

    assert size(d_in + 1) > size() and size(d_out=d_out + 1) > size()
    assert size(sweeps=sweeps + 1) >= size() and size(online=True) > size()
    assert size() >= 4 * (d_in**2 + d_out**2), "the triangles of the moments and the factors alone"


@pytest.mark.parametrize("collect", [[INPUTS], [INPUTS, GRADIENTS], [KRONECKER], [INPUTS, GRADIENTS, KRONECKER]])
def test_what_is_counted_of_sums_is_what_a_calibration_holds(collect):
    """But for the sketch's probes and full matrices, which no layer has in the end."""
    model = tiny_model("llama")
    found = calibrate(model, [{"input_ids": random_tokens(16, 64)}], collect=collect, heldout=None)
    storages = {}
    for stats in found.layers.values():
        for field in TENSORS:
            if (value := getattr(stats, field)) is not None and field not in ("input_abs", "fisher_rows"):
                storages[value.data_ptr()] = value.nbytes if value.dim() == 1 else 0
    sizes = {name: (stats.d_in, stats.d_out) for name, stats in found.layers.items()}
    leaders = input_leaders(model, find_linears(model), {"input_ids": random_tokens(1, 2)}, forward)
    counted = Collected(sizes, leaders, frozenset(collect)).bytes(sizes)
    widths = sum(map(sum, sizes.values()))
    probes = 4 * 2 * PROBES * widths * (KRONECKER in collect)
    heldout = 2 * HELDOUT_TOKENS * widths * (collect != [INPUTS])
    assert counted - probes - heldout - 3 * 4 * 160**2 == sum(storages.values())


@given(
    st.integers(1, 10**6),
    st.sampled_from(sorted(UNITS)),
    st.sampled_from(["", "i", "B", "iB"]),
    st.booleans(),
    st.sampled_from(["", " "]),
)
def test_an_amount_of_memory_is_read_in_every_spelling(number, unit, ending, lower, space):
    if not unit:
        ending = ending.replace("i", "")
    text = f" {number}{space}{unit}{ending} "
    assert parse_bytes(text.lower() if lower else text) == number * UNITS[unit]


@given(st.floats(min_value=1, max_value=1e15))
def test_what_is_shown_of_an_amount_is_read_back_to_four_digits(size):
    shown = bytes_text(size)
    number, unit = shown.split(" ")
    assert math.isclose(parse_bytes(f"{number}{unit.replace('bytes', '')}"), size, rel_tol=6e-4, abs_tol=1)


@given(st.text(max_size=12))
def test_any_text_is_an_amount_of_memory_or_refused_by_an_error_of_ours(text):
    try:
        assert parse_bytes(text) >= 1
    except GfwsvdError as error:
        assert repr(text) in str(error)


@pytest.mark.parametrize(
    "text", ["", "B", "iB", "G", "0", "0.2", "-1G", "nan", "inf", "infK", "1e999T", "8 apples", "1GG"]
)
def test_what_is_no_amount_of_memory_is_refused(text):
    with pytest.raises(GfwsvdError, match="expected an amount of memory such as 80G"):
        parse_bytes(text)
