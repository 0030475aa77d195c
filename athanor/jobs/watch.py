"""Notices when a stage's ranks make no progress any more, and says in one sentence which of them holds up the others, and where.

Ranks write signs of life beside their work (`train/beat.py` says which); what changes in them is timed here, by the clock of
this process, so that clocks of other hosts do not matter. After a limit without progress every rank is asked where it stands,
and from the answers follows who never entered a collective that others wait in, who entered another one, or was stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from athanor.foundation.errors import AthanorError, RankError
from athanor.foundation.run_folder import StageFolder, write_atomic
from athanor.jobs.verdict import STOPPED, judge, named

HANG_SECONDS = 30.0  # without progress, unless a recipe says otherwise
STEPS_WITHOUT_PROGRESS = 10  # a hang takes at least as long as so many steps
SLOW_PHASES = ("startup", "checkpoint", "evaluation")  # until the first step is done, while saving, while validating:
SLOW_FACTOR = 20.0  # so many times as patient
LOOK_SECONDS = 0.25
MOST_LOOKS_PER_SECOND = 2000  # at one rank
ANSWER_SECONDS = 5.0  # how long we wait for the ranks to say where they stand, for some may have no processor just then
ANSWER_SECONDS_PER_RANK = 1 / 256  # more: where there are many, each looks more seldom whether it is asked


@dataclass
class Signs:
    """The newest line of a rank, and when what it does changed last."""

    line: dict[str, Any] = field(default_factory=lambda: {"phase": "startup"})
    since: float = field(default_factory=time.monotonic)

    def take(self, line: dict[str, Any], now: float) -> None:
        if any(self.line.get(key) != line[key] for key in ("pid", "step", "phase", "ticks")):
            self.since = now
        self.line = line

    def state(self) -> str | None:
        """The letter that Linux has for the state of the rank's process; None when it is of another host, or gone."""
        if self.line.get("host") != socket.gethostname():
            return None
        try:
            return Path(f"/proc/{self.line['pid']}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return None

    def is_at_work(self) -> bool:
        """Whether it is not done, or was stopped before its process could end."""
        return self.line["phase"] != "done" or self.state() in STOPPED

    def limit(self, hang_seconds: float) -> float:
        """Seconds that it may do without progress. What a stopped process last said of its phase may be long past."""
        limit = max(hang_seconds, STEPS_WITHOUT_PROGRESS * (self.line.get("step_seconds") or 0.0))
        is_slow = self.line["phase"] in SLOW_PHASES and self.state() not in STOPPED
        return limit * (SLOW_FACTOR if is_slow else 1.0)


class Watch:
    """Watches one life of all ranks of a stage. `check` is to be called a few times a second while they run."""

    def __init__(self, folder: StageFolder, world_size: int, hang_seconds: float | None = None) -> None:
        self.folder, self.hang_seconds = folder, hang_seconds or HANG_SECONDS
        with contextlib.suppress(OSError):  # what an earlier life said last, the next one puts into its ledger
            if folder.beats.exists():  # else what is there waits still for a life that begins
                shutil.rmtree(folder.earlier_beats, ignore_errors=True)
                folder.beats.rename(folder.earlier_beats)
        shutil.rmtree(folder.beats, ignore_errors=True)
        self.signs = {rank: Signs() for rank in range(world_size)}
        self.pause = max(LOOK_SECONDS, world_size / MOST_LOOKS_PER_SECOND)
        self.looked = time.monotonic()

    def check(self) -> None:
        """Look at the signs of life. Raises RankError, the verdict, when no rank has made progress for longer than it may."""
        now = time.monotonic()
        if now - self.looked < self.pause:
            return
        if now - self.looked > max(self.hang_seconds / 2, 4 * self.pause):  # we were stopped, and the ranks perhaps with us
            for signs in self.signs.values():
                signs.since += now - self.looked
        self.looked = now
        for rank, signs in self.signs.items():
            if (line := read(self.folder.beats / f"rank-{rank}.json")) is not None:
                signs.take(line, now)
        working = [signs for signs in self.signs.values() if signs.is_at_work()]
        over = [now - signs.since - signs.limit(self.hang_seconds) for signs in working]
        is_stopped = any(late > 0 and signs.state() in STOPPED for late, signs in zip(over, working, strict=True))
        if working and (min(over) > 0 or is_stopped):  # while others save or validate, which may take longer, too
            if is_read_only(self.folder.beats):  # then the ranks cannot give a sign, and may well be working
                for signs in working:
                    signs.since = now
                return
            raise self.verdict(*min((now - signs.since, late) for signs, late in zip(working, over, strict=True) if late > 0))

    def verdict(self, seconds: float, over: float) -> RankError:
        """Ask the ranks where they stand, and say which of them holds up the others; what they said is kept in the logs."""
        dumps = self.ask()
        working = [rank for rank, signs in self.signs.items() if signs.is_at_work()]
        ranks, reason = judge(dumps, {rank: self.signs[rank].state() for rank in working if rank not in dumps}, self.host)
        log = self.folder.logs / f"hang-{int(time.time())}.json"
        with contextlib.suppress(OSError, AthanorError):
            write_atomic(log, json.dumps({"ranks": ranks, "reason": reason, "seconds_without_progress": seconds,
                                          "limit_seconds": seconds - over, "ranks_say": dumps,
                                          "signs": {rank: signs.line for rank, signs in self.signs.items()}}))
        return RankError(ranks[0], reason, str(log), who=named(ranks, self.host))

    def ask(self) -> dict[int, dict[str, Any]]:
        """Where the ranks stand that answer in time; for a stopped process nobody waits."""
        word = str(time.time_ns())
        until = time.monotonic() + ANSWER_SECONDS + len(self.signs) * ANSWER_SECONDS_PER_RANK
        with contextlib.suppress(OSError):  # on a full disk there are no answers
            (self.folder.beats / "ask").write_text(word)
        answers: dict[int, dict[str, Any]] = {}
        while time.monotonic() < until:
            for rank, signs in self.signs.items():
                told = read(self.folder.beats / f"dump-{rank}.json")
                if told is not None and told["word"] == word and told["pid"] == signs.line.get("pid"):
                    answers[rank] = told
            silent = [rank for rank, signs in self.signs.items() if rank not in answers and signs.is_at_work()]
            if all(self.signs[rank].state() in STOPPED for rank in silent):
                break
            time.sleep(0.05)
        return answers

    def host(self, rank: int) -> str | None:
        """The name of a rank's host, when it has ever given a sign of life."""
        return self.signs[rank].line.get("host")


def is_read_only(folder: Path) -> bool:
    """Whether nothing can be written there for the file system does not let anybody, as after an error of the disk."""
    try:
        return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
    except OSError:
        return False


def read(file: Path) -> dict[str, Any] | None:
    """A JSON object that another process may be writing just now; None when there is none, or not yet whole."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
