"""What a rank was doing when: nested, named intervals on one monotonic clock that all ranks of a host share.

Code that may wait (a collective, the loader, a save) wraps itself in `interval(name)`. Nothing is recorded, at the cost
of one comparison, unless a recorder is active in this process; `ledger/attribute.py` turns the rows into accounts.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Interval(NamedTuple):
    """One interval: seconds on the host's monotonic clock; `depth` 0 is outermost.

    `group` names the ranks of a collective; `arrived` is when this rank had given its part (an asynchronous collective
    is issued before it is waited for). `delay`: seconds in which others had this thread's processor, where that is known.
    """

    name: str
    start: float
    end: float
    depth: int
    group: str | None
    arrived: float
    delay: float = 0.0


class Recorder:
    """Collects intervals of the thread that made it, in the order in which they end."""

    def __init__(self) -> None:
        self.rows: list[Interval] = []
        self.opened: list[float] = []  # when the intervals began that are not over yet
        self.names: list[str] = []  # and what they are called
        self.thread = threading.get_ident()
        self.delay: Callable[[], float] = float  # seconds that this thread was ready and had no processor, if that is known


_active: Recorder | None = None


def activate(recorder: Recorder | None) -> None:
    """Record into `recorder` from now on (None: stop recording)."""
    global _active
    _active = recorder


@contextlib.contextmanager
def interval(name: str, group: str | None = None, arrived: float | None = None) -> Iterator[None]:
    """Record the block as `name`: an account of the ledger, or 'compute'. A collective names its `group`.

    The ranks of one group must wait for their collectives in the same order; that is how arrivals are matched.
    """
    recorder = _active
    if recorder is None or recorder.thread != threading.get_ident():
        yield
        return
    start = time.perf_counter()
    recorder.opened.append(start)
    recorder.names.append(name)
    before = recorder.delay()
    try:
        yield
    finally:
        recorder.opened.pop()
        recorder.names.pop()
        recorder.rows.append(Interval(name, start, time.perf_counter(), len(recorder.opened), group,
                                      start if arrived is None else arrived, recorder.delay() - before))


def idle(name: str, group: str) -> None:
    """Record what passed since the last interval ended (or the open one began) as a wait for others of the group."""
    recorder = _active
    if recorder is not None and recorder.thread == threading.get_ident():
        begin = max(recorder.opened[-1:] + [row.end for row in recorder.rows[-1:]], default=time.perf_counter())
        recorder.rows.append(Interval(name, begin, time.perf_counter(), len(recorder.opened), group, begin))


def mark(name: str, group: str) -> None:
    """Record that this rank has given the others of the group what they may be waiting for."""
    recorder = _active
    if recorder is not None and recorder.thread == threading.get_ident():
        now = time.perf_counter()
        recorder.rows.append(Interval(name, now, now, len(recorder.opened), group, now))
