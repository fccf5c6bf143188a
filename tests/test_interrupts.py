"""Ctrl-C: it waits for a place where the work can be gone on with, and loses nothing."""

import itertools
import os
import signal
import threading

import pytest
from test_passes import assert_same_bits

from gfwsvd import collector
from gfwsvd.calibration import calibrate
from gfwsvd.interrupts import noted_interrupts
from gfwsvd.work import open_work
from tiny_models import random_tokens, tiny_model

BATCHES = [{"input_ids": random_tokens(2, 8, seed=seed)} for seed in range(4)]
GRADIENTS = 14  # of the layers of a batch


@pytest.fixture(autouse=True)
def _ctrl_c_raises_as_ever():
    """Some that start tests have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def _press(times=1):
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)


def test_it_waits_for_the_end_of_the_block(capfd):
    reached = False
    with pytest.raises(KeyboardInterrupt), noted_interrupts() as noted:
        assert not noted.is_set()
        _press()
        reached = noted.is_set()
    assert reached and "another Ctrl-C ends it at once" in capfd.readouterr().err


def test_it_takes_the_place_of_an_error():
    with pytest.raises(KeyboardInterrupt), noted_interrupts():
        _press()
        raise ValueError


def test_the_second_one_ends_the_block_at_once():
    pressed = False
    with pytest.raises(KeyboardInterrupt), noted_interrupts():
        _press()
        pressed = True
        _press()
        pytest.fail("it went on")
    assert pressed


def test_nothing_changes_where_it_is_not_wanted_or_where_it_cannot_be():
    seen = []

    def look(wanted):
        with noted_interrupts(wanted):
            seen.append(signal.getsignal(signal.SIGINT))

    look(False)
    thread = threading.Thread(target=look, args=(True,))
    thread.start()
    thread.join()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    look(True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert seen == [signal.default_int_handler, signal.default_int_handler, signal.SIG_IGN]


@pytest.mark.parametrize(
    ("when", "left"),
    [(5, [3, 4]), (3 * GRADIENTS + 1, [4]), (6 * GRADIENTS + 7, [1])],
    ids=["first batch", "last batch of a pass", "second pass"],
)
def test_ctrl_c_within_a_batch_of_a_calibration_keeps_that_batch(when, left, tmp_path, monkeypatch):
    """No state is due yet; where the pass is interrupted in its last batch, all of it is kept."""
    original, calls = collector.Collector._see_gradient, itertools.count()

    def pressing(self, name, x, g):
        if next(calls) == when:
            _press()
        original(self, name, x, g)

    monkeypatch.setattr(collector.Collector, "_see_gradient", pressing)
    model, rest = tiny_model("llama"), []
    with pytest.raises(KeyboardInterrupt), open_work(tmp_path / "work", {}) as work:
        calibrate(model, BATCHES, sweeps=2, heldout=0, work=work)
    with open_work(tmp_path / "work", {}) as work:
        found = calibrate(
            model, BATCHES, sweeps=2, heldout=0, work=work, track=lambda items, _: rest.append(len(items)) or items
        )
        assert [count for count in rest if count] == left
        assert_same_bits(found, calibrate(model, BATCHES, sweeps=2, heldout=0))


def test_without_a_folder_of_work_ctrl_c_interrupts_a_calibration_at_once(monkeypatch):
    seen = []

    def pressing(self, name, x, g):
        seen.append(name)
        _press()

    monkeypatch.setattr(collector.Collector, "_see_gradient", pressing)
    with pytest.raises(KeyboardInterrupt):
        calibrate(tiny_model("llama"), BATCHES)
    assert len(seen) == 1
