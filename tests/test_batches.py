"""Batches that memory is too short for, or that are not finite, wherever in a calibration they come."""

from collections import Counter

import pytest
import torch
from test_passes import assert_same_bits, needed

from gfwsvd import memory
from gfwsvd.calibration import calibrate
from gfwsvd.work import open_work
from tiny_models import random_tokens, tiny_model

SPOILT = 0  # a token that random ones are not


def model_with_nan(first=SPOILT):
    """A model whose logits are NaN for texts that begin with a token."""
    model = tiny_model("llama")

    def spoil(module, args, kwargs, output):
        output.logits = output.logits.masked_fill((kwargs["input_ids"][:, 0] == first)[:, None, None], torch.nan)
        return output

    model.register_forward_hook(spoil, with_kwargs=True)
    return model


def model_short_of_memory(most=2, when=lambda ids: True):
    """A model that runs out of memory with more than `most` sequences."""
    model = tiny_model("llama")

    def refuse(module, args, kwargs):
        if len(kwargs["input_ids"]) > most and when(kwargs["input_ids"]):
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    return model


def spoilt_tokens(sequences, *bad):
    ids = random_tokens(sequences, 8)
    ids[list(bad), 0] = SPOILT
    return ids


def batches_of(ids, size):
    return [{"input_ids": part} for part in ids.split(size)]


@pytest.mark.parametrize("budget", [False, True], ids=["first forward pass", "measured within a budget"])
def test_memory_that_is_short_before_the_first_pass_halves_the_batches(budget, tmp_path):
    ids, limit = random_tokens(8, 8), needed() if budget else None
    model = model_short_of_memory(when=lambda _: torch.is_grad_enabled() or not budget)
    with pytest.warns(UserWarning, match="batches of 4 sequences: going on with 2"):
        found = calibrate(model, batches_of(ids, 4), host_memory=limit, sweeps=2)
    assert found.batch_rows == 2
    assert_same_bits(found, calibrate(tiny_model("llama"), batches_of(ids, 2), sweeps=2))


def test_groups_stay_when_the_memory_in_use_is_measured_otherwise_later(tmp_path, monkeypatch):
    batches, limit = batches_of(random_tokens(4, 8), 2), needed()

    def track(items, description):
        if "layers 2" in description:
            raise KeyboardInterrupt
        return items

    with pytest.raises(KeyboardInterrupt), open_work(tmp_path / "work", {}) as work:
        calibrate(tiny_model("llama"), batches, host_memory=limit, work=work, track=track)
    less = memory.InUse(Counter(), None)
    monkeypatch.setattr(memory, "bytes_in_use", lambda *args, **kwargs: less)
    with open_work(tmp_path / "work", {}) as work:
        found = calibrate(tiny_model("llama"), batches, host_memory=limit, work=work)
        assert_same_bits(found, calibrate(tiny_model("llama"), batches))


def test_a_sequence_of_nan_costs_itself_alone_and_not_its_batch():
    ids = spoilt_tokens(64, 13)
    with pytest.warns(UserWarning, match="loss is NaN or inf.*; 1 sequences are left out"):
        found = calibrate(model_with_nan(), batches_of(ids, 4), sweeps=2)
    assert (found.num_sequences, found.num_skipped, found.num_heldout) == (59, 1, 4)
    apart = [part for batch in ids.split(4) for part in (batch.split(1) if SPOILT in batch else [batch])]
    expected = calibrate(
        tiny_model("llama"), [{"input_ids": part} for part in apart if part[0, 0] != SPOILT], sweeps=2, heldout=4
    )
    found.num_skipped, found.data_sha256 = 0, expected.data_sha256
    assert_same_bits(found, expected)


@pytest.mark.parametrize("bad", [(63,), (60, 61, 62, 63)])
def test_a_held_out_sequence_of_nan_is_left_out_and_counted(bad):
    ids = spoilt_tokens(64, *bad)
    with pytest.warns(UserWarning, match=f"{len(bad)} sequences are left out"):
        found = calibrate(model_with_nan(), batches_of(ids, 4))
    rest = 4 - len(bad)
    assert (found.num_sequences, found.num_skipped, found.num_heldout) == (60, len(bad), rest)
    apart = batches_of(ids[:60], 4) + batches_of(ids[60 : 60 + rest], 1)
    expected = calibrate(tiny_model("llama"), apart, heldout=rest)
    found.num_skipped, found.data_sha256 = 0, expected.data_sha256
    assert_same_bits(found, expected)


def test_memory_that_is_short_for_held_out_sequences_halves_their_batch():
    ids = spoilt_tokens(12, 8)
    with pytest.warns(UserWarning, match="batches of 4 sequences: going on with 2"):
        found = calibrate(model_short_of_memory(when=lambda ids: SPOILT in ids), batches_of(ids, 4), heldout=4)
    assert found.batch_rows == 2
    apart = batches_of(ids[:8], 4) + batches_of(ids[8:], 2)
    assert_same_bits(found, calibrate(tiny_model("llama"), apart, heldout=4))


def test_held_out_sequences_are_in_no_sum_of_inputs_alone():
    ids = random_tokens(6, 8)
    found = calibrate(tiny_model("llama"), batches_of(ids, 2), collect=["inputs"], heldout=2)
    expected = calibrate(tiny_model("llama"), batches_of(ids[:4], 2), collect=["inputs"])
    assert (found.num_heldout, found.num_sequences) == (2, 4)
    found.num_heldout, found.data_sha256 = 0, expected.data_sha256
    assert_same_bits(found, expected)
