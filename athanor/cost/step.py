"""From configurations and rates to the seconds of a training step, each in one account."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from athanor.cost.case import PLACES, Array, Case
from athanor.cost.pipeline import for_each_schedule, idle_seconds
from athanor.cost.rates import Rates, Work

TWICE = [PLACES["InterleavedZeroBubble"], PLACES["ZBVZeroBubble"]]  # compute blocks again for each half of the backward pass


@dataclass(frozen=True)
class Priced:
    """Steps of C configurations: wall seconds, and the seconds of an average device by account; they add up to the wall.

    `work` is a micro-batch's computing; `useful` and `kernel` together are its seconds in the whole step. `shares` are those of
    the forward pass and of the gradients of weights in the computing of a block.
    """

    seconds: Array
    accounts: dict[str, Array]
    work: Work
    shares: tuple[Array, Array]


def price(case: Case, rates: Rates) -> Priced:
    """Time of one step: micro-batches through a pipeline, then what no computation hides of the rest, then the update."""
    times, work = case.num_microbatches, rates.work(case)
    forward, backward = work.seconds("block")
    ends = sum(work.seconds("ends"), np.zeros(1))
    tensor, tensor_ends = rates.tensor(case)
    context, expert = rates.context(case), rates.expert(case)
    work.recomputed = work.recomputed * (1 + np.isin(case.schedule, TWICE))
    block = forward + backward + work.recomputed
    shares = forward / block, (work.block["matmul"][1] + np.isin(case.schedule, TWICE) * work.recomputed) / 2 / block
    layer = block + tensor + context + expert
    outside = ends + tensor_ends

    # the pipeline: whole layers, the head on the last rank
    most = np.ceil(case.layers / case.pp - 1e-9)
    is_even = (case.pp == 1) | (case.layers % (case.pp * case.chunks) == 0)
    mean = (case.layers * layer + outside) / case.pp
    slowest = np.where(is_even, most * layer + outside, np.maximum(most * layer, (most - 1) * layer + outside))
    slowest = np.where(case.is_cut_by_cost * (case.pp > 1) > 0, _best_cut(case, layer, outside), slowest)
    hops = np.where(case.pp > 1, 2 * case.chunks * rates.hop(case), 0.0)
    each, first, weight = (seconds / case.chunks for seconds in (mean + hops, mean * shares[0] + hops / 2, mean * shares[1]))
    stepping = times * (slowest + hops) + for_each_schedule(
        case.schedule, idle_seconds, case.pp, case.chunks, times, first, each - first - weight, weight)

    per = times * case.layers / case.pp
    data = np.where(case.dp * case.cp > 1, rates.data_parallel(case, per * layer), 0.0)
    update, messages = rates.update(case)
    host, entry = rates.host(case)
    total = stepping + data + messages + update + host + entry
    computing = per * (forward + backward) + times * ends / case.pp
    skew = rates.skew(case, total, computing)
    useful = case.model_flops() / (rates.peak_flops * case.devices)
    accounts = {"useful": useful, "kernel": computing + host - useful, "recompute": per * work.recomputed,
                "bubble": stepping - times * (mean + hops), "tensor": per * tensor + times * tensor_ends / case.pp,
                "context": per * context, "expert": per * expert, "pipeline": times * hops, "data_parallel": data + messages,
                "optimizer": update, "input": entry, "skew": skew}
    more = (rates.own() - 1.0) * (total + skew)  # what the user's own runs say: seconds that no account above knows
    return Priced(total + skew + more, accounts | {"kernel": accounts["kernel"] + more}, work, shares)


def _best_cut(case: Case, layer: Array, outside: Array) -> Array:
    """The slowest rank's seconds of a micro-batch when blocks are cut so that it is as fast as possible."""
    best = np.full(np.broadcast_shapes(layer.shape, outside.shape, case.layers.shape), np.inf)
    for last in range(1, int(np.max(np.ceil(case.layers / case.pp))) + 1):  # blocks beside the head
        others = np.ceil((case.layers - last) / np.maximum(1, case.pp - 1))
        best = np.minimum(best, np.maximum(others * layer, last * layer + outside))
    return best
