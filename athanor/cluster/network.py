"""What the ranks of this machine can do together: collectives by size."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from athanor.cluster.timing import Operation, in_turns

# operands and results are fresh, as they are in training: what no near cache holds, and memory that was just asked for
COMPUTE_SIZE = {"cpu": 384, "cuda": 4096}  # of the square matmul between collectives, about a millisecond
MESSAGE_BYTES = {"cpu": [2**12, 2**14, 2**16, 2**18, 2**20, 2**22, 2**24],
                 "cuda": [2**12, 2**15, 2**18, 2**21, 2**24, 2**27, 2**30]}


def gather_seconds(seconds: float, device: torch.device) -> list[float]:
    """The seconds of every rank, on every rank; where all of them meet."""
    mine = torch.tensor([seconds], dtype=torch.float64, device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return [float(value) for value in everyone]


def collective_curves(device: torch.device, budget_seconds: float) -> dict[str, list[list[float]]]:
    """Usual seconds of each collective, ranks starting together, by the bytes of the full tensor. Rows: bytes, seconds.

    The bytes of an exchange or a message are those that one rank sends.
    """
    sizes = MESSAGE_BYTES[device.type]
    each = budget_seconds / (len(COLLECTIVES) * len(sizes))
    return {name: [[float(size), time_together(in_turns(partial(make, size, device), size, device), device, each)]
                   for size in sizes] for name, make in COLLECTIVES.items()}


def time_together(operation: Callable[[], Any], device: torch.device, budget_seconds: float) -> float:
    """Usual seconds of something all ranks do together, between stretches of computing as in training; equal on all ranks.

    A repetition takes as long as on the rank that came last: what the others waited before is no cost of the operation.
    """
    operation()
    work = torch.ones(COMPUTE_SIZE[device.type], COMPUTE_SIZE[device.type], device=device)
    estimate = max(gather_seconds(_timed(operation, device) + _timed(lambda: work @ work, device), device))
    repetitions = max(4, min(100, int(budget_seconds / max(estimate, 1e-5) / 1.5)))
    samples = []
    for _ in range(repetitions):
        dist.barrier()
        work @ work
        samples.append(_timed(operation, device))
    mine = torch.tensor(samples, dtype=torch.float64, device=device)
    dist.all_reduce(mine, dist.ReduceOp.MIN)
    usual = sorted(mine.tolist())[:-(repetitions // 10) or None]  # ranks of a host disturb each other, and so they do in training
    return sum(usual) / len(usual)


def _timed(operation: Callable[[], Any], device: torch.device) -> float:
    begin = time.perf_counter()
    operation()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _all_reduce(size: int, device: torch.device) -> Operation:
    full = torch.zeros(size // 4, device=device)
    return lambda: dist.all_reduce(full)


def _all_gather(size: int, device: torch.device) -> Operation:
    part = torch.zeros(size // 4 // dist.get_world_size(), device=device)

    def gather() -> None:
        dist.all_gather_into_tensor(part.new_empty(part.numel() * dist.get_world_size()), part)

    return gather


def _reduce_scatter(size: int, device: torch.device) -> Operation:
    part = size // 4 // dist.get_world_size()
    full = torch.zeros(part * dist.get_world_size(), device=device)
    return lambda: dist.reduce_scatter_tensor(full.new_empty(part), full)


def _all_to_all(size: int, device: torch.device) -> Operation:
    sent = torch.zeros(size // 4 // dist.get_world_size() * dist.get_world_size(), device=device)
    return lambda: dist.all_to_all_single(torch.empty_like(sent), sent)


def _send(size: int, device: torch.device) -> Operation:
    """From each rank of even number to the next one."""
    message, rank = torch.zeros(size // 4, device=device), dist.get_rank()

    def pass_on() -> None:
        if rank % 2:
            dist.recv(torch.empty_like(message), rank - 1)
        elif rank + 1 < dist.get_world_size():
            dist.send(message, rank + 1)

    return pass_on


COLLECTIVES: dict[str, Callable[[int, torch.device], Operation]] = {
    "all_reduce": _all_reduce, "all_gather": _all_gather, "reduce_scatter": _reduce_scatter, "all_to_all": _all_to_all,
    "send": _send}
