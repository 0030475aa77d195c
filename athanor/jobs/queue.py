"""What was submitted, and how it ended: one row per job in `jobs.sqlite` under the folder of all runs.

The file only lists jobs; how far their work is stands in the run folders, and losing it loses no work.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from athanor.foundation.errors import UserError, did_you_mean
from athanor.foundation.run_folder import disk_errors, read_jsonl

FILE = "jobs.sqlite"
SCHEMA = 3  # PRAGMA user_version
ADDED = {1: "slurm TEXT", 2: "is_fresh INTEGER NOT NULL DEFAULT 0"}  # columns by the last version without them
WAITING, RUNNING, DONE, STOPPED, CANCELLED, HELD, LOST = "waiting", "running", "done", "stopped", "cancelled", "held", "lost"
PATIENCE_SECONDS = 10.0  # for other processes that are writing


@dataclass(frozen=True)
class Job:
    """One submitted recipe: `stage` None walks its whole chain. Times in seconds since 1970.

    `state`: running; done; stopped (asked to, by a signal or the time limit) or cancelled (by `jobs cancel`), which saved and
    can go on; held (somebody must look); lost (its agent was killed, it can go on). `process` is the agent's number, None
    while it is being started. `sentence` says how it ended. `is_fresh`: what was begun before it was submitted begins anew. A
    job on Slurm (`slurm`: what it asks for, and as "id" Slurm's number of it) may also be waiting there, which is not kept here.
    """

    number: int
    name: str
    recipe: str
    overrides: list[str]
    stage: str | None
    run: str
    folder: str  # where it was submitted, which relative paths are relative to
    minutes: float | None  # after which it is asked to stop
    submitted: float
    state: str = RUNNING
    process: int | None = None
    exit_code: int | None = None
    sentence: str = ""
    ended: float | None = None
    is_cancelled: bool = False  # somebody has asked for it, whether it has ended or not
    slurm: dict[str, Any] | None = None
    is_fresh: bool = False

    @property
    def id(self) -> str:
        return f"{self.name}-{self.number}"

    @property
    def log(self) -> Path:
        """What its agent says; the agent holds a lock on it as long as it lives."""
        return Path(self.run) / "logs" / f"{self.id}.log"

    @property
    def lives(self) -> Path:
        """Has a line when an agent of it began, {"life", "begun", "nodes"?}, and when that ended, {"life", "ended", "code"}."""
        return self.log.with_suffix("") / "lives.jsonl"

    def starts(self) -> list[dict[str, Any]]:
        """Each start: begun, ended or last seen (seconds since 1970), state (how its agent ended); on Slurm device-seconds."""
        rows, found = read_jsonl(self.lives), []
        ends = {row["life"]: row for row in rows if "ended" in row}
        begins = [row for row in rows if "begun" in row]
        for begin, after in itertools.pairwise([*begins, {"begun": math.inf}]):
            if (end := ends.get(begin["life"])) is None:
                is_running = self.state == RUNNING and begin is begins[-1]
                last = time.time() if is_running else self._last_sign(begin["begun"], after["begun"])
                end = {"ended": last, "code": RUNNING if is_running else "no end was written"}
            found.append({"begun": begin["begun"], "ended": end["ended"], "state": str(end["code"])})
            if self.slurm is not None:
                devices = begin["nodes"] * self.slurm["ranks_per_node"]
                found[-1]["device_seconds"] = (end["ended"] - begin["begun"]) * devices
        return found

    def _last_sign(self, since: float, until: float) -> float:
        """When somebody wrote into the run folder last in a time of which an agent was killed."""
        times = [row["time"] for file in Path(self.run).glob("*/*.jsonl") for row in read_jsonl(file) if "time" in row]
        return max([since, *(moment for moment in times if since <= moment < until)])


COLUMNS = tuple(field.name for field in fields(Job))
TABLE = ("CREATE TABLE IF NOT EXISTS job (number INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, recipe TEXT NOT NULL, "
         "overrides TEXT NOT NULL, stage TEXT, run TEXT NOT NULL, folder TEXT NOT NULL, minutes REAL, submitted REAL NOT NULL, "
         "state TEXT NOT NULL, process INTEGER, exit_code INTEGER, sentence TEXT NOT NULL DEFAULT '', ended REAL, "
         "is_cancelled INTEGER NOT NULL DEFAULT 0, slurm TEXT, is_fresh INTEGER NOT NULL DEFAULT 0)")


class Queue:
    """The jobs of one folder of runs; several processes may use it at once."""

    def __init__(self, root: Path) -> None:
        self.root, self.file = root, root / FILE

    def add(self, *, name: str, recipe: Path, overrides: list[str], stage: str | None, run: Path, minutes: float | None,
            slurm: dict[str, Any] | None = None, is_fresh: bool = False) -> Job:
        """A new row, in state running."""
        with self._open() as base:
            row = base.execute("INSERT INTO job (name, recipe, overrides, stage, run, folder, minutes, submitted, state, slurm, "
                               "is_fresh) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING *",
                               (name, str(recipe.resolve()), json.dumps(overrides), stage, str(run.resolve()), str(Path.cwd()),
                                minutes, time.time(), RUNNING, json.dumps(slurm), is_fresh)).fetchone()
        return _job(row)

    def remove(self, job: Job) -> None:
        """Forget a job that never was; its number is the next one's."""
        with self._open() as base:
            base.execute("DELETE FROM job WHERE number = ?", (job.number,))
            base.execute("UPDATE sqlite_sequence SET seq = (SELECT COALESCE(MAX(number), 0) FROM job) WHERE name = 'job'")

    def all(self) -> list[Job]:
        """All jobs, the newest first; none where nothing was ever submitted."""
        if not self.file.exists():
            return []
        with self._open() as base:
            return [_job(row) for row in base.execute("SELECT * FROM job ORDER BY number DESC")]

    def get(self, reference: str) -> Job:
        """The job of an id such as 'stdlib-3', or of its number alone. Raises UserError with the nearest."""
        jobs = self.all()
        for job in jobs:
            if reference in (job.id, str(job.number)):
                return job
        known = did_you_mean(reference, [job.id for job in jobs]) if jobs else f"nothing was submitted to {self.root} yet"
        raise UserError(f"there is no job '{reference}'; {known}")

    def update(self, job: Job, *, only_running: bool = False, **values: Any) -> Job:
        """Change columns of a row, and return it; `only_running`: unless it has ended meanwhile."""
        assert values.keys() <= set(COLUMNS), values
        values = {name: json.dumps(value) if name == "slurm" else value for name, value in values.items()}
        text = ", ".join(f"{name} = ?" for name in values)
        condition = f" AND state = '{RUNNING}'" if only_running else ""
        with self._open() as base:
            base.execute(f"UPDATE job SET {text} WHERE number = ?{condition}", (*values.values(), job.number))
            return _job(base.execute("SELECT * FROM job WHERE number = ?", (job.number,)).fetchone())

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A transaction. Raises UserError when the file is not ours to read."""
        with disk_errors(self.file):
            self.root.mkdir(parents=True, exist_ok=True)
        try:
            with contextlib.closing(sqlite3.connect(self.file, timeout=PATIENCE_SECONDS)) as base, base:
                base.row_factory = sqlite3.Row
                if _version(base) != SCHEMA:
                    base.execute("BEGIN IMMEDIATE")  # one process alone, which looks again: another may have just done it
                    if (version := _version(base)) > SCHEMA:
                        raise UserError(f"{self.file} has schema {version}, this version reads up to {SCHEMA}; use a newer "
                                        "Athanor")
                    base.execute(TABLE)
                    for older in range(version or SCHEMA, SCHEMA):
                        base.execute(f"ALTER TABLE job ADD COLUMN {ADDED[older]}")
                    base.execute(f"PRAGMA user_version = {SCHEMA}")
                    base.commit()
                yield base
        except sqlite3.Error as error:
            raise UserError(f"{self.file} cannot be used: {error}; when it is damaged, move it away: it only lists jobs, their "
                            "work is in the run folders") from error


def _version(base: sqlite3.Connection) -> int:
    return int(base.execute("PRAGMA user_version").fetchone()[0])


def _job(row: sqlite3.Row) -> Job:
    values = {name: row[name] for name in COLUMNS}
    return Job(**{**values, "overrides": json.loads(values["overrides"]), "is_cancelled": bool(values["is_cancelled"]),
                  "is_fresh": bool(values["is_fresh"]), "slurm": json.loads(values["slurm"] or "null")})
