"""Calibration that is cut up: into groups of layers, by interruptions, over batches that fail."""

import itertools
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracles import symmetric
from torch.utils._python_dispatch import TorchDispatchMode

from gfwsvd import collector, passes
from gfwsvd.budget import Collected
from gfwsvd.calibration import Statistics, calibrate, input_leaders
from gfwsvd.errors import GfwsvdError
from gfwsvd.hooks import frozen
from gfwsvd.layers import find_linears, weight_shape
from gfwsvd.losses import forward, next_token_loss
from gfwsvd.memory import bytes_in_use
from gfwsvd.methods import GRADIENTS, INPUTS, KRONECKER
from gfwsvd.packed import NUMBERS, TENSORS
from gfwsvd.store import save_statistics
from gfwsvd.work import open_work
from tiny_models import random_tokens, tiny_model

BATCHES = [{"input_ids": random_tokens(2, 12, seed=seed)} for seed in range(5)]
ABOUT = {"of": "a test"}
VARIANTS = {
    "token": {"sweeps": 2},
    "sequence": {"unit": "sequence", "sweeps": 2},
    "online": {"online": True, "sweeps": 2},
    "sampled": {"labels": "sampled"},
    "tolerance": {"sweeps": 4, "tolerance": 0.2},
    "inputs": {"collect": ["inputs"]},
    "gradients": {"collect": ["inputs", "gradients"]},
}


def assert_same_bits(found: Statistics, expected: Statistics) -> None:
    assert found.layers.keys() == expected.layers.keys()
    for name, stats in expected.layers.items():
        for number in NUMBERS:
            assert getattr(found.layers[name], number) == getattr(stats, number), (name, number)
        for field in TENSORS:
            _assert_equal(getattr(found.layers[name], field), getattr(stats, field))
    for field in ("settings", "num_losses", "num_sequences", "num_heldout", "num_skipped", "data_sha256", "unreached"):
        assert getattr(found, field) == getattr(expected, field), field
    assert len(found.seconds) == len(expected.seconds)


def _assert_equal(found: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    assert (found is None) == (expected is None)
    assert found is None or torch.equal(found, expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_groups_of_layers_have_the_same_statistics_to_the_last_bit(variant):
    whole = calibrate(tiny_model("llama"), BATCHES, **VARIANTS[variant])
    titles = []

    def track(items, description):
        titles.append(description)
        return items

    found = calibrate(
        tiny_model("llama"), BATCHES, device_memory=needed(**VARIANTS[variant]), track=track, **VARIANTS[variant]
    )
    assert any("layers 2 of" in title for title in titles)
    assert_same_bits(found, whole)


def needed(*, collect=(INPUTS, GRADIENTS, KRONECKER), sweeps=1, online=False, **_) -> int:
    """What the largest layers of one input need at least, with the model and its activations."""
    model, loss = tiny_model("llama"), next_token_loss("empirical", 0)
    backward = list(collect) != [INPUTS]
    linears = find_linears(model)
    sizes = {name: weight_shape(module)[::-1] for name, module in linears.items()}
    collected = Collected(sizes, input_leaders(model, linears, BATCHES[0], forward), frozenset(collect), sweeps, online)
    with frozen(model):
        used = bytes_in_use(model, linears, BATCHES[0], loss if backward else forward, backward=backward)
    return used.kept["cpu"] + max(map(collected.bytes, collected.families()))


class Live(TorchDispatchMode):
    """Follows how many bytes of tensors are alive that were made within it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for value in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(value, torch.Tensor):
                self._see(value.untyped_storage())
        return found

    def _see(self, storage) -> None:
        key = storage._cdata
        if key not in self.known:
            size = storage.nbytes()
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("sweeps", [1, 2])
def test_a_tight_memory_budget_is_kept(sweeps, tmp_path):
    model = tiny_model("llama")
    weights = sum(value.nbytes for value in model.parameters())
    tight, peaks = needed(sweeps=sweeps), {}
    for budget in (None, tight):
        with open_work(tmp_path / str(budget), ABOUT) as work, Live() as live:
            calibrate(model, BATCHES, sweeps=sweeps, host_memory=budget, work=work)
        peaks[budget] = weights + live.peak
    assert peaks[tight] <= tight < peaks[None]


MEASURED = """
import re, sys
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from gfwsvd.calibration import calibrate
from gfwsvd.work import open_work

torch.set_num_threads(1)
sizes = {"hidden_size": 1024, "intermediate_size": 1024, "num_attention_heads": 4, "num_hidden_layers": 1}
batches = [{"input_ids": torch.randint(64, (1, 16))}]


def run(hidden, folder, budget=None):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **(sizes | {"hidden_size": hidden}))).eval()
    weights = sum(value.nbytes for value in model.parameters())
    Path("/proc/self/clear_refs").write_text("5")
    now, most = (re.compile(rf"{what}:\\s+(\\d+)") for what in ("VmRSS", "VmHWM"))
    before = int(now.search(Path("/proc/self/status").read_text())[1]) * 1024
    with open_work(folder, {}) as work:
        calibrate(model, batches, heldout=0, host_memory=budget, work=work)
    print(weights + int(most.search(Path("/proc/self/status").read_text())[1]) * 1024 - before)


run(64, Path(sys.argv[1]) / "warm")  # what libraries take at their first use counts in no budget
run(1024, Path(sys.argv[1]) / "work", *map(int, sys.argv[2:]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the peak memory of Linux")
def test_a_process_stays_within_its_budget_with_what_kernels_take_inside_of_them(tmp_path):
    """By the memory of a process, which sees the products that no tensor of Python stands for."""

    budget, peaks = 90 << 20, []
    for limit in ([str(budget)], []):  # each in a process of its own, whose allocator keeps nothing of the other
        command = [sys.executable, "-c", MEASURED, str(tmp_path / f"limits-{len(limit)}"), *limit]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(found.stdout.split()[-1]))
    short, whole = peaks
    assert short <= budget < whole


def test_a_budget_below_the_needs_of_one_layer_says_what_to_change():
    with pytest.raises(
        GfwsvdError, match="the statistics of model.layers.0.* take .* give more memory, or smaller batches"
    ):
        calibrate(tiny_model("llama"), BATCHES, host_memory=100_000)


def _keep_every_batch(monkeypatch):
    monkeypatch.setattr(passes, "SNAPSHOT_SECONDS", -1.0)
    monkeypatch.setattr(passes, "SNAPSHOT_COST", 0)


class _Killed(BaseException):
    pass


@pytest.mark.parametrize(("variant", "memory"), [*((variant, False) for variant in VARIANTS), ("token", True)])
def test_a_calibration_that_dies_again_and_again_ends_with_the_same_bits(variant, memory, tmp_path, monkeypatch):
    """It dies after every few batches, at another place of the batch each time."""
    _keep_every_batch(monkeypatch)
    whole = calibrate(tiny_model("llama"), BATCHES, **VARIANTS[variant])
    model = tiny_model("llama")
    original = collector.Collector._see_input
    for attempt in itertools.count():
        calls = itertools.count()

        def dying(self, name, x, attempt=attempt, calls=calls):
            if next(calls) == 50 + 17 * attempt:
                raise _Killed
            original(self, name, x)

        monkeypatch.setattr(collector.Collector, "_see_input", dying)
        try:
            with open_work(tmp_path / "work", ABOUT) as work:
                budget = 3 * needed() // 2 if memory else None
                found = calibrate(model, BATCHES, host_memory=budget, work=work, **VARIANTS[variant])
                assert_same_bits(found, whole)
            break
        except _Killed:
            assert attempt < 60, "it does not get on"
    assert attempt > 0


def test_what_was_kept_is_not_computed_again(tmp_path, monkeypatch):
    _keep_every_batch(monkeypatch)
    model, seen = tiny_model("llama"), []

    def track(items, description):
        for index, item in enumerate(items):
            if len(seen) == 3:
                raise KeyboardInterrupt
            seen.append(index)
            yield item

    with pytest.raises(KeyboardInterrupt), open_work(tmp_path / "work", ABOUT) as work:
        calibrate(model, BATCHES, heldout=0, work=work, track=track)
    rest = []
    with open_work(tmp_path / "work", ABOUT) as work:
        calibrate(model, BATCHES, heldout=0, work=work, track=lambda items, _: rest.append(len(items)) or items)
        assert rest == [2]
        calibrate(model, BATCHES, heldout=0, work=work, track=lambda items, _: rest.append(len(items)) or items)
    assert rest == [2]


def test_a_finished_group_whose_file_was_changed_since_is_refused_by_its_name(tmp_path):
    whole = calibrate(tiny_model("llama"), BATCHES, heldout=0)
    with open_work(tmp_path / "work", ABOUT) as work:
        found = calibrate(tiny_model("llama"), BATCHES, heldout=0, work=work)
        content = bytearray(work.file("group-0").read_bytes())
        content[-4] ^= 1  # the last bit of the last number
        work.file("group-0").write_bytes(content)
        refused = {}
        for name, stats in whole.layers.items():
            for field in TENSORS:
                try:
                    _assert_equal(getattr(found.layers[name], field), getattr(stats, field))
                except GfwsvdError as error:
                    refused[name, field] = str(error)
        assert len(refused) == 1
        (((name, field), error),) = refused.items()
        assert error.startswith(f"{work.file('group-0')}: {name}.{field} does not have its digest")
        with pytest.raises(GfwsvdError, match="does not have its digest"):
            save_statistics(found, tmp_path / "statistics")
        assert not (tmp_path / "statistics").exists()


def _failing(bad: Callable[[torch.Tensor], bool], value: float):
    def loss(model, batch):
        logits = model(**batch).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="none"
        )
        return losses * value if bad(batch["input_ids"]) else losses

    return loss


def test_a_batch_of_a_loss_that_is_nan_is_left_out_and_counted():
    batches = [{"input_ids": random_tokens(1, 8, seed=seed)} for seed in range(40)]
    spoilt = batches[7]["input_ids"]
    loss = _failing(lambda ids: torch.equal(ids, spoilt), float("nan"))
    with pytest.warns(UserWarning, match="1 sequences are left out"):
        found = calibrate(tiny_model("llama"), batches, loss=loss, sweeps=2, heldout=0)
    rest = batches[:7] + batches[8:]
    expected = calibrate(tiny_model("llama"), rest, loss=loss, sweeps=2, heldout=0)
    assert (found.num_skipped, expected.num_skipped) == (1, 0)
    found.num_skipped, found.data_sha256 = 0, expected.data_sha256
    assert_same_bits(found, expected)


def test_too_many_batches_of_nan_end_the_calibration():
    batches = [{"input_ids": random_tokens(1, 8, seed=seed)} for seed in range(40)]
    spoilt = [batches[n]["input_ids"] for n in (3, 5, 9)]
    loss = _failing(lambda ids: any(torch.equal(ids, bad) for bad in spoilt), float("nan"))
    with warnings.catch_warnings(), pytest.raises(GfwsvdError, match="loss is NaN or inf.*3 of 40 sequences"):
        warnings.simplefilter("ignore")
        calibrate(tiny_model("llama"), batches, loss=loss, heldout=0)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(
    "when", [1, 17, 30]
)  # hooked gradients before memory is short: of the first or the second pass
def test_running_out_of_memory_halves_the_batches_and_goes_on(when, kept, tmp_path, monkeypatch):
    """Wherever within a batch it happens, nothing counts twice."""
    _keep_every_batch(monkeypatch)
    batches = [{"input_ids": random_tokens(4, 8, seed=seed)} for seed in range(2)]
    expected = calibrate(
        tiny_model("llama"), [{"input_ids": p} for b in batches for p in b["input_ids"].split(2)], sweeps=2
    )
    original, calls = collector.Collector._see_gradient, itertools.count()

    def short(self, name, x, g):
        if self.num_sequences > 2 and next(calls) == when:
            raise torch.OutOfMemoryError("CUDA out of memory")
        original(self, name, x, g)

    monkeypatch.setattr(collector.Collector, "_see_gradient", short)
    with open_work(tmp_path / "work", ABOUT) as work, pytest.warns(UserWarning, match="going on with 2"):
        found = calibrate(tiny_model("llama"), batches, sweeps=2, work=work if kept else None)
    assert found.batch_rows == 2
    for name, stats in expected.layers.items():
        for field in ("input_moment", "output_moment", "left", "right"):
            a, b = symmetric(getattr(found.layers[name], field)), symmetric(getattr(stats, field))
            assert (a - b).norm() <= 1e-5 * b.norm(), (name, field)
        assert found.layers[name].num_tokens == stats.num_tokens


def test_running_out_of_memory_with_one_sequence_says_what_to_do(monkeypatch):
    def short(self, name, x, g):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(collector.Collector, "_see_gradient", short)
    with (
        warnings.catch_warnings(),
        pytest.raises(GfwsvdError, match="out of memory with 1 sequences.*Tried to allocate"),
    ):
        warnings.simplefilter("ignore")
        calibrate(tiny_model("llama"), BATCHES)
    with pytest.raises(GfwsvdError, match="2 sequences in a batch, which belong together"):
        calibrate(tiny_model("llama"), BATCHES, unit="batch")
