"""Several layers of a checkpoint merged into one, or split over processes, as inference engines run them.

A *shard* is one layer of the checkpoint within a merged layer, such as q, k and v; each has a rank and a kind of its
own, or is dense:

    z = weight x        all down factors, and the weights of dense shards, one under the other: one product
    u_i = up_i z_i      for each shard with two factors
    y_i = z_i if shard i is dense, u_i if low-rank, [z_i u_i] in its order if pivoted: one gather for all shards

Tensor parallelism. Where the inputs are split, a process has its columns of `weight` and all of up, and the y of the
processes are to be added. Where the outputs are split, it has all of the down factors, since every output takes the
whole of z, and the rows of up for its own outputs; those of them that are pivots it finds in z. So ranks need not be
divisible, but one of the two factors is held by every process.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from .checkpoint import Entry
from .errors import GfwsvdError
from .layers import check_order


class Shard:
    """One layer of the checkpoint within a merged layer.

    Attributes:
        own: the outputs that this process computes, (N,) int64 on the CPU.
        shapes: of the whole tensors in the checkpoint, by their last name.
        kept: of what this process loads of them. Of a pivoted shard that is all of up and order: which rows are those
            of its own outputs can be told only when order has come.
        starts: where this begins in the merged layer's tensor of that name.
        loaded: last names of the tensors that came.
    """

    def __init__(self, name: str, entry: Entry, d_out: int, own: Tensor, d_in: int, columns: int, bias: bool) -> None:
        self.name, self.entry, self.own = name, entry, own
        self.shapes = entry.shapes(d_out, d_in) | ({"bias": (d_out,)} if bias else {})
        self.kept = entry.shapes(d_out if entry.pivoted else len(own), columns)
        self.starts: dict[str, int] = {}
        self.loaded: set[str] = set()

    def view(self, leaf: str, tensor: Tensor) -> Tensor:
        """The shard's part of the merged layer's tensor."""
        start = self.starts[leaf]
        return tensor.view(-1)[start : start + math.prod(self.kept[leaf])].view(self.kept[leaf])


class MergedLayer:
    """The shards of a merged layer and what this process computes of it.

    Its tensors are `weight` (rows of all shards, columns), and flat `up` and `order`, the shards' tensors one after the
    other.

    Attributes:
        sizes: elements of `weight`, `up` and `order`.
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
        self.sizes = {"weight": 0, "up": 0, "order": 0}
        self.shards, width = [], columns.stop - columns.start
        for (name, entry), (d_out, own) in zip(entries.items(), outputs, strict=True):
            self.shards.append(shard := Shard(name, entry, d_out, own, d_in, width, bias))
            for leaf, shape in shard.kept.items():
                shard.starts[leaf] = self.sizes[leaf]
                self.sizes[leaf] += math.prod(shape)
        self.pivoted = any(shard.entry.pivoted for shard in self.shards)

    @torch.no_grad()
    def load(self, position: int, leaf: str, whole: Tensor, *, into: Tensor) -> None:
        """Copy what this process needs of a tensor of the checkpoint into the merged layer's tensor of that name.

        Raises:
            GfwsvdError: when it has another shape than the checkpoint's configuration says.
        """
        shard = self.shards[position]
        if (expected := shard.shapes.get(leaf)) != tuple(whole.shape):
            raise GfwsvdError(
                f"{shard.name}.{leaf} should be {expected or 'absent'} by config.json, got {tuple(whole.shape)}; the "
                "files are not of one checkpoint, or the engine stores this kind of layer otherwise"
            )
        if leaf == "up" and not shard.entry.pivoted or shard.entry.rank is None:
            whole = whole[shard.own]
        shard.view(leaf, into).copy_(whole[:, self.columns] if leaf == "weight" else whole)
        shard.loaded.add(leaf)

    @torch.no_grad()
    def finish(self, up: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """After loading: `up` with its own rows alone, and where in `[z_i, u_i for each i]`, of which dense shards have
        no u and low-rank ones no z, each output stands, (N,) int32.

        Raises:
            GfwsvdError: when a tensor has not come, or an order does not hold each output once.
        """
        if missing := [f"{s.name}.{leaf}" for s in self.shards for leaf in s.shapes if leaf not in s.loaded]:
            raise GfwsvdError(f"missing from the checkpoint: {', '.join(missing)}; copy the folder again, all files")
        if order is None:
            return up, None
        ups, orders, filled, width = [], [], 0, 0
        for shard in self.shards:
            rows = shard.view("up", up) if "up" in shard.starts else up[:0]
            places, columns = torch.arange(len(shard.own), dtype=torch.int32, device="cpu"), len(shard.own)
            if shard.entry.pivoted:
                check_order(shard.name, whole := shard.view("order", order).cpu())
                rank, places = rows.shape[1], whole[shard.own]
                rest = places >= rank
                rows = rows.index_select(0, (places[rest] - rank).to(up.device))
                places[rest] = torch.arange(rank, rank + len(rows), dtype=torch.int32, device="cpu")
                columns = rank + len(rows)
            shard.kept["up"], shard.starts["up"] = tuple(rows.shape), filled
            ups.append(rows.reshape(-1))
            orders.append(places + width)
            filled, width = filled + rows.numel(), width + columns
        return torch.cat(ups), torch.cat(orders).to(order.device)

    def forward(self, x: Tensor, weight: Tensor, up: Tensor, order: Tensor | None, bias: Tensor | None) -> Tensor:
        """y (..., N of all shards) of this process, from its inputs x (..., columns) and the finished tensors."""
        parts = []
        z = F.linear(x, weight).split([shard.kept["weight"][0] for shard in self.shards], -1)
        for shard, z_i in zip(self.shards, z, strict=True):
            if shard.entry.kind != "lowrank":
                parts.append(z_i)
            if shard.entry.kind != "dense":
                parts.append(F.linear(z_i, shard.view("up", up)))
        y = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        if order is not None:
            y = y.index_select(-1, order)
        return y if bias is None else y + bias
