"""Statistics and work in progress of which files were changed, cut or lost: what is read is what was written, or it is
refused by an error of ours, soon and without much memory."""

import json
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gfwsvd
from gfwsvd.errors import GfwsvdError
from gfwsvd.folders import sealed, sha256_file
from gfwsvd.store import JSON_NAME, load_statistics, save_statistics
from gfwsvd.work import open_work
from mutations import change_file, change_somewhere
from tiny_models import random_tokens, tiny_model

ABOUT = {"model_sha256": "ab" * 32, "sweeps": 2, "clip": 3.0, "layers": ["a", "b"]}
STATES = {
    "a": ({"moment": torch.arange(12.0).view(3, 4), "sum": torch.tensor(0.1, dtype=torch.float64)}, {"done": 3}),
    "b": ({"half": torch.arange(5.0).bfloat16()}, {"traces": [0.1, None], "nested": {"x": "y"}}),
}


def frugal(read: Any, memory: int = 200_000) -> Any:
    """What `read` returns, None where it refuses; in less than 5 seconds and 200 MB more."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    try:
        return read()
    except GfwsvdError:
        return None
    finally:
        assert time.perf_counter() - began < 5
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < memory, "kilobytes"


def same(one: Any, other: Any) -> bool:
    """Whether two nested values are of the same types and equal to the bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


# ---------------------------------------------------------------------------------------------------------- statistics


@pytest.fixture(scope="module")
def statistics(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "statistics"
    found = gfwsvd.calibrate(tiny_model("llama"), [{"input_ids": random_tokens(4, 16)}], heldout=1)
    save_statistics(found, folder, provenance={"text": "random"})
    return folder


def everything(folder: Path) -> dict[str, Any]:
    """All that statistics hold, read to the end."""
    found, provenance = load_statistics(folder)
    fields = [name for name in vars(gfwsvd.Statistics)["__dataclass_fields__"] if name != "layers"]
    tensors = ("input_moment", "output_moment", "left", "right", "input_abs", "fisher_rows", "heldout_x", "heldout_g")
    layers = {
        name: {field: getattr(layer, field) for field in (*tensors, "d_in", "d_out", "trace")}
        for name, layer in found.layers.items()
    }
    return {**{name: getattr(found, name) for name in fields}, "layers": layers, "provenance": provenance}


@settings(max_examples=100)
@given(data=st.data())
def test_statistics_of_which_a_file_changed_are_the_same_or_refused(statistics, data):
    with tempfile.TemporaryDirectory() as temporary:
        folder = shutil.copytree(statistics, Path(temporary) / "statistics")
        change_file(data, data.draw(st.sampled_from(sorted(folder.iterdir()))))
        found = frugal(lambda: everything(folder))
    assert found is None or same(found, everything(statistics))


@settings(max_examples=150)
@given(data=st.data())
def test_statistics_changed_on_purpose_with_digests_that_fit_are_read_or_refused(statistics, data):
    with tempfile.TemporaryDirectory() as temporary:
        folder = shutil.copytree(statistics, Path(temporary) / "statistics")
        others = [file for file in sorted(folder.iterdir()) if file.name != JSON_NAME]
        described = json.loads((folder / JSON_NAME).read_text())
        described.pop("seal")
        if data.draw(st.booleans()):
            change_file(data, data.draw(st.sampled_from(others)))
            described["sha256"] = {file.name: sha256_file(file) for file in others if file.exists()}
        else:
            described = change_somewhere(data, described)
        (folder / JSON_NAME).write_text(json.dumps(sealed(described) if isinstance(described, dict) else described))
        frugal(lambda: everything(folder))


# ---------------------------------------------------------------------------------------------------- work in progress


@settings(max_examples=150)
@given(data=st.data())
def test_work_of_which_a_file_changed_goes_on_the_same_or_is_refused(data):
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "work"
        with open_work(folder, ABOUT) as work:
            for name, (tensors, values) in STATES.items():
                work.save(name, tensors, values)
        change_file(data, data.draw(st.sampled_from(sorted(folder.iterdir()))))

        def read() -> dict[str, Any]:
            with open_work(folder, ABOUT) as work:
                return {name: work.load(name) for name in STATES}

        found = frugal(read)
    for name, state in (found or {}).items():
        assert state is None or same(state, STATES[name])
