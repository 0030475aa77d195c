"""What each fault, stop and rollback of a stage cost, from the lines of its `ledger.jsonl` (see `attempts.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from athanor.ledger.accounts import STEPPING
from athanor.ledger.attribute import COMPUTE

COSTS = ("lost", "down", "startup")  # accounts


@dataclass
class Interruption:
    """The stage had come to `step`, `attempt` went on from `resumed_step` (None: not yet); `accounts`: device-seconds of COSTS.

    `startup` is that of the starts after it, failed ones too.
    """

    step: int
    resumed_step: int | None = None
    attempt: int = 0
    accounts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COSTS, 0.0))

    @property
    def steps_again(self) -> int:
        """Steps that were thrown away."""
        return 0 if self.resumed_step is None else max(0, self.step - self.resumed_step)

    @property
    def device_seconds(self) -> float:
        return sum(self.accounts.values())


def interruptions(lines: Sequence[dict[str, Any]]) -> list[Interruption]:
    """One for each time that the stage went on from a checkpoint, in order, and one more when it ended without going on.

    What they lost adds up to the book's `lost`, but for steps that were skipped.
    """
    found: list[Interruption] = []
    kept_until = [line.get("last_step", 0) for line in lines]
    step = 0
    for index, line in enumerate(lines):
        accounts, step = line.get("accounts", {}), max(step, line.get("last_step", 0))
        if found:
            found[-1].accounts["startup"] += accounts.get("startup", 0.0)
        if not {"lost", "down"} & set(accounts) and "resumed_step" not in line:
            continue
        if not found or found[-1].resumed_step is not None:
            found.append(Interruption(step))
        current = found[-1]
        current.step = max(current.step, step)
        for name in ("lost", "down"):
            current.accounts[name] += accounts.get(name, 0.0)
        if "resumed_step" in line:
            step = current.resumed_step = line["resumed_step"]
            current.attempt = line.get("attempt", 0)
            for before in range(index):
                until = max(step, lines[before].get("first_step", 0))
                if until < kept_until[before]:
                    current.accounts["lost"] += (kept_until[before] - until) * _step_seconds(lines[before])
                    kept_until[before] = until
    return found


def _step_seconds(line: dict[str, Any]) -> float:
    """Device-seconds of one of a line's steps that was not skipped."""
    steps = line["last_step"] - line["first_step"]
    stepping = sum(seconds for name, seconds in line["accounts"].items() if name == COMPUTE or name in STEPPING)
    return float(stepping * (1 - line.get("skipped_steps", 0) / max(1, steps)) / max(1, steps))
