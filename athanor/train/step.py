"""One step of any objective: count, forward and backward over micro-batches, one reduction, clip, update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from athanor.foundation.intervals import interval
from athanor.models.context import Groups, Packed, Scored
from athanor.models.decoder import Decoder
from athanor.objectives.batch import Batch, count_kept
from athanor.objectives.find import Objective
from athanor.parallel.fully_shard import Replicas
from athanor.parallel.mesh import Mesh
from athanor.train.optimizer import Optimizer

COLUMNS = ("tokens", "targets", "weight", "positions", "cu_seqlens")


@dataclass
class Trainee:
    """A model laid out on a mesh, with what trains it."""

    model: Decoder
    mesh: Mesh
    objective: Objective
    optimizer: Optimizer
    replicas: Replicas | None = None

    def forward(self, batch: Batch) -> Scored:
        """Score a batch whose columns are on the device."""
        context = Packed(batch["positions"], batch["cu_seqlens"], batch["max_length"], Groups(tp=self.mesh.group("tp")))
        scored: Scored = self.model(batch["tokens"], context, batch["targets"], batch["weight"])
        return scored


@dataclass(frozen=True)
class Outcome:
    """What a step did: loss and gradient norm before clipping, over all ranks; tokens kept and the keys they saw.

    `metrics` are means; a skipped step left the weights as they were. `is_asked_to_stop` when any rank was.
    """

    loss: float
    grad_norm: float
    is_skipped: bool
    is_asked_to_stop: bool
    kept_tokens: int
    keys_seen: int
    metrics: Mapping[str, float]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its columns as tensors on the device."""
    return {key: torch.from_numpy(value).to(device) if key in COLUMNS else value for key, value in batch.items()}


def run_step(trainee: Trainee, batches: Sequence[Batch], learning_rate: float, gradient_clip: float,
             is_asked_to_stop: bool = False) -> Outcome:
    """Train on this rank's micro-batches (numpy columns, at least one). Every rank must call it with as many.

    The loss is the sum over all tokens of the global batch / their global count N, which is known before the first backward
    pass, so gradients are only ever added. A gradient that is not finite skips the update on all ranks.
    """
    mesh, objective, optimizer = trainee.mesh, trainee.objective, trainee.optimizer
    with interval("input"):
        totals, kept_tokens, keys_seen = global_counts(objective, batches, mesh)
    loss, metrics = 0.0, dict[str, tuple[float, float]]()
    for number, batch in enumerate(batches):
        with interval("compute"):
            if trainee.replicas is not None:
                trainee.replicas.is_last_micro_batch = number == len(batches) - 1
            columns = to_device(batch, mesh.device)
            part, found = objective.loss(trainee.forward(columns), columns, totals)
            part.backward()
            loss += float(part.detach())
            for name, (value, count) in found.items():
                before = metrics.get(name, (0.0, 0.0))
                metrics[name] = before[0] + float(value), before[1] + count
    with interval("optimizer"):
        loss, norm, stop, means = _reduce(trainee, loss, metrics, is_asked_to_stop)
        is_finite = math.isfinite(norm) and math.isfinite(loss)
        if is_finite:
            if norm > gradient_clip:
                optimizer.scale_gradients(gradient_clip / (norm + 1e-6))
            optimizer.step(learning_rate)
        optimizer.clear()
    return Outcome(loss, norm, not is_finite, stop, kept_tokens, keys_seen, means)


def global_counts(objective: Objective, batches: Sequence[Batch], mesh: Mesh) -> tuple[dict[str, float], int, int]:
    """The denominators N over micro-batches and data ranks; tokens kept, and keys their queries see."""
    counts = [objective.count(batch) for batch in batches]
    names = sorted(counts[0])
    kept = [count_kept(batch) for batch in batches]
    values = [sum(count[name] for count in counts) for name in names] + [sum(pair[i] for pair in kept) for i in (0, 1)]
    packed = torch.tensor(values, dtype=torch.float64, device=mesh.device)
    if mesh.coordinates["tp"] != 0:
        packed.zero_()  # tensor-parallel ranks read the same rows
    found = mesh.sum(packed).tolist()
    return {name: max(total, 1e-9) for name, total in zip(names, found, strict=False)}, int(found[-2]), int(found[-1])


def _reduce(trainee: Trainee, loss: float, metrics: Mapping[str, tuple[float, float]],
            is_asked_to_stop: bool) -> tuple[float, float, bool, dict[str, float]]:
    """Loss, gradient norm, wish to stop and metrics over all ranks, in one message; a NaN anywhere reaches every rank."""
    mesh = trainee.mesh
    names = sorted(metrics)
    is_counted = mesh.coordinates["tp"] == 0
    mine = [loss, *(value for name in names for value in metrics[name])] if is_counted else [0.0] * (1 + 2 * len(names))
    packed = torch.tensor([0.0, float(is_asked_to_stop), *mine], dtype=torch.float64, device=mesh.device)
    packed[0] = trainee.optimizer.squared_norm()
    squared, stop, loss, *sums = mesh.sum(packed).tolist()
    means = {name: sums[2 * i] / max(sums[2 * i + 1], 1e-9) for i, name in enumerate(names)}
    return loss, math.sqrt(squared) if squared >= 0 else math.nan, stop > 0, means
