"""From what every rank was doing when, to accounts: interval arithmetic, no torch, no clock of its own.

Intervals of a rank are nested; each moment belongs to the innermost one. A collective's waiting is split at the moment
when its last rank arrived: before it is `skew`, after it the collective's own account. Ranks that do equal work are
peers: computing beyond that of the fastest peer is `skew` too, since everybody would be done without it.
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

    `peers` lists the ranks that do equal work (all of them unless given). Raises ValueError when the ranks of a group
    took part in different numbers of collectives, which means that the windows do not match.
    """
    out: dict[str, float] = {}
    for window in windows:
        for name, seconds in window.seconds.items():
            out[name] = out.get(name, 0.0) + seconds
    for account, group in sorted({key for window in windows for key in window.waits}):
        members = [np.array(w.waits[account, group]) for w in windows if (account, group) in w.waits]
        if len({len(waits) for waits in members}) > 1:
            raise ValueError(f"ranks of group {group} waited {[len(w) for w in members]} times in {account}")
        stacked = np.stack(members)  # [ranks, collectives, (arrived, start, end)]
        last = stacked[..., 0].max(axis=0)
        start, end = stacked[..., 1], stacked[..., 2]
        late = np.clip(np.minimum(end, last) - start, 0.0, None)
        out["skew"] = out.get("skew", 0.0) + float(late.sum())
        out[account] = out.get(account, 0.0) + float((end - start - late).sum())
    for ranks in peers if peers is not None else [range(len(windows))]:
        compute = [windows[rank].seconds.get(COMPUTE, 0.0) for rank in ranks]
        excess = sum(compute) - len(compute) * min(compute)
        if excess > 0:
            out["skew"] = out.get("skew", 0.0) + excess
            out[COMPUTE] -= excess
    return out
