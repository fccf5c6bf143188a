"""Several layers of a checkpoint merged into one, or split over processes, as inference engines run them.

A *shard* is one layer of the checkpoint within a merged layer, such as q, k and v; each has a rank and a kind of its
own, or is dense:

    z = weight x        all down factors, and the weights of dense shards, one under the other: one product
    u_i = up_i z_i      for each shard with two factors
    y_i = z_i if shard i is dense, u_i if low-rank, [z_i u_i] in its order if pivoted: one gather for all shards

Where a process has all inputs and outputs and every shard is factored, that may be one grouped operation instead
(`grouped`), which on a GPU takes fewer launches and no gather.

The factors of a shard in eight bits (`quantise.py`) are whole numbers, which lie in tensors of their own; then
two products make z, and z_i and what up_i takes are brought to scale as `LowRankLinear` does.

Tensor parallelism. Where the inputs are split, a process has its columns of `weight` and all of up, and the y of the
processes are to be added. Where the outputs are split, it has all of the down factors, since every output takes the
whole of z, and the rows of up for its own outputs; those of them that are pivots it finds in z. So ranks need not be
divisible, but one of the two factors is held by every process, and so are all scales, which belong to ranks.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from gfwsvd_kernels import Factors, LowRankGroup

from .checkpoint import Entry
from .errors import GfwsvdError
from .layers import check_order
from .quantise import UNIT, check_scales

WHOLE = "_whole"  # ends the name of a tensor of whole numbers


class Shard:
    """One layer of the checkpoint within a merged layer.

    Attributes:
        own: the outputs that this process computes, (N,) int64 on the CPU.
        shapes: of the whole tensors in the checkpoint, by their last name.
        kept: of what this process loads of them. Of a pivoted shard that is all of up and order: which rows are those
            of its own outputs can be told only when order has come.
        places: in which of the merged layer's tensors this is, and where it begins there.
        loaded: last names of the tensors that came.
        pivots: of a pivoted shard that has all its outputs, which of them the rows of weight are, once it is finished.
    """

    def __init__(self, name: str, entry: Entry, d_out: int, own: Tensor, d_in: int, columns: int, bias: bool) -> None:
        self.name, self.entry, self.own = name, entry, own
        self.shapes = entry.shapes(d_out, d_in) | ({"bias": (d_out,)} if bias else {})
        self.kept = entry.shapes(d_out if entry.pivoted else len(own), columns)
        self.places: dict[str, tuple[str, int]] = {}
        self.loaded: set[str] = set()
        self.pivots: Tensor | None = None
        self.is_whole = columns == d_in and torch.equal(own, torch.arange(d_out, device="cpu"))

    def tensor(self, leaf: str) -> str:
        """The name of the merged layer's tensor that has a tensor of the shard in it."""
        return leaf + WHOLE if leaf in ("weight", "up") and self.entry.bits else leaf

    def view(self, leaf: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """The shard's part of the merged layer's tensors."""
        name, start = self.places[leaf]
        return tensors[name].view(-1)[start : start + math.prod(self.kept[leaf])].view(self.kept[leaf])


class MergedLayer:
    """The shards of a merged layer and what this process computes of it.

    Its tensors are `weight` (rows of all shards, columns), and flat `up`, `order` and `scales`, the shards' tensors one
    after the other; those of int8 factors are in `weight_whole` and `up_whole` instead.

    Attributes:
        sizes: elements of each of these tensors.
    """

    def __init__(
        self,
        entries: Mapping[str, Entry],
        outputs: Sequence[tuple[int, Tensor]],
        *,
        d_in: int,
        columns: slice,
        bias: bool,
    ) -> None:
        """
        Args:
            entries: what the format section says of the shards, by their names.
            outputs: for each shard D_OUT, and which outputs this process computes, (N,) int64 on the CPU. One shard may
                have the outputs of several pairs.
            columns: the inputs that this process has.
            bias: whether there has to be one, which is not loaded here.

        Raises:
            GfwsvdError: when several shards are not as many as the pairs.
        """
        if len(entries) == 1:
            starts = accumulate((d_out for d_out, _ in outputs), initial=0)
            own = torch.cat([own + start for start, (_, own) in zip(starts, outputs, strict=False)])
            outputs = [(sum(d_out for d_out, _ in outputs), own)]
        if len(outputs) != len(entries):
            raise GfwsvdError(
                f"{', '.join(entries)} would be merged into a layer of {len(outputs)} parts, and which is which is not "
                "known; compress the model anew with these layers excluded"
            )
        self.columns = columns
        self.sizes = dict.fromkeys(("weight", "up", "weight" + WHOLE, "up" + WHOLE, "order", "scales"), 0)
        self.shards, width = [], columns.stop - columns.start
        for (name, entry), (d_out, own) in zip(entries.items(), outputs, strict=True):
            self.shards.append(shard := Shard(name, entry, d_out, own, d_in, width, bias))
            for leaf, shape in shard.kept.items():
                tensor = shard.tensor(leaf)
                shard.places[leaf] = tensor, self.sizes[tensor]
                self.sizes[tensor] += math.prod(shape)
        self.pivoted = any(shard.entry.pivoted for shard in self.shards)

    def room(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors to load into, on the default device; all but whole numbers and orders are of `dtype`."""
        dtypes = {"order": torch.int32, "weight" + WHOLE: torch.int8, "up" + WHOLE: torch.int8}
        room = {name: torch.empty(size, dtype=dtypes.get(name, dtype)) for name, size in self.sizes.items()}
        width = self.columns.stop - self.columns.start
        return {name: data.view(-1, width) if name.startswith("weight") else data for name, data in room.items()}

    @torch.no_grad()
    def load(self, position: int, leaf: str, whole: Tensor, *, into: Mapping[str, Tensor]) -> None:
        """Copy what this process needs of a tensor of the checkpoint into the merged layer's tensors.

        Raises:
            GfwsvdError: when it has another shape than the checkpoint's configuration says, or whole numbers where it
                says others, or the other way round.
        """
        shard = self.shards[position]
        if (expected := shard.shapes.get(leaf)) != tuple(whole.shape):
            raise GfwsvdError(
                f"{shard.name}.{leaf} should be {expected or 'absent'} by config.json, got {tuple(whole.shape)}; the "
                "files are not of one checkpoint, or the engine stores this kind of layer otherwise"
            )
        part = shard.view(leaf, into)
        if whole.dtype != part.dtype and not (whole.is_floating_point() and part.is_floating_point()):
            raise GfwsvdError(
                f"{shard.name}.{leaf} should be {part.dtype} by config.json, got {whole.dtype}; the files are not of "
                "one checkpoint"
            )
        if leaf == "up" and not shard.entry.pivoted or shard.entry.rank is None:
            whole = whole[shard.own]
        part.copy_(whole[:, self.columns] if leaf == "weight" else whole)
        shard.loaded.add(leaf)

    @torch.no_grad()
    def finish(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """After loading: the up factors with their own rows alone, and where in `[z_i, u_i for each i]`, of which dense
        shards have no u and low-rank ones no z, each output stands, `order` (N,) int32 where a shard is pivoted.

        Raises:
            GfwsvdError: when a tensor has not come, an order does not hold each output once, or a scale is none.
        """
        if missing := [f"{s.name}.{leaf}" for s in self.shards for leaf in s.shapes if leaf not in s.loaded]:
            raise GfwsvdError(f"missing from the checkpoint: {', '.join(missing)}; copy the folder again, all files")
        for shard in self.shards:
            if shard.entry.bits is not None:
                check_scales(shard.name, shard.view("scales", tensors), shard.entry.bits)
        if not self.pivoted:
            return dict(tensors)
        ups: dict[str, list[Tensor]] = {name: [tensors[name][:0]] for name in ("up", "up" + WHOLE)}
        orders, width = [], 0
        for shard in self.shards:
            places, columns = torch.arange(len(shard.own), dtype=torch.int32, device="cpu"), len(shard.own)
            if "up" in shard.places:
                rows = shard.view("up", tensors)
                if shard.entry.pivoted:
                    check_order(shard.name, whole := shard.view("order", tensors).cpu())
                    rank, places = rows.shape[1], whole[shard.own]
                    shard.pivots = places.argsort()[:rank] if shard.is_whole else None
                    rest = places >= rank
                    rows = rows.index_select(0, (places[rest] - rank).to(rows.device))
                    places[rest] = torch.arange(rank, rank + len(rows), dtype=torch.int32, device="cpu")
                    columns = rank + len(rows)
                name = shard.tensor("up")
                shard.kept["up"] = tuple(rows.shape)
                shard.places["up"] = name, sum(len(part) for part in ups[name])
                ups[name].append(rows.reshape(-1))
            orders.append(places + width)
            width += columns
        made = {name: torch.cat(parts) for name, parts in ups.items()}
        return {**tensors, **made, "order": torch.cat(orders).to(tensors["order"].device)}

    def grouped(self, tensors: Mapping[str, Tensor]) -> LowRankGroup | None:
        """What `forward` computes of the finished tensors, without the bias, from copies of them; None where a shard is
        dense, or not whole here, or some are in eight bits and others are not."""
        if not all(s.is_whole and s.entry.rank and s.entry.bits == self.shards[0].entry.bits for s in self.shards):
            return None
        return LowRankGroup(
            [
                Factors(
                    shard.view("weight", tensors),
                    shard.view("up", tensors),
                    pivots=shard.pivots,
                    scales=shard.view("scales", tensors) if shard.entry.bits else None,
                )
                for shard in self.shards
            ]
        )

    def forward(self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """y (..., N of all shards) of this process, from its inputs x (..., columns) and the finished tensors."""
        z, parts = {}, []
        if self.sizes["weight"]:
            z["weight"] = F.linear(x, tensors["weight"])
        if self.sizes["weight" + WHOLE]:
            unit = x.new_full((), UNIT)  # brings whole numbers to the dtype of x
            z["weight" + WHOLE] = F.linear(x, tensors["weight" + WHOLE] * unit)
        for shard in self.shards:
            tensor, start = shard.places["weight"]
            rows, columns = shard.kept["weight"]
            z_i = to_up = z[tensor].narrow(-1, start // columns, rows)
            if shard.entry.bits:
                down_scale, up_scale = shard.view("scales", tensors)
                z_i = z_i * down_scale
                to_up = z_i * up_scale
            if shard.entry.kind != "lowrank":
                parts.append(z_i)
            if shard.entry.kind != "dense":
                up = shard.view("up", tensors)
                parts.append(F.linear(to_up, up * unit if shard.entry.bits else up))
        y = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        if self.pivoted:
            y = y.index_select(-1, tensors["order"])
        return y if bias is None else y + bias
