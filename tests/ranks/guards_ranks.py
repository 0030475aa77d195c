"""What the ranks of the guards' tests do: learn from some samples what nobody should, or pass over samples."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Channel = Callable[..., None]


def spoil(trainee: Any, kind: str) -> None:
    """Spoil what a step's micro-batches have left on this rank: what is not finite, or is far too large, in one place."""
    held = [piece.gradient for piece in trainee.optimizer.pieces if piece.gradient is not None and piece.gradient.numel()]
    if kind == "gradient":
        held[0].view(-1)[0] = math.nan
    elif kind == "loss":
        trainee.tally.loss.fill_(math.inf)
    elif kind == "large gradient":
        for gradient in held:
            gradient.mul_(1000.0)
    elif kind == "large loss":
        trainee.tally.loss.add_(100.0)
    else:
        raise AssertionError(kind)


def train_spoiled(channel: Channel, spoiled: Sequence[Sequence[int]], kind: str, ranks: Sequence[int], once: str | None = None,
                  die_at: int | None = None, stop_at: int | None = None, die_in: str = "", flush_seconds: float = 0.0,
                  **arguments: Any) -> dict[str, Any]:
    """Train; on `ranks`, what steps leave whose first sample lies in one of the ranges `spoiled` is spoiled.

    Where the file `once` exists it no longer is: a fault of the machine, not of the data. `die_at`: rank 1 is killed before it
    takes in this sample after something was spoiled; before it takes in sample `stop_at` it is asked to stop. `die_in`: when a
    rollback has found or loaded its checkpoint, or noted in the ledger that it goes back, a rank that did so is killed. Each
    flush to the disk takes `flush_seconds` longer.
    """
    from athanor.train import checkpoint, guards, loop, step
    from athanor.train.meter import Meter

    fetch, run_batches, rank = loop.fetch, step.run_batches, int(os.environ["RANK"])
    is_over = once is not None and Path(once).exists()
    now, seen = -1, 0

    def take(job: Any, mesh: Any, trainee: Any, samples: int) -> Any:
        nonlocal now
        now = samples
        if seen and samples == die_at:
            mesh.share(None)  # until rank 0 has written down what it did
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1 and samples == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return fetch(job, mesh, trainee, samples)

    def learn(trainee: Any, batches: Any) -> None:
        nonlocal seen
        run_batches(trainee, batches)
        if not is_over and any(first <= now < end for first, end in spoiled):
            seen += 1
            if once is not None:
                Path(once).touch()
            if rank in ranks:
                spoil(trainee, kind)

    def dying(inner: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            found = inner(*given)
            if seen:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        return run

    for owner, name in ((guards, "find_good"), (checkpoint, "load"), (Meter, "roll_back")):
        if name == die_in:
            setattr(owner, name, dying(getattr(owner, name)))
    fsync = os.fsync

    def flush(descriptor: int) -> None:
        time.sleep(flush_seconds)
        fsync(descriptor)

    os.fsync = flush
    loop.fetch, step.run_batches = take, learn
    return loop.train_stage(channel, **arguments)


def train_passing_over(channel: Channel, first: int, end: int, **arguments: Any) -> dict[str, Any]:
    """Train on an order of data that has no samples [first, end)."""
    from athanor.train import loop

    fetch = loop.fetch

    def take(job: Any, mesh: Any, trainee: Any, samples: int) -> Any:
        return fetch(job, mesh, trainee, samples if samples < first else samples + end - first)

    loop.fetch = take
    return loop.train_stage(channel, **arguments)


def one_step_is_spoiled(channel: Channel, kind: str, run_folder: str, recipe: Any, stage: str, launched: float) -> dict[str, Any]:
    """Two good steps, one that is spoiled on the last rank, a good one; beside it the same without the bad one."""
    import torch

    from athanor.foundation.run_folder import RunFolder
    from athanor.parallel.mesh import leave, make_mesh
    from athanor.train import step
    from athanor.train.loop import build, fetch
    from athanor.train.stage import resolve

    job = resolve(RunFolder(Path(run_folder)), recipe, stage, int(os.environ["WORLD_SIZE"]))
    mesh = make_mesh(job.layout, "cpu")
    run_batches, is_last = step.run_batches, mesh.rank == job.layout.world_size - 1

    def bits(trainee: Any) -> list[torch.Tensor]:
        own = [*trainee.optimizer.weights(), *trainee.optimizer.state()]
        return [tensor.clone() for *_, tensor in own] + [trainee.guard.seen.clone(), trainee.optimizer.counted.clone()]

    def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
        return all(torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0)) for a, b in zip(left, right, strict=True))

    def learn(trainee: Any, number: int, is_bad: bool = False) -> Any:
        def spoiled(trainee: Any, batches: Any) -> None:
            run_batches(trainee, batches)
            if is_bad and is_last:
                spoil(trainee, kind)

        step.run_batches = spoiled
        return step.run_step(trainee, fetch(job, mesh, trainee, 16 * number), 0.01, 1.0)

    trainee, calm = build(job, mesh), build(job, mesh)
    for each in (trainee, calm):
        for number in (0, 1):
            learn(each, number)
    before = bits(trainee)
    bad = learn(trainee, 2, is_bad=True)
    kept = same(before, bits(trainee))
    good = [learn(each, 3) for each in (trainee, calm)]
    found = {"skipped": [bad.is_skipped, good[0].is_skipped], "kept": kept, "same": same(bits(trainee), bits(calm)),
             "moved": not same(before, bits(trainee)), "updates": trainee.optimizer.updates, "reason": trainee.guard.reason()[0]}
    everyone = mesh.collect(found)
    leave()
    return {**found, "everywhere": all(each == found for each in everyone)}
