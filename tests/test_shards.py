"""Merged and split layers against the product of the whole factors in float64, without an inference engine."""

import pytest
import torch
from torch import Tensor

from gfwsvd.checkpoint import Entry
from gfwsvd.errors import GfwsvdError
from gfwsvd.layers import LowRankLinear
from gfwsvd.pivot import pivoted
from gfwsvd.quantise import UNIT, eight_bits
from gfwsvd.shards import MergedLayer

D_IN = 12
# Kind, outputs, rank and, if any, bits of each shard; the ranks are no multiples of anything.
GROUPS = {
    "one low-rank": [("lowrank", 16, 5)],
    "one pivoted": [("pivoted", 16, 7)],
    "low-rank": [("lowrank", 16, 5), ("lowrank", 8, 3), ("lowrank", 8, 7)],
    "pivoted": [("pivoted", 16, 5), ("pivoted", 8, 3), ("pivoted", 8, 7)],
    "all kinds": [("pivoted", 16, 7), ("dense", 8, None), ("lowrank", 8, 3)],
    "dense first": [("dense", 8, None), ("lowrank", 8, 5), ("pivoted", 16, 11)],
    "one low-rank in 8 bits": [("lowrank", 16, 5, 8)],
    "one pivoted in 8 bits": [("pivoted", 16, 7, 8)],
    "low-rank in 8 bits": [("lowrank", 16, 5, 8), ("lowrank", 8, 3, 8), ("lowrank", 8, 7, 8)],
    "all kinds, some in 8 bits": [("pivoted", 16, 7, 8), ("dense", 8, None), ("lowrank", 8, 3), ("lowrank", 8, 5, 8)],
    "pivoted, the second in 8 bits": [("pivoted", 16, 5), ("pivoted", 8, 3, 8), ("dense", 8, None)],
}


def tensors(kind: str, d_out: int, rank: int | None, bits: int | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """What a checkpoint holds of a random layer, in float64, and the weight that it stands for."""
    if rank is None:
        weight = torch.randn(d_out, D_IN, dtype=torch.float64)
        return {"weight": weight}, weight
    up, down = torch.randn(d_out, rank, dtype=torch.float64), torch.randn(rank, D_IN, dtype=torch.float64)
    found = {"weight": down, "up": up}
    if kind == "pivoted":
        form = pivoted(up, down)
        found = {"weight": form.down, "up": form.up, "order": form.order()}
    if bits:
        found["up"], found["weight"], found["scales"] = eight_bits(found["up"], found["weight"], dtype=torch.float64)
        down_scale, up_scale = UNIT * found["scales"]
        up, down = found["up"] * up_scale, found["weight"] * down_scale[:, None]
        return found, torch.cat((down, up @ down))[found["order"]] if kind == "pivoted" else up @ down
    return found, up @ down


class Checkpoint:
    """A random checkpoint of one group of shards: its entries, tensors and dense weights."""

    def __init__(self, group: str) -> None:
        self.entries = {f"layer{i}": Entry(kind, *rest) for i, (kind, _, *rest) in enumerate(GROUPS[group])}
        self.tensors, self.weights = zip(*(tensors(*shard) for shard in GROUPS[group]), strict=True)

    def outputs(self, process: int, processes: int) -> list[tuple[int, Tensor]]:
        return [(len(w), torch.arange(len(w)).chunk(processes)[process]) for w in self.weights]

    def merged(self, outputs: list[tuple[int, Tensor]], columns: slice = slice(0, D_IN)) -> MergedLayer:
        return MergedLayer(self.entries, outputs, d_in=D_IN, columns=columns, bias=False)

    def loaded(self, merged: MergedLayer, dtype: torch.dtype, without: str = "") -> dict[str, Tensor]:
        """What a process of an engine loads, with every buffer full of NaN, or of the least whole numbers, before."""
        room = merged.room(dtype)
        for buffer in room.values():
            buffer.fill_(float("nan") if buffer.is_floating_point() else torch.iinfo(buffer.dtype).min)
        for position, stored in enumerate(self.tensors):
            for leaf, tensor in sorted(stored.items()):
                if f"{position}.{leaf}" != without:
                    merged.load(position, leaf, tensor, into=room)
        return merged.finish(room)

    def compute(self, merged: MergedLayer, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return merged.forward(x, self.loaded(merged, torch.float64), bias)


def assert_close(y: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(y, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("group", GROUPS)
def test_a_merged_layer_computes_its_shards_side_by_side(group):
    checkpoint, x = Checkpoint(group), torch.randn(5, D_IN, dtype=torch.float64)
    exact = x @ torch.cat(checkpoint.weights).T
    bias = torch.randn(exact.shape[-1], dtype=torch.float64)
    assert_close(checkpoint.compute(checkpoint.merged(checkpoint.outputs(0, 1)), x, bias), exact + bias)


@pytest.mark.parametrize("group", GROUPS)
def test_factored_shards_of_one_width_in_bits_are_one_grouped_operation(group):
    checkpoint, x = Checkpoint(group), torch.randn(5, D_IN, dtype=torch.float64)
    merged = checkpoint.merged(checkpoint.outputs(0, 1))
    grouped = merged.grouped(checkpoint.loaded(merged, torch.float64))
    assert (grouped is None) == (group in ("all kinds", "dense first") or "some" in group or "second" in group)
    if grouped is not None:
        assert_close(grouped(x), x @ torch.cat(checkpoint.weights).T)


@pytest.mark.parametrize("group", ["one low-rank", "pivoted", "one pivoted in 8 bits"])
def test_what_processes_split_is_no_grouped_operation(group):
    checkpoint = Checkpoint(group)
    splits = [checkpoint.merged(checkpoint.outputs(1, 2)), checkpoint.merged(checkpoint.outputs(0, 1), slice(0, 6))]
    for merged in splits:
        assert merged.grouped(checkpoint.loaded(merged, torch.float64)) is None


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


@pytest.mark.parametrize("group", [group for group in GROUPS if group.startswith("one")])
def test_one_shard_may_be_several_parts_of_the_engines_layer(group):
    checkpoint, x = Checkpoint(group), torch.randn(5, D_IN, dtype=torch.float64)
    parts = [(8, torch.tensor([4, 5, 6, 7])), (4, torch.tensor([2, 3])), (4, torch.tensor([2, 3]))]
    own = [4, 5, 6, 7, 10, 11, 14, 15]
    assert_close(checkpoint.compute(checkpoint.merged(parts), x), x @ checkpoint.weights[0][own].T)


@pytest.mark.parametrize("group", ["one pivoted", "one pivoted in 8 bits"])
def test_a_process_keeps_the_rows_of_up_that_its_outputs_take(group):
    checkpoint = Checkpoint(group)
    kept = 0
    for process in range(2):
        merged = checkpoint.merged(checkpoint.outputs(process, 2))
        checkpoint.compute(merged, torch.zeros(1, D_IN, dtype=torch.float64))
        kept += merged.shards[0].kept["up"][0]
    assert kept == 16 - 7


@pytest.mark.parametrize("group", ["one pivoted", "one low-rank in 8 bits", "one pivoted in 8 bits"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_shard_gives_the_bits_of_the_layer_in_memory(group, dtype):
    checkpoint, x = Checkpoint(group), torch.randn(5, D_IN, dtype=dtype)
    stored = {leaf: t.to(dtype) if t.is_floating_point() else t for leaf, t in checkpoint.tensors[0].items()}
    layer = LowRankLinear.from_factors(stored["up"], stored["weight"], None, stored.get("order"), stored.get("scales"))
    merged = checkpoint.merged(checkpoint.outputs(0, 1))
    assert torch.equal(merged.forward(x, checkpoint.loaded(merged, dtype), None), layer(x))


def test_a_process_holds_factors_in_eight_bits_as_they_are():
    checkpoint = Checkpoint("all kinds, some in 8 bits")
    stored = [tensor for tensors in checkpoint.tensors for tensor in tensors.values()]
    room = checkpoint.merged(checkpoint.outputs(0, 1)).room(torch.float64)
    assert sum(tensor.nbytes for tensor in room.values()) == sum(tensor.nbytes for tensor in stored)


def test_a_merged_layer_with_whole_numbers_is_traced_without_a_break():
    checkpoint, x = Checkpoint("all kinds, some in 8 bits"), torch.randn(5, D_IN, dtype=torch.float64)
    merged = checkpoint.merged(checkpoint.outputs(0, 1))
    tensors = checkpoint.loaded(merged, torch.float64)
    traced = torch.compile(lambda x: merged.forward(x, tensors, None), backend="eager", fullgraph=True)
    assert torch.equal(traced(x), merged.forward(x, tensors, None))


@pytest.mark.parametrize("tensor", ["0.weight", "0.up", "0.order", "0.scales", "1.weight", "2.up"])
def test_a_missing_tensor_is_an_error_that_names_it(tensor):
    checkpoint = Checkpoint("all kinds, some in 8 bits")
    with pytest.raises(GfwsvdError, match=f"missing from the checkpoint: layer{tensor}; "):
        checkpoint.loaded(checkpoint.merged(checkpoint.outputs(0, 1)), torch.float64, without=tensor)


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
        merged.load(position, leaf, torch.zeros(shape), into=merged.room(torch.float32))


@pytest.mark.parametrize(
    ("position", "leaf", "expected"),
    [(0, "weight", "int8"), (0, "up", "int8"), (0, "order", "int32"), (0, "scales", "float32"), (2, "up", "float32")],
)
def test_whole_numbers_in_the_place_of_others_are_an_error_that_names_them(position, leaf, expected):
    merged = (checkpoint := Checkpoint("all kinds, some in 8 bits")).merged(checkpoint.outputs(0, 1))
    other = torch.int64 if expected == "float32" else torch.float32
    tensor = checkpoint.tensors[position][leaf].to(other)
    with pytest.raises(GfwsvdError, match=rf"layer{position}\.{leaf} should be torch.{expected} by .*, got {other};"):
        merged.load(position, leaf, tensor, into=merged.room(torch.float32))


def test_an_order_with_a_place_twice_is_refused():
    checkpoint = Checkpoint("one pivoted")
    checkpoint.tensors[0]["order"][0] = checkpoint.tensors[0]["order"][1]
    with pytest.raises(GfwsvdError, match="layer0.order should hold each of 0 to 15 once"):
        checkpoint.compute(checkpoint.merged(checkpoint.outputs(0, 1)), torch.zeros(1, D_IN))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_is_none_is_refused(scale):
    checkpoint = Checkpoint("one low-rank in 8 bits")
    checkpoint.tensors[0]["scales"][1, 2] = scale
    with pytest.raises(GfwsvdError, match=r"layer0\.scales should be finite and above zero"):
        checkpoint.compute(checkpoint.merged(checkpoint.outputs(0, 1)), torch.zeros(1, D_IN))


def test_shards_that_cannot_be_told_apart_are_refused():
    checkpoint = Checkpoint("low-rank")
    with pytest.raises(GfwsvdError, match="layer0, layer1, layer2 would be merged into a layer of 2 parts"):
        checkpoint.merged(checkpoint.outputs(0, 1)[:2])
