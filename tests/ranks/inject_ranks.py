"""Training with a delay put into one place, or with one kind of interval hidden."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import Any


def train_with(channel: Callable[..., None], place: str, seconds: float, **arguments: Any) -> dict[str, Any]:
    """`place`: 'nowhere', 'loader' or 'save' (every rank), 'one rank' (rank 1 computes longer), 'hide' (the optimizer's time)."""
    from athanor.train import checkpoint, loop, step

    def delayed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            time.sleep(seconds)
            return function(*args, **kwargs)

        return call

    os.fsync = lambda descriptor: None  # how long the disk takes is not what is measured
    if place == "loader":
        loop.fetch = delayed(loop.fetch)
    elif place == "save":
        checkpoint.save = delayed(checkpoint.save)
    elif place == "one rank" and os.environ["RANK"] == "1":
        step.to_device = delayed(step.to_device)
    elif place == "hide":
        inner = step.interval

        @contextlib.contextmanager
        def interval(name: str, *rest: Any) -> Any:
            with contextlib.nullcontext() if name == "optimizer" else inner(name, *rest):
                yield

        step.interval = interval
    return loop.train_stage(channel, **arguments)
