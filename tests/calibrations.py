"""What tests of calibration share: batches, a loss, and when statistics are the same."""

import pytest
import torch
from oracles import symmetric
from torch import nn

MATRICES = ("input_moment", "output_moment", "left", "right")
VECTORS = ("input_abs", "fisher_rows")


def in_batches(ids, size):
    return [{"input_ids": part} for part in ids.split(size)]


def cross_entropy(model, batch):
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    return nn.functional.cross_entropy(logits.mT, batch["input_ids"][:, 1:], reduction="none")


def assert_same(first, second, *, tolerance=1e-4, names=(*MATRICES, *VECTORS), scales=True):
    """All statistics agree, relative to the size of each, gradient scales undone."""
    assert list(first.layers) == list(second.layers)
    assert first.num_losses == second.num_losses
    for layer, expected in second.layers.items():
        found = first.layers[layer]
        assert found.num_tokens == expected.num_tokens
        for name in names:
            full = symmetric if name in MATRICES else torch.Tensor.double
            a, b = full(getattr(found, name)), full(getattr(expected, name))
            if name in ("output_moment", "fisher_rows"):
                a, b = a / found.gradient_scale**2, b / expected.gradient_scale**2
            assert (a - b).norm() <= tolerance * b.norm(), f"{name} of {layer}"
        if scales:
            scale = expected.scale / expected.gradient_scale**2
            assert found.scale / found.gradient_scale**2 == pytest.approx(scale, rel=tolerance)


LENGTHS = (4, 9, 6)
