"""From what every rank was doing when, to accounts: interval arithmetic, no torch, no clock of its own.

Intervals of a rank are nested; each moment belongs to the innermost one. A collective's waiting is split at the moment
when its last rank arrived: before it is `skew`, after it the collective's own account. Waiting for another stage of one's own
pipeline is `bubble`. Ranks that do equal work are peers: computing beyond that of the fastest peer is `skew` too, since
everybody would be done without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from athanor.foundation.intervals import Interval

COMPUTE = "compute"


@dataclass
class RankWindow:
    """What one rank did in a stretch of time: exclusive seconds by name, and its waits by (account, group)."""

    seconds: dict[str, float] = field(default_factory=dict)
    waits: dict[tuple[str, str], list[tuple[float, float, float]]] = field(default_factory=dict)  # (arrived, start, end)


def condense(rows: Iterable[Interval]) -> RankWindow:
    """Exclusive seconds of each name, from intervals in the order in which they ended.

    A collective's wait goes to `waits` instead of `seconds`, because it can be split only beside the other ranks'.
    """
    window = RankWindow()
    inner: dict[int, float] = {}  # depth -> seconds of finished intervals there whose parent is still open
    for row in rows:
        length = row.end - row.start
        own = length - inner.pop(row.depth + 1, 0.0)
        inner[row.depth] = inner.get(row.depth, 0.0) + length
        if row.group is None:
            window.seconds[row.name] = window.seconds.get(row.name, 0.0) + own
        else:
            window.waits.setdefault((row.name, row.group), []).append((row.arrived, row.start, row.end))
    return window


def attribute(windows: Sequence[RankWindow], peers: Sequence[Sequence[int]] | None = None) -> dict[str, float]:
    """Device-seconds of all ranks by account, with 'compute' still whole (useful + kernel + recompute).

    `peers` lists the ranks that do equal work, stage by stage of a pipeline (all of them unless given); the i-th of each
    stage make a chain. Raises ValueError when the ranks of a group took part in different numbers of collectives, which
    means that the windows do not match.
    """
    peers = peers or [range(len(windows))]
    chains = {rank: number for ranks in peers for number, rank in enumerate(ranks)}
    out: dict[str, float] = {}

    def add(name: str, seconds: float) -> None:
        out[name] = out.get(name, 0.0) + seconds

    for window in windows:
        for name, seconds in window.seconds.items():
            add(name, seconds)
    for account, group in sorted({key for window in windows for key in window.waits}):
        members = [rank for rank, window in enumerate(windows) if (account, group) in window.waits]
        waits = [windows[rank].waits[account, group] for rank in members]
        if len({len(each) for each in waits}) > 1:
            raise ValueError(f"ranks of group {group} waited {[len(each) for each in waits]} times in {account}")
        stacked = np.array(waits)  # [ranks, collectives, (arrived, start, end)]
        arrived, start, end = np.moveaxis(stacked, -1, 0)
        late = np.clip(np.minimum(end, arrived.max(axis=0)) - start, 0.0, None)
        mine = np.array([chains[rank] for rank in members])
        turn = np.zeros_like(late)  # waiting for another stage of one's own chain
        if len(peers) > 1:
            last = np.stack([arrived[mine == chain].max(axis=0) for chain in mine])
            turn = np.clip(np.minimum(end, last) - start, 0.0, None)
        add("bubble", float(turn.sum()))
        add("skew", float((late - turn).sum()))
        add(account, float((end - start - late).sum()))
    for ranks in peers:
        compute = [windows[rank].seconds.get(COMPUTE, 0.0) for rank in ranks]
        excess = sum(compute) - len(compute) * min(compute)
        if excess > 0:
            add("skew", excess)
            out[COMPUTE] -= excess
    return {name: seconds for name, seconds in out.items() if seconds}
