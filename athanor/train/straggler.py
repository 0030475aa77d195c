"""Names ranks that take longer than others which do equal work. Steps take all of them equally long, for they wait for each
other; what differs is the time that each spends before its collectives, on its own."""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from athanor.foundation.intervals import Interval
from athanor.ledger.attribute import COMPUTE, condense

OWN = ("input", COMPUTE, "recompute")  # what a rank does in a step without the others
WINDOW = 20  # steps that are compared
WINDOWS = 3  # in a row, in which a rank must be slow
RATIO = 1.15  # of its time to that of the others
EXCESS_SECONDS = 0.002  # of a step, which it must be slower at least
DELAY_SECONDS, DELAY_SHARE = 0.001, 0.05  # how long a step may have waited for a processor, and which part of it
SCHEDULE = Path("/proc/thread-self/schedstat")  # Linux: nanoseconds a thread has run, and has waited for a processor


class Pace:
    """What one rank spends on its own in each step. Steps in which others had its processor do not count."""

    def __init__(self) -> None:
        self.is_told = SCHEDULE.exists()
        self.steps: deque[tuple[int, float]] = deque([(0, self.delay())], maxlen=2 * WINDOW + 1)  # rows, delay, at ends of steps

    def delay(self) -> float:
        """Seconds that this thread has waited for a processor; none where the system does not tell."""
        return int(SCHEDULE.read_bytes().split()[1]) * 1e-9 if self.is_told else 0.0

    def end_step(self, rows: Sequence[Interval]) -> None:
        """A step is over; `rows` are the intervals since the last `take`."""
        self.steps.append((len(rows), self.delay()))

    def take(self, rows: Sequence[Interval]) -> list[float]:
        """Seconds of each of the last steps, whose intervals `rows` ends with; a new count begins."""
        out = []
        for (first, before), (last, after) in pairwise(self.steps):
            seconds = condense(rows[first:last]).seconds
            own = sum(seconds.get(name, 0.0) for name in OWN)
            if after - before <= max(DELAY_SECONDS, DELAY_SHARE * own):
                out.append(own)
        self.steps.clear()
        self.steps.append((0, self.delay()))
        return out


class Stragglers:
    """Compares ranks that do equal work, on rank 0. `tell` gets a rank, its host and a sentence, each time that a rank
    begins to be slow."""

    def __init__(self, peers: Sequence[Sequence[int]], tell: Callable[[int, str, str], None]) -> None:
        self.peers = [ranks for ranks in peers if len(ranks) > 1]
        self.tell = tell
        self.seconds: dict[int, deque[float]] = {rank: deque(maxlen=2 * WINDOW) for ranks in self.peers for rank in ranks}
        self.slow: Counter[int] = Counter()  # windows in a row

    def add(self, seconds: Sequence[Sequence[float]], hosts: Sequence[str]) -> None:
        """What every rank spent on its own in each of its last steps."""
        for rank, mine in self.seconds.items():
            mine.extend(seconds[rank])
        for ranks in self.peers:
            if min(len(self.seconds[rank]) for rank in ranks) >= WINDOW:
                self.compare(ranks, hosts)

    def compare(self, ranks: Sequence[int], hosts: Sequence[str]) -> None:
        """One window of ranks that do equal work."""
        medians = {rank: statistics.median(self.seconds[rank]) for rank in ranks}
        for rank in ranks:
            others = statistics.median(medians[other] for other in ranks if other != rank)
            is_slow = medians[rank] > RATIO * others and medians[rank] - others >= EXCESS_SECONDS
            self.slow[rank] = self.slow[rank] + 1 if is_slow else 0
            self.seconds[rank].clear()
            if self.slow[rank] == WINDOWS:
                times = medians[rank] / max(others, 1e-9)
                self.tell(rank, hosts[rank], f"rank {rank} (host {hosts[rank]}) takes {times:.1f} times as long before its "
                                             "collectives as the others")
