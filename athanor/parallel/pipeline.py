"""The pipeline at work: torch's schedules over a rank's stages, with the time it computed and the time it waited recorded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

from athanor.foundation.intervals import idle, interval, mark
from athanor.foundation.schedules import find_schedule
from athanor.parallel.stages import Stages

Columns = Mapping[str, Tensor]
# runs one stage on one micro-batch: token ids or hidden [t, H] -> hidden [t, H], and on the last stage what is wanted of it
Compute = Callable[[nn.Module, Tensor, dict[str, Any]], Any]


class Runner:
    """Runs training steps through the stages of all pipeline ranks.

    `hidden` is the shape [t, H] and the dtype of what stages hand on, `tokens` how many ids a micro-batch has on this rank.
    `compute` returns the micro-batch's loss on the last stage; gradients are summed over micro-batches.
    """

    def __init__(self, stages: Stages, hidden: Tensor, tokens: int, compute: Compute) -> None:
        self.stages, self.device, self.tokens, self.compute = stages, stages.mesh.device, tokens, compute
        self.hidden = hidden.requires_grad_()  # or no gradient is sent back
        self.links = _Links(stages)
        self.schedules: dict[int, tuple[Any, list[_Stage]]] = {}
        self.is_alone = False  # no other rank is there to be asked, as in a rehearsal

    def schedule(self, num_microbatches: int) -> tuple[Any, list[_Stage]]:
        """torch's schedule for that many micro-batches, and its stages."""
        if num_microbatches not in self.schedules:
            pipeline, last = self.stages.pipeline, len(self.stages.pipeline.blocks) - 1
            ids, loss = torch.empty(self.tokens, dtype=torch.int64, device="meta"), self.hidden.new_empty(())
            made = []
            for number, part in self.stages.parts.items():
                stage = _Stage(part, number, last + 1, self.device, input_args=ids if number == 0 else self.hidden,
                               output_args=loss if number == last else self.hidden, group=self.stages.group)
                stage.compute, stage.links = self.compute, self.links
                made.append(stage)
            kind = get_schedule_class(pipeline.schedule)
            is_single = not issubclass(kind, PipelineScheduleMulti)
            assert is_single == (find_schedule(pipeline.schedule).placement == "single"), "the table names the placement"
            schedule = kind(made[0] if is_single else made, n_microbatches=num_microbatches,  # type: ignore[arg-type]
                            loss_fn=lambda output, target: output, scale_grads=False)
            if self.is_alone:
                schedule._warmup_p2p = _agree  # type: ignore[method-assign]
            self.schedules[num_microbatches] = schedule, made
        return self.schedules[num_microbatches]

    def step(self, columns: Columns, constants: Mapping[str, Any]) -> None:
        """Forward and backward over all micro-batches, whose columns are stacked on dim 0, each with the same length.

        `constants` are what a batch has besides columns.
        """
        given = dict(columns)
        tokens = given.pop("tokens")
        schedule, made = self.schedule(len(tokens) // self.tokens)
        for stage in made:
            stage.constants = constants
        with interval("bubble"):  # what is neither computed nor sent is waited
            schedule.step(*((tokens,) if self.stages.is_first else ()), return_outputs=False,
                          target=given["positions"] if self.stages.is_last else None, **given)

    @torch.no_grad()
    def forward(self, batch: dict[str, Any], compute: Compute) -> Any:
        """One micro-batch through all stages, without gradients: what `compute` makes of the last, None on other ranks."""
        x, ranks, result = batch["tokens"], self.stages.pipeline.ranks, None
        for number, rank in enumerate(ranks):
            if number not in self.stages.parts:
                continue
            if number and ranks[number - 1] != rank:
                x = torch.empty(self.hidden.shape, dtype=self.hidden.dtype, device=self.device)
                dist.recv(x, group=self.stages.group, group_src=ranks[number - 1])
            x = result = compute(self.stages.parts[number], x, batch)
            if number + 1 < len(ranks) and ranks[number + 1] != rank:
                dist.send(x.contiguous(), group=self.stages.group, group_dst=ranks[number + 1])
        return result if self.stages.is_last else None


def _agree(stages: Sequence[Any], *_: Any) -> None:
    """What torch's ranks ask each other before the first step (2.13): whether all know their shapes, which they always do."""
    from torch.distributed.pipelining.stage import InferenceMode

    for stage in stages:
        stage._inference_mode = InferenceMode.STATIC


class _Links:
    """Names of the ways between stages, for recorded intervals: the same at both ends, None within a rank."""

    def __init__(self, stages: Stages) -> None:
        self.ranks = stages.pipeline.ranks
        layout = stages.mesh.layout
        self.chain = stages.mesh.rank % (layout.world_size // layout.pp)

    def name(self, direction: str, lower: int) -> str | None:
        """The way between stages `lower` and `lower + 1`, in one of its directions."""
        if not 0 <= lower < len(self.ranks) - 1 or self.ranks[lower] == self.ranks[lower + 1]:
            return None
        return f"{direction}{lower}:{self.chain}"


class _Stage(PipelineStage):
    """A stage that is run through `compute`; each of its turns is recorded, and the wait before it."""

    compute: Compute
    links: _Links
    constants: Mapping[str, Any]

    def forward_maybe_with_nosync(self, x: Tensor, **columns: Tensor) -> Any:
        return self.compute(self.submod, x, {**columns, **self.constants})

    def forward_one_chunk(self, *args: Any, **options: Any) -> Any:
        return self._turn(super().forward_one_chunk, "forward", self.stage_index - 1, self.stage_index, args, options)

    def backward_one_chunk(self, *args: Any, **options: Any) -> Any:
        return self._turn(super().backward_one_chunk, "backward", self.stage_index, self.stage_index - 1, args, options)

    def backward_weight_one_chunk(self, *args: Any, **options: Any) -> Any:
        return self._turn(super().backward_weight_one_chunk, "weight", -1, -1, args, options)

    def perform_reduce_grad(self, grad_scale_factor: int) -> Any:
        with interval("compute"):
            return super().perform_reduce_grad(grad_scale_factor)

    def _turn(self, work: Callable[..., Any], direction: str, comes: int, goes: int, args: Any, options: Any) -> Any:
        """Do `work`. What passed since the last turn was spent waiting for the stage before, where one sends to this."""
        before, after = self.links.name(direction, comes), self.links.name(direction, goes)
        if before is not None:
            idle("pipeline", before)
        with interval("compute"):
            result = work(*args, **options)
        if after is not None:
            mark("pipeline", after)
        return result
