"""Turns and pairs: contestants that take turns on a busy machine, and how sure one may be of the ratio of their times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 4000
CONFIDENCE = 95.0


@dataclass(frozen=True)
class Turn:
    """What a turn took: on the clock, and of this process on all its processors together."""

    wall_seconds: float
    cpu_seconds: float


class Stopwatch:
    """Times from its making to `read`."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> Turn:
        return Turn(time.perf_counter() - self.wall, time.process_time() - self.cpu)


def timed(work: Callable[[], object]) -> Turn:
    """One turn of `work`."""
    watch = Stopwatch()
    work()
    return watch.read()


def take_turns(contestants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[Turn]]:
    """After one turn each to warm up, `rounds` turns each; who begins changes from round to round."""
    names, turns = list(contestants), {name: list[Turn]() for name in contestants}
    for number in range(rounds + 1):
        for name in names:
            turn = timed(contestants[name])
            if number:
                turns[name].append(turn)
        names.append(names.pop(0))
    return turns


def ratio(others: Sequence[float], ours: Sequence[float]) -> tuple[float, float, float]:
    """Median over rounds of (other's / ours), with its 95 % bootstrap interval: above 1, ours is faster."""
    pairs = np.asarray(others) / np.asarray(ours)
    drawn = np.random.default_rng(0).choice(pairs, (DRAWS, len(pairs)))
    tail = (100.0 - CONFIDENCE) / 2.0
    low, high = np.percentile(np.median(drawn, axis=1), [tail, 100.0 - tail])
    return float(np.median(pairs)), float(low), float(high)


def compare(turns: Mapping[str, Sequence[Turn]], ours: str) -> dict[str, dict[str, object]]:
    """Each contestant's median seconds a turn, and its ratios to ours by both clocks, as (median, low, high)."""
    return {name: {"wall_seconds": statistics.median(t.wall_seconds for t in mine),
                   "cpu_seconds": statistics.median(t.cpu_seconds for t in mine),
                   "wall_ratio": ratio([t.wall_seconds for t in mine], [t.wall_seconds for t in turns[ours]]),
                   "cpu_ratio": ratio([t.cpu_seconds for t in mine], [t.cpu_seconds for t in turns[ours]])}
            for name, mine in turns.items()}


def interval_text(found: object) -> str:
    """`1.23 (1.20 to 1.26)` of a ratio and its interval."""
    median, low, high = found  # type: ignore[misc]
    return f"{median:.3f} ({low:.3f} to {high:.3f})"
