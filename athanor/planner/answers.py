"""What a search tells beside the best layout: how many devices pay, what a faster network buys, known methods side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from athanor.cost.datasheet import accelerator
from athanor.cost.memory import GIB
from athanor.foundation.errors import LayoutError
from athanor.foundation.units import PD_FLOP, format_bytes, format_share
from athanor.planner.finalists import Finalist, finalists, refine
from athanor.planner.search import Grid, Mask, Task, sweep

FACTORS = (0.25, 0.5, 2.0)  # of the devices asked for
FEW = 10  # finalists, where one number is asked for
LARGER = (1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
MOST_POINTS = 40  # of a front, for one number of devices
METHODS = ("TP x PP x DP", "PP x DP, unequal stages, optimizer sharded", "FSDP")


def with_devices(task: Task, factors: Sequence[float] = FACTORS) -> list[Grid]:
    """The grids of the same batch on other numbers of devices, those without any legal layout left out."""
    out = []
    for factor in factors:
        try:
            out.append(sweep(replace(task, devices=max(1, round(task.devices * factor)))))
        except LayoutError:
            continue
    return out


def needed(grid: Grid) -> str:
    """What would be needed where nothing fits: the memory of this many devices, or more devices."""
    task, least = grid.task, int(np.argmin(grid.peak))
    row = grid.row(least)
    named = " ".join(f"{axis}={row[axis]:.0f}" for axis in ("pp", "dp", "cp", "tp", "ep") if row[axis] > 1) or "one device"
    more = (other for factor in LARGER for other in with_devices(task, (factor,)))
    enough = next((other.task.devices for other in more if other.fits.any()), None)
    rest = f"it fits on {enough:,} devices" if enough else f"nor does it fit on {LARGER[-1]} times as many devices"
    return (f"nothing fits on {task.devices:,} {task.cluster.accelerator}: the layout that needs least ({named}) has a peak of "
            f"{format_bytes(grid.peak[least])}, and {format_bytes(task.cap_bytes)} are the most that keep the probability of "
            f"running out of memory at {format_share(task.most_odds, 0)}; {rest}")


def best_of(grid: Grid) -> Finalist | None:
    """The best of a few finalists."""
    return next(iter(finalists(grid, count=FEW)), None)


def devices_worth(sizes: Sequence[tuple[Grid, Finalist | None]]) -> list[dict[str, Any]]:
    """For each number of devices the best step, and what a token costs in device-seconds; None where nothing fits."""
    out = []
    for grid, best in sizes:
        task, seconds = grid.task, best and best.seconds
        out.append({"devices": task.devices, "step_seconds": seconds, "configurations": len(grid),
                    "device_seconds_per_token": seconds and seconds * task.devices / task.global_batch_tokens,
                    "memory_gib": best and max(best.memory_bytes) / GIB, "layout": best and best.words()})
    return out


def network_twice(grid: Grid, first: Finalist) -> dict[str, Any]:
    """The best layout of a network twice as fast, and how much less time a step takes."""
    task = grid.task
    nic = 2 * float(task.machine.network[0]) * 8 / 1e9
    faster = sweep(replace(task, cluster=replace(task.cluster, facts={**task.cluster.facts, "nic_gbps": nic})))
    best = min((refine(faster, first.index), *finalists(faster, count=FEW)), key=lambda one: one.seconds)
    return {"nic_gbps": nic, "step_seconds": best.seconds, "saved": 1 - best.seconds / first.seconds, "layout": best.words()}


def method_masks(grid: Grid) -> dict[str, Mask]:
    """Parts of a grid: Yuan's method 1 and method 2 (arXiv:2311.15786), and fully sharded data parallelism."""
    c = grid.columns
    plain = (c["chunks"] == 1) & (c["cp"] == 1) & (c["ep"] == 1)
    masks = (plain & (c["zero"] <= 1), plain & (c["tp"] == 1) & (c["pp"] > 1) & (c["zero"] == 1),
             plain & (c["tp"] == 1) & (c["pp"] == 1) & (c["zero"] == 3))
    return dict(zip(METHODS, masks, strict=True))


def compare_methods(grid: Grid) -> list[dict[str, Any]]:
    """The best of each method, exactly; for one that does not fit, what its least memory would be."""
    out: list[dict[str, Any]] = []
    for name, within in method_masks(grid).items():
        entry: dict[str, Any] = {"method": name, "configurations": int(within.sum())}
        if best := finalists(grid, within, 10)[:1]:
            entry |= best[0].to_dict(grid.task)
        elif within.any():
            entry["least_memory_gib"] = float(grid.peak[within].min()) / GIB
        out.append(entry)
    return out


def front(sizes: Sequence[tuple[Grid, Finalist | None]]) -> list[dict[str, float]]:
    """What no other configuration beats in devices, memory and step time at once; per number of devices by rising memory.

    Of those whose closed form is near the simulation, and the best of each number of devices.
    """
    out: list[dict[str, float]] = []
    for grid, best in sorted(sizes, key=lambda one: one[0].task.devices):
        order = np.lexsort((grid.seconds, grid.peak))
        order = order[(grid.fits & grid.is_even)[order]]
        seconds = grid.seconds[order]
        falls = np.flatnonzero(seconds < np.minimum.accumulate(np.concatenate([[np.inf], seconds[:-1]])))
        kept = falls[np.unique(np.linspace(0, len(falls) - 1, MOST_POINTS).round().astype(int))] if len(falls) else falls
        points = [{"devices": grid.task.devices, "memory_gib": float(grid.peak[at]) / GIB,
                   "step_seconds": float(grid.seconds[at])} for at in order[kept]]
        if best:
            memory = max(best.memory_bytes) / GIB
            points = [point for point in points if point["memory_gib"] < memory or point["step_seconds"] < best.seconds]
            points.append({"devices": grid.task.devices, "memory_gib": memory, "step_seconds": best.seconds})
            points.sort(key=lambda point: point["memory_gib"])
        out += [point for point in points if not any(
            other["memory_gib"] <= point["memory_gib"] and other["step_seconds"] <= point["step_seconds"] for other in out)]
    return out


def cost(task: Task, seconds: float, tokens: float, price: float | None) -> dict[str, float | None]:
    """Days, PD (6ND), device-hours, money and energy of a token budget at steps of `seconds`, no faults counted.

    Energy is all devices at their rated power all the time, which is an upper bound of what the devices themselves draw.
    """
    whole = tokens / task.global_batch_tokens * seconds
    hours, watts = whole * task.devices / 3600, accelerator(task.cluster.accelerator).get("power_watts")
    return {"tokens": tokens, "days": whole / 86400, "pd_6nd": 6 * task.shape.active_parameters() * tokens / PD_FLOP,
            "device_hours": hours, "money": None if price is None else hours * price,
            "most_energy_joules": None if watts is None else hours * 3600 * watts}
