"""What the ranks of the trainer's tests do."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Channel = Callable[..., None]


def train_and_signal(channel: Channel, at_step: int, number: int, rank: int, heard: str | None = None,
                     is_saved: bool = False, **arguments: Any) -> dict[str, Any]:
    """Train, and send a signal to this rank when a step is done; rank 0 waits after each until the file `heard` has its number.

    `is_saved`: it first waits until the checkpoint that is being written is complete.
    """
    from athanor.foundation.run_folder import RunFolder
    from athanor.train.loop import train_stage

    checkpoints = RunFolder(Path(arguments["run_folder"])).stage(arguments["stage"]).checkpoints

    def send() -> None:
        while is_saved and list(checkpoints.glob(".*.building-*")):
            time.sleep(0.005)
        os.kill(os.getpid(), number)

    if int(os.environ["RANK"]) == rank and rank != 0:
        from athanor.train import loop

        inner = loop.record

        def record(run: Any, *rest: Any) -> None:  # only rank 0 tells its steps
            inner(run, *rest)
            if run.progress.step == at_step:
                send()

        loop.record = record

    def tell(**message: Any) -> None:
        channel(**message)
        while heard is not None and not (Path(heard).exists() and Path(heard).read_text() == str(message["step"])):
            time.sleep(0.005)
        if rank == 0 and message["step"] == at_step:
            send()

    return train_stage(tell, **arguments)


def train_on_small_disk(channel: Channel, file_bytes: int, **arguments: Any) -> dict[str, Any]:
    """Train where no file can become larger than `file_bytes`."""
    from athanor.train.loop import train_stage

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    return train_stage(channel, **arguments)


def train_too_large(channel: Channel, **arguments: Any) -> dict[str, Any]:
    """Train where the first step asks for more memory than any machine has."""
    import torch

    from athanor.train import loop

    loop.run_step = lambda *_: torch.empty(1 << 50)
    return loop.train_stage(channel, **arguments)


def save_again(channel: Channel, source: str, target_folder: str, run_folder: str, recipe: Any, stage: str,
               launched: float) -> dict[str, Any]:
    """Load a checkpoint in this layout and save it again."""
    from athanor.foundation.run_folder import RunFolder, StageFolder
    from athanor.parallel.mesh import leave, make_mesh
    from athanor.train import checkpoint
    from athanor.train.loop import build
    from athanor.train.saver import Saver
    from athanor.train.stage import resolve

    job = resolve(RunFolder(Path(run_folder)), recipe, stage, int(os.environ["WORLD_SIZE"]))
    mesh = make_mesh(job.layout, "cpu")
    trainee = build(job, mesh)
    meta = checkpoint.load(Path(source), trainee.stages, trainee.optimizer)
    Saver(StageFolder(Path(target_folder)), trainee.stages, trainee.optimizer, is_async=False).save(meta)
    leave()
    return {}


def train_sharded(channel: Channel, **arguments: Any) -> dict[str, Any]:
    """Train in mixed precision as if there were others to share the weights with: through fully_shard."""
    from athanor.train import loop

    loop.keeps_masters = lambda job: False
    return loop.train_stage(channel, **arguments)


def biases_in_bf16(channel: Callable[..., None], biases: list[float], sizes: dict[str, Any]) -> dict[str, Any]:
    """What a router computes with where weights are cast to bf16, and what part of its biases this rank holds."""
    import torch
    import torch.distributed as dist

    from athanor.foundation.layout import Layout
    from athanor.foundation.placement import placements
    from athanor.models.context import Packed
    from athanor.models.initialize import fill, initialize
    from athanor.models.shapes.deepseek_v3 import Shape
    from athanor.models.zoo import deepseek_v3
    from athanor.parallel.apply import Choices, parallelize
    from athanor.parallel.mesh import make_mesh

    mesh = make_mesh(Layout(dp_shard=2), "cpu", is_mixed=True)
    model = deepseek_v3.build(Shape(**sizes))
    handle = parallelize(model, mesh, deepseek_v3.TENSOR_DIMS, Choices(precision="bf16"))
    assert handle is not None
    initialize(model, 0)
    router, found = model.blocks["0"].mlp.gate, {}
    place = placements(model)["model.layers.0.mlp.gate.e_score_correction_bias"]
    fill(router.e_score_correction_bias, place, torch.tensor(biases))
    router.register_forward_pre_hook(lambda module, _: found.update(
        weight=str(module.weight.dtype), biases=module.e_score_correction_bias.tolist()))
    handle.begin(is_last_micro_batch=True)
    ids = torch.arange(8)
    model(ids, Packed.of([8]), ids, torch.ones(8)).weighted_sum.backward()
    found["writes"] = place.is_first_copy()
    dist.destroy_process_group()
    return found
