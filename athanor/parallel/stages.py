"""The pipeline stages of a model that one rank holds, under the parameter names of the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import nn

from athanor.foundation.intervals import interval
from athanor.foundation.layout import Layout
from athanor.foundation.placement import Placement, placements
from athanor.foundation.schedules import Pipeline
from athanor.parallel.mesh import Mesh
from athanor.parallel.tensor import full, sum_copies


class Stages:
    """This rank's stages by their number, each a module that knows its parameters under their names in the whole model.

    Without a pipeline it is one stage, which is the model. `described` are all stages, whose weights need no memory. A name
    that two stages hold (tied embeddings) is one parameter: the earlier stage speaks for it, and `complete` keeps the
    gradients of both equal.
    """

    def __init__(self, parts: Mapping[int, nn.Module], pipeline: Pipeline, mesh: Mesh,
                 described: Mapping[int, nn.Module] | None = None) -> None:
        self.parts, self.pipeline, self.mesh = dict(parts), pipeline, mesh
        self.group = mesh.group("pp")
        self.pp_rank = mesh.coordinates["pp"]
        self.holders: dict[str, list[int]] = {}  # name -> stages
        self.tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}  # name -> shape and dtype, in the order of stages
        for number, part in sorted((described or parts).items()):
            for name, parameter in part.named_parameters():
                self.holders.setdefault(name, []).append(number)
                self.tensors.setdefault(name, (placements(part)[name].shape, parameter.dtype))

    @classmethod
    def alone(cls, model: nn.Module, mesh: Mesh | None = None) -> Stages:
        """A whole model, on one rank unless a mesh says otherwise."""
        return cls({0: model}, Pipeline("", (range(0),), (0,)), mesh or Mesh(Layout(), torch.device("cpu"), 0))

    @property
    def is_first(self) -> bool:
        return 0 in self.parts

    @property
    def is_last(self) -> bool:
        return len(self.pipeline.blocks) - 1 in self.parts

    @property
    def last(self) -> nn.Module:
        """The last stage's module; only where `is_last`."""
        return self.parts[len(self.pipeline.blocks) - 1]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Each parameter that this rank has a part of; a tied one twice, if this rank has the first stage and the last."""
        for part in self.parts.values():
            yield from part.named_parameters()

    def placed(self) -> dict[nn.Parameter, Placement]:
        """Which part of each parameter this rank has."""
        return {parameter: placements(part)[name] for part in self.parts.values() for name, parameter in part.named_parameters()}

    def train(self, mode: bool = True) -> None:
        for part in self.parts.values():
            part.train(mode)

    def owned(self) -> set[nn.Parameter]:
        """The parameters of which this rank's part is to be counted and saved here, since no rank before it has it."""
        if not self.mesh.counts_parameters:
            return set()
        return {parameter for number, part in self.parts.items() for name, parameter in part.named_parameters()
                if self.holders[name][0] == number and placements(part)[name].is_first_copy()}

    def complete(self, gradient: Callable[[nn.Parameter], torch.Tensor | None]) -> None:
        """Add up what several ranks have of one gradient, once a step, alike on all of them.

        That is the gradient of parameters that tensor-parallel ranks hold in full and apply to their own tokens, and of
        those that two stages hold. `gradient` gives this rank's part of a parameter's.
        """
        if (group := self.mesh.group("tp")) is not None:
            held = [gradient(parameter) for parameter, placement in self.placed().items() if placement.is_copied]
            with interval("tensor", group=self.mesh.label("tp")):
                sum_copies([part for part in held if part is not None], group)
        for name, (first, *others) in self.holders.items():
            if not others or not {first, *others} & set(self.parts):
                continue
            grads = [found for number in (first, *others) if number in self.parts
                     for key, p in self.parts[number].named_parameters() if key == name and (found := gradient(p)) is not None]
            if len(grads) == 2:
                total = grads[0] + grads[1]
            else:
                peer = self.pipeline.ranks[others[0] if first in self.parts else first]
                theirs = self._swap(grads[0], peer)
                total = grads[0] + theirs if first in self.parts else theirs + grads[0]
            for grad in grads:
                grad.copy_(total)

    def _swap(self, mine: torch.Tensor, peer: int) -> torch.Tensor:
        """Give a tensor to another pipeline rank for the one it gives."""
        mine, theirs = mine.contiguous(), torch.empty_like(mine, memory_format=torch.contiguous_format)
        operations = [dist.P2POp(dist.isend, mine, group=self.group, group_peer=peer),
                      dist.P2POp(dist.irecv, theirs, group=self.group, group_peer=peer)]
        with interval("pipeline"):
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        return theirs

    @torch.no_grad()
    def whole(self, name: str) -> torch.Tensor | None:
        """A parameter in full on rank 0, None elsewhere. All ranks must ask for the same names in the same order."""
        holder = self.pipeline.ranks[self.holders[name][0]]
        found: torch.Tensor | None = None
        if self.holders[name][0] in self.parts:
            part = self.parts[self.holders[name][0]]
            found = full(part.get_parameter(name).detach(), placements(part)[name], self.mesh.group)
        if holder != 0 and self.mesh.rank % self._stage_size == 0:  # the chain of rank 0
            if found is not None:
                dist.send(found.contiguous(), group=self.group, group_dst=0)
            elif self.pp_rank == 0:
                shape, dtype = self.tensors[name]
                found = torch.empty(shape, dtype=dtype, device=self.mesh.device)
                dist.recv(found, group=self.group, group_src=holder)
        return found if self.mesh.rank == 0 else None

    @property
    def _stage_size(self) -> int:
        return self.mesh.layout.world_size // self.mesh.layout.pp
