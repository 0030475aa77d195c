"""The rehearsal: some ranks' real program, with a fake process group and tensors that have shapes but no values.

What the ranks would allocate, send and compute is seen without an accelerator, a peer or data; no time is. Rows hold one
document each. Blocks are rehearsed as they are written, compiled or not.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.pipelining import schedules

from athanor.data.lineage import open_manifest
from athanor.foundation.errors import UserError
from athanor.foundation.launch import run_ranks
from athanor.foundation.recipe import Recipe
from athanor.foundation.run_folder import RunFolder
from athanor.models.huggingface import read_shape
from athanor.models.rehearsed import computing_like
from athanor.objectives.batch import Row, empty_row
from athanor.parallel.apply import compute_dtype
from athanor.parallel.mesh import Mesh, leave, make_mesh
from athanor.train.loop import equip, fetch, keeps_masters, lay_out
from athanor.train.observe import Observed, observe
from athanor.train.stage import Job, arrange, find_start, fresh_shape
from athanor.train.step import run_step

LATER = 10**15  # rows, after which a batch that grows has grown


@dataclass(frozen=True)
class Rehearsed:
    """One rank's rehearsal: its place in the pipeline, the blocks it holds, and what was seen."""

    rank: int
    pp_rank: int
    blocks: list[int]
    seen: Observed


class OneDocument:
    """Rows of one document each, whose tokens are all the same and all count."""

    count, dropped, left_out, fingerprint = 1, 0, "", ""

    def __init__(self, seq_len: int) -> None:
        self.made: Row = {**empty_row(seq_len), "weight": np.ones(seq_len, dtype=np.float32)}

    def take(self, first_sample: int, count: int) -> list[Row]:
        return [self.made] * count


def rehearsal_job(run: RunFolder, recipe: Recipe, stage_name: str, world_size: int) -> Job:
    """The stage as `train` would resolve it, without data: sizes come from the recipe, or from the data where there are any.

    Raises a UserError of some kind with what would work.
    """
    stage = recipe.get_stage(stage_name)
    start = find_start(run, recipe, stage) if stage.start_from not in [None, *(other.name for other in recipe.stage)] else None
    shape = read_shape(start) if start is not None else fresh_shape(recipe, vocabulary(run, recipe))
    layout, settings, pipeline = arrange(recipe, stage, shape, world_size)
    settings, rows = replace(settings, compile=False), cast(Any, OneDocument(settings.seq_len))
    return Job(run, run.stage(stage.name), recipe, settings, layout, pipeline, shape, start, rows, rows, {})


def vocabulary(run: RunFolder, recipe: Recipe) -> dict[str, Any]:
    """What `fresh_shape` asks of the data's manifest, from the recipe where there are no data yet; else raises UserError."""
    if (run.data / "manifest.json").is_file():
        return open_manifest(run.data)
    if recipe.data.vocab_size is None:
        raise UserError("data.vocab_size is open, so nobody knows the model's size; give it, or first `athanor data build`")
    return {"vocab_size": recipe.data.vocab_size, "bos_id": 0, "eos_id": 1, "pad_id": 2}


def chosen_ranks(job: Job) -> list[int]:
    """The first rank of the first, a middle and the last pipeline stage."""
    size = job.layout.world_size // job.layout.pp
    return [place * size for place in sorted({0, job.layout.pp // 2, job.layout.pp - 1})]


def rehearse(job: Job, device_type: str, ranks: Sequence[int], log_folder: Path,
             on_message: Callable[[dict[str, Any]], None] | None = None) -> list[Rehearsed]:
    """Rehearse a training step of some ranks, as on devices of a type (`cpu` or `cuda`).

    Each gets a process of its own, since torch remembers meshes. `on_message` gets {"rank", "done"}, the share of a rank done.
    """
    arguments = {"job": job, "ranks": list(ranks), "device_type": device_type}
    return run_ranks("athanor.train.rehearse:rehearse_one", arguments, len(ranks), log_folder=log_folder, on_message=on_message,
                     threads=1)


def rehearse_one(channel: Callable[..., None], job: Job, ranks: list[int], device_type: str) -> Rehearsed:
    """Rank function: rehearse the rank of `ranks` that is this process' turn."""
    rank = ranks[int(os.environ["RANK"])]
    with fake_rank(job, rank) as mesh:
        pp_rank = mesh.coordinates["pp"]
        blocks = [number for stage in job.pipeline.stages_of(pp_rank) for number in job.pipeline.blocks[stage]]
        seen = rehearse_rank(job, mesh, device_type, lambda done: channel(rank=rank, done=done))
        return Rehearsed(rank, pp_rank, blocks, seen)


class _Held(dist.Work):
    """A message that keeps what it sends until it is waited for, as real ones do."""

    def __init__(self, work: dist.Work, tensors: list[Any]) -> None:
        super().__init__()
        self.work, self.tensors = work, tensors

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        self.tensors.clear()
        return bool(self.work.wait())


@contextlib.contextmanager
def fake_rank(job: Job, rank: int) -> Iterator[Mesh]:
    """Be one rank of a layout whose others do not exist: messages to them are taken, and nothing comes."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=job.layout.world_size, store=FakeStore())
    exchange = schedules._batch_p2p

    def exchange_and_hold(p2p_ops: list[dist.P2POp], desc: str | None = None) -> list[dist.Work]:
        return [_Held(work, [each.tensor for each in p2p_ops]) for work in exchange(p2p_ops, desc)]

    schedules._batch_p2p = exchange_and_hold
    try:
        yield make_mesh(job.layout, "cpu", is_mixed=compute_dtype(job.settings.precision) is not None and not keeps_masters(job))
    finally:
        schedules._batch_p2p = exchange
        leave()


def rehearse_rank(job: Job, mesh: Mesh, device_type: str, on_part: Callable[[float], None] = lambda done: None) -> Observed:
    """What this rank's steps take, on weights without values."""
    settings = job.settings
    stages, sharded = lay_out(job, mesh)
    lengths = [settings.seq_len] * settings.micro_batch_size
    with FakeTensorMode(allow_non_fake_inputs=True), computing_like(device_type, lengths):
        for part in stages.parts.values():
            part.to_empty(device=mesh.device)
        trainee = equip(job, stages, sharded)
        if trainee.runner is not None:
            trainee.runner.is_alone = True
        passes, done = settings.num_microbatches * len(stages.parts), 0

        def tell(*_: Any) -> None:
            nonlocal done
            done += 1
            on_part(done / passes)

        for part in stages.parts.values():
            part.register_forward_hook(tell)

        def step(number: int) -> None:
            batches = fetch(job, mesh, trainee, LATER)
            for batch in batches:
                batch["is_even"] = False  # the kernel for documents of any length, which keeps as much
            run_step(trainee, batches, settings.learning_rate, settings.gradient_clip)

        return observe(trainee, job.shape.vocab_size // job.layout.tp, step, steps=1, answers=True)
