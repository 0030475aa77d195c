"""A stage's book over all attempts, from the lines of its `ledger.jsonl`.

A line holds what all ranks spent between two exchanges: attempt, time (seconds since 1970), first_step, last_step,
wall_seconds, device_seconds, tokens, model_flops, model_flops_full, accounts (with 'compute' still whole), and how many of its
steps were skipped, which its tokens and FLOPs leave out. A line with `resumed_step` says that a new attempt went on from there,
or the same one after a rollback, and what was spent after the last line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from athanor.foundation.run_folder import append_jsonl, append_when_possible
from athanor.ledger.accounts import STEPPING
from athanor.ledger.attribute import COMPUTE
from athanor.ledger.book import Book


def roll_back(ledger_file: Path, resumed_step: int, attempt: int, tail_seconds: float = 0.0, devices: int = 1) -> None:
    """Note in `ledger.jsonl` that an attempt goes on from `resumed_step`: later steps of the lines before are lost.

    So are the `tail_seconds` between the last line of the attempt before and its last sign of life.
    """
    append_when_possible(ledger_file, {"attempt": attempt, "resumed_step": resumed_step, "wall_seconds": tail_seconds,
                               "device_seconds": tail_seconds * devices})


def note(ledger_file: Path, accounts: Mapping[str, float], *, until: float, attempt: int, step: int, devices: int,
         idle: Mapping[str, int] | None = None) -> None:
    """Add a line for what the ranks did not write themselves: seconds of all `devices` by account, outside of steps.

    `until`: when they ended, in seconds since 1970. `idle`: further devices without a rank in that time, by account.
    """
    wall, idle = sum(accounts.values()), idle or {}
    spent = {name: accounts.get(name, 0.0) * devices + wall * idle.get(name, 0) for name in {**accounts, **idle}}
    append_jsonl(ledger_file, {"attempt": attempt, "time": until, "first_step": step, "last_step": step, "wall_seconds": wall,
                               "device_seconds": wall * (devices + sum(idle.values())), "tokens": 0, "model_flops": 0,
                               "model_flops_full": 0, "accounts": spent})


def book_of(lines: Sequence[dict[str, Any]], *, devices: int, accelerator: str, peak_flops: float | None) -> Book:
    """Add up the lines of a `ledger.jsonl`; of a line whose steps were partly rolled back or skipped, that share is lost."""
    book = Book("actual", devices, accelerator, peak_flops)
    resumed = [(i, line["resumed_step"]) for i, line in enumerate(lines) if "resumed_step" in line]
    for index, line in enumerate(lines):
        if "resumed_step" in line:
            if line.get("device_seconds"):
                book.add("lost", line["device_seconds"])
                book.wall_seconds += line["wall_seconds"]
                book.device_seconds += line["device_seconds"]
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
