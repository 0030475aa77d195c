"""The best few of a grid, exactly: stages cut by memory and time, the schedule simulated action by action."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from athanor.cost.case import Array, Case
from athanor.cost.memory import GIB
from athanor.cost.pipeline import best_split, simulate
from athanor.cost.step import Priced, price
from athanor.foundation.errors import LayoutError
from athanor.foundation.layout import Layout
from athanor.foundation.schedules import SCHEDULES, Pipeline, cut, find_schedule
from athanor.ledger.book import Book
from athanor.planner.estimate import RECOMPUTE
from athanor.planner.search import Grid, Mask, Task

FINALISTS = 50
SPLIT_GAIN = 1.3  # a layout whose equal stages need so many times the memory may still fit with unequal ones
STEADY = 3  # rounds of pp micro-batches after which each further round takes equally long; a test holds it


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
    accounts = {name: float(np.broadcast_to(seconds, 1)[0]) for name, seconds in priced.accounts.items()}
    pp, chunks, times = int(row["pp"]), int(row["chunks"]), int(row["num_microbatches"])
    schedule, costs = tuple(SCHEDULES)[int(row["schedule"])], _times(task, case, priced)
    ranks, blocks = np.arange(pp, dtype=np.float64), len(costs)
    memory, each, seconds = _memory(task, case, ranks), np.zeros(pp), float(priced.seconds[0])
    split = _looped(blocks, pp * chunks)
    if chunks == 1 and pp > 1:
        each = _memory(task, _deeper(case), ranks) - memory  # of one more layer on each rank
        rest = memory - each * np.ceil(case.layers / pp - 1e-9)
        each = each * case.layers / blocks
        split = best_split(costs, np.broadcast_to(each[:, None], (pp, blocks)), task.cap_bytes - rest)
        memory = rest + each * np.array(split)
    if pp > 1:
        pipeline = cut(pp, schedule, costs, split)
        busy = np.array([sum(costs[block] for block in held) for held in pipeline.blocks])
        hop = accounts["pipeline"] / times / (2 * chunks)
        forward, weight = (float(share[0]) for share in priced.shares)
        idle, whole = (_step(pipeline, busy, (forward, weight), send, times) for send in (0.0, hop))
        own = float(task.rates.own()[0])
        skew = accounts["skew"] / (seconds / own - accounts["skew"])
        exact = {"bubble": idle - times * float(busy.sum()) / pp, "pipeline": whole - idle}
        change = sum(exact.values()) - sum(accounts[name] for name in exact)
        accounts |= exact | {"skew": accounts["skew"] + skew * change,
                             "kernel": accounts["kernel"] + change * (1 + skew) * (own - 1)}
        seconds += change * (1 + skew) * own
    mfu = accounts["useful"] / seconds
    values = {"seq_len": task.seq_len, "zero": int(row["zero"]), "micro_batch_size": int(row["micro_batch_size"]),
              "num_microbatches": times, "stages_per_rank": chunks, "sequence_parallel": int(row["is_sequence_parallel"]),
              "recompute": next(name for name, code in RECOMPUTE.items() if code == row["recompute"])}
    shard = int(row["shard"] / row["cp"])
    layout = Layout(pp, int(row["dp"]) // shard, shard, int(row["cp"]), int(row["tp"]), int(row["ep"]))
    odds = 1 / (1 + np.exp(-np.clip(task.footprint.log_odds(np.array([memory.max()])), -60, 60)))
    hfu = mfu * float(case.computed_flops()[0] / case.model_flops()[0])
    return Finalist(index, layout, schedule, tuple(split), values, seconds, mfu, hfu, accounts, tuple(memory.tolist()),
                    float(odds[0]))


def _looped(blocks: int, stages: int) -> list[int]:
    """Nearly equal stages; the larger ones lie side by side, so that ranks of several are nearly equal, and the ends small."""
    each, more = divmod(blocks, stages)
    first = (stages - more) // 2
    return [each + (first <= stage < first + more) for stage in range(stages)]


def _times(task: Task, case: Case, priced: Priced) -> list[float]:
    """Each block's seconds per micro-batch with what is not hidden, the last with the ends."""
    work, accounts = priced.work, priced.accounts
    per = case.num_microbatches * case.layers / case.pp
    layer = sum(work.seconds("block"), work.recomputed) + sum(accounts[name] for name in ("tensor", "context", "expert")) / per
    relative = np.array(task.shape.block_costs(float(case.mean_context[0])))
    relative[-1] -= 6 * float((case.hidden * case.vocab * case.heads_of_loss)[0])
    costs = relative * float((case.layers * layer)[0]) / relative.sum()
    costs[-1] += float(sum(work.seconds("ends"), np.zeros(1))[0])
    return [float(cost) for cost in costs]


def _memory(task: Task, case: Case, ranks: Array) -> Array:
    return np.broadcast_to(sum(task.footprint.kinds(case, ranks).values(), np.zeros(1)), ranks.shape)


def _deeper(case: Case) -> Case:
    """The same with one more layer on each pipeline rank."""
    more = (case.layers + case.pp) / case.layers
    return replace(case, layers=case.layers * more, uses=case.uses * more, moe_layers=case.moe_layers * more,
                   block_parameters=case.block_parameters * more, expert_parameters=case.expert_parameters * more)


def _step(pipeline: Pipeline, busy: Array, shares: tuple[float, float], send: float, times: int) -> float:
    """Seconds of a step's micro-batches; of many equal rounds of pp only the first few are simulated.

    `shares` are those of the forward pass and of the gradients of weights.
    """
    (forward, weight), pp = shares, max(pipeline.ranks) + 1

    def run(count: int) -> float:
        return simulate(pipeline, busy * forward, busy * (1 - forward - weight), busy * weight, send, count,
                        is_blocking=True).seconds

    rounds, rest = divmod(times, pp)
    if rounds <= STEADY + 1 or (rest and find_schedule(pipeline.schedule).rounds):
        return run(times)
    before, after = (run(count * pp + rest) for count in (STEADY, STEADY + 1))
    return after + (rounds - STEADY - 1) * (after - before)


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
