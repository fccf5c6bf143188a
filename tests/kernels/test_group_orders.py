"""The order of additions where programs split the rank, emulated bit by bit: an interpreter shows one order only."""

import numpy as np
import pytest
import torch
from group_cases import factors, oracle
from kernel_cases import DEVICE
from torch import Tensor

from gfwsvd_kernels import Factors, LowRankGroup, tiles
from gfwsvd_kernels.split_rank import split_rank

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="emulates the interpreter's products, which a GPU rounds apart")

TILE = tiles.Tile(16, 64, 32, 4, 2)
D_IN, RANK, D_OUT, NUM_SMS = 80, 37, 100, 5


@pytest.fixture
def group(monkeypatch) -> LowRankGroup:
    monkeypatch.setattr(tiles, "H200", tiles.Target(90, NUM_SMS))
    return LowRankGroup([factors(D_IN, RANK, D_OUT, False, False, dtype=torch.float32)])


def contributions(group: LowRankGroup, x: Tensor) -> list[np.ndarray]:
    """What each program adds to the sums, made of the same products of the same blocks."""
    (projection,) = group.layout.projections
    down, up = group.down.numpy(), group.up.view(projection.rank, projection.pitch).numpy()
    rows = max(16, 1 << (projection.chunk - 1).bit_length())
    depth, cols = 16 * TILE.depth // rows, 16 * TILE.cols // rows
    tokens = padded(x.numpy(), 16, -(-D_IN // depth) * depth)
    found = []
    for start in range(0, projection.rank, projection.chunk):
        ranks = slice(start, min(start + projection.chunk, projection.rank))
        own_down = padded(down[ranks], rows, tokens.shape[1])
        own_up = padded(up[ranks], rows, -(-projection.pitch // cols) * cols)
        z = np.zeros((16, rows), np.float32)
        for i in range(0, tokens.shape[1], depth):
            z = z + np.matmul(tokens[:, i : i + depth], own_down[:, i : i + depth].T)
        parts = [np.matmul(z, own_up[:, o : o + cols]) for o in range(0, own_up.shape[1], cols)]
        found.append(np.concatenate(parts, 1)[: len(x), : projection.pitch])
    return found


def padded(rows: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.pad(rows, ((0, height - rows.shape[0]), (0, width - rows.shape[1])))


def added(parts: list[np.ndarray]) -> Tensor:
    total = np.zeros_like(parts[0])
    for part in parts:
        total = total + part
    return torch.from_numpy(total)[:, :D_OUT]


def launch(group: LowRankGroup, x: Tensor) -> Tensor:
    return split_rank(x, group.operands, group.layout, tile=TILE)


def test_the_kernel_adds_what_the_emulation_adds(group):
    x = torch.randn(5, D_IN)
    parts = contributions(group, x)
    assert len(parts) == group.layout.num_programs == NUM_SMS
    assert torch.equal(launch(group, x), added(parts))


def test_in_any_order_every_slice_counts_once(group):
    """Small integers, so that any order gives the same bits and a lost or doubled slice shows."""
    whole = Factors(torch.randint(-3, 4, (RANK, D_IN)).float(), torch.randint(-3, 4, (D_OUT, RANK)).float())
    group = LowRankGroup([whole])
    x = torch.randint(-3, 4, (5, D_IN)).float()
    parts, exact = contributions(group, x), oracle(x, [whole], None)
    for _ in range(20):
        assert torch.equal(added([parts[i] for i in torch.randperm(len(parts))]).double(), exact)
    assert torch.equal(launch(group, x).double(), exact)


def test_the_order_changes_the_result_by_rounding_alone(group):
    """The bound of summation: (programs - 1) eps times the sum of the magnitudes."""
    x = torch.randn(5, D_IN)
    parts = contributions(group, x)
    exact = torch.from_numpy(sum(part.astype(np.float64) for part in parts))[:, :D_OUT]
    magnitudes = torch.from_numpy(sum(abs(part.astype(np.float64)) for part in parts))[:, :D_OUT]
    results = [added([parts[i] for i in torch.randperm(len(parts))]) for _ in range(20)]
    assert len({result.numpy().tobytes() for result in results}) > 1
    for result in results:
        assert ((result.double() - exact).abs() <= (len(parts) - 1) * 2.0**-24 * magnitudes).all()
