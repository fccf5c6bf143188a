"""The cases that hypothesis draws: the same ones in every run of the suite, new ones where it explores."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def drawn(profile: str) -> list[int]:
    cases = []

    @settings(settings.get_profile(profile), max_examples=20, database=None)
    @given(st.integers())
    def note(case):
        cases.append(case)

    note()
    return cases


@pytest.mark.parametrize(("profile", "repeats"), [("suite", True), ("explore", False)])
def test_only_the_suite_draws_its_cases_again(profile, repeats):
    assert (drawn(profile) == drawn(profile)) == repeats
