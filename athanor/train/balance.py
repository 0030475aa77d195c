"""Equal loads for experts without a loss: biases that their choice adds to scores move a small step a time (arXiv:2408.15664)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from athanor.foundation.intervals import interval
from athanor.foundation.placement import Placement
from athanor.models.experts import SigmoidRouter
from athanor.parallel.stages import Stages
from athanor.parallel.tensor import local


class Balancer:
    """After each step the bias of every expert that got fewer tokens than the mean grows by `rate`, that of others shrinks.

    Only the sign counts, so it does not matter that tensor-parallel ranks all count the same tokens, or that what is
    recomputed is counted twice.
    """

    def __init__(self, stages: Stages, placed: Mapping[nn.Parameter, Placement], rate: float) -> None:
        self.stages, self.placed, self.rate = stages, placed, rate
        modules = (module for part in stages.parts.values() for module in part.modules())
        self.routers = [module for module in modules if isinstance(module, SigmoidRouter)]
        for router in self.routers:
            router.load.zero_()

    @torch.no_grad()
    def step(self, is_made: Tensor) -> None:
        """Move the biases by what was counted since the last step, unless that was skipped."""
        if not self.routers:
            return
        loads = torch.stack([router.load for router in self.routers])
        mesh = self.stages.mesh
        if mesh.layout.world_size > mesh.layout.pp:
            with interval("expert", group=f"stage:{mesh.coordinates['pp']}"):
                dist.all_reduce(loads, group=mesh.stage)
        wanted = torch.sign(loads.sum(1, keepdim=True) - loads * loads.shape[1])
        for router, signs in zip(self.routers, wanted, strict=True):
            bias = router.e_score_correction_bias
            mine = local(bias)
            mine.add_(signs[self.placed[bias].box().slices()].to(mine.dtype) * (self.rate * is_made))
            router.load.zero_()
