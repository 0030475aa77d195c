"""Training with a delay put into one place once a step, or with one kind of interval hidden."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAUSES: list[float] = []  # of this rank in this run: a busy machine wakes a sleeper late


def pause(seconds: float) -> None:
    start = time.perf_counter()
    time.sleep(seconds)
    PAUSES.append(time.perf_counter() - start)


class OncePerStep:
    """Makes functions pause before they run, at their first call of each step."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.is_due = seconds, False

    def delayed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.is_due:
                self.is_due = False
                pause(self.seconds)
            return function(*args, **kwargs)

        return call

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.is_due = True
            return function(*args, **kwargs)

        return call


def train_with(channel: Callable[..., None], place: str, seconds: float, **arguments: Any) -> dict[str, Any]:
    """`place`: 'nowhere'; 'loader', 'save', 'gather' (tensor parallelism), 'reduction' (of gradients), 'exchange' (of context
    parallelism) on every rank; 'one rank' or 'stage' (rank 1 computes longer); 'link' (what rank 1 gets comes late);
    'hide' (the optimizer's time is not recorded)."""
    from athanor.models import collectives
    from athanor.parallel import fully_shard, pipeline
    from athanor.train import loop, saver, step

    once, is_second = OncePerStep(seconds), os.environ["RANK"] == "1"
    os.fsync = lambda descriptor: None  # how long the disk takes is not what is measured
    loop.run_step = once.counted(loop.run_step)
    if place == "loader":
        fetch = loop.fetch

        def late(*args: Any) -> Any:
            pause(seconds)
            return fetch(*args)

        loop.fetch = late
    elif place == "save":
        save = saver.Saver.save

        def slow(self: Any, *args: Any) -> Any:
            self.finish()  # in the wait for the save before, a pause would be hidden
            pause(seconds)
            return save(self, *args)

        saver.Saver.save = slow
    elif place == "one rank" and is_second:
        step.to_device = once.delayed(step.to_device)
    elif place == "stage" and is_second:
        step.Trainee.score = once.delayed(step.Trainee.score)
    elif place == "link" and is_second:
        pipeline.idle = once.delayed(pipeline.idle)
    elif place == "gather":
        collectives._all_gather = once.delayed(collectives._all_gather)
    elif place == "exchange":

        class Slow:
            def __getattr__(self, asked: str) -> Any:
                found = getattr(collectives_dist, asked)
                return once.delayed(found) if asked == "all_to_all_single" else found

        collectives_dist, collectives.dist = collectives.dist, Slow()
    elif place == "reduction":
        fully_shard.reduce_scatter_into = once.delayed(fully_shard.reduce_scatter_into)
    elif place == "hide":
        inner = step.interval

        @contextlib.contextmanager
        def interval(name: str, *rest: Any) -> Any:
            with contextlib.nullcontext() if name == "optimizer" else inner(name, *rest):
                yield

        step.interval = interval
    PAUSES.clear()
    result = loop.train_stage(channel, **arguments)
    Path(arguments["run_folder"], f"paused-{os.environ['RANK']}").write_text(str(sum(PAUSES)), encoding="utf-8")
    return result
