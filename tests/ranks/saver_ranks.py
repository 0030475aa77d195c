"""Ranks that save while they train: on slow disks, until they are killed, and in other layouts than those that load."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Channel = Callable[..., None]


def train_on_slow_disk(channel: Channel, seconds: float, **arguments: Any) -> dict[str, Any]:
    """Train where whatever is flushed to the disk takes so long."""
    from athanor.train.loop import train_stage

    fsync = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(seconds)
        fsync(descriptor)

    os.fsync = slow
    return train_stage(channel, **arguments)


def train_until_it_waits(channel: Channel, seconds: float, **arguments: Any) -> dict[str, Any]:
    """Train where a save's flushes begin when the loop has come to wait for it (at most a minute), and take so long each."""
    from athanor.train import saver
    from athanor.train.loop import train_stage

    finish, is_awaited, fsync = saver.Saver.finish, threading.Event(), os.fsync

    def wait(self: Any) -> None:
        if self.pending is not None:
            is_awaited.set()
        finish(self)
        is_awaited.clear()

    def slow(descriptor: int) -> None:
        if threading.current_thread().name == "saver":
            is_awaited.wait(60)
            time.sleep(seconds)
        fsync(descriptor)

    saver.Saver.finish, os.fsync = wait, slow  # type: ignore[method-assign]
    return train_stage(channel, **arguments)


def train_and_do(channel: Channel, commands: dict[int, str], **arguments: Any) -> dict[str, Any]:
    """Train, and run commands of the shell when steps are done, before what follows is saved."""
    from athanor.train.loop import train_stage

    def tell(**message: Any) -> None:
        channel(**message)
        if message["step"] in commands:
            subprocess.run(commands[message["step"]], shell=True, check=True)

    return train_stage(tell, **arguments)


def train_and_die_saving(channel: Channel, save: int, moment: float, who: list[int], **arguments: Any) -> dict[str, Any]:
    """Train on a slow disk; some ranks are killed at a moment after this save has begun, and before three more have."""
    from athanor.train import saver

    inner, saves = saver.Saver.save, itertools.count(1)

    def begin(self: Any, meta: Any) -> None:
        number = next(saves)
        if number == save and int(os.environ["RANK"]) in who:
            threading.Timer(moment, os.kill, (os.getpid(), signal.SIGKILL)).start()
        if number == save + 3 and int(os.environ["RANK"]) in who:
            time.sleep(60)  # the timer is late, or the disk quick
        inner(self, meta)

    saver.Saver.save = begin  # type: ignore[method-assign]
    return train_on_slow_disk(channel, random.Random(moment).uniform(0, 0.02), **arguments)


def train_where_one_cannot_write(channel: Channel, rank: int, steps: list[int], **arguments: Any) -> dict[str, Any]:
    """Train where the file of one rank cannot be written at these steps."""
    from athanor.train import checkpoint, saver
    from athanor.train.loop import train_stage

    save, write, now = saver.Saver.save, checkpoint.Part.write, []

    def saving(self: Any, meta: Any) -> None:
        self.finish()
        now[:] = [meta.step]
        save(self, meta)

    def failing(self: Any, *rest: Any) -> str:
        if int(os.environ["RANK"]) == rank and now[0] in steps:
            raise OSError(5, "Input/output error")
        return write(self, *rest)

    saver.Saver.save, checkpoint.Part.write = saving, failing  # type: ignore[method-assign]
    return train_stage(channel, **arguments)


def train_and_save(channel: Channel, recipe: Any, folder: str, steps: int) -> dict[str, Any]:
    """Take some steps on ragged documents, begin to save, and take one more, which must not alter what is saved."""
    trainee, go_on, leave = _prepare(recipe)
    from athanor.foundation.run_folder import StageFolder
    from athanor.train.checkpoint import Meta
    from athanor.train.saver import Saver

    saver = Saver(StageFolder(Path(folder)), trainee.stages, trainee.optimizer)
    for step in range(steps):
        go_on(step)
    saver.save(Meta(steps, 0, 0, trainee.optimizer.updates, 0, 1, {}, {}, {}))
    after = go_on(steps)
    saver.finish()
    leave()
    return after


def load_and_save(channel: Channel, recipe: Any, source: str, folder: str, steps: int) -> dict[str, Any]:
    """Load what another layout saved; give back all weights in full, save again at once, and take the next step."""
    trainee, go_on, leave = _prepare(recipe)
    from athanor.foundation.run_folder import StageFolder
    from athanor.train import checkpoint
    from athanor.train.saver import Saver

    meta = checkpoint.load(Path(source), trainee.stages, trainee.optimizer)
    whole = {name: found.clone().numpy() for name in trainee.stages.holders
             if (found := trainee.stages.whole(name)) is not None}  # on rank 0
    Saver(StageFolder(Path(folder)), trainee.stages, trainee.optimizer, is_async=False).save(meta)
    after = go_on(steps)
    leave()
    return {**after, "weights": whole, "updates": meta.updates}


def _prepare(recipe: Any) -> Any:
    """A trainee, a step of it by number, and what ends it."""
    from parity_ranks import make_job

    from athanor.parallel.mesh import leave, make_mesh
    from athanor.train.loop import build, fetch
    from athanor.train.step import run_step

    job = make_job(recipe, int(os.environ["WORLD_SIZE"]))
    mesh = make_mesh(job.layout, "cpu")
    trainee = build(job, mesh)

    def go_on(step: int) -> dict[str, Any]:
        batches = fetch(job, mesh, trainee, step * job.settings.rows_per_step)
        outcome = run_step(trainee, batches, job.settings.learning_rate, job.settings.gradient_clip)
        return {"loss": outcome.loss, "grad_norm": outcome.grad_norm}

    return trainee, go_on, leave
