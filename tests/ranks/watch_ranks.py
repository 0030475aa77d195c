"""What ranks do that are watched: train while one is slower, or stand still where the test can look at them."""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS_APART = 10  # between two exchanges, so that a short run has many


def train_unevenly(channel: Callable[..., None], slow: int | None, seconds: float, enough: int,
                   **arguments: Any) -> dict[str, Any]:
    """Train until a rank is called slow or was compared `enough` times; rank `slow` computes longer in each step.

    `windows.jsonl` gets what the ranks took on their own in a step, in the median, of each window in which they were compared.
    """
    from inject_ranks import OncePerStep

    from athanor.foundation.run_folder import RunFolder, append_jsonl, read_jsonl
    from athanor.train import loop, meter, step, straggler

    events = RunFolder(Path(arguments["run_folder"])).stage(arguments["stage"]).events
    windows, compare = Path(arguments["run_folder"], "windows.jsonl"), straggler.Stragglers.compare

    def compare_and_tell(self: Any, ranks: Any, hosts: Any) -> None:
        append_jsonl(windows, {"medians": [statistics.median(self.seconds[rank]) for rank in ranks]})
        compare(self, ranks, hosts)

    straggler.Stragglers.compare = compare_and_tell  # type: ignore[method-assign]
    meter.Meter._agree = lambda self, value: STEPS_APART  # type: ignore[method-assign]
    rank, exchange, once = int(os.environ["RANK"]), meter.Meter.exchange, OncePerStep(seconds)

    def exchange_and_see(self: Any) -> None:
        exchange(self)
        is_told = any(row["kind"] == "straggler" for row in read_jsonl(events))
        if rank == 0 and (is_told or len(read_jsonl(windows)) >= enough):
            os.kill(os.getpid(), signal.SIGTERM)

    meter.Meter.exchange = exchange_and_see  # type: ignore[method-assign]
    if rank == slow:
        loop.run_step = once.counted(loop.run_step)
        step.to_device = once.delayed(step.to_device)
    return loop.train_stage(channel, **arguments)


def stand_still(channel: Callable[..., None], folder: str) -> dict[str, Any]:
    """Rank 0 waits in a collective of both, for which rank 1 waits until `folder` has both their dumps."""
    import torch

    from athanor.foundation.layout import Layout
    from athanor.parallel.mesh import leave, make_mesh
    from athanor.train import beat

    beat.start(Path(folder), lambda: 3)
    mesh = make_mesh(Layout(dp_shard=2), "cpu")
    for _ in range(5):
        mesh.sum(torch.zeros(1))
    if mesh.rank == 1:
        deadline = time.monotonic() + 30
        while len(list(Path(folder).glob("dump-*.json"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
    mesh.sum(torch.zeros(1))
    leave()
    beat.stop()
    return {}
