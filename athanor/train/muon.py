"""Orthogonal factors of sharded matrices: each is gathered once, on one rank, and ranks share out the work."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from athanor.foundation.intervals import interval
from athanor.foundation.placement import Box, Placement
from athanor.models.rehearsed import device_type
from athanor.parallel.mesh import Mesh

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the Newton-Schulz step (Jordan et al. 2024)
STEPS = 5


class Orthogonaliser:
    """Two messages for any number of matrices and any layout: parts to the rank that owns a matrix, and results back.

    The ranks that hold the same pipeline stages work together. A stack of matrices [E, rows, columns] counts as one.
    """

    def __init__(self, placements: Sequence[Placement], mesh: Mesh) -> None:
        self.shapes = [placement.shape for placement in placements]
        self.group, self.world_size = mesh.stage, mesh.layout.world_size // mesh.layout.pp
        first = mesh.rank - mesh.rank % self.world_size
        self.rank, self.label = mesh.rank - first, f"stage:{mesh.coordinates['pp']}"
        places = [mesh.place(first + r) for r in range(self.world_size)]
        self.boxes = [[placement.box(place) for placement in placements] for place in places]  # [rank][matrix]
        self.gives = [[place["dp_replicate"] == 0 and placement.is_first_copy(place) for placement in placements]
                      for place in places]
        self.owned = share_out([math.prod(shape) * min(shape[-2:]) for shape in self.shapes], self.world_size)

    def __call__(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """This rank's part of every matrix -> its part of the orthogonal factors."""
        if self.world_size == 1:
            return [newton_schulz(part) for part in parts]
        ranks, mine = range(self.world_size), self.owned[self.rank]
        incoming = self._exchange([[parts[m] for m in self.owned[r] if self.gives[self.rank][m]] for r in ranks],
                                  [[self.boxes[r][m] for m in mine if self.gives[r][m]] for r in ranks], parts[0])
        factors: dict[int, torch.Tensor] = {}
        for m in mine:
            whole = parts[0].new_empty(self.shapes[m])
            for r in ranks:
                if self.gives[r][m]:
                    whole[self.boxes[r][m].slices()] = incoming[r].pop(0)
            factors[m] = newton_schulz(whole)
        results = self._exchange([[factors[m][self.boxes[r][m].slices()] for m in mine] for r in ranks],
                                 [[self.boxes[self.rank][m] for m in self.owned[r]] for r in ranks], parts[0])
        found = {m: part for r in ranks for m, part in zip(self.owned[r], results[r], strict=True)}
        return [found[m] for m in range(len(parts))]

    def _exchange(self, outgoing: list[list[torch.Tensor]], expected: list[list[Box]],
                  like: torch.Tensor) -> list[list[torch.Tensor]]:
        """Send tensors to each rank, and receive from each those of the expected sizes."""
        flat = [torch.cat([t.flatten() for t in tensors]) if tensors else like.new_empty(0) for tensors in outgoing]
        counts = [[_count(box) for box in boxes] for boxes in expected]
        received = like.new_empty(sum(map(sum, counts)))
        with interval("data_parallel", group=self.label):
            dist.all_to_all_single(received, torch.cat(flat), [sum(each) for each in counts], [len(f) for f in flat],
                                   group=self.group)
        out = []
        for boxes, each, message in zip(expected, counts, received.split([sum(each) for each in counts]), strict=True):
            out.append([part.view(box.shape) for box, part in zip(boxes, message.split(each), strict=True)])
        return out


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """About U V^T of the matrix' singular value decomposition: five steps of a quintic iteration (Jordan et al. 2024).

    A stack of matrices [E, rows, columns] is done matrix by matrix at once.
    """
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16() if device_type(matrix) == "cuda" else matrix
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if is_tall else x).to(matrix.dtype)


def share_out(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Items of each rank, the costliest first and always to the rank with the least; ascending within a rank."""
    loads, owned = [0.0] * ranks, [[] for _ in range(ranks)]  # type: ignore[var-annotated]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = loads.index(min(loads))
        loads[rank] += costs[item]
        owned[rank].append(item)
    return [sorted(items) for items in owned]


def _count(box: Box) -> int:
    return math.prod(box.shape)
