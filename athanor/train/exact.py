"""Steps that are the same bits on any number of data ranks: every sum has an order that none of them changes.

Gradients are added up by a tree over virtual shards, the loss and counts over all micro-batches of the step, the gradient's norm
over rows of parameters. What is sent for the latter is zero wherever it is another rank's, so any order of ranks adds it exactly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from athanor.parallel.exact import Shards, fold

if TYPE_CHECKING:
    from athanor.train.step import Trainee


class Exact:
    """What a step sums up, when it does so exactly. The gradients of a sharded model are fully_shard's matter."""

    def __init__(self, data_shards: int, trainee: Trainee) -> None:
        self.trainee, self.mesh = trainee, trainee.mesh
        self.shards = Shards.of(data_shards, trainee.mesh)
        self.tree = self.shards.tree()
        self.tallies: list[Tensor] = []  # of each micro-batch
        self.places: dict[str, int] = {}  # where a parameter's rows lie among all
        self.rows = 0
        for name, (shape, _) in trainee.stages.tensors.items():
            self.places[name] = self.rows
            self.rows += self.mesh.layout.tp * (shape[0] if shape else 1)

    def spread(self, mine: Tensor) -> Tensor:
        """A row per micro-batch of this rank [k, n] -> one per micro-batch of the step, zero where it is another rank's."""
        rank, ranks = self.shards.rank, self.shards.ranks
        everywhere = mine.new_zeros(ranks, *mine.shape)
        everywhere[rank] = mine
        return everywhere.flatten(0, 1)

    def sum(self, mine: Tensor) -> Tensor:
        """A row per micro-batch of this rank [k, n] -> the sum over all ranks' [n]."""
        return fold(self.mesh.sum(self.spread(mine)).t())

    def end_micro_batch(self, tally: Tensor, ends_shard: bool) -> None:
        """Note a micro-batch's outcome. At the end of a shard its gradient goes into the tree, if no one else adds it up."""
        self.tallies.append(tally)
        if self.trainee.sharded or not ends_shard:
            return
        optimizer, gradients = self.trainee.optimizer, []
        for piece in optimizer.pieces:
            found = piece.gradient
            gradients.append(torch.zeros_like(piece.shard) if found is None else found.to(piece.shard.dtype))
        self.tree.add(gradients)
        optimizer.clear()
        if self.tree.next == self.shards.total:
            for piece, total in zip(optimizer.pieces, self.tree.root(), strict=True):
                piece.give(total)
            self.tree = self.shards.tree()

    def outcome(self, asked: Tensor) -> Tensor:
        """The squared norm of the gradient, the wish to stop [1], and the sums of what was tallied, over all ranks."""
        tallies = self.spread(torch.stack(self.tallies))
        self.tallies = []
        if not self.mesh.counts_tokens:
            tallies.mul_(0.0)  # what is not a number stays so
        found = self.mesh.sum(torch.cat([self._squares(), asked, tallies.flatten()]))
        squares, asked, sums = found.split([self.rows, 1, tallies.numel()])
        return torch.cat([fold(squares).reshape(1), asked, fold(sums.view(tallies.shape).t())])

    def _squares(self) -> Tensor:
        """The sum of squares of each row (dim 0) of every parameter's gradient, of each tensor-parallel rank by itself."""
        optimizer, mesh = self.trainee.optimizer, self.mesh
        out = torch.zeros(self.rows, dtype=torch.float64, device=mesh.device)
        for piece in optimizer.pieces:
            gradient = piece.gradient
            if gradient is None or not gradient.numel() or piece.parameter not in optimizer.owned:
                continue
            placement = optimizer.placed[piece.parameter]
            rows = gradient.reshape(gradient.shape[0] if gradient.ndim else 1, -1)
            wide = rows.to(torch.promote_types(gradient.dtype, torch.float32))
            first = self.places[piece.name] + mesh.coordinates["tp"] * (placement.shape or (1,))[0]
            first += (placement.box().offset or (0,))[0]
            out[first:first + len(rows)] = fold(wide * wide).double()
        out[0] += optimizer.faulty_copies()
        return out
