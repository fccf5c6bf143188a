"""The choice of tiles and of the split over tokens."""

import re
from types import SimpleNamespace

import pytest
import torch

from gfwsvd_kernels import tiles


def busy(splits: int, num_tiles: int, num_sms: int) -> float:
    programs = splits * num_tiles
    return programs / (-(-programs // num_sms) * num_sms)


@pytest.mark.parametrize("num_tiles", [1, 10, 36, 136, 528, 5000])
def test_splitting_the_tokens_fills_the_machine(num_tiles):
    splits = tiles.token_splits(2**17, num_tiles, 132, 512)
    assert busy(splits, num_tiles, 132) >= 0.9


def test_tokens_are_not_split_where_the_tiles_fill_the_machine_alone():
    assert tiles.token_splits(2**17, 528, 132, 512) == 1


def test_every_part_keeps_enough_tokens_to_be_worth_its_addition():
    assert tiles.token_splits(511, 1, 132, 512) == 1
    assert tiles.token_splits(2048, 1, 132, 512) == 4


def test_rows_that_cannot_be_read_in_vectors_get_the_small_tile():
    aligned, unaligned = torch.empty(8, 64), torch.empty(8, 63)
    shipped = tiles.ALIGNED["gram"][90][4]
    assert tiles.tile("gram", tiles.H200, torch.float32, aligned) == shipped
    assert tiles.tile("gram", tiles.H200, torch.float32, aligned[:, :40]) == shipped
    for odd in (unaligned, aligned[:, 1:], aligned.mT, aligned[:, ::2], torch.empty(1, 1)):
        assert tiles.tile("gram", tiles.H200, torch.float32, aligned, odd) == tiles.UNALIGNED["gram"]


@pytest.mark.parametrize("capability, arch", [((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((10, 3), 100), ((12, 0), 80)])
def test_a_gpu_gets_the_tiles_of_its_architecture(monkeypatch, capability, arch):
    gpu = SimpleNamespace(major=capability[0], minor=capability[1], multi_processor_count=7, name="a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert tiles.target(torch.device("cuda")) == (arch, 7)


def test_an_older_gpu_is_refused_by_name(monkeypatch):
    gpu = SimpleNamespace(major=7, minor=5, multi_processor_count=7, name="Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    with pytest.raises(ValueError, match=re.escape("8.0 or later, got 7.5 (Tesla T4)")):
        tiles.target(torch.device("cuda"))


def test_a_stride_that_would_overflow_an_offset_is_refused():
    huge = torch.empty(2**23, 4, device="meta")
    tiles.check_strides(x=huge)  # more elements than 2**24, small strides
    with pytest.raises(
        ValueError, match=re.escape("x must have strides below 8388608 elements on a GPU, got strides (1, 8388608)")
    ):
        tiles.check_strides(x=torch.empty(4, 2**23, device="meta").mT)
