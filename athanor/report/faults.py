"""The faults, stops and rollbacks of a stage in their order, and what each cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from athanor.foundation.units import format_share
from athanor.ledger.interruptions import COSTS, Interruption, interruptions

TOLD, RESUMED = ("fault", "held", "stop", "rollback", "fresh"), ("restart", "rollback", "fresh")  # kinds of events


@dataclass(frozen=True)
class Fault:
    """`at`: seconds since the stage's first event, None when nobody saw it; `sentence`: what was told of it; `is_asked`: whether
    it was no fault, but --fresh."""

    at: float | None
    sentence: str
    cost: Interruption
    is_asked: bool = False

    def to_json(self) -> dict[str, Any]:
        cost = self.cost
        return {"seconds_since_start": self.at, "sentence": self.sentence, "step": cost.step, "resumed_step": cost.resumed_step,
                "is_asked": self.is_asked, "accounts": cost.accounts, "device_seconds": cost.device_seconds}


def timeline(events: Sequence[dict[str, Any]], ledger: Sequence[dict[str, Any]]) -> list[Fault]:
    """What interrupted a stage. Events and lines of the ledger are in the same order: each going on is told in both, but where
    a kill came between the two."""
    found, left = [], list(events)
    first = next((event["time"] for event in events if "time" in event), 0.0)
    for cost in interruptions(ledger):
        ends = [number for number, event in enumerate(left, 1) if event.get("kind") in RESUMED and
                (event.get("attempt", 0), event.get("step", 0)) == (cost.attempt, cost.resumed_step)]
        until = len(left) if cost.resumed_step is None else min(ends, default=0)
        found.append(_fault([event for event in left[:until] if event.get("kind") in TOLD], cost, first))
        left = left[until:]
    return found


def _fault(told: Sequence[dict[str, Any]], cost: Interruption, first: float) -> Fault:
    times = [event["time"] - first for event in told if "time" in event]
    sentences = dict.fromkeys(str(event.get("sentence", "")) for event in told)
    return Fault(min(times, default=None), "; ".join(sentences) or "it ended, and nobody was left to say why", cost,
                 any(event.get("kind") == "fresh" for event in told))


def summary(faults: Sequence[Fault], paid_seconds: float) -> str:
    """What all of them took, of the device-seconds paid."""
    cost = sum(fault.cost.device_seconds for fault in faults)
    share = f", {format_share(cost / paid_seconds)} of what was paid" if paid_seconds > 0 else ""
    found = [_counted([fault for fault in faults if fault.is_asked is is_asked], *words) for is_asked, words in (
        (False, ("interrupted", "done again")), (True, ("begun anew", "thrown away as asked")))]
    return f"{' and '.join(filter(None, found))}: {cost:,.1f} device-seconds{share}"


def _counted(faults: Sequence[Fault], what: str, became: str) -> str:
    """How often, and what became of how many steps; empty where there is none."""
    steps = sum(fault.cost.steps_again for fault in faults)
    times = "once" if len(faults) == 1 else f"{len(faults)} times"
    return f"{what} {times}, {steps} step{'' if steps == 1 else 's'} {became}" if faults else ""


def cells(fault: Fault) -> list[str]:
    """Device-seconds by account of COSTS, and of all of them; a restart in place may take hundredths of a second."""
    held = *(fault.cost.accounts[name] for name in COSTS), fault.cost.device_seconds
    return [f"{seconds:,.1f}" if seconds >= 10 else f"{seconds:.2f}" for seconds in held]
