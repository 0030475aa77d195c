"""What a pipeline schedule costs: exact simulation over the times of each stage, closed forms for a grid, the best split.

The orders are those of torch.distributed.pipelining (2.13), action by action; a test holds them equal.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from athanor.foundation.errors import LayoutError
from athanor.foundation.layout import Layout, spans, split_least
from athanor.foundation.schedules import SCHEDULES, Pipeline, check_pipeline, find_schedule

# Actions of a rank. A FORWARD_HELD is followed by the backward pass that it shares a turn with: both results leave together.
FORWARD, BACKWARD, INPUT, WEIGHT, FORWARD_HELD = range(5)
Action = tuple[int, int]  # kind, and which of the rank's stages
ROUNDING = 1 + 1e-12  # sums that are equal differ by so much


@dataclass(frozen=True)
class Simulated:
    """One step of a pipeline. `busy`, `sending` and `bubble` are seconds of each rank and add up to `seconds`.

    in_flight[stage] counts the micro-batches whose activations a stage keeps at the moment its rank keeps most, by blocks.
    """

    seconds: float
    busy: NDArray[np.float64]
    sending: NDArray[np.float64]
    bubble: NDArray[np.float64]
    in_flight: NDArray[np.int64]


def simulate(pipeline: Pipeline, forward_s: ArrayLike, backward_s: ArrayLike, weight_s: ArrayLike, send_s: ArrayLike,
             num_microbatches: int, *, is_blocking: bool = False) -> Simulated:
    """Run a schedule's actions over seconds per stage and micro-batch.

    `backward_s` is the gradient of inputs, `weight_s` that of weights; a schedule that does not split them does both at once.
    `send_s` is a hop's time, one or one per pair of neighbouring stages; a sender waits for it only if `is_blocking`. Raises
    LayoutError for a number of micro-batches that the schedule does not take.
    """
    stages, pp, m = len(pipeline.ranks), max(pipeline.ranks) + 1, num_microbatches
    check_pipeline(Layout(pp=pp), pipeline.schedule, stages=stages, num_microbatches=m, is_compiled=False)
    f, b, w = (np.broadcast_to(np.asarray(times, float), stages) for times in (forward_s, backward_s, weight_s))
    away = np.diff(pipeline.ranks) != 0
    up, down = (np.pad(np.broadcast_to(np.asarray(send_s, float), stages - 1) * away, pad) for pad in ((0, 1), (1, 0)))
    rows, in_flight = [], np.zeros(stages, dtype=np.int64)
    for rank in range(pp):
        held = np.array(pipeline.stages_of(rank))
        kinds, loops, batches = order(pipeline.schedule, pp, len(held), m, rank)
        rows.append((kinds, held[loops], batches))
        in_flight[held] = _most_kept(kinds, loops, np.array([len(pipeline.blocks[stage]) for stage in held]))
    kinds, at, batches = (_joined([row[i] for row in rows]) for i in range(3))
    is_real, is_held = kinds >= 0, kinds == FORWARD_HELD
    is_forward, is_backward = np.isin(kinds, (FORWARD, FORWARD_HELD)), np.isin(kinds, (BACKWARD, INPUT))
    # forward passes end at stage x m + micro-batch, gradients of inputs as far behind; then come three special places
    place, gradients = at * m + batches, stages * m
    start, never, nowhere = range(2 * gradients, 2 * gradients + 3)
    needs = [~is_real, is_forward & (at > 0), is_backward & (at < stages - 1)]
    follows = np.select(needs, [never, place - m, gradients + place + m], start)
    fills = np.select([kinds == FORWARD, is_backward], [place, gradients + place], nowhere)
    also = np.where(np.roll(is_held, 1), np.roll(place, 1), nowhere)
    seconds = np.stack([f, b + w, b, w, f])[kinds, at] * is_real
    arriving = np.stack([down, up, up, 0 * f, down])[kinds, at]
    leaving = np.stack([up, down, down, 0 * f, up])[kinds, at] * is_real * is_blocking
    leaving = np.where(is_held, 0.0, leaving + np.roll(leaving * is_held, 1))
    ends = np.full(nowhere + 1, np.inf)
    ends[start] = 0.0
    total = float(_run(np.arange(pp) * len(kinds) // pp, ends, (follows, arriving, seconds, fills, also, leaving)).max())
    assert np.isfinite(ends[:start]).all(), "an order of actions never waits for itself"
    busy, sending = (each.reshape(pp, -1).sum(axis=1) for each in (seconds, leaving))
    return Simulated(total, busy, sending, total - busy - sending, in_flight)


def _run(position: NDArray[np.int64], ends: NDArray[np.float64], table: tuple[NDArray[np.generic], ...]) -> NDArray[np.float64]:
    """Fill `ends`; return when each rank is free. Every pass does the next action of all ranks that have what it needs."""
    follows, arriving, seconds, fills, also, leaving = table
    free = np.zeros(len(position))
    while True:
        arrival = ends[follows[position]] + arriving[position]
        ready = np.flatnonzero(arrival < np.inf)
        if not len(ready):
            return free
        now = position[ready]
        done = np.maximum(free[ready], arrival[ready]) + seconds[now]
        ends[fills[now]] = done
        ends[also[now]] = done
        free[ready] = done + leaving[now]
        position[ready] += 1


def _joined(rows: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Rows of different lengths one after another, each filled up with at least one -1."""
    width = 1 + max(map(len, rows))
    return np.concatenate([np.pad(row, (0, width - len(row)), constant_values=-1) for row in rows])


def _most_kept(kinds: NDArray[np.int64], loops: NDArray[np.int64], blocks: NDArray[np.int64]) -> NDArray[np.int64]:
    change = np.isin(kinds, (FORWARD, FORWARD_HELD)).astype(int) - np.isin(kinds, (BACKWARD, WEIGHT))
    most = int(np.argmax(np.cumsum(change * blocks[loops])))
    return np.bincount(loops[: most + 1], weights=change[: most + 1], minlength=len(blocks)).astype(np.int64)


@functools.lru_cache(maxsize=256)
def order(schedule: str, pp: int, loops: int, m: int, rank: int) -> tuple[NDArray[np.int64], ...]:
    """What a rank does, in order: kinds of action, which of its `loops` stages, and micro-batches; three equal lengths."""
    find_schedule(schedule)
    if schedule in ("GPipe", "1F1B"):
        ahead = min(m, pp - rank) if schedule == "1F1B" else m
        actions = [(FORWARD, 0)] * ahead + [(BACKWARD, 0), (FORWARD, 0)] * (m - ahead) + [(BACKWARD, 0)] * ahead
    elif schedule == "LoopedBFS":
        actions = [(FORWARD, loop) for loop in range(loops) for _ in range(m)]
        actions += [(BACKWARD, loop) for loop in reversed(range(loops)) for _ in range(m)]
    elif schedule == "ZBVZeroBubble":
        actions = _zero_bubble_v(pp, max(m, 2 * pp - 1), rank)
    elif schedule == "DualPipeV":
        actions = _dual_pipe_v(pp, m, rank)
    else:
        actions = _interleaved(pp, loops, m, rank, splits_backward=schedule == "InterleavedZeroBubble")
    kinds, of = np.array(actions, dtype=np.int64).T
    batches = np.zeros_like(kinds)
    for loop, group in itertools.product(range(loops), ((FORWARD, FORWARD_HELD), (WEIGHT, BACKWARD), (INPUT, BACKWARD))):
        turns = np.flatnonzero((of == loop) & np.isin(kinds, group))
        batches[turns] = np.arange(len(turns))
    if schedule == "LoopedBFS":
        batches[kinds == BACKWARD] = m - 1 - batches[kinds == BACKWARD]
    real = batches < m  # a V is filled with micro-batches that do not exist
    return kinds[real], of[real], batches[real]


def _interleaved(pp: int, loops: int, m: int, rank: int, *, splits_backward: bool) -> list[Action]:
    """Rounds of about pp micro-batches through all loops. Narayanan et al. 2021 (arXiv:2104.04473); ZB1P of 2401.10241."""
    rounds, total = max(1, m // pp), loops * m
    turns = [loop for loop in range(loops) for _ in range(m // rounds)]
    forward, backward = turns * rounds, turns[::-1] * rounds
    ahead = min((loops - 1) * (m // rounds) + (1 if splits_backward else 2) * (pp - 1 - rank), total)
    actions = [(FORWARD, loop) for loop in forward[:ahead]]
    for turn in range(total):
        if ahead + turn < total:
            actions.append((FORWARD, forward[ahead + turn]))
        actions.append((INPUT if splits_backward else BACKWARD, backward[turn]))
        if splits_backward and turn >= rank:
            actions.append((WEIGHT, backward[turn - rank]))
    return actions + [(WEIGHT, loop) for loop in backward[max(0, total - rank):] if splits_backward]


def _zero_bubble_v(pp: int, m: int, rank: int) -> list[Action]:
    """Qi et al. 2024 (arXiv:2401.10241, section 6), for at least 2 pp - 1 micro-batches."""
    (f0, i0, w0), (f1, i1, w1) = [[(kind, loop) for kind in (FORWARD, INPUT, WEIGHT)] for loop in (0, 1)]
    rest = pp - rank
    warmup = [f0] * (2 * rest - 1) + [f1, f0] * rank + [f1, i1, w1] * rest
    steady = [f0, i0, w0, f1, i1, w1] * (m - 2 * pp + rank + 1) + [i0, w0, f1, i1, w1] * (rest - 1)
    return warmup + steady + [i0, i1] * rank + [i0, w0] * rest + [w1] * rank + [w0] * rank


def _dual_pipe_v(pp: int, m: int, rank: int) -> list[Action]:
    """DualPipe (DeepSeek-V3, arXiv:2412.19437) cut in half, for at least 2 pp micro-batches."""
    (f0, b0, i0, w0, h0), (f1, b1, i1, w1, h1) = [[(kind, loop) for kind in range(5)] for loop in (0, 1)]
    rest, half = pp - 1 - rank, (rank + 1) // 2
    warmup = [f0] * (2 * rest) + [f0, f1] * (rank + 1) + [i1, w1, f1] * rest
    steady = [h0, b1, h1, b0] * (m - 2 * pp + rank + 1) + [b1, h1, b0] * rest
    if rank == pp - 1 and steady:
        steady[0] = f0  # the first is not shared there
    split = ([i1, i0] if rank % 2 else [b1, i0]) + [i1, i0] * (rank - half)
    late = [w1 if action == i1 else w0 for action in split if action != b1] + [w0] * rest
    return (warmup + steady + [b1, b0] * half + split
            + [action for weight in late[:rest] for action in (weight, i0)] + late[rest:])


def bubble_share(schedule: str, pp: ArrayLike, loops: ArrayLike, num_microbatches: ArrayLike, forward: ArrayLike = 1.0,
                 backward: ArrayLike = 1.0, weight: ArrayLike = 1.0) -> NDArray[np.float64]:
    """The share of a step that ranks wait for their turn: the simulation's, for equal stages and hops that take no time.

    Arrays broadcast. The last three are a stage's seconds per micro-batch, the gradient of inputs no cheaper than the others.
    """
    idle = idle_seconds(schedule, pp, loops, num_microbatches, forward, backward, weight)
    return np.asarray(idle / (idle + np.multiply(loops, num_microbatches) * (np.add(forward, backward) + weight)))


def idle_seconds(schedule: str, pp: ArrayLike, loops: ArrayLike, num_microbatches: ArrayLike, forward: ArrayLike,
                 backward: ArrayLike, weight: ArrayLike) -> NDArray[np.float64]:
    """Seconds of a step that a rank waits for its turn, of which `bubble_share` is the share."""
    find_schedule(schedule)
    p, v, m, f, b, w = np.broadcast_arrays(pp, loops, num_microbatches, forward, backward, weight)
    filled = np.minimum(m, p)
    if schedule == "InterleavedZeroBubble":
        drain = np.maximum((p - 1) * b, (v * (p - filled) + filled - 1) * b - (v - 1) * filled * w)
        idle = v * (p - filled) * f + drain + (filled - 1) * np.maximum(f - w, 0)
    elif schedule == "ZBVZeroBubble":
        late = np.clip(2 * p - 1 - m, 0, p - 1)
        early = 2 * (p - filled) * f + 2 * (p - 1) * b - 2 * np.clip(m - p, 0, p - 1) * w
        idle = np.maximum(early, (p - 1 + late) * b - late * w)
    elif schedule == "DualPipeV":
        idle = np.maximum(2 * (p - 1) * f, (p - 2) * f + (p - 1) * b) + (p - 1) * np.maximum(b - w, 0)
    else:
        idle = (p - 1 + (v - 1) * (p - filled)) * (f + b + w)
    return np.where(p > 1, idle, 0.0)


def kept_microbatches(schedule: str, pp: ArrayLike, loops: ArrayLike, num_microbatches: ArrayLike,
                      rank: ArrayLike) -> NDArray[np.float64]:
    """Micro-batches whose activations a rank of equal stages keeps when it keeps most; a stage's count as 1 / loops each."""
    p, v, m, r = (np.asarray(size) for size in (pp, loops, num_microbatches, rank))
    if schedule in ("GPipe", "LoopedBFS"):
        kept = m
    elif schedule == "1F1B" and (v == 1).all():
        kept = p - r
    elif schedule == "ZBVZeroBubble":
        kept = np.minimum(p, (m + r + 1) / 2)
    elif schedule == "DualPipeV":
        kept = p + 0.5
    else:  # a round's micro-batches on all but the last stage, then what goes ahead of the first backward pass
        ahead = p if schedule == "InterleavedZeroBubble" else np.where(v > 1, 2 * (p - r) - 1, p - r)
        kept = ((v - 1) * np.floor(m / np.maximum(1, np.floor(m / p))) + ahead) / v
    return np.where(p > 1, np.minimum(kept, m), 1.0)


def for_each_schedule(places: NDArray[np.float64], form: Callable[..., NDArray[np.float64]],
                      *sizes: ArrayLike) -> NDArray[np.float64]:
    """A closed form over configurations that differ in their schedule, given by its place in SCHEDULES."""
    names, found = tuple(SCHEDULES), np.unique(places)
    if len(found) == 1:
        return form(names[int(found[0])], *sizes)
    places, *columns = np.broadcast_arrays(places, *sizes)
    out = np.empty(places.shape)
    for place in found:
        of = places == place
        out[of] = form(names[int(place)], *(column[of] for column in columns))
    return out


def best_split(costs: Sequence[float], memory_bytes: NDArray[np.float64], cap_bytes: ArrayLike) -> list[int]:
    """Blocks per stage with the cheapest costliest stage that memory allows; of these, what leaves the fullest most room.

    A step takes at most (m - 1) x the costliest stage + the sum of all, with GPipe exactly, so of the costs only the costliest
    stage's matters. `costs` has one number per block, the ends included. memory_bytes[stage, block] is what a block takes
    there, the ends and all micro-batches in flight included; `cap_bytes` is one number, or one per stage. Raises LayoutError
    with what would be needed.
    """
    stages, count = memory_bytes.shape
    if stages > count:
        raise LayoutError(f"{stages} stages cannot be made of {count} blocks")
    cap = np.broadcast_to(np.asarray(cap_bytes, float), stages)
    if cap.min() <= 0:
        raise LayoutError(f"stage {cap.argmin()} has {cap.min():.3g} bytes left for its blocks; the cap must be more than 0")
    share = spans(memory_bytes / cap[:, None])
    roomiest = split_least(share)
    if (needed := _greatest(share, roomiest)) > ROUNDING:
        raise LayoutError(f"no split of {count} blocks over {stages} stages fits; the best, {roomiest}, needs {needed:.3g} "
                          "times the memory there is")
    cost = np.where(share <= ROUNDING, spans(np.asarray(costs, float)), np.inf)
    least = _greatest(cost, split_least(cost))
    return split_least(np.where(cost <= least * ROUNDING, share, np.inf))


def _greatest(loads: NDArray[np.float64], split: Sequence[int]) -> float:
    ends = np.cumsum(split)
    return float(loads[np.arange(len(split)), ends - split, ends].max())
