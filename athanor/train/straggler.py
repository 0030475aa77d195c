"""Names ranks that take longer than others which do equal work. Steps take all of them equally long, for they wait for each
other; what differs is the time that each spends before its collectives, on its own."""

from __future__ import annotations

import os
import statistics
from collections import Counter, deque
from collections.abc import Callable, Sequence
from itertools import pairwise

from athanor.foundation.intervals import Recorder
from athanor.ledger.attribute import COMPUTE, condense

OWN = ("input", COMPUTE, "recompute")  # what a rank does in a step without the others
WINDOW = 20  # steps that are compared
WINDOWS = 3  # in a row, in which a rank must be slow to be named
RATIO = 1.15  # of its median to that of the others
EXCESS_SECONDS = 0.002  # by which it must be longer at least
SCHEDULE = "/proc/thread-self/schedstat"  # Linux: nanoseconds a thread has run, and has waited for a processor


class Pace:
    """What one rank spends on its own in each step, without the time in which others had its processor."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.file = os.open(SCHEDULE, os.O_RDONLY) if os.path.exists(SCHEDULE) else None
        recorder.delay = self.delay
        self.ends: deque[int] = deque([0], maxlen=2 * WINDOW + 1)  # intervals recorded when a step was over

    def delay(self) -> float:
        """Seconds that this thread was ready and had no processor; 0 where the system does not tell."""
        return 0.0 if self.file is None else int(os.pread(self.file, 64, 0).split()[1]) * 1e-9

    def end_step(self) -> None:
        self.ends.append(len(self.recorder.rows))

    def take(self) -> list[float]:
        """Seconds of each of the last steps. The recorded intervals are forgotten, and a new count begins."""
        out = []
        for first, last in pairwise(self.ends):
            seconds = condense(row._replace(end=row.end - row.delay) for row in self.recorder.rows[first:last]).seconds
            out.append(sum(seconds.get(name, 0.0) for name in OWN))
        self.recorder.rows.clear()
        self.ends.clear()
        self.ends.append(0)
        return out

    def close(self) -> None:
        if self.file is not None:
            os.close(self.file)
            self.file = None


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
