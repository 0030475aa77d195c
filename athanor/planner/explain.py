"""Why a layout: where its step goes, what each choice is worth against its neighbours, and that as sentences."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from athanor.cost.case import Array
from athanor.cost.memory import GIB
from athanor.cost.pipeline import ROUNDING
from athanor.foundation.errors import LayoutError
from athanor.foundation.schedules import SCHEDULES
from athanor.foundation.units import format_share
from athanor.planner.estimate import RECOMPUTE
from athanor.planner.finalists import Finalist, refine
from athanor.planner.search import Grid

# Each choice, and the choices that follow it: they take their best value when it changes.
CHOICES = {"tp": ("is_sequence_parallel",), "pp": ("chunks", "schedule"),
           "chunks": ("schedule",), "schedule": ("chunks",), "cp": (),
           "ep": (), "micro_batch_size": (), "zero": ("spread",), "spread": (), "recompute": (), "is_sequence_parallel": ()}
NAMES = {"chunks": "stages_per_rank", "schedule": "pipeline_schedule", "spread": "sharded over",
         "is_sequence_parallel": "sequence_parallel"}
WATERFALL = ("account", "seconds", "share", "up_to")
HELD = ("Each alternative changes one choice and holds the others, except what must follow it (sequence parallelism, schedule "
        "and stages per rank, data ranks, micro-batches); several changed at once may do better, so the whole grid was priced")
TRIED = 3  # configurations of a changed choice, where others follow it
SPREAD = {0: "all data ranks", 1: "near data ranks"}


@dataclass(frozen=True)
class Change:
    """One choice changed, data ranks and micro-batches following: relative step time, memory, whether it fits."""

    choice: str
    value: str
    relative: float
    memory_gib: float
    fits: bool

    def __str__(self) -> str:
        speed = f"{format_share(abs(self.relative))} {'slower' if self.relative >= 0 else 'faster'}"
        missing = f"does not fit ({self.memory_gib:.0f} GiB; else {speed})"
        return f"{self.value} {f'is {speed}' if self.fits else missing}"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "sentence": str(self)}


def waterfall(finalist: Finalist) -> list[tuple[str, float, float, float]]:
    """From the ideal step to the predicted one: account, its seconds, its share, and the seconds up to and with it."""
    out, total = [], 0.0
    rest = sorted((name for name in finalist.accounts if name != "useful"), key=lambda name: -finalist.accounts[name])
    for name in ("useful", *rest):
        if seconds := finalist.accounts[name]:
            total += seconds
            out.append((name, seconds, seconds / finalist.seconds, total))
    return out


def what_if(grid: Grid, first: Finalist) -> list[Change]:
    """Every legal change of one choice around a finalist, ordered by choice and value, each cut and simulated as it was."""
    index = first.index
    columns = {name: grid.columns[name] for name in CHOICES if name != "spread"}
    columns["spread"] = _is_near(**{name: grid.columns[name] for name in ("zero", "shard", "dp", "cp")})
    equal = {name: values == values[index] for name, values in columns.items()}
    equal["spread"] |= columns["zero"] == 0
    out = []
    for choice, followers in CHOICES.items():
        same = np.logical_and.reduce([hit for name, hit in equal.items() if name != choice and name not in followers])
        for value in np.unique(columns[choice][same & ~equal[choice]]):
            found = np.flatnonzero(same & (columns[choice] == value))
            near = found[np.lexsort((grid.seconds[found], ~grid.fits[found]))][:TRIED]
            tried = [_tried(grid, int(at), first) for at in near]
            seconds, memory, fits = min(tried, key=lambda one: (not one[2], one[0]))
            out.append(Change(NAMES.get(choice, choice), _word(choice, value), seconds, memory / GIB, fits))
    return out


def _tried(grid: Grid, at: int, first: Finalist) -> tuple[float, float, bool]:
    """Relative step time, peak memory, and whether it fits; by the closed form where no cut of the stages fits."""
    try:
        found = refine(grid, at)
        peak = max(found.memory_bytes)
        return found.seconds / first.seconds - 1, peak, peak <= grid.task.cap_bytes * ROUNDING
    except LayoutError:
        return float(grid.seconds[at] / grid.seconds[first.index] - 1), float(grid.peak[at]), False


def _is_near(zero: Array, shard: Array, dp: Array, cp: Array) -> Array:
    """1 where states are sharded over a part of the data ranks."""
    return np.asarray((zero > 0) & (shard < dp * cp), dtype=np.float64)


def _word(choice: str, value: float) -> str:
    if choice == "recompute":
        return next(name for name, code in RECOMPUTE.items() if code == value)
    if choice == "schedule":
        return tuple(SCHEDULES)[int(value)]
    return SPREAD[int(value)] if choice == "spread" else f"{value:.0f}"


def reasons(grid: Grid, index: int, changes: list[Change]) -> dict[str, str]:
    """A sentence for each choice: its two best alternatives, or that there is none."""
    out, row = {}, grid.row(index)
    row["spread"] = float(_is_near(*(np.array(row[name]) for name in ("zero", "shard", "dp", "cp"))))
    for choice in CHOICES:
        name = NAMES.get(choice, choice)
        others = sorted((change for change in changes if change.choice == name), key=lambda one: (not one.fits, one.relative))
        if others or row[choice] > 1:
            text = "; ".join(map(str, others[:2])) or "no other value is legal beside the rest"
            out[name] = f"{_word(choice, row[choice])}: {text}"
    return out
