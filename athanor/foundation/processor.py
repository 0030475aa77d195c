"""How much of the time that our threads wanted a core they had one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

THREADS = Path("/proc/self/task")


def ran_and_waited() -> tuple[float, float]:
    """Seconds that this process's threads have run, and have been ready to run while others had the cores.

    From the scheduler's own account of each thread (Linux, Documentation/scheduler/sched-stats.rst); where there is none, all
    time that is not the processor's counts as waiting, which holds for one thread that always computes.
    """
    nanoseconds = []
    for file in THREADS.glob("*/schedstat"):
        with contextlib.suppress(OSError):  # the thread has just ended
            nanoseconds.append([int(value) for value in file.read_text().split()[:2]])
    if not nanoseconds:
        return time.process_time(), max(0.0, time.perf_counter() - time.process_time())
    return sum(ran for ran, _ in nanoseconds) / 1e9, sum(waited for _, waited in nanoseconds) / 1e9


class Share:
    """Adds up over several parts of work what share of the wanted processor time was had."""

    def __init__(self) -> None:
        self.ran = self.waited = 0.0

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        before = ran_and_waited()
        yield
        after = ran_and_waited()
        self.ran += max(0.0, after[0] - before[0])  # less after a thread has ended
        self.waited += max(0.0, after[1] - before[1])

    @property
    def value(self) -> float:
        return self.ran / (self.ran + self.waited) if self.ran > 0 else 1.0
