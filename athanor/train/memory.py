"""When memory does not suffice: which changes would help, what each saves and costs, and the sentence that an error ends in."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from athanor.foundation.errors import OutOfMemory, UserError
from athanor.foundation.layout import keeps_whole
from athanor.foundation.recipe import Recipe
from athanor.foundation.remedy import Remedy
from athanor.foundation.units import format_bytes
from athanor.ledger.book import read_book
from athanor.parallel.apply import storage_dtype
from athanor.train.stage import Job, arrange

WIDTH_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp8": 2}
LEAST_SAVING = 0.01  # of the peak, or it is not worth a sentence
# shares that a step takes longer by: estimates, the first from arithmetic (the forward pass is a third of a step's FLOPs)
FORWARD_SHARE, SELECTIVE, BF16_STATE, SMALLER_MATMULS, WIDER_SHARDS, TENSOR, CONTEXT = 1 / 3, 0.05, 0.01, 0.05, 0.04, 0.10, 0.08
A_BLOCK_AT_A_TIME = 0.15  # gathered and reduced for every micro-batch, not once a step


def remedies(memory: Mapping[str, float], job: Job) -> list[Remedy]:
    """Changes that the rules of layouts allow, cheapest first. `memory` is the peak of the fullest rank by kind, in bytes."""
    least = LEAST_SAVING * sum(memory.values())
    found = [each for each in _candidates(memory, job) if each.saves_bytes > least and is_allowed(job, each.changes)]
    return sorted(found, key=lambda each: (each.costs, -each.saves_bytes))


def is_allowed(job: Job, changes: tuple[str, ...]) -> bool:
    """Whether the stage could be trained with these changes on as many ranks."""
    try:
        recipe = changed(job.recipe, changes)
        arrange(recipe, recipe.get_stage(job.settings.stage), job.shape, job.layout.world_size)
    except UserError:
        return False
    return True


def changed(recipe: Recipe, changes: tuple[str, ...]) -> Recipe:
    """The recipe with overrides of [parallel] and of stages."""
    parallel: dict[str, Any] = {}
    stages: dict[str, dict[str, Any]] = {stage.name: {} for stage in recipe.stage}
    for change in changes:
        key, _, text = change.partition("=")
        table, _, name = key.rpartition(".")
        into = parallel if table == "parallel" else stages[table.removeprefix("stage.")]
        into[name] = int(text) if text.isdigit() else {"false": False, "true": True}.get(text, text)
    return recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update=parallel),
                                     "stage": [stage.model_copy(update=stages[stage.name]) for stage in recipe.stage]})


def _candidates(memory: Mapping[str, float], job: Job) -> Iterator[Remedy]:
    settings, layout, stage = job.settings, job.layout, f"stage.{job.settings.stage}"
    have = {kind: memory.get(kind, 0.0) for kind in ("parameters", "gradients", "optimizer", "gathered", "activations")}
    whole = have["gathered"] + max(0.0, have["gradients"] - have["parameters"])
    yield from _recomputing(have["activations"], job)
    if settings.optimizer_state_dtype == "fp32" and storage_dtype(settings.precision) == torch.float32:
        yield Remedy((f"{stage}.optimizer_state_dtype=bf16",), have["optimizer"] / 2, BF16_STATE)
    if settings.micro_batch_size % 2 == 0:
        smaller = f"{stage}.micro_batch_size={settings.micro_batch_size // 2}"
        yield Remedy((smaller,), have["activations"] / 2, SMALLER_MATMULS)
    if layout.dp_replicate > 1:
        sharded = have["parameters"] + have["optimizer"] + min(have["gradients"], have["parameters"])
        wider = ("parallel.dp_replicate=1", f"parallel.dp_shard={layout.dp_shard * layout.dp_replicate}")
        yield Remedy(wider, sharded * (1 - 1 / layout.dp_replicate), WIDER_SHARDS)
    chosen = job.recipe.parallel.keep_whole
    is_whole = keeps_whole(layout, job.shape.parameters()) if chosen is None else chosen
    if is_whole and layout.dp_shard * layout.cp > 1:
        blocks = -(-job.shape.num_hidden_layers // layout.pp)
        yield Remedy(("parallel.keep_whole=false",), whole * (1 - 1 / blocks), A_BLOCK_AT_A_TIME)
    yield Remedy(_twice("tp", job), (have["activations"] + whole) / 2, TENSOR)
    yield Remedy(_twice("cp", job), have["activations"] / 2, CONTEXT)
    yield Remedy(_twice("pp", job), whole / 2, _bubble(2 * layout.pp, 2 * settings.num_microbatches)
                 - _bubble(layout.pp, settings.num_microbatches))


def _recomputing(activations: float, job: Job) -> Iterator[Remedy]:
    """Keeping only what goes into blocks, or that and what takes long; one block at a time is there in full either way."""
    settings, layout, shape = job.settings, job.layout, job.shape
    count = -(-shape.num_hidden_layers // layout.pp)
    if layout.pp > 1:
        is_all_in_flight = job.pipeline.schedule in ("GPipe", "LoopedBFS")
        count *= settings.num_microbatches if is_all_in_flight else min(settings.num_microbatches, layout.pp)
    vector = settings.micro_batch_size * settings.seq_len / layout.cp * WIDTH_BYTES[settings.precision]
    inputs, one = vector * shape.hidden_size / layout.tp, activations / count
    inner = shape.query_size + shape.key_value_size + shape.intermediate_size
    products = 2 * vector * (shape.hidden_size + inner / layout.tp)
    if settings.recompute == "none":
        yield Remedy(("parallel.recompute=selective",), activations - one - count * (inputs + products), SELECTIVE)
        yield Remedy(("parallel.recompute=every-2",), (activations - one - count * inputs) / 2, FORWARD_SHARE / 2)
    if settings.recompute != "full":
        yield Remedy(("parallel.recompute=full",), activations - one - count * inputs, FORWARD_SHARE)


def _twice(axis: str, job: Job) -> tuple[str, ...]:
    """The overrides for twice the degree of an axis, with half as many data ranks."""
    changes = [f"parallel.{axis}={2 * getattr(job.layout, axis)}"]
    if (job.recipe.parallel.dp_shard or -1) != -1:
        given = "dp_shard" if job.layout.dp_shard % 2 == 0 else "dp_replicate"
        changes.append(f"parallel.{given}={getattr(job.layout, given) // 2}")
    return tuple(changes)


def _bubble(pp: int, num_microbatches: int) -> float:
    """The time stages wait, relative to the time they compute, in a schedule with one stage a rank."""
    return (pp - 1) / num_microbatches


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or what caused it, is a device or a host that has no memory left."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(cause):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def explain(job: Job, device: torch.device) -> OutOfMemory:
    """The error to end in: what was predicted, what was used, and the three cheapest changes."""
    memory, source = predicted(job)
    if device.type == "cuda":
        used = f"{format_bytes(torch.cuda.max_memory_allocated(device))} of {device} were allocated at most"
    else:
        used = f"this process took {format_bytes(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)} at most"
    said = "nothing was predicted (athanor rehearse does)"
    if memory:
        said = f"{source} says {format_bytes(sum(memory.values()))} a rank"
    helps = [str(each) if memory else " ".join(each.changes) for each in remedies(memory or dict.fromkeys(UNKNOWN, 1.0), job)[:3]]
    advice = f"; cheapest first: {'; '.join(helps)}" if helps else "; nothing is left to change but the model or the devices"
    return OutOfMemory(f"stage {job.settings.stage} ran out of memory: {used}, {said}{advice}")


UNKNOWN = ("parameters", "gradients", "optimizer", "gathered", "activations")


def predicted(job: Job) -> tuple[dict[str, float], str]:
    """Peak memory by kind of the fullest rank, and the file that says so: the rehearsal or else the forecast; or nothing."""
    for file in (job.folder.rehearsal, job.folder.forecast):
        try:
            book = read_book(file)
        except UserError:  # not there, or not readable: this is no time to complain about it
            continue
        stages = [dict(zip(book.memory_bytes, sizes, strict=True)) for sizes in zip(*book.memory_bytes.values(), strict=False)]
        if stages:
            return max(stages, key=lambda stage: sum(stage.values())), str(file)
    return {}, ""
