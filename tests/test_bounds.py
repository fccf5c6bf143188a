"""Bounds of layers: how they are written, and which one a layer is under."""

import math

import pytest

from gfwsvd.bounds import Bound, bounds_of, check_bounds, parse_bounds
from gfwsvd.errors import GfwsvdError

NAMES = [f"layers.{number}.{kind}" for number in range(2) for kind in ("q", "down")]


def test_the_upper_end_is_one_where_it_is_left_out():
    assert parse_bounds(["q=0.5:0.9", "down=1", r"a(?=b)=0:1"]) == {"q": (0.5, 0.9), "down": (1, 1), "a(?=b)": (0, 1)}


@pytest.mark.parametrize("text", ["q", "q=", "=0.5", "q=a:b", "q=0.5:0.6:0.7", "q=:0.5", "q 0.5:1"])
def test_a_text_that_is_no_bound_is_refused_with_an_example(text):
    with pytest.raises(GfwsvdError, match="REGEX=LOW:HIGH") as caught:
        parse_bounds([text])
    assert repr(text) in str(caught.value)


def test_a_pattern_given_twice_is_refused():
    with pytest.raises(GfwsvdError, match="each pattern once.*'q=0.6'"):
        parse_bounds(["q=0.5", "down=0.5", "q=0.6"])


@pytest.mark.parametrize("bound", [(0.9, 0.5), (-0.1, 1), (0, 1.1), (math.nan, 1), (0, math.nan)])
def test_ends_out_of_order_or_range_are_refused(bound):
    with pytest.raises(GfwsvdError, match="0 <= low <= high <= 1"):
        check_bounds({"q": bound})


@pytest.mark.parametrize("bounds", [{"(": (0, 1)}, {"q": 0.5}, {"q": (0, 1, 1)}, {"q": ("a", "b")}, {3: (0, 1)}])
def test_what_is_no_pattern_and_two_shares_is_refused(bounds):
    with pytest.raises(GfwsvdError, match="regular expression and two shares"):
        check_bounds(bounds)


def test_the_last_pattern_that_matches_counts():
    found = bounds_of(NAMES, {"q": (0.5, 1), r"layers\.1": (1, 1)})
    assert found == {NAMES[0]: (0.5, 1), NAMES[1]: Bound(), NAMES[2]: (1, 1), NAMES[3]: (1, 1)}
    assert bounds_of(NAMES, {r"layers\.1": (1, 1), "q": (0.5, 1)})[NAMES[2]] == (0.5, 1)


def test_a_pattern_that_matches_no_layer_is_refused():
    with pytest.raises(GfwsvdError, match="'gate' matches none of the 4 layers to compress; .* such as layers.0.q"):
        bounds_of(NAMES, {"q": (0, 1), "gate": (0.5, 1)})
