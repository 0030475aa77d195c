"""How long one operation takes on this rank's device, as the lower quartile and the best of many repetitions."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

BATCH_SECONDS = 4e-4  # shorter than a time slice of the scheduler, so that many samples are undisturbed
COLD_BYTES, MOST_TURNS = {"cpu": 2**24, "cuda": 2**28}, 256
Operation = Callable[[], Any]


@dataclass(frozen=True)
class Sample:
    """Seconds of one call: `typical` is what to expect (the lower quartile, since other processes only ever add time),
    `best` what the device can do."""

    typical: float
    best: float


def lower_quartile(samples: list[float]) -> float:
    """The value that a quarter of the samples lie below; the smaller of two."""
    return sorted(samples)[(len(samples) - 1) // 4]


def in_turns(make: Callable[[], Operation], size_bytes: float, device: torch.device) -> Operation:
    """An operation that works on other tensors of `size_bytes` each time, so many that no cache near the core keeps them.

    In training an operand comes from the pass before, not from a moment ago.
    """
    turns = itertools.cycle([make() for _ in range(max(1, min(MOST_TURNS, round(COLD_BYTES[device.type] / size_bytes))))])
    return lambda: next(turns)()


def filled(*shape: int, dtype: torch.dtype, device: torch.device, **options: Any) -> torch.Tensor:
    """A tensor to work on: numbers like those of training where they matter (to an accelerator's power), else the cheapest."""
    if device.type == "cuda":
        return torch.randn(shape, dtype=dtype, device=device, **options)
    return torch.full(shape, 0.5, dtype=dtype, device=device, **options)


class Clock:
    """Times operations on one device; on CUDA with events, so that launching does not hide the work."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.is_cuda = device, device.type == "cuda"

    def time(self, operation: Operation, budget_seconds: float, least_samples: int = 2) -> Sample:
        """Run `operation` for about `budget_seconds`, once to warm up, and at least `least_samples` times."""
        operation()
        estimate = self.batch(operation, 1)
        calls = max(1, int(BATCH_SECONDS / max(estimate, 1e-7)))
        samples = [estimate] if calls == 1 else []
        deadline = time.perf_counter() + budget_seconds - estimate
        while len(samples) < least_samples or time.perf_counter() < deadline:
            samples.append(self.batch(operation, calls))
        return Sample(lower_quartile(samples), min(samples))

    def batch(self, operation: Operation, calls: int) -> float:
        if self.is_cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(calls):
                operation()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / calls
        begin = time.perf_counter()
        for _ in range(calls):
            operation()
        return (time.perf_counter() - begin) / calls
