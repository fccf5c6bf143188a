"""Merged and split layers against the product of the whole factors in float64, without an inference engine."""

import pytest
import torch
from torch import Tensor

from gfwsvd.checkpoint import Entry
from gfwsvd.errors import GfwsvdError
from gfwsvd.layers import LowRankLinear
from gfwsvd.pivot import pivoted
from gfwsvd.shards import MergedLayer

D_IN = 12
# Kind, outputs and rank of each shard; the ranks are no multiples of anything.
GROUPS = {
    "one low-rank": [("lowrank", 16, 5)],
    "one pivoted": [("pivoted", 16, 7)],
    "low-rank": [("lowrank", 16, 5), ("lowrank", 8, 3), ("lowrank", 8, 7)],
    "pivoted": [("pivoted", 16, 5), ("pivoted", 8, 3), ("pivoted", 8, 7)],
    "all kinds": [("pivoted", 16, 7), ("dense", 8, None), ("lowrank", 8, 3)],
    "dense first": [("dense", 8, None), ("lowrank", 8, 5), ("pivoted", 16, 11)],
}


def tensors(kind: str, d_out: int, rank: int | None) -> tuple[dict[str, Tensor], Tensor]:
    """What a checkpoint holds of a random layer, in float64, and the weight that it stands for."""
    if rank is None:
        weight = torch.randn(d_out, D_IN, dtype=torch.float64)
        return {"weight": weight}, weight
    up, down = torch.randn(d_out, rank, dtype=torch.float64), torch.randn(rank, D_IN, dtype=torch.float64)
    if kind == "lowrank":
        return {"weight": down, "up": up}, up @ down
    form = pivoted(up, down)
    return {"weight": form.down, "up": form.up, "order": form.order()}, up @ down


class Checkpoint:
    """A random checkpoint of one group of shards: its entries, tensors and dense weights."""

    def __init__(self, group: str) -> None:
        self.entries = {f"layer{i}": Entry(kind, rank) for i, (kind, _, rank) in enumerate(GROUPS[group])}
        self.tensors, self.weights = zip(*(tensors(*shard) for shard in GROUPS[group]), strict=True)

    def outputs(self, process: int, processes: int) -> list[tuple[int, Tensor]]:
        return [(len(w), torch.arange(len(w)).chunk(processes)[process]) for w in self.weights]

    def merged(self, outputs: list[tuple[int, Tensor]], columns: slice = slice(0, D_IN)) -> MergedLayer:
        return MergedLayer(self.entries, outputs, d_in=D_IN, columns=columns, bias=False)

    def compute(self, merged: MergedLayer, x: Tensor, bias: Tensor | None = None, without: str = "") -> Tensor:
        """What a process of an engine does, with every buffer full of NaN first."""
        room = {leaf: torch.full((size,), float("nan"), dtype=torch.float64) for leaf, size in merged.sizes.items()}
        room["order"] = room["order"].nan_to_num(nan=-(2**31)).int()
        for position, stored in enumerate(self.tensors):
            for leaf, tensor in sorted(stored.items()):
                if f"{position}.{leaf}" != without:
                    merged.load(position, leaf, tensor, into=room[leaf])
        up, order = merged.finish(room["up"], room["order"] if merged.pivoted else None)
        return merged.forward(x, room["weight"].view(-1, x.shape[-1]), up, order, bias)


def assert_close(y: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(y, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("group", GROUPS)
def test_a_merged_layer_computes_its_shards_side_by_side(group):
    checkpoint, x = Checkpoint(group), torch.randn(5, D_IN, dtype=torch.float64)
    exact = x @ torch.cat(checkpoint.weights).T
    bias = torch.randn(exact.shape[-1], dtype=torch.float64)
    assert_close(checkpoint.compute(checkpoint.merged(checkpoint.outputs(0, 1)), x, bias), exact + bias)


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("group", GROUPS)
def test_processes_that_split_the_outputs_compute_their_own(group, processes):
    checkpoint, x = Checkpoint(group), torch.randn(5, D_IN, dtype=torch.float64)
    for process in range(processes):
        outputs = checkpoint.outputs(process, processes)
        exact = torch.cat([x @ w[own].T for w, (_, own) in zip(checkpoint.weights, outputs, strict=True)], -1)
        assert_close(checkpoint.compute(checkpoint.merged(outputs), x), exact)


@pytest.mark.parametrize("group", GROUPS)
def test_processes_that_split_the_inputs_compute_terms_of_the_sum(group):
    checkpoint, x = Checkpoint(group), torch.randn(5, D_IN, dtype=torch.float64)
    terms = [
        checkpoint.compute(checkpoint.merged(checkpoint.outputs(0, 1), columns), x[:, columns])
        for columns in (slice(0, 6), slice(6, D_IN))
    ]
    assert_close(sum(terms), x @ torch.cat(checkpoint.weights).T)


@pytest.mark.parametrize("group", ["one low-rank", "one pivoted"])
def test_one_shard_may_be_several_parts_of_the_engines_layer(group):
    checkpoint, x = Checkpoint(group), torch.randn(5, D_IN, dtype=torch.float64)
    parts = [(8, torch.tensor([4, 5, 6, 7])), (4, torch.tensor([2, 3])), (4, torch.tensor([2, 3]))]
    own = [4, 5, 6, 7, 10, 11, 14, 15]
    assert_close(checkpoint.compute(checkpoint.merged(parts), x), x @ checkpoint.weights[0][own].T)


def test_a_process_keeps_the_rows_of_up_that_its_outputs_take():
    checkpoint = Checkpoint("one pivoted")
    kept = 0
    for process in range(2):
        merged = checkpoint.merged(checkpoint.outputs(process, 2))
        checkpoint.compute(merged, torch.zeros(1, D_IN, dtype=torch.float64))
        kept += merged.shards[0].kept["up"][0]
    assert kept == 16 - 7


def test_one_pivoted_shard_gives_the_bits_of_the_layer_in_memory():
    checkpoint, x = Checkpoint("one pivoted"), torch.randn(5, D_IN, dtype=torch.float64)
    stored = checkpoint.tensors[0]
    layer = LowRankLinear.from_factors(stored["up"], stored["weight"], None, stored["order"])
    assert torch.equal(checkpoint.compute(checkpoint.merged(checkpoint.outputs(0, 1)), x), layer(x))


@pytest.mark.parametrize("tensor", ["0.weight", "0.up", "0.order", "1.weight", "2.up"])
def test_a_missing_tensor_is_an_error_that_names_it(tensor):
    checkpoint = Checkpoint("all kinds")
    with pytest.raises(GfwsvdError, match=f"missing from the checkpoint: layer{tensor}; "):
        checkpoint.compute(checkpoint.merged(checkpoint.outputs(0, 1)), torch.zeros(1, D_IN), without=tensor)


def test_a_bias_that_has_to_come_is_missed():
    checkpoint = Checkpoint("one low-rank")
    merged = MergedLayer(checkpoint.entries, checkpoint.outputs(0, 1), d_in=D_IN, columns=slice(0, D_IN), bias=True)
    with pytest.raises(GfwsvdError, match="layer0.bias"):
        checkpoint.compute(merged, torch.zeros(1, D_IN))


@pytest.mark.parametrize(
    ("position", "leaf", "shape"), [(0, "weight", (8, 12)), (0, "up", (16, 7)), (1, "up", (8, 3)), (2, "up", (3, 8))]
)
def test_a_tensor_of_another_shape_is_an_error_that_names_it(position, leaf, shape):
    merged = (checkpoint := Checkpoint("all kinds")).merged(checkpoint.outputs(0, 1))
    with pytest.raises(GfwsvdError, match=rf"layer{position}\.{leaf} should be .*, got \({shape[0]}, {shape[1]}\)"):
        merged.load(position, leaf, torch.zeros(shape), into=torch.zeros(merged.sizes[leaf]))


def test_an_order_with_a_place_twice_is_refused():
    checkpoint = Checkpoint("one pivoted")
    checkpoint.tensors[0]["order"][0] = checkpoint.tensors[0]["order"][1]
    with pytest.raises(GfwsvdError, match="layer0.order should hold each of 0 to 15 once"):
        checkpoint.compute(checkpoint.merged(checkpoint.outputs(0, 1)), torch.zeros(1, D_IN))


def test_shards_that_cannot_be_told_apart_are_refused():
    checkpoint = Checkpoint("low-rank")
    with pytest.raises(GfwsvdError, match="layer0, layer1, layer2 would be merged into a layer of 2 parts"):
        checkpoint.merged(checkpoint.outputs(0, 1)[:2])
