"""What ranks do that are watched: train while one is slower, or stand still where the test can look at them."""

from __future__ import annotations

import os
import signal
import statistics
import threading
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


def train_and_keep_signs(channel: Callable[..., None], signs: str, **arguments: Any) -> dict[str, Any]:
    """Train; every sign of life is kept in a file of its own rows."""
    from athanor.foundation.run_folder import append_jsonl, read_json
    from athanor.train import beat, loop

    write = beat.Beat.write

    def write_and_keep(self: beat.Beat) -> None:
        write(self)
        append_jsonl(Path(signs), read_json(self.file))

    beat.Beat.write = write_and_keep  # type: ignore[method-assign]
    return loop.train_stage(channel, **arguments)


def stand_still(channel: Callable[..., None], folder: str) -> dict[str, Any]:
    """Rank 0 waits in a collective of both, for which rank 1 waits until it is told that rank 0 does: it asks again and again."""
    import torch

    from athanor.foundation.layout import Layout
    from athanor.foundation.run_folder import write_atomic
    from athanor.jobs.watch import read
    from athanor.parallel.mesh import leave, make_mesh
    from athanor.train import beat

    def ask() -> None:
        said: list[Any] = [None, None]
        number = 0
        while not (said[0] and said[0]["is_waiting"]):
            number += 1
            write_atomic(Path(folder, "ask"), str(number))
            while not all(found and found["word"] == str(number) for found in said):
                time.sleep(0.05)
                said = [read(Path(folder, f"dump-{rank}.json")) for rank in (0, 1)]

    beat.start(Path(folder), lambda: 3)
    mesh = make_mesh(Layout(dp_shard=2), "cpu")
    for _ in range(5):
        mesh.sum(torch.zeros(1))
    if mesh.rank == 1:
        asking = threading.Thread(target=ask)
        asking.start()
        any(time.sleep(0.1) for _ in iter(asking.is_alive, False))  # one line, so that it stands there whenever it is asked
    mesh.sum(torch.zeros(1))
    leave()
    beat.stop()
    return {}
