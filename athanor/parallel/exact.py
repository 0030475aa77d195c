"""Sums whose bits do not depend on how many ranks there are: by a fixed binary tree over the virtual shards of a batch.

Leaves 2i and 2i + 1 are added up, then their sums in the same way; where one is left over it goes up alone. Each data rank has
equally many neighbouring shards and adds up what the tree pairs among them: one sum when their number is a power of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from athanor.parallel.mesh import Mesh

LINE = 64  # elements: a multiple of what any processor's vectors hold
# torch 2.13 renamed both; up to 2.12 only the old names exist
gather_into: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_into: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Shards:
    """The `total` virtual shards of a batch and the data ranks that share them out, of which this is one."""

    total: int
    ranks: int
    rank: int

    @classmethod
    def of(cls, total: int, mesh: Mesh) -> Shards:
        return cls(total, mesh.layout.data_ranks, mesh.data_rank)

    @property
    def count(self) -> int:
        """Shards of one rank."""
        return self.total // self.ranks

    @property
    def end(self) -> int:
        """The shard after this rank's last one."""
        return (self.rank + 1) * self.count

    def tree(self) -> Tree:
        """A tree that waits for this rank's first shard."""
        return Tree(self.total, self.rank * self.count)

    def nodes(self, rank: int, ranks: int = 1) -> list[int]:
        """How many shards each sum covers that is left when neighbouring ranks, from `rank` on, have added up their pairs."""
        begin, end, sizes = rank * self.count, (rank + ranks) * self.count, []
        while begin < end:
            size = 1
            while begin % (2 * size) == 0 and begin + size < self.total and min(begin + 2 * size, self.total) <= end:
                size *= 2
            sizes.append(min(size, self.total - begin))
            begin += sizes[-1]
        return sizes


class Tree:
    """Adds up what comes for leaf after leaf, from leaf `first` on; `nodes` are the sums that have no partner yet."""

    def __init__(self, total: int, first: int = 0) -> None:
        self.total, self.next = total, first
        self.nodes: list[tuple[int, int, list[Tensor]]] = []  # from leaf, to leaf, sums

    def add(self, values: list[Tensor], leaves: int = 1) -> None:
        """Take the values of the next leaf, or the sums of so many that are a node; they may be overwritten."""
        self.nodes.append((self.next, self.next + leaves, values))
        self.next += leaves
        while len(self.nodes) > 1:
            (begin, middle, left), (_, end, right) = self.nodes[-2:]
            size = middle - begin
            if begin % (2 * size) or end != min(begin + 2 * size, self.total):
                break
            torch._foreach_add_(left, right)
            self.nodes[-2:] = [(begin, end, left)]

    def root(self) -> list[Tensor]:
        """The sums of all leaves. Zeros have lost their sign, which sums with zeros elsewhere would take from them."""
        ((begin, end, values),) = self.nodes
        assert (begin, end) == (0, self.total), "every leaf has been added"
        torch._foreach_add_(values, 0.0)
        return values


def exchange(mine: Tree, shards: Shards, first_rank: int, group: dist.ProcessGroup) -> Tree:
    """Neighbouring ranks, from `first_rank` on, give each other their sums of equal slices [slices x n]: this rank's slice."""
    sent = torch.stack([values[0].view(group.size(), -1) for _, _, values in mine.nodes], 1)
    nodes, length = [shards.nodes(first_rank + i) for i in range(group.size())], sent.shape[-1]
    counts = [len(each) * length for each in nodes]
    received = sent.new_empty(sum(counts))
    dist.all_to_all_single(received, sent.flatten(), counts, [sent[0].numel()] * group.size(), group=group)
    return _joined(Tree(shards.total, first_rank * shards.count), nodes, received.split(counts), length)


def gather(mine: Tree, shards: Shards, together: int, group: dist.ProcessGroup) -> Tree:
    """Replicas, each of `together` neighbouring ranks, give each other their sums of one slice [n]."""
    nodes = [shards.nodes(replica * together, together) for replica in range(group.size())]
    slices = [values[0] for _, _, values in mine.nodes]
    length = slices[0].numel()
    sent = torch.cat([*slices, slices[0].new_zeros((max(map(len, nodes)) - len(slices)) * length)])
    received = sent.new_empty(group.size() * sent.numel())
    gather_into(received, sent, group=group)
    return _joined(Tree(shards.total), nodes, received.split(sent.numel()), length)


def _joined(tree: Tree, nodes: Sequence[Sequence[int]], parts: Sequence[Tensor], length: int) -> Tree:
    """The tree with the sums [length] that lie one after another in each rank's part, and cover so many leaves each."""
    for leaves, part in zip(nodes, parts, strict=True):
        for count, values in zip(leaves, part.split(length), strict=False):  # a part may end in padding
            tree.add([values], count)
    return tree


def fold(x: Tensor) -> Tensor:
    """The sum over the last dim, by halves, so that it rounds alike whatever else there is; `x` is overwritten."""
    while (size := x.shape[-1]) > 1:
        half = (size + 1) // 2
        x[..., :size - half].add_(x[..., half:])
        x = x[..., :half]
    return x.squeeze(-1)


def join(tensors: Sequence[Tensor]) -> Tensor:
    """All elements in one row, with zeros up to a whole number of a processor's vectors.

    What is left over after the last vector of a loop may be rounded otherwise (torch 2.13's fused AdamW does so).
    """
    return torch.nn.functional.pad(flat := torch.cat([tensor.flatten() for tensor in tensors]), (0, -flat.numel() % LINE))


def take_apart(row: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of these shapes that were joined into a row."""
    sizes = [tensor.numel() for tensor in like]
    return [piece.view_as(tensor) for piece, tensor in zip(row[:sum(sizes)].split(sizes), like, strict=True)]
