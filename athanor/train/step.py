"""One step of any objective: count, forward and backward over micro-batches, one reduction, clip, update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from athanor.foundation.intervals import interval
from athanor.models.context import Groups, Packed, Scored
from athanor.objectives.batch import Batch, count_kept
from athanor.objectives.find import Objective
from athanor.parallel.fully_shard import DataParallel
from athanor.parallel.mesh import Mesh
from athanor.parallel.pipeline import Runner
from athanor.parallel.stages import Stages
from athanor.train.balance import Balancer
from athanor.train.exact import Exact
from athanor.train.optimizer import Optimizer
from athanor.train.spikes import Guard

COLUMNS = ("tokens", "targets", "weight", "positions", "cu_seqlens")
OF_ALL_TOKENS = ("positions", "cu_seqlens")  # context-parallel ranks need them whole, and a part of all other columns


class Tally:
    """Sums over the micro-batches of a step, kept on the device: the loss, and each metric with its count."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.metrics: dict[str, tuple[Tensor, float]] = {}

    def add(self, loss: Tensor, found: Mapping[str, tuple[Tensor, float]]) -> None:
        self.loss += loss.detach()
        for name, (value, count) in found.items():
            before = self.metrics.get(name, (0.0, 0.0))
            self.metrics[name] = before[0] + value.detach().double(), before[1] + count

    def values(self, metrics: Sequence[str]) -> Tensor:
        """The loss, and of each of these metrics the sum and the count [1 + 2 x metrics]."""
        zero = torch.zeros_like(self.loss)
        found = [value for name in metrics for value in self.metrics.get(name, (zero, 0.0))]
        return torch.stack([torch.as_tensor(value, dtype=torch.float64, device=zero.device) for value in (self.loss, *found)])


@dataclass
class Trainee:
    """A model laid out on a mesh, with what trains it. `runner` is there where the model is a pipeline."""

    stages: Stages
    mesh: Mesh
    objective: Objective
    optimizer: Optimizer
    sharded: Sequence[DataParallel] = ()
    runner: Runner | None = None
    totals: Mapping[str, float] = field(default_factory=dict)
    tally: Tally | None = None
    z_loss: float = 0.0
    mtp_weight: float = 0.0
    balancer: Balancer | None = None
    exact: Exact | None = None
    guard: Guard = field(default_factory=Guard)

    def score(self, part: nn.Module, x: Tensor, batch: Batch) -> Tensor | Scored:
        """Run one stage on a batch whose columns are on the device: its hidden states, or what the last says of the targets."""
        groups = Groups(tp=self.mesh.group("tp"), cp=self.mesh.group("cp"), ep=self.mesh.group("ep"))
        context = Packed(batch["positions"], batch["cu_seqlens"], batch["max_length"], groups, is_even=batch["is_even"],
                         z_loss=self.z_loss, mtp_weight=self.mtp_weight * part.training, row_tokens=batch["max_length"])
        if not part.is_last:
            return part(x, context)  # type: ignore[no-any-return]
        return part(x, context, batch["targets"], batch["weight"])  # type: ignore[no-any-return]

    def compute(self, part: nn.Module, x: Tensor, batch: Batch) -> Tensor:
        """The same, with the micro-batch's loss on the last stage; what it says goes to the tally."""
        scored = self.score(part, x, batch)
        if isinstance(scored, Tensor):
            return scored
        assert self.tally is not None, "a step has begun"
        loss, found = self.objective.loss(scored, batch, self.totals)
        self.tally.add(loss, found)
        return loss

    def end_micro_batch(self, ends_shard: bool) -> None:
        """Where sums are exact: hand on what a micro-batch gave, whose virtual shard may end with it."""
        if self.exact is not None and self.tally is not None:
            self.exact.end_micro_batch(self.tally.values(self.objective.METRICS), ends_shard)
            self.tally = Tally(self.mesh.device)

    def report(self, is_asked_to_stop: bool) -> Tensor:
        """A step's outcome, summed over all ranks; a NaN anywhere reaches every rank.

        The squared norm of the gradient, the wish to stop, the loss, and each metric with its count.
        """
        assert self.tally is not None, "a step has begun"
        asked = torch.tensor([float(is_asked_to_stop)], dtype=torch.float64, device=self.mesh.device)
        if self.exact is not None:
            return self.exact.outcome(asked)
        sums = self.tally.values(self.objective.METRICS)
        if not self.mesh.counts_tokens:
            sums.mul_(0.0)  # what is not a number stays so
        return self.mesh.sum(torch.cat([self.optimizer.squared_norm().reshape(1), asked, sums]))


@dataclass(frozen=True)
class Outcome:
    """What a step did: loss (without z-loss) and gradient norm before clipping, over all ranks; tokens kept, keys they saw.

    `metrics` are means; a skipped step left the weights as they were. `is_asked_to_stop` when any rank was.
    """

    loss: float
    grad_norm: float
    is_skipped: bool
    is_asked_to_stop: bool
    kept_tokens: int
    keys_seen: int
    metrics: Mapping[str, float]


def to_device(batch: Batch, mesh: Mesh) -> Batch:
    """The batch with its columns as tensors on the device; of most, this context-parallel rank's contiguous part."""
    part, parts = mesh.coordinates["cp"], mesh.layout.cp
    out: dict[str, Any] = {}
    for key, value in batch.items():
        if key not in COLUMNS:
            out[key] = value
            continue
        if parts > 1 and key not in OF_ALL_TOKENS:
            size = len(value) // parts
            value = value[part * size:(part + 1) * size]
        column = torch.from_numpy(value)
        if mesh.device.type == "cuda":
            column = column.pin_memory()  # or the copy would wait for all that the device still has to do
        out[key] = column.to(mesh.device, non_blocking=True)
    return out


def run_step(trainee: Trainee, batches: Sequence[Batch], learning_rate: float, gradient_clip: float,
             is_asked_to_stop: bool = False) -> Outcome:
    """Train on this rank's micro-batches (numpy columns, at least one). Every rank must call it with as many.

    The loss is the sum over all tokens of the global batch / their global count N, which is known before the first backward
    pass, so gradients are only ever added. What is not finite, or a spike, skips the update on all ranks.
    """
    mesh, optimizer = trainee.mesh, trainee.optimizer
    with interval("input"):
        names, counts = count_rows(trainee.objective, batches, mesh)
        summed = mesh.sum(counts.sum(0)) if trainee.exact is None else trainee.exact.sum(counts)
        *totals, kept_tokens, keys_seen = summed.tolist()
        trainee.totals = {name: max(total, 1e-9) for name, total in zip(names, totals, strict=True)}
    run_batches(trainee, batches)
    with interval("optimizer"):
        sums = trainee.report(is_asked_to_stop)
        is_usual = trainee.guard.judge(sums[2], sums[0])
        is_made = optimizer.step(learning_rate, sums[0], sums[2], gradient_clip, is_usual)
        trainee.guard.keep(is_made)
        optimizer.clear()
        if trainee.balancer is not None:
            trainee.balancer.step(is_made)
        squared, stop, _, *parts = sums.tolist()
    norm = math.sqrt(squared) if squared >= 0 else math.nan
    means = {name: parts[2 * i] / max(parts[2 * i + 1], 1e-9) for i, name in enumerate(trainee.objective.METRICS)}
    return Outcome(means["loss"], norm, not bool(is_made), stop > 0, int(kept_tokens), int(keys_seen), means)


def run_batches(trainee: Trainee, batches: Sequence[Batch]) -> None:
    """Forward and backward over a step's micro-batches, which leaves gradients and a tally."""
    trainee.tally = Tally(trainee.mesh.device)
    if trainee.runner is not None:
        run_pipeline(trainee.runner, batches, trainee.mesh)
    else:
        run_micro_batches(trainee, batches)
    trainee.optimizer.complete()


def run_micro_batches(trainee: Trainee, batches: Sequence[Batch]) -> None:
    """Forward and backward through the whole model, one micro-batch after another."""
    together = len(batches) if trainee.exact is None else len(batches) // trainee.exact.shards.count  # in a virtual shard
    for number, batch in enumerate(batches, 1):
        with interval("compute"):
            for sharded in trainee.sharded:
                sharded.begin(number == len(batches), ends_shard=number % together == 0)
            columns = to_device(batch, trainee.mesh)
            trainee.compute(trainee.stages.last, columns["tokens"], columns).backward()
            trainee.end_micro_batch(ends_shard=number % together == 0)


def run_pipeline(runner: Runner, batches: Sequence[Batch], mesh: Mesh) -> None:
    """Forward and backward of all micro-batches through the pipeline, their columns stacked."""
    with interval("compute"):
        parts = [to_device(batch, mesh) for batch in batches]
        columns = {key: torch.cat([part[key] for part in parts]) for key in COLUMNS}
    constants = {key: value for key, value in parts[0].items() if key not in COLUMNS}
    constants["is_even"] = all(batch["is_even"] for batch in batches)
    runner.step(columns, constants)


def count_rows(objective: Objective, batches: Sequence[Batch], mesh: Mesh) -> tuple[list[str], Tensor]:
    """Each micro-batch's share of the denominators N, by name, then of the tokens kept and the keys that their queries see."""
    counts = [objective.count(batch) for batch in batches]
    names = sorted(counts[0])
    values = [[*(count[name] for name in names), *count_kept(batch)] for count, batch in zip(counts, batches, strict=True)]
    return names, torch.tensor(values, dtype=torch.float64, device=mesh.device) * float(mesh.counts_rows)
