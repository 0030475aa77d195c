"""One pipeline with its own stages: blocks' seconds and bytes, and the step that the simulation says they take."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from athanor.cost.case import Array, Case
from athanor.cost.memory import Footprint
from athanor.cost.pipeline import simulate
from athanor.cost.step import Priced
from athanor.foundation.schedules import Pipeline, find_schedule
from athanor.models.shapes.decoder import DecoderShape

STEADY = 3  # rounds of pp micro-batches after which each further round takes equally long; a test holds it


def plain(priced: Priced) -> dict[str, float]:
    """The accounts of one configuration."""
    return {name: float(np.broadcast_to(seconds, 1)[0]) for name, seconds in priced.accounts.items()}


def simulated(priced: Priced, case: Case, pipeline: Pipeline, costs: list[float], own: float) -> tuple[dict[str, float], float]:
    """Accounts and seconds of a step with bubble and messages as simulated; `own` is the rates' factor of own runs."""
    accounts, seconds = plain(priced), float(priced.seconds[0])
    pp, chunks, times = int(case.pp[0]), int(case.chunks[0]), int(case.num_microbatches[0])
    busy = np.array([sum(costs[block] for block in held) for held in pipeline.blocks])
    hop = accounts["pipeline"] / times / (2 * chunks)
    forward, weight = (float(share[0]) for share in priced.shares)
    idle, whole = (step_seconds(pipeline, busy, (forward, weight), send, times) for send in (0.0, hop))
    skew = accounts["skew"] / (seconds / own - accounts["skew"])
    exact = {"bubble": idle - times * float(busy.sum()) / pp, "pipeline": whole - idle}
    change = sum(exact.values()) - sum(accounts[name] for name in exact)
    accounts |= exact | {"skew": accounts["skew"] + skew * change, "kernel": accounts["kernel"] + change * (1 + skew) * (own - 1)}
    return accounts, seconds + change * (1 + skew) * own


def block_seconds(shape: DecoderShape, case: Case, priced: Priced) -> list[float]:
    """Each block's seconds per micro-batch with what is not hidden, the last with the ends."""
    work, accounts = priced.work, priced.accounts
    per = case.num_microbatches * case.layers / case.pp
    layer = sum(work.seconds("block"), work.recomputed) + sum(accounts[name] for name in ("tensor", "context", "expert")) / per
    relative = np.array(shape.block_costs(float(case.mean_context[0])))
    relative[-1] -= 6 * float((case.hidden * case.vocab * case.heads_of_loss)[0])
    costs = relative * float((case.layers * layer)[0]) / relative.sum()
    costs[-1] += float(sum(work.seconds("ends"), np.zeros(1))[0])
    return [float(cost) for cost in costs]


def step_seconds(pipeline: Pipeline, busy: Array, shares: tuple[float, float], send: float, times: int) -> float:
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


def memory_of(footprint: Footprint, case: Case, ranks: Array) -> Array:
    """Bytes of pipeline ranks with equal stages."""
    return np.broadcast_to(sum(footprint.kinds(case, ranks).values(), np.zeros(1)), ranks.shape)


def memory_by_block(footprint: Footprint, case: Case, ranks: Array, blocks: int) -> tuple[Array, Array]:
    """Bytes of pipeline ranks without their blocks, and of each block that a rank holds."""
    whole = memory_of(footprint, case, ranks)
    each = memory_of(footprint, _deeper(case), ranks) - whole  # of one more layer on each rank
    return whole - each * np.ceil(case.layers / case.pp - 1e-9), each * case.layers / blocks


def _deeper(case: Case) -> Case:
    """The same with one more layer on each pipeline rank."""
    more = (case.layers + case.pp) / case.layers
    return replace(case, layers=case.layers * more, uses=case.uses * more, moe_layers=case.moe_layers * more,
                   block_parameters=case.block_parameters * more, expert_parameters=case.expert_parameters * more)
