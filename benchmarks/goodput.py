"""Llama 3 405B's faults on 16,384 devices with this software's restarts: the figures of docs/goodput.md, with what is assumed.

    python benchmarks/goodput.py [--json]

Nothing is run: what was measured here before (docs/log.md) and what must be assumed for that size goes into the same model as
`athanor plan goodput`. A fault is seen at once, or by the watchdog alone; the ranks start in place, or a spare takes the place of
a node. Both times are means over the published kinds of faults, which is exact for detection and nearly so for restarts.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from athanor.foundation.units import format_seconds, format_share
from athanor.laws.goodput import (
    DAY,
    Job,
    faults_per_second,
    largest,
    levers,
    mean_detection,
    saving_seconds,
    typical_saving,
)
from athanor.laws.published import constants

DEVICES, DAYS, PARAMETERS, BATCH_TOKENS, FLOPS = 16384, 54, 405e9, 16 * 2**20, 400e12
STORAGE = 2e12  # bytes a second sustained, of their Tectonic (arXiv 2407.21783, section 3.3.1)
PUBLISHED, TARGET = 0.90, 0.97  # "higher than 90 % effective training time"
# measured here, on four nodes of Slurm of one rank each on one machine: seconds from a fault to the agent's knowing, from
# there to the first new step in place or on a spare node, and of a health gate that fails until the job runs elsewhere
SEEN, IN_PLACE, SPARE, GATE = 0.10, 1.55, 1.73, 7.6
HANG_LIMIT_STEPS, HANG_LIMIT_SECONDS, VERDICT = 10, 30.0, 2.0  # the watchdog's limit is the longer of two; then it asks the ranks
GROUPS = 30.0  # seconds to make process groups on more than 10,000 devices: MegaScale's bound (arXiv 2402.15627)
DIAGNOSED, CAUGHT_UP = 600.0, 900.0  # MegaScale's bounds of detection with diagnosis, and of catching up
EVERY_DEVICE_READS = 4e9  # bytes, the largest part of a checkpoint that a device of theirs writes


@dataclass(frozen=True)
class Case:
    """Seconds of each way to see a fault and to start again, and of a save that is waited for."""

    name: str
    seen: float
    hang: float
    in_place: float
    spare: float
    save: float
    is_async: bool = True
    hang_share: float | None = None  # None: as the kinds of faults have it
    faults: float = 1.0  # times those that were unexpected

    def job(self) -> Job:
        kinds = constants()["faults"]["kind"]
        spares = sum(kind["count"] for kind in kinds if kind["node"]) / sum(kind["count"] for kind in kinds)
        return Job(DAYS * DAY, typical_saving(self.save, self.is_async), mean_detection(self.seen, self.hang, self.hang_share),
                   spares * self.spare + (1 - spares) * self.in_place, self.faults * faults_per_second(DEVICES))


def cases() -> list[Case]:
    """From what was measured on one machine to what others published."""
    step = 6 * PARAMETERS * BATCH_TOKENS / (DEVICES * FLOPS)
    save, limit = saving_seconds(PARAMETERS, STORAGE), max(HANG_LIMIT_SECONDS, HANG_LIMIT_STEPS * step) + VERDICT
    floor = Case("as measured on one machine", SEEN, limit, IN_PLACE, SPARE, save)
    grown = GROUPS + save + step  # groups, reading what was saved at the same rate, and the first step again as a warm-up
    likely = replace(floor, name="with what grows with size", in_place=IN_PLACE + grown, spare=SPARE + GATE + grown)
    load = DEVICES * EVERY_DEVICE_READS / STORAGE
    bounds = Case("MegaScale's bounds", DIAGNOSED, DIAGNOSED, CAUGHT_UP, CAUGHT_UP, save)
    return [floor, likely,
            replace(likely, name="… all faults seen at once", hang_share=0.0),
            replace(likely, name="… all faults hang", hang_share=1.0),
            replace(likely, name="… every device reads 4 GB", in_place=likely.in_place + load, spare=likely.spare + load),
            replace(likely, name="… groups take Megatron's 1,047 s", in_place=likely.in_place + 1047 - GROUPS,
                    spare=likely.spare + 1047 - GROUPS),
            replace(likely, name="… saves are waited for", is_async=False),
            replace(likely, name="… with the 47 planned interruptions", faults=466 / 419),
            Case("the planner's defaults, 5 and 10 minutes", 300.0, 300.0, 600.0, 600.0, save), bounds]


def found() -> dict[str, Any]:
    """Everything that is printed."""
    rows = []
    for case in cases():
        job = case.job()
        rows.append({"name": case.name, "detect_seconds": job.detect_seconds, "restart_seconds": job.restart_seconds,
                     "interval_seconds": job.interval, "goodput": job.goodput,
                     "shares": {name: seconds / job.wall_seconds for name, seconds in job.expect().items()}})
    slow = next(case for case in cases() if case.name.startswith("the planner"))
    return {"faults_per_day": slow.job().faults * DAY, "cases": rows, "kinds": constants()["faults"]["kind"],
            "levers": {case.name: [asdict(lever) for lever in levers(case.job(), TARGET)]
                       for case in (slow, cases()[-1])},
            "from_fault_to_step": {target: budget(target) for target in (PUBLISHED, 0.95, TARGET, 0.99)}}


def budget(goodput: float) -> float:
    """Seconds from a fault to the first new step that leave this goodput, half of them detection."""
    save, faults = typical_saving(saving_seconds(PARAMETERS, STORAGE), True), faults_per_second(DEVICES)
    return largest(0.0, 1e5, lambda seconds: Job(DAYS * DAY, save, seconds / 2, seconds / 2, faults).goodput >= goodput)


def tables(result: dict[str, Any]) -> list[str]:
    """The tables of docs/goodput.md."""
    kinds = result["kinds"]
    made = ["| kind | faults | seen | goes on |", "|---|---|---|---|"]
    for kind in kinds:
        made.append(f"| {kind['name']} | {kind['count']} | {'by the watchdog' if kind['hangs'] else 'at once'} | "
                    f"{'on a spare node' if kind['node'] else 'in place'} |")
    whole = sum(kind["count"] for kind in kinds)
    made.append(f"| all | {whole} | {format_share(sum(k['count'] for k in kinds if k['hangs']) / whole)} by the watchdog | "
                f"{format_share(sum(k['count'] for k in kinds if k['node']) / whole)} on a spare node |")
    names = ("lost", "down", "startup", "checkpoint", "kernel")
    rows = [f"| case | detect | restart | save every | goodput | {' | '.join(names)} |", "|---|" + "---|" * (len(names) + 4)]
    for row in result["cases"]:
        shares = [format_share(row["shares"][name], 2) for name in names]
        times = " | ".join(format_seconds(row[f"{name}_seconds"]) for name in ("detect", "restart", "interval"))
        rows.append(f"| {row['name']} | {times} | {format_share(row['goodput'], 2)} | {' | '.join(shares)} |")
    return ["\n".join(made), "\n".join(rows), *(_lever_table(name, pulled) for name, pulled in result["levers"].items()),
            "\n".join(["| goodput | from a fault to the first new step, at most |", "|---|---|",
                       *(f"| {format_share(float(target), 0)} | {format_seconds(seconds)} |"
                         for target, seconds in result["from_fault_to_step"].items())])]


def _lever_table(name: str, pulled: list[dict[str, Any]]) -> str:
    rows = [f"| {name}, to {format_share(TARGET, 0)} | now | needed |", "|---|---|---|"]
    for lever in pulled:
        now, needed = (None if value is None else format_seconds(value) if lever["unit"] == "seconds" else
                       format_share(value) if lever["unit"] == "of each" else f"{value:.2f} {lever['unit']}"
                       for value in (lever["now"], lever["needed"]))
        without = f"cannot alone: {format_share(lever['goodput_without'], 2)} with none"
        rows.append(f"| {lever['name']} | {now} | {needed or without} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON document to standard output")
    options = parser.parse_args()
    print(json.dumps(found()) if options.json else "\n\n".join(tables(found())))


if __name__ == "__main__":
    main()
