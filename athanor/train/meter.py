"""The actual book of a stage, filled while it trains.

Every step's intervals are recorded (a step has some dozens); every few seconds the ranks exchange them, rank 0 turns
them into accounts and appends a line to `ledger.jsonl`. A later attempt finds there what the earlier ones spent, moves
the steps that were rolled back to `lost`, and the book covers them all.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from athanor.foundation.intervals import Recorder, activate, interval
from athanor.foundation.run_folder import append_when_possible, read_jsonl
from athanor.ledger.attempts import RanOn, book_of, roll_back
from athanor.ledger.attribute import COMPUTE, attribute, condense
from athanor.ledger.book import Book
from athanor.train.straggler import Pace, Stragglers

EXCHANGE_SECONDS = 4.0  # how often ranks compare notes


class Meter:
    """One per rank. `launched` is when the launcher began to start this attempt, on the host's monotonic clock.

    The time from then until now is `startup`; later set-up belongs into `interval("startup")`. What no interval covers
    ends up in `unattributed`, which is why the loop wraps everything that can take time. `idle`: devices that are paid for and
    have no rank, by account.
    """

    def __init__(self, ledger_file: Path, ran_on: RanOn, *, launched: float, attempt: int = 0, first_step: int = 0,
                 peers: Sequence[Sequence[int]] | None = None, idle: Mapping[str, int] | None = None) -> None:
        self.file, self.devices, self.peak_flops = ledger_file, ran_on.devices, ran_on.peak_flops
        self.ran_on = asdict(ran_on)
        self.attempt, self.step, self.peers, self.idle = attempt, first_step, peers, idle or {}
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.recorder = Recorder()
        self.pace = Pace(self.recorder)
        self.stragglers: Stragglers | None = None  # who is told, on rank 0, what ranks take on their own
        activate(self.recorder)
        self.window_start, self.first_step = launched, first_step
        self.before: dict[str, float] = {"startup": time.perf_counter() - launched}
        self.tokens = self.flops = self.flops_full = 0.0
        self.skipped_steps = 0
        self.exchange_every: int | None = None
        self.first_step_end = 0.0
        self.accounts: dict[str, float] = {}  # of this attempt until the last exchange, on rank 0
        self.spent_flops = 0.0  # the same of model FLOPs

    def end_step(self, *, tokens: float, flops: float, flops_full: float, is_skipped: bool = False) -> None:
        """Count a finished step: tokens, model FLOPs with causal and with full-square attention, over all ranks.

        Every rank must call this after the same steps: now and then it exchanges intervals with the others.
        """
        self.step += 1
        self.pace.end_step()
        self.skipped_steps += is_skipped
        if not is_skipped:
            self.tokens += tokens
            self.flops += flops
            self.flops_full += flops_full
        done = self.step - self.first_step
        if self.exchange_every:
            if done % self.exchange_every == 0:
                self.exchange()
        elif done == 1:
            self.first_step_end = time.perf_counter()
        elif done == 2:  # the first step is slow, the second tells how many fit into the time between two exchanges
            self.exchange_every = self._agree(max(1, round(EXCHANGE_SECONDS / (time.perf_counter() - self.first_step_end))))

    def so_far(self) -> dict[str, float]:
        """Device-seconds of this attempt by account, until the ranks last compared notes; on rank 0."""
        accounts = dict(self.accounts)
        computing = accounts.pop(COMPUTE, 0.0)
        useful = min(computing, self.spent_flops / self.peak_flops) if self.peak_flops else 0.0
        return accounts | {"useful": useful, "kernel": computing - useful}

    def mfu(self, flops: float, seconds: float) -> float | None:
        """Share of all devices' peak that `flops` model FLOPs in `seconds` amount to; None when no peak is known."""
        return flops / seconds / (self.peak_flops * self.devices) if self.peak_flops and seconds > 0 else None

    def exchange(self) -> None:
        """Put the intervals since the last exchange into `ledger.jsonl`, as device-seconds of all ranks."""
        with interval("metering"):
            mine, own = condense(self.recorder.rows), self.pace.take()
            for name, seconds in self.before.items():
                mine.seconds[name] = mine.seconds.get(name, 0.0) + seconds
            self.before = {}
            now = time.perf_counter()
            wall, self.window_start = now - self.window_start, now
            gathered: list[Any] = [None] * self.devices
            host = socket.gethostname()
            if self.devices > 1:
                dist.gather_object((mine, wall, own, host), gathered if self.rank == 0 else None)
            else:
                gathered = [(mine, wall, own, host)]
            if self.rank == 0:
                windows, walls, owns, hosts = zip(*gathered, strict=True)
                accounts = attribute(windows, self.peers) | {name: wall * count for name, count in self.idle.items()}
                if self.stragglers is not None:
                    self.stragglers.add(owns, hosts)
                self.spent_flops += self.flops
                for name, seconds in accounts.items():
                    self.accounts[name] = self.accounts.get(name, 0.0) + seconds
                append_when_possible(self.file, {
                    "attempt": self.attempt, "time": time.time(), "first_step": self.first_step, "last_step": self.step,
                    "wall_seconds": wall, "device_seconds": sum(walls) + wall * sum(self.idle.values()),
                    "tokens": self.tokens, "model_flops": self.flops, "model_flops_full": self.flops_full,
                    "skipped_steps": self.skipped_steps, "accounts": accounts, **self.ran_on})
            self.skipped_steps = 0
            self.first_step, self.tokens, self.flops, self.flops_full = self.step, 0.0, 0.0, 0.0

    def roll_back(self, step: int) -> None:
        """Go on from an earlier step, right after an `exchange`: the steps since are lost."""
        if self.rank == 0:
            roll_back(self.file, step, self.attempt)
        self.step = self.first_step = step

    def close(self) -> Book | None:
        """The stage's book over all attempts, on rank 0; None elsewhere. Recording stops."""
        self.exchange()
        activate(None)
        self.pace.close()
        if self.rank != 0:
            return None
        return book_of(read_jsonl(self.file), **self.ran_on)

    def _agree(self, value: int) -> int:
        box = [value]
        if self.devices > 1:
            with interval("metering"):
                dist.broadcast_object_list(box, src=0)
        return int(box[0])
