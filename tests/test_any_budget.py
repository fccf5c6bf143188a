"""Calibration within any memory budget, of any settings: the same statistics to the last bit."""

import functools
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from gfwsvd.calibration import Statistics, calibrate
from gfwsvd.packed import NUMBERS, TENSORS
from tiny_models import random_tokens, tiny_model

BATCHES = [{"input_ids": random_tokens(1, 8, seed=seed)} for seed in range(2)]
SETTINGS = {
    "token": {"sweeps": 2},
    "sequence": {"unit": "sequence"},
    "online": {"online": True},
    "sampled": {"labels": "sampled"},
}


def as_bytes(statistics: Statistics) -> dict[tuple[str, str], Any]:
    found: dict[tuple[str, str], Any] = {}
    for name, layer in statistics.layers.items():
        found |= {(name, field): getattr(layer, field) for field in (*NUMBERS, *TENSORS)}
    return {key: value.numpy().tobytes() if hasattr(value, "numpy") else value for key, value in found.items()}


@functools.cache
def without_budget(variant: str) -> dict[tuple[str, str], Any]:
    return as_bytes(calibrate(tiny_model("llama"), BATCHES, **SETTINGS[variant]))


@settings(max_examples=6)
@given(budget=st.integers(2_200_000, 3_500_000), variant=st.sampled_from(sorted(SETTINGS)))  # two groups to five
def test_any_memory_budget_gives_the_same_bits(budget, variant):
    titles = []

    def track(items, description):
        titles.append(description)
        return items

    found = calibrate(tiny_model("llama"), BATCHES, host_memory=budget, track=track, **SETTINGS[variant])
    assert any("layers 2 of" in title for title in titles), "it took a single group"
    assert as_bytes(found) == without_budget(variant)
