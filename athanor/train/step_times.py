"""Whole training steps of small decoders, timed: what they take beyond their parts, no measurement of parts can tell."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from athanor.foundation import intervals
from athanor.foundation.layout import Layout
from athanor.foundation.processor import Share
from athanor.models.context import Groups, Packed
from athanor.models.decoder import Decoder
from athanor.models.initialize import initialize
from athanor.models.shapes.decoder import DecoderShape
from athanor.models.zoo.llama import TENSOR_DIMS
from athanor.parallel.apply import Choices, parallelize
from athanor.parallel.fully_shard import ACCOUNT
from athanor.parallel.mesh import Mesh, make_mesh

DTYPES = {"cpu": "fp32", "cuda": "bf16"}
VOCABULARY, HEAD_DIM = {"cpu": 4096, "cuda": 32768}, {"cpu": 32, "cuda": 128}
SIZES = {"cpu": ((64, 4, 1024, 256), (128, 3, 1024, 256), (256, 2, 1024, 256)),  # hidden, layers, tokens, seq_len
         "cuda": ((1024, 4, 8192, 2048), (2048, 3, 8192, 2048), (4096, 2, 8192, 2048))}
SPREAD = 1  # of these sizes, the one that ranks do together too
COLLECTIVES = {ACCOUNT, "tensor"}
LEAST_REPEATS = 5


def time_steps(channel: Callable[..., None], seconds: float) -> list[list[Any]]:
    """One rank's part: rows for the table `steps` of cluster.toml, measured in about `seconds`; equal on all ranks.

    A step is forward, loss and backward of one micro-batch: by each rank for itself, all at once; with weights sharded over the
    ranks; with tensor parallelism over them, where heads divide. `channel` gets {"part", "share": of the work, "had": of the
    processor time that was wanted}.
    """
    is_cuda = torch.cuda.is_available()
    device_type, ranks = "cuda" if is_cuda else "cpu", int(os.environ["WORLD_SIZE"])
    if is_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if is_cuda else "gloo")
    try:
        sizes, head_dim = SIZES[device_type], HEAD_DIM[device_type]
        runs = [(size, Layout()) for size in sizes] + [(sizes[SPREAD], Layout(dp_shard=ranks))] * (ranks > 1)
        runs += [(sizes[SPREAD], Layout(tp=ranks))] * (ranks > 1 and sizes[SPREAD][0] // head_dim % ranks == 0)
        rows, had = [], Share()
        for number, ((hidden, layers, tokens, seq_len), layout) in enumerate(runs):
            shape = DecoderShape(VOCABULARY[device_type], hidden, hidden * 8 // 3 // 32 * 32, layers,
                                 max(1, hidden // head_dim), tie_word_embeddings=True)
            step = _step(shape, tokens // seq_len, seq_len, make_mesh(layout, device_type))
            with had.counted() if layout == Layout() else contextlib.nullcontext():  # in collectives ranks wait for each other
                usual = _usual(step, seconds / len(runs), is_cuda)
            rows.append([DTYPES[device_type], shape.vocab_size, hidden, shape.intermediate_size, layers,
                         shape.num_attention_heads, tokens, seq_len, layout.dp_shard, layout.tp, *usual])
            channel(part="steps", share=(number + 1) / len(runs), had=had.value)
        return rows
    finally:
        dist.destroy_process_group()


def _step(shape: DecoderShape, documents: int, seq_len: int, mesh: Mesh) -> Callable[[], None]:
    """A micro-batch of equally long documents through a new model."""
    model = Decoder(shape)
    if mesh.device.type == "cuda":
        model.to(mesh.device, torch.bfloat16)
    sharded = parallelize(model, mesh, TENSOR_DIMS, Choices(keeps_whole=True))
    initialize(model, 0)
    chance = torch.Generator(mesh.device).manual_seed(0)
    tokens = torch.randint(0, shape.vocab_size, (documents * seq_len + 1,), generator=chance, device=mesh.device)
    context = Packed.of([seq_len] * documents, mesh.device, Groups(mesh.group("tp")))
    weights = torch.ones(documents * seq_len, device=mesh.device)

    def step() -> None:
        if sharded is not None:
            sharded.begin(is_last_micro_batch=True)
        (model(tokens[:-1], context, tokens[1:], weights).weighted_sum / len(weights)).backward()
        model.zero_grad(set_to_none=True)

    return step


def _usual(step: Callable[[], None], seconds: float, is_cuda: bool) -> tuple[float, float]:
    """Median seconds of a step, and those that the ranks wait in its collectives, not counting for each other."""
    step()
    deadline, took, waits = time.perf_counter() + seconds, list[float](), list[list[float]]()
    is_over = torch.zeros(1, device="cuda" if is_cuda else "cpu")
    while len(took) < LEAST_REPEATS or not is_over.item():
        intervals.activate(recorder := intervals.Recorder())
        dist.barrier()
        begin = time.perf_counter()
        step()
        if is_cuda:
            torch.cuda.synchronize()
        took.append(time.perf_counter() - begin)
        intervals.activate(None)
        waits.append([0.0, *(row.end - row.start for row in recorder.rows if row.name in COLLECTIVES)])
        is_over[0] = float(time.perf_counter() > deadline)
        dist.all_reduce(is_over, dist.ReduceOp.MAX)
    last = torch.tensor(waits, device=is_over.device)
    dist.all_reduce(last, dist.ReduceOp.MIN)  # a collective takes as long as on the rank that came last
    usual = torch.stack([torch.tensor(took, device=is_over.device), last.sum(1)]).median(1).values
    dist.all_reduce(usual)
    return tuple((usual / dist.get_world_size()).tolist())
