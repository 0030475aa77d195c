"""What the ranks of the parity tests do: a few optimizer steps on made-up ragged documents, in any layout."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

STEPS = 4
MANIFEST = {"vocab_size": 61, "bos_id": 0, "eos_id": 1, "pad_id": 2}


class Ragged:
    """Rows of documents of many lengths, some of which weigh nothing: a pure function of the sample's number."""

    def __init__(self, seq_len: int) -> None:
        self.seq_len, self.count = seq_len, 10_000

    def take(self, first: int, count: int) -> list[dict[str, Any]]:
        return [self.row(number) for number in range(first, first + count)]

    def row(self, number: int) -> dict[str, Any]:
        rng = np.random.default_rng([7, number])
        cuts = np.flatnonzero(rng.random(self.seq_len) < 0.02 + 0.1 * (number % 3))
        starts = np.unique(np.concatenate([[0], cuts])).astype(np.int32)
        weight = (rng.random(self.seq_len) < 0.2 + 0.15 * (number % 5)).astype(np.float32)
        tokens = rng.integers(3, MANIFEST["vocab_size"], self.seq_len + 1).astype(np.int32)
        return {"tokens": tokens, "weight": weight, "starts": starts}


def make_job(recipe: Any, world_size: int) -> Any:
    from athanor.foundation.layout import resolve as resolve_layout
    from athanor.foundation.run_folder import RunFolder
    from athanor.train.settings import layout_of, settle
    from athanor.train.stage import Job, fresh_shape, make_pipeline

    stage, run = recipe.stage[0], RunFolder(Path("unused"))
    shape = fresh_shape(recipe, MANIFEST)
    layout = resolve_layout(layout_of(recipe), world_size)
    settings = settle(recipe, stage, layout, shape)
    rows = Ragged(settings.seq_len)
    return Job(run, run.stage(stage.name), recipe, settings, layout, make_pipeline(recipe, layout, settings, shape), shape,
               None, rows, rows, {})  # type: ignore[arg-type]


def train(channel: Callable[..., None], recipe: Any, steps: int = STEPS) -> dict[str, Any]:
    """Losses and gradient norms of some steps, and this rank's share of the first step's gradients in full."""
    from athanor.parallel.apply import compute_dtype
    from athanor.parallel.mesh import leave, make_mesh
    from athanor.parallel.tensor import full
    from athanor.train.loop import build, fetch, keeps_masters
    from athanor.train.step import run_step

    job = make_job(recipe, int(os.environ["WORLD_SIZE"]))
    is_mixed = compute_dtype(job.settings.precision) is not None and not keeps_masters(job)
    mesh = make_mesh(job.layout, "cpu", is_mixed)
    trainee = build(job, mesh)
    outcomes, gradients, samples = [], {}, 0
    update, placed = trainee.optimizer.step, trainee.stages.placed()

    def look(*arguments: Any) -> Any:
        if not gradients:
            gradients.update({name: full(p.grad, placed[p], mesh.group).double().clone().numpy()
                              for name, p in trainee.stages.named_parameters() if p.grad is not None})
        return update(*arguments)

    trainee.optimizer.step = look
    for step in range(steps):
        rate = job.settings.learning_rate * (step + 1) / steps
        outcomes.append(run_step(trainee, fetch(job, mesh, trainee, samples), rate, job.settings.gradient_clip))
        samples += job.settings.rows_of_step(samples)
    weights = {name: full(p, placed[p], mesh.group).detach().double().clone().numpy()
               for name, p in trainee.stages.named_parameters()}
    leave()
    return {"loss": [each.loss for each in outcomes], "grad_norm": [each.grad_norm for each in outcomes],
            "tokens": [each.kept_tokens for each in outcomes], "gradients": gradients, "weights": weights}
