"""A stage's book over all attempts, from the lines of its `ledger.jsonl`.

A line holds what all ranks spent between two exchanges: attempt, time (seconds since 1970), first_step, last_step,
wall_seconds, device_seconds, tokens, model_flops, model_flops_full, accounts (with 'compute' still whole), and how many of its
steps were skipped, which its tokens and FLOPs leave out. A line with `resumed_step` says that a new attempt went on from there,
or the same one after a rollback. Lines that ranks write say on what they were: devices, accelerator, peak_flops, layout.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from athanor.foundation.identity import read_identity
from athanor.foundation.run_folder import StageFolder, append_when_possible, read_jsonl, write_atomic
from athanor.ledger.accounts import STEPPING
from athanor.ledger.attribute import COMPUTE
from athanor.ledger.book import Book

SILENT_SECONDS = 30.0  # that running ranks may be without a sign of life, on a slow shared disk


@dataclass(frozen=True)
class RanOn:
    """What a line of the ranks says of them; `peak_flops` in FLOP/s of one device, None when nobody knows it."""

    devices: int
    accelerator: str
    peak_flops: float | None
    layout: str | None = None


RAN_ON = tuple(RanOn.__dataclass_fields__)


@dataclass(frozen=True)
class Attempt:
    """One life of the ranks: its number, the seconds that it took, when it failed (since 1970), the step it reached.

    `step` is None when the ranks had not even begun; `events` and `ledger` are its lines; `has_stepped`: whether it did a step.
    """

    number: int
    seconds: float
    failed: float
    step: int | None
    events: list[dict[str, Any]]
    ledger: list[dict[str, Any]]
    has_stepped: bool = False

    def accounts(self) -> dict[str, float]:
        """Seconds of which the ledger has no line, by account: work that nobody kept, and starting and saving in between.

        They add up to what this life took, even where the clock that lines have their time from was set meanwhile.
        """
        lines = [line for line in self.ledger if "devices" in line]  # of ranks; what --fresh threw away was told before
        left = max(0.0, self.seconds - sum(line["wall_seconds"] for line in lines))
        begun = next((row["time"] for row in self.events if row.get("kind") == "start"), self.failed)
        startup = 0.0 if lines else min(left, max(0.0, left - self.failed + begun))
        saving = min(left - startup, sum(row.get("seconds", 0.0) for row in self.events if row.get("kind") == "checkpoint" and
                                         row.get("until", row["time"]) > max([line["time"] for line in lines], default=0.0)))
        return {"startup": startup, "checkpoint": saving, "lost": left - startup - saving}


def roll_back(ledger_file: Path, resumed_step: int, attempt: int) -> None:
    """Note in `ledger.jsonl` that an attempt goes on from `resumed_step`: later steps of the lines before are lost."""
    append_when_possible(ledger_file, {"attempt": attempt, "resumed_step": resumed_step})


def note(ledger_file: Path, accounts: Mapping[str, float], **told: Any) -> None:
    """Add a line for what the ranks did not write themselves (the arguments of `unstepped`)."""
    append_when_possible(ledger_file, unstepped(accounts, **told))


def unstepped(accounts: Mapping[str, float], *, until: float, attempt: int, step: int, devices: int,
              idle: Mapping[str, int] | None = None) -> dict[str, Any]:
    """A line for seconds of all `devices` by account, outside of steps.

    `until`: when they ended, in seconds since 1970. `idle`: further devices without a rank in that time, by account.
    """
    wall, idle = math.fsum(accounts.values()), idle or {}
    spent = {name: accounts.get(name, 0.0) * devices + wall * idle.get(name, 0) for name in {**accounts, **idle}}
    return _outside_of_steps(spent, until, wall, attempt, step)


def _outside_of_steps(accounts: dict[str, float], until: float, wall_seconds: float, attempt: int, step: int) -> dict[str, Any]:
    return {"attempt": attempt, "time": until, "first_step": step, "last_step": step, "wall_seconds": wall_seconds,
            "device_seconds": math.fsum(accounts.values()), "tokens": 0, "model_flops": 0, "model_flops_full": 0,
            "accounts": accounts}


def unwritten(folder: StageFolder) -> list[dict[str, Any]]:
    """Lines that a stage's ledger lacks since who would have written them was killed, too.

    Of the attempt that began last: its start-up if it has no line, and as `lost` the time from its last line to its last step or
    sign of life. Of ranks that were killed before they began: all the time until their last sign, as `startup`.
    """
    turns = [row for row in read_jsonl(folder.events) if row.get("kind") in ("start", "done", "stop")]
    last: dict[str, Any] = turns[-1] if turns else {"kind": "none", "time": 0.0}
    lines, begun = [line for line in read_jsonl(folder.ledger) if {"time", "last_step"} <= set(line)], last["time"]
    signs = [row for file in sorted(folder.earlier_beats.glob("rank-*.json")) for row in read_jsonl(file) if "launched" in row]
    launched, alive = (signs[0]["launched"], signs[0]["time"]) if signs else (0.0, 0.0)
    found = []
    if last["kind"] == "start":
        written = [line for line in lines if line["attempt"] == last["attempt"]  # of ranks, though the clock was set back since
                   and ("devices" in line or line["time"] >= begun)]
        newest = lines[-1] if written else {"time": begun, "last_step": last.get("step", 0)}
        until, step = max([(newest["time"], newest["last_step"]),
                           *((row["time"], row["step"]) for row in read_jsonl(folder.metrics)[-1:])])
        until = max(until, alive if launched <= begun else 0.0)
        startup = 0.0 if written else last.get("startup_seconds", 0.0)
        found.append(unstepped({"startup": startup, "lost": until - newest["time"]}, until=until, step=step,
                               attempt=last["attempt"], devices=last["ranks"], idle=last.get("idle")))
    if launched > max([begun, *(line["time"] for line in lines)]) and signs[0]["phase"] != "done":  # for that was refused
        found.append(unstepped({"startup": alive - launched}, until=alive, step=0, devices=len(signs),
                               attempt=sum(row["kind"] == "start" for row in turns)))
    return [line for line in found if line["device_seconds"] > 0.0]


def throw_away(folder: StageFolder) -> None:
    """Turn all that a stage's ledger holds, and what it does not hold yet, into `lost`: it was paid, and when, though its work
    goes and steps begin at 0. Doing so twice changes nothing."""
    lines = [*read_jsonl(folder.ledger), *unwritten(folder)]
    rows = [_outside_of_steps({"lost": line["device_seconds"]}, line["time"], line["wall_seconds"], 0, line.get("last_step", 0))
            for line in lines if "time" in line and line.get("device_seconds")]
    if lines:
        write_atomic(folder.ledger, "".join(json.dumps(row) + "\n" for row in (*rows, {"attempt": 0, "resumed_step": 0})))


def so_far(folder: StageFolder) -> tuple[Book, str] | None:
    """The book of a stage that was begun and is not done, as far as its ledger goes, and in a phrase how far it is; None of
    any other. It is running while its ranks give signs of life."""
    turns = [row["kind"] for row in read_jsonl(folder.events) if row.get("kind") in ("start", "stop", "held", "done")]
    lines = read_jsonl(folder.ledger)
    ran_on = next(({key: line[key] for key in RAN_ON} for line in reversed(lines) if set(RAN_ON) <= set(line)), None)
    if turns[-1:] in ([], ["done"]) or ran_on is None:
        return None
    signs = [file.stat().st_mtime for file in folder.beats.glob("rank-*.json")]
    is_alive = max(signs, default=0.0) > time.time() - SILENT_SECONDS
    state = {"stop": "stopped", "held": "held"}.get(turns[-1], "running" if is_alive else "cut off")
    step = max([row["step"] for row in read_jsonl(folder.metrics) if "step" in row], default=0)
    return book_of(lines, **ran_on), f"{state}, step {step} of {read_identity(folder).get('steps', '?')}"


def book_of(lines: Sequence[dict[str, Any]], *, devices: int, accelerator: str, peak_flops: float | None,
            layout: str | None = None) -> Book:
    """Add up the lines of a `ledger.jsonl`; of a line whose steps were partly rolled back or skipped, that share is lost."""
    book = Book("actual", devices, accelerator, peak_flops, layout=layout)
    resumed = [(i, line["resumed_step"]) for i, line in enumerate(lines) if "resumed_step" in line]
    for index, line in enumerate(lines):
        if "resumed_step" in line:
            continue
        kept_until = min([step for at, step in resumed if at > index], default=line["last_step"])
        steps = line["last_step"] - line["first_step"]
        kept = 1.0 if steps == 0 else min(1.0, max(0.0, (kept_until - line["first_step"]) / steps))
        _add_line(book, line, kept, kept * (1.0 - line.get("skipped_steps", 0) / max(1, steps)))
    if peak_flops:
        useful = book.model_flops / peak_flops
        computing = book.accounts.pop(COMPUTE, 0.0)
        book.add("useful", useful, "derived")
        book.add("kernel", computing - useful, "derived")
        if useful > computing:
            book.notes.append("error: useful exceeds the measured computing time: the peak is too low or FLOPs are counted twice")
    else:
        book.add("kernel", book.accounts.pop(COMPUTE, 0.0))
        book.notes.append("the device's peak is unknown, so useful cannot be told from kernel")
    return book.close()


def _add_line(book: Book, line: dict[str, Any], kept: float, kept_seconds: float) -> None:
    for name, seconds in line["accounts"].items():
        share = kept_seconds if name == COMPUTE or name in STEPPING else 1.0
        if share < 1.0:
            book.add("lost", seconds * (1.0 - share))
        if name == COMPUTE:
            book.accounts[COMPUTE] = book.accounts.get(COMPUTE, 0.0) + seconds * share
        else:
            book.add(name, seconds * share)
    book.wall_seconds += line["wall_seconds"]
    book.device_seconds += line["device_seconds"]
    book.tokens += line["tokens"] * kept
    book.model_flops += line["model_flops"] * kept
    book.model_flops_full += line["model_flops_full"] * kept
