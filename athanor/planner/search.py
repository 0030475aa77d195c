"""The whole grid of layouts of a model on some devices: priced and checked for memory as arrays, the best simulated exactly."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from athanor.cluster.spec import check_precision
from athanor.cost.calibrate import mappings
from athanor.cost.case import PLACES, SELECTIVE, Array, Case, case_of
from athanor.cost.datasheet import KERNELS, PROGRAMS, SCATTERING, Datasheet, Machine, machine_of, usual_kernel
from athanor.cost.memory import Footprint
from athanor.cost.step import price
from athanor.foundation.errors import LayoutError, UserError, did_you_mean
from athanor.foundation.layout import check_batch
from athanor.foundation.schedules import DEFAULT_SCHEDULE, SCHEDULES, find_schedule
from athanor.foundation.units import check_positive
from athanor.models.shapes.decoder import DecoderShape
from athanor.planner.estimate import PRODUCT_BYTES, RECOMPUTE, Cluster

Mask = NDArray[np.bool_]
CHUNKS = (1, 2, 3, 4, 5, 6, 8)  # stages of a pipeline rank, beside the numbers that divide the layers
MICRO_BATCHES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)
STAGES = {"single": (1, 1), "looped": (2, 1000), "v": (2, 2)}  # of a pipeline rank, least and most
LEAST_ROW = 256  # tokens of a sequence on a context rank; shorter ones are not worth a rank
MOST = {"devices": 10**6, "global_batch_tokens": 10**12}
BLOCK = 8192  # configurations priced at a time, so that their arrays stay in the cache


@dataclass(frozen=True)
class Task:
    """What a layout is searched for. `most_odds` is the greatest probability of running out of memory that is accepted."""

    shape: DecoderShape
    cluster: Cluster
    devices: int
    global_batch_tokens: int
    seq_len: int
    precision: str = "bf16"
    recompute: tuple[str, ...] = tuple(RECOMPUTE)
    program: str = "megatron-core"
    kernel: str = ""  # the program's usual one
    most_odds: float = 0.1
    schedules: tuple[str, ...] = ("1F1B", "Interleaved1F1B")
    coefficients: Path | None = None  # what `athanor plan calibrate` wrote; else ours

    @cached_property
    def machine(self) -> Machine:
        return machine_of([{**self.cluster.facts, "accelerator": self.cluster.accelerator, "program": self.program,
                            "kernel": self.kernel or usual_kernel(self.program), "product_bytes": PRODUCT_BYTES[self.precision]}])

    @cached_property
    def rates(self) -> Datasheet:
        return Datasheet(self.machine, mappings(self.coefficients)[0])

    @cached_property
    def footprint(self) -> Footprint:
        return Footprint(self.machine, mappings(self.coefficients)[1])

    @cached_property
    def cap_bytes(self) -> float:
        """The peak at which running out of memory is as likely as `most_odds`."""
        size = float(self.machine.memory_bytes[0])
        at, twice = (float(self.footprint.log_odds(np.array([factor * size]))[0]) for factor in (1, 2))
        return float(size * 2 ** ((math.log(self.most_odds / (1 - self.most_odds)) - at) / (twice - at)))

    def check(self) -> None:
        """Raises UserError for a value that makes no sense, with what is allowed."""
        check_positive(devices=self.devices, global_batch_tokens=self.global_batch_tokens, seq_len=self.seq_len)
        for name in ("devices", "global_batch_tokens"):
            if getattr(self, name) > MOST[name]:
                raise UserError(f"{name.replace('_', ' ')} = {getattr(self, name):,}; it may be {MOST[name]:,} at most")
        words = [("precision", self.precision, PRODUCT_BYTES), ("program", self.program, PROGRAMS),
                 ("kernel", self.kernel, ("", *KERNELS)), *(("recompute", one, RECOMPUTE) for one in self.recompute)]
        for name, value, allowed in words:
            if value not in allowed:
                raise UserError(f"{name} is '{value}'; {did_you_mean(value, allowed)}")
        check_precision(self.cluster.accelerator, self.precision)
        for schedule in self.schedules:
            find_schedule(schedule)
        if not 0 < self.most_odds < 1:
            raise UserError(f"{self.most_odds:g} is no probability of running out of memory; it must lie between 0 and 1")
        check_batch(global_batch_tokens=self.global_batch_tokens, seq_len=self.seq_len, micro_batch_size=1, data_ranks=1)

    def case(self, columns: Mapping[str, Array]) -> Case:
        width = PRODUCT_BYTES[self.precision]
        scatters = float(self.program in SCATTERING)
        run: dict[str, Any] = {"seq_len": self.seq_len, "weight_bytes": max(2.0, width), "product_bytes": width,
                               "is_scattered": np.maximum(columns["is_sequence_parallel"], scatters)}
        return case_of([self.shape], {**columns, **run})


@dataclass(frozen=True)
class Grid:
    """All legal configurations: columns under the names of `Case`, the seconds of a step, the bytes of the fullest rank."""

    task: Task
    columns: dict[str, Array]
    seconds: Array
    peak: Array
    took: float

    def __len__(self) -> int:
        return len(self.seconds)

    @property
    def fits(self) -> Mask:
        return np.asarray(self.peak <= self.task.cap_bytes)

    @property
    def is_even(self) -> Mask:
        """Where the closed form is near the simulation: too low for ranks that hold several stages of unequal size."""
        chunks = self.columns["chunks"]
        return np.asarray((chunks == 1) | (self.task.shape.num_hidden_layers % (self.columns["pp"] * chunks) == 0))

    def row(self, index: int) -> dict[str, float]:
        return {name: float(values[index]) for name, values in self.columns.items()}

    def best(self, count: int = 1, within: Mask | bool = True) -> list[int]:
        """The fastest that fit; of equally fast ones those that leave more room first."""
        fitting = np.flatnonzero(self.fits & within)
        if len(fitting) > 4 * count:
            fitting = fitting[self.seconds[fitting] <= np.partition(self.seconds[fitting], count - 1)[count - 1]]
        order = np.lexsort((self.peak[fitting], self.seconds[fitting]))
        return [int(index) for index in fitting[order[:count]]]


def legal(task: Task) -> dict[str, Array]:
    """Every configuration that the model, the devices, the batch and the schedules allow."""
    shape, devices, rows = task.shape, task.devices, task.global_batch_tokens // task.seq_len
    heads = math.gcd(shape.num_attention_heads, shape.num_key_value_heads, shape.intermediate_size,
                     getattr(shape, "moe_intermediate_size", 0), devices)
    layers, experts = shape.num_hidden_layers, getattr(shape, "num_experts", 0)
    tp, pp, chunks, cp, ep, place = _crossed(
        divisors(heads, int(task.machine.domain[0])), divisors(devices, layers), sorted({*CHUNKS, *divisors(layers, layers)}),
        divisors(math.gcd(task.seq_len, devices), max(1, task.seq_len // LEAST_ROW)), divisors(max(1, experts), devices),
        sorted({int(PLACES[name]) for name in task.schedules}))
    ranks = tp * pp * cp
    dp = np.maximum(1, devices // ranks)
    is_whole = (devices % ranks == 0) & (rows % dp == 0) & (dp * cp % ep == 0)
    least, most, rounds, fills, splits = np.array([STAGES[row.placement] + (row.rounds, row.fills, row.splits_backward)
                                                   for row in SCHEDULES.values()]).T
    is_placed = np.where(pp > 1, (chunks >= least[place]) & (chunks <= most[place]), (chunks == 1) & (place == place.min()))
    outer = np.flatnonzero(is_whole & is_placed & (pp * chunks <= layers))
    at, micro, zero, recompute, parallel, is_near = _crossed(outer, MICRO_BATCHES, range(4), [
        RECOMPUTE[name] for name in task.recompute], (0, 1), (0, 1))
    tp, pp, chunks, cp, ep, dp, place = (values[at] for values in (tp, pp, chunks, cp, ep, dp, place))
    times, near = rows // (dp * micro), np.gcd(dp, np.maximum(1, int(task.machine.domain[0]) // (tp * cp)))
    shard = np.where(zero == 0, 1, np.where(is_near > 0, near, dp)) * cp
    keep = (rows % (dp * micro) == 0) & (micro * task.seq_len % tp == 0) & ((parallel == 0) | (tp > 1))
    rounds, fills, splits = (np.asarray(each[place] & (pp > 1), dtype=bool) for each in (rounds, fills, splits))
    keep &= (~rounds | (times % np.maximum(1, times // pp) == 0)) & (~fills | (times >= pp * chunks))
    keep &= ~splits | ((recompute != SELECTIVE) & (shape.embedding_uses() < 2))
    # states are sharded over all data ranks, or over those near each other; gradients of several micro-batches are not
    keep &= ((shard > 1) | (zero == 0)) & (shard % ep == 0) & ((zero != 2) | (times == 1))
    keep &= (is_near == 0) | ((zero > 0) & (near < dp))
    found = {"tp": tp, "pp": pp, "chunks": chunks, "cp": cp, "ep": ep, "dp": dp, "micro_batch_size": micro, "zero": zero,
             "recompute": recompute, "is_sequence_parallel": parallel, "num_microbatches": times,
             "shard": shard, "schedule": np.where(pp > 1, place, PLACES[DEFAULT_SCHEDULE])}
    return {name: values[keep].astype(np.float64) for name, values in found.items()}


def _crossed(*axes: Any) -> list[NDArray[Any]]:
    return [axis.ravel() for axis in np.meshgrid(*map(np.asarray, axes), indexing="ij")]


def divisors(number: int, most: int) -> list[int]:
    return [d for d in range(1, min(number, most) + 1) if number % d == 0]


def sweep(task: Task) -> Grid:
    """Price the whole grid. Raises LayoutError when no layout is legal, with the nearest numbers of devices that have one."""
    started = time.perf_counter()
    columns = legal(task)
    count = len(columns["tp"])
    if not count:
        near = sorted(range(max(1, task.devices - 512), task.devices + 512), key=lambda n: abs(n - task.devices))
        works = next((n for n in near if len(legal(replace(task, devices=n))["tp"])), 1)
        raise LayoutError(f"no layout splits {task.global_batch_tokens // task.seq_len:,} rows of {task.seq_len:,} tokens over "
                          f"{task.devices:,} devices; {works:,} devices have one, or take a batch with more factors")
    seconds, peak = np.empty(count), np.empty(count)
    for begin in range(0, count, BLOCK):
        part = slice(begin, begin + BLOCK)
        case = task.case({name: values[part] for name, values in columns.items()})
        seconds[part], peak[part] = price(case, task.rates).seconds, task.footprint.peak(case)
    return Grid(task, columns, seconds, peak, time.perf_counter() - started)


def least_seconds(task: Task) -> float | None:
    """The closed form's shortest step of a layout that fits; None when there is none."""
    try:
        grid = sweep(task)
    except LayoutError:
        return None
    best = grid.best(1, grid.is_even)
    return float(grid.seconds[best[0]]) if best else None
