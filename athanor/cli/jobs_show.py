"""What can be told of a job: how far it is, what happened to it, what its processes wrote."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from athanor.foundation.errors import UserError
from athanor.foundation.run_folder import RunFolder, StageFolder, read_jsonl
from athanor.jobs.queue import Job

NOTABLE = ("fault", "held", "given up", "fewer", "damaged", "unsaved")  # events that are told


def describe(job: Job, starts: list[dict[str, Any]]) -> dict[str, Any]:
    """What is kept of a job, where its agent writes, and for how long it ran: the time it lay still between starts is no part."""
    took = sum(start["ended"] - start["begun"] for start in starts)
    return {"id": job.id, **asdict(job), "log": str(job.log), "took_seconds": took}


def progress(job: Job) -> dict[str, Any]:
    """How far a job came in the stage it is in, from its run folder, and what happened to it there, not to earlier or later ones.

    {"stage", "step", "ranks": that work or worked last, "restarts", "told": sentences, of which "faults" and "damaged" are
    those of faults and of checkpoints that could not be used}.
    """
    folder = RunFolder(Path(job.run)).stage(job.stage) if job.stage else _newest_stage(Path(job.run))
    if folder is None:
        return {"stage": None, "step": 0, "ranks": None, "restarts": 0, "told": [], "faults": [], "damaged": []}
    until = job.ended or time.time()
    events = [row for row in read_jsonl(folder.events) if job.submitted <= row["time"] <= until]

    def told(*kinds: str) -> list[str]:
        return [row["sentence"] for row in events if row["kind"] in kinds]

    return {"stage": folder.root.name, "restarts": len(told("restart")), "told": told(*NOTABLE), "faults": told("fault", "held"),
            "damaged": told("damaged"), "ranks": next((row["ranks"] for row in reversed(events) if "ranks" in row), None),
            "step": next((row["step"] for row in reversed(read_jsonl(folder.metrics)) if row.get("time", 0.0) <= until), 0)}


def log_of(job: Job, rank: int | None) -> Path:
    """The log of a job's agent, or of one of the ranks it started last. Raises UserError when there is none."""
    if rank is None:
        return job.log
    stage = progress(job)["stage"]
    logs: list[Path] = sorted((Path(job.run) / stage / "logs").glob("rank-*.log")) if stage else []
    found = [path for path in logs if path.stem == f"rank-{rank}"]
    if not found:
        known = ", ".join(path.stem.removeprefix("rank-") for path in logs)
        raise UserError(f"{job.id} has no log of rank {rank}; " + (f"there are {known}" if known else "no rank was started yet"))
    return found[0]


def _newest_stage(run: Path) -> StageFolder | None:
    files = sorted(run.glob("*/events.jsonl"), key=lambda path: path.stat().st_mtime)
    return RunFolder(run).stage(files[-1].parent.name) if files else None
