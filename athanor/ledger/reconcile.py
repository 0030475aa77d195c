"""Books side by side: what was foreseen, what was measured, and the error of each account.

An error is forecast / actual - 1: plus means that the forecast was too high. Page and terminal both read this.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from athanor.foundation.run_folder import StageFolder, is_held, read_jsonl
from athanor.ledger.accounts import ACCOUNTS, Account
from athanor.ledger.attempts import so_far
from athanor.ledger.book import Book, read_book

NOTHING = 1e-9  # of the paid device-seconds: what rounding leaves over
WHOLE_CHAIN = "whole chain"  # no stage can have this name

# every derived figure with its definition; the keys are those of `Book.derived`
DEFINITIONS = {
    "mfu": "model FLOPs utilisation: useful device-seconds / device-seconds of kept training steps; attention counted "
           "causally, nothing recomputed counted",
    "mfu_full_attention": "MFU with attention counted over the full square, as PaLM counts it; the seconds are the same",
    "hfu": "hardware FLOPs utilisation: (useful + recompute) / device-seconds of kept training steps",
    "goodput": "device-seconds of kept training steps / device-seconds paid",
    "end_to_end": "useful device-seconds / device-seconds paid, from allocation to release",
    "pd_6nd": "model FLOPs of the kept tokens in PD (8.64e19 FLOP): 6 per parameter and token (6ND) and causal attention",
    "unattributed_share": "device-seconds that no account explains / device-seconds paid; negative when accounts overlap",
    "error": "forecast / actual - 1; plus means that the forecast was too high",
    "share": "device-seconds of the account / device-seconds paid",
    "device-seconds": "devices x wall-clock seconds; each stands in exactly one account",
}


@dataclass(frozen=True)
class Line:
    """One account in both books, in device-seconds; None where there is no such book."""

    account: Account
    forecast: float | None
    actual: float | None
    share: float  # of the paid device-seconds of the actual book, or of the forecast while there is no actual one
    evidence: str
    parts: Mapping[str, float] = field(default_factory=dict)  # device-seconds by the step of the chain they were spent in
    is_done: bool = True  # else the forecast is of more than the actual is

    @property
    def error_seconds(self) -> float | None:
        """Forecast minus actual, in device-seconds; None when a book is missing, or not done."""
        return None if self.forecast is None or self.actual is None or not self.is_done else self.forecast - self.actual

    @property
    def error(self) -> float | None:
        """Forecast / actual - 1, or None when a book is missing, or not done, or the actual is not above zero."""
        return relative_error(self.forecast, self.actual) if self.is_done else None


@dataclass(frozen=True)
class Reconciliation:
    """The books of a stage or of a whole chain, account by account; accounts empty in both are left out.

    `progress` says how far a stage is whose actual book goes on, such as "running, step 12 of 60"; it is compared with nothing.
    """

    name: str
    forecast: Book | None
    actual: Book | None
    lines: Sequence[Line]
    progress: str | None = None

    @property
    def wall_error(self) -> float | None:
        """Error of the wall-clock time."""
        if self.forecast is None or self.actual is None or self.progress:
            return None
        return relative_error(self.forecast.wall_seconds, self.actual.wall_seconds)

    @property
    def paid_error(self) -> float | None:
        """Error of the device-seconds."""
        if self.forecast is None or self.actual is None or self.progress:
            return None
        return relative_error(self.forecast.device_seconds, self.actual.device_seconds)

    @property
    def books(self) -> dict[str, Book]:
        """The books there are, by kind."""
        return {kind: book for kind, book in (("forecast", self.forecast), ("actual", self.actual)) if book}

    @property
    def called(self) -> dict[str, str]:
        """What people call the books, by kind."""
        return {"forecast": "forecast", "actual": "so far" if self.progress else "actual"}

    @property
    def layouts(self) -> str:
        """How the ranks were laid out, and what the forecast is for, where that is another; empty when nobody knows."""
        known = {kind: book.layout for kind, book in self.books.items() if book.layout}
        if len(set(known.values())) == 2:
            return f"{known['actual']}; the forecast is for {known['forecast']}"
        return next(iter(known.values()), "")

    def to_json(self) -> dict[str, Any]:
        """Plain values in SI units, for `--json`."""
        return {
            **{kind: {"devices": book.devices, "accelerator": book.accelerator, "wall_seconds": book.wall_seconds,
                      "device_seconds": book.device_seconds, "tokens": book.tokens, "model_flops": book.model_flops,
                      "layout": book.layout, "derived": book.derived(), "notes": book.notes}
               for kind, book in self.books.items()},
            "progress": self.progress, "wall_error": self.wall_error,
            "accounts": {line.account.name: {
                "forecast": line.forecast, "actual": line.actual, "share": line.share, "error_seconds": line.error_seconds,
                "error": line.error, "evidence": line.evidence} for line in self.lines}}


def relative_error(forecast: float | None, actual: float | None) -> float | None:
    """Forecast / actual - 1, or None where that says nothing."""
    return forecast / actual - 1 if forecast is not None and actual is not None and actual > 0 else None


def reconcile(name: str, forecast: Book | None, actual: Book | None, steps: Mapping[str, Book] | None = None,
              progress: str | None = None) -> Reconciliation:
    """Set two books side by side. `steps` are the books of single steps inside them, which say where an account's time lay.

    Raises ValueError when there is neither book.
    """
    leading = actual or forecast
    if leading is None:
        raise ValueError(f"there is no book of {name}")
    paid = leading.device_seconds
    lines = []
    for account in ACCOUNTS:
        values = [book.accounts.get(account.name, 0.0) if book else None for book in (forecast, actual)]
        if not any(value and abs(value) > NOTHING * paid for value in values):
            continue
        seconds = leading.accounts.get(account.name, 0.0)
        parts = {step: held for step, book in (steps or {}).items() if (held := book.accounts.get(account.name))}
        if steps and abs(others := seconds - math.fsum(parts.values())) > 1e-6 * paid:
            parts["other steps"] = others
        lines.append(Line(account, values[0], values[1], seconds / paid if paid > 0 else 0.0,
                          leading.evidence.get(account.name, ""), parts, progress is None))
    return Reconciliation(name, forecast, actual, lines, progress)


def reconcile_run(root: Path, stages: Sequence[str]) -> list[Reconciliation]:
    """The books of a run folder: first the whole chain's, then each stage's; those with neither book are left out.

    Of a stage that is not done, the actual book is what its ledger holds so far.
    Raises UserError when a file is there but is no book.
    """
    forecast, actual = _books(root)
    of_stages = {stage: _books(root / stage) for stage in stages}
    kind = 1 if actual else 0
    steps = {stage: book for stage, books in of_stages.items() if (book := books[kind])}
    found = [reconcile(WHOLE_CHAIN, forecast, actual, steps)] if forecast or actual else []
    for stage, (foreseen, measured) in of_stages.items():
        measured, progress = so_far(StageFolder(root / stage)) or (measured, None)
        state, _, step = (progress or "").partition(", ")
        hosts = {row.get("host") for file in StageFolder(root / stage).beats.glob("rank-*.json") for row in read_jsonl(file)}
        if state in ("running", "cut off") and hosts == {socket.gethostname()} and not is_held(root / ".lock"):
            progress = f"not running, {step}; the same command goes on"
        if foreseen or measured:
            found.append(reconcile(stage, foreseen, measured, progress=progress))
    return found


def _books(folder: Path) -> tuple[Book | None, Book | None]:
    files = folder / "forecast.json", folder / "actual.json"
    forecast, actual = (read_book(file) if file.exists() else None for file in files)
    return forecast, actual
