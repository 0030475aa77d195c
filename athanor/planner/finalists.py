"""The best few of a grid, exactly: stages cut by memory and time, the schedule simulated action by action."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from athanor.cost.memory import GIB
from athanor.cost.pipeline import best_split
from athanor.cost.step import price
from athanor.foundation.errors import LayoutError
from athanor.foundation.layout import Layout
from athanor.foundation.schedules import SCHEDULES, cut
from athanor.ledger.book import Book
from athanor.planner.estimate import RECOMPUTE
from athanor.planner.search import Grid, Mask, Task
from athanor.planner.stages import block_seconds, memory_by_block, memory_of, plain, simulated

FINALISTS = 50
SPLIT_GAIN = 1.3  # a layout whose equal stages need so many times the memory may still fit with unequal ones


@dataclass(frozen=True)
class Finalist:
    """A layout with the seconds of a step, its accounts (of an average device) and the bytes of each pipeline rank."""

    index: int  # in the grid
    layout: Layout
    schedule: str
    split: tuple[int, ...]
    values: dict[str, Any]
    seconds: float
    mfu: float
    hfu: float
    accounts: dict[str, float]
    memory_bytes: tuple[float, ...]
    odds: float

    def book(self, task: Task) -> Book:
        """The forecast of one step."""
        useful = self.accounts["useful"] * task.devices * float(task.machine.product_flops[0])
        book = Book("forecast", task.devices, task.cluster.accelerator, float(task.machine.product_flops[0]),
                    wall_seconds=self.seconds, device_seconds=self.seconds * task.devices, tokens=task.global_batch_tokens,
                    model_flops=useful, memory_bytes={"peak": list(self.memory_bytes)})
        for name, seconds in self.accounts.items():
            book.add(name, seconds * task.devices, "planned")
        return book.close()

    def words(self) -> dict[str, Any]:
        """The layout with all choices, by the names of `athanor plan estimate`."""
        return {**asdict(self.layout), **self.values, "pipeline_schedule": self.schedule, "split": list(self.split)}

    def to_dict(self, task: Task) -> dict[str, Any]:
        return {"layout": self.words(), "step_seconds": self.seconds,
                "tokens_per_second_per_device": task.global_batch_tokens / self.seconds / task.devices,
                "mfu": self.mfu, "hfu": self.hfu, "memory_gib": [size / GIB for size in self.memory_bytes],
                "out_of_memory_probability": self.odds, "accounts": self.accounts, "book": asdict(self.book(task))}


def refine(grid: Grid, index: int) -> Finalist:
    """One configuration of the grid with its stages cut and its schedule simulated. Raises LayoutError when no cut fits."""
    task, row = grid.task, grid.row(index)
    case = task.case({name: np.array([value]) for name, value in row.items()})
    priced = price(case, task.rates)
    pp, chunks, times = int(row["pp"]), int(row["chunks"]), int(row["num_microbatches"])
    schedule, costs = tuple(SCHEDULES)[int(row["schedule"])], block_seconds(task.shape, case, priced)
    ranks, blocks = np.arange(pp, dtype=np.float64), len(costs)
    memory, seconds, accounts = memory_of(task.footprint, case, ranks), float(priced.seconds[0]), plain(priced)
    split = _looped(blocks, pp * chunks)
    if chunks == 1 and pp > 1:
        rest, each = memory_by_block(task.footprint, case, ranks, blocks)
        split = best_split(costs, np.broadcast_to(each[:, None], (pp, blocks)), task.cap_bytes - rest)
        memory = rest + each * np.array(split)
    if pp > 1:
        accounts, seconds = simulated(priced, case, cut(pp, schedule, costs, split), costs, float(task.rates.own()[0]))
    mfu = accounts["useful"] / seconds
    values = {"seq_len": task.seq_len, "zero": int(row["zero"]), "micro_batch_size": int(row["micro_batch_size"]),
              "num_microbatches": times, "stages_per_rank": chunks, "sequence_parallel": int(row["is_sequence_parallel"]),
              "recompute": next(name for name, code in RECOMPUTE.items() if code == row["recompute"])}
    shard = int(row["shard"] / row["cp"])
    layout = Layout(pp, int(row["dp"]) // shard, shard, int(row["cp"]), int(row["tp"]), int(row["ep"]))
    odds = task.footprint.odds(np.array([memory.max()]))
    hfu = mfu * float(case.computed_flops()[0] / case.model_flops()[0])
    return Finalist(index, layout, schedule, tuple(split), values, seconds, mfu, hfu, accounts, tuple(memory.tolist()),
                    float(odds[0]))


def _looped(blocks: int, stages: int) -> list[int]:
    """Nearly equal stages; the larger ones lie side by side, so that ranks of several are nearly equal, and the ends small."""
    each, more = divmod(blocks, stages)
    first = (stages - more) // 2
    return [each + (first <= stage < first + more) for stage in range(stages)]


def finalists(grid: Grid, within: Mask | bool = True, count: int = FINALISTS) -> list[Finalist]:
    """The best configurations of a grid, or of a part of it, exactly and in order; none when nothing fits.

    Half as many come along of those whose closed form is near, which the others may have crowded out.
    """
    columns, chosen = grid.columns, grid.best(count, within)
    chosen += sorted(set(grid.best(count // 2, within & grid.is_even)) - set(chosen))
    limit = grid.seconds[chosen[-1]] if len(chosen) >= count else np.inf
    near = (columns["pp"] > 1) & (columns["chunks"] == 1) & ~grid.fits & (grid.peak <= SPLIT_GAIN * grid.task.cap_bytes)
    uneven = np.flatnonzero(near & within & (grid.seconds < limit))
    out = []
    for index in [*chosen, *uneven[np.argsort(grid.seconds[uneven])][:count].tolist()]:
        try:
            out.append(refine(grid, index))
        except LayoutError:  # however the blocks are cut
            continue
    return sorted(out, key=lambda one: one.seconds)
