"""From configurations and rates to the seconds of a training step, each in one account."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from athanor.planner.case import FULL, Array, Case
from athanor.planner.datasheet import Datasheet, smooth_max


@dataclass(frozen=True)
class Priced:
    """Steps of C configurations: wall seconds, and the seconds of an average device by account; they add up to the wall."""

    seconds: Array
    accounts: dict[str, Array]


def price(case: Case, rates: Datasheet) -> Priced:
    """Time of one step: micro-batches through a pipeline, then what no computation hides of the rest, then the update."""
    c, times = rates.coefficient, case.num_microbatches
    work, tokens = rates.work(case), case.tokens
    activations = tokens * case.hidden * case.weight_bytes
    pair = 4.0 * rates.gather(activations, case.tp, np.ones(1)) * c("tensor")  # of a pass: 2 x gather and scatter, or all-reduces
    tensor = pair * (2 + (case.recompute == FULL))
    keys = 2 * tokens * case.key_value_heads * case.key_size / case.tp * case.weight_bytes * case.cp
    context = 3 * rates.gather(keys, case.cp, case.tp) * c("context")
    expert = case.moe_layers / case.layers * 4 * c("expert") * rates.exchange(
        tokens / case.tp, case.hidden * case.weight_bytes, case.top_k, case.ep, np.ones(1))
    layer = work.forward + work.backward + work.recomputed + tensor + context + expert

    # the pipeline: whole layers, the head on the last rank; interleaved stages divide the bubble
    full = np.ceil(case.layers / case.pp - 1e-9)
    is_even = (case.pp == 1) | (case.layers % (case.pp * case.chunks) == 0)
    mean = (case.layers * layer + work.ends) / case.pp
    slowest = np.where(is_even, full * layer + work.ends, np.maximum(full * layer, (full - 1) * layer + work.ends))
    hops = np.where(case.pp > 1, 2 * case.chunks * rates.send(
        activations / np.where(case.is_scattered > 0, case.tp, 1.0), case.tp * case.cp * case.dp), 0.0) * c("pipeline")
    fill = (case.pp - 1) / case.chunks * (mean + hops)
    stepping = times * (slowest + hops) + fill

    # data parallelism: gradients once a step, or parameters for every micro-batch
    held = (case.block_parameters - case.expert_parameters) / case.tp / case.pp + case.end_parameters / case.tp / np.where(
        case.pp > 1, 2.0, 1.0)
    held = held + case.expert_parameters / case.ep / case.pp
    compute = times * case.layers / case.pp * layer
    own = rates.gather(held * 2, case.dp * case.cp, case.tp)
    plain = 2 * own * c("data_parallel")
    hidden = c("sharded_overlap") * compute
    traffic = times * 3 * own * c("sharded")
    sharded = smooth_max(traffic, hidden) - hidden + c("sharded_rest") * traffic
    data = np.where(case.dp * case.cp > 1, np.where(case.zero >= 3, sharded, plain), 0.0)

    update = rates.update(held * np.where(case.zero > 0, 1.0 / case.shard, 1.0))
    total = stepping + data + update + c("host")
    nodes = np.maximum(1.0, case.devices / 8)
    skew = total * c("straggler") * np.sqrt(np.log2(nodes))
    seconds = total + skew
    useful = case.model_flops() / (rates.peak() * case.devices)
    per = times * case.layers / case.pp
    computing = per * (work.forward + work.backward) + times * work.ends / case.pp
    accounts = {"useful": useful, "kernel": computing + c("host") - useful, "recompute": per * work.recomputed,
                "bubble": stepping - times * (mean + hops), "tensor": per * tensor, "context": per * context,
                "expert": per * expert, "pipeline": times * hops, "data_parallel": data, "optimizer": update, "skew": skew}
    own = (c("own") - 1.0) * seconds  # what the user's own runs say: seconds that no account above knows
    return Priced(seconds + own, accounts | {"kernel": accounts["kernel"] + own})
