"""Layer groups within a memory budget, amounts of memory as text, and what more budget buys, for any model."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gfwsvd.budget import UNITS, bytes_text, layer_groups, parse_bytes, statistics_bytes
from gfwsvd.errors import GfwsvdError

SIZES = st.integers(1, 5000)


@st.composite
def models(draw):
    """Layers by name with their sizes, and of each the first one of the same input."""
    sizes, leaders, families = {}, {}, []
    for number in range(draw(st.integers(1, 12))):
        name = f"layer{number}"
        if families and draw(st.booleans()):
            leader = draw(st.sampled_from(families))
            sizes[name], leaders[name] = (sizes[leader][0], draw(SIZES)), leader
        else:
            sizes[name], leaders[name] = (draw(SIZES), draw(SIZES)), name
            families.append(name)
    return sizes, leaders


@given(models(), st.integers(1, 4), st.booleans(), st.floats(0, 1))
def test_groups_hold_every_layer_once_fit_the_budget_and_are_as_few_as_their_order_allows(model, sweeps, online, share):
    sizes, leaders = model
    families = {name: [other for other in sizes if leaders[other] == name] for name in dict.fromkeys(leaders.values())}

    def needed(names):
        return statistics_bytes([sizes[name] for name in names], sweeps=sweeps, online=online)

    least, most = max(map(needed, families.values())), needed(sizes)
    budget = least + int(share * (most - least))
    groups = layer_groups(sizes, leaders, budget, sweeps=sweeps, online=online)
    assert [name for group in groups for name in group] == [name for members in families.values() for name in members]
    assert all(0 < needed(group) <= budget for group in groups)
    for group, after in zip(groups, groups[1:], strict=False):
        more = group + families[leaders[after[0]]]
        assert needed(more) > budget, "the first family of the next group would have fitted"
    for members in families.values():
        assert sum(set(members) <= set(group) for group in groups) == 1
    assert layer_groups(sizes, leaders, None, sweeps=sweeps) == [[name for group in groups for name in group]]
    with pytest.raises(GfwsvdError, match="take .* are left for statistics"):
        layer_groups(sizes, leaders, least - 1, sweeps=sweeps, online=online)


@given(SIZES, SIZES, st.integers(1, 9))
def test_statistics_take_more_with_larger_layers_and_more_sweeps(d_in, d_out, sweeps):
    size = statistics_bytes([(d_in, d_out)], sweeps=sweeps)
    assert statistics_bytes([(d_in + 1, d_out)], sweeps=sweeps) > size
    assert statistics_bytes([(d_in, d_out + 1)], sweeps=sweeps) > size
    assert statistics_bytes([(d_in, d_out)], sweeps=sweeps + 1) >= size
    assert statistics_bytes([(d_in, d_out)], sweeps=sweeps, online=True) > size
    assert size >= 4 * (d_in**2 + d_out**2), "the triangles of the moments and the factors alone"


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
