"""Tensors brought to the host: the same bits, from wherever they are. On a GPU: `test_gpu.py`."""

from types import SimpleNamespace

import pytest
import torch

from gfwsvd import host
from gfwsvd.host import to_host


class Elsewhere(torch.Tensor):
    """A tensor that is taken for one of a GPU."""

    is_cpu = False


def test_tensors_of_the_host_are_not_copied():
    first, rows = torch.randn(5), torch.randn(4, 6)
    found = to_host({"first": first, "columns": rows.T})
    assert found["first"].data_ptr() == first.data_ptr()
    assert found["columns"].is_contiguous() and torch.equal(found["columns"], rows.T)


@pytest.mark.parametrize("stage", [8, 40, 1 << 20])
def test_tensors_that_pass_through_two_small_pieces_keep_their_bits(stage, monkeypatch):
    empty, waits = torch.empty, []
    filled = SimpleNamespace(record_event=lambda: SimpleNamespace(synchronize=lambda: waits.append(None)))
    monkeypatch.setattr(host, "STAGE", stage)
    monkeypatch.setattr(torch, "empty", lambda size, *, dtype, pin_memory: empty(size, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: filled)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "long": torch.randn(1001, generator=generator),
        "half": torch.randn(7, 3, generator=generator).bfloat16(),
        "columns": torch.randn(4, 6, generator=generator).double().T,
        "number": torch.tensor(0.1, dtype=torch.float64),
        "nothing": torch.zeros(0, 3),
    }
    found = to_host({name: value.as_subclass(Elsewhere) for name, value in tensors.items()} | {"here": torch.ones(3)})
    assert list(found) == [*tensors, "here"]
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    assert len(waits) == sum(max(1, -(-value.nbytes // stage)) for value in tensors.values()), "one for every piece"
