"""The loop: one for every objective. A rank runs `train_stage` from start, or from the newest checkpoint, to model/."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import os
import platform
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from athanor.data.order import pass_over
from athanor.data.text.tokenizer import FILES as TOKENIZER_FILES
from athanor.foundation.errors import UserError
from athanor.foundation.events import log_event
from athanor.foundation.intervals import activate, interval
from athanor.foundation.layout import keeps_whole
from athanor.foundation.recipe import Recipe
from athanor.foundation.run_folder import RunFolder, append_when_possible, folder_renamed_last, read_jsonl
from athanor.ledger.attempts import RanOn, roll_back, unwritten
from athanor.models import fp8
from athanor.models.decoder import Decoder
from athanor.models.find import load_architecture
from athanor.models.huggingface import load_weights, save_model
from athanor.models.initialize import initialize
from athanor.objectives.batch import Batch
from athanor.objectives.find import load_objective
from athanor.parallel.apply import Choices, compute_dtype, parallelize, storage_dtype
from athanor.parallel.fully_shard import DataParallel
from athanor.parallel.mesh import Mesh, leave, make_mesh
from athanor.parallel.pipeline import Runner
from athanor.parallel.stages import Stages
from athanor.train import beat, checkpoint, guards
from athanor.train.balance import Balancer
from athanor.train.exact import Exact
from athanor.train.masters import Masters
from athanor.train.memory import explain, is_out_of_memory
from athanor.train.meter import Meter
from athanor.train.optimizer import STATE_DTYPES, Optimizer
from athanor.train.saver import Saver
from athanor.train.schedule import learning_rate
from athanor.train.spikes import Guard
from athanor.train.stage import Job, claim_folder, is_finished, resolve
from athanor.train.step import Outcome, Trainee, run_step
from athanor.train.straggler import Stragglers
from athanor.train.validate import Sampler, validate, whole

Channel = Callable[..., None]


@dataclass
class Progress:
    """How far a stage is: steps done, rows read, tokens learned from; this attempt's number and claim; what went wrong in a row.

    `passed` are ranges [first, end) of samples that rollbacks pass over.
    A signal sets `wants_to_stop` on its rank; `is_asked_to_stop` is what all ranks have agreed on since.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    attempt: int = 0
    owner: str | None = None
    skipped_steps: int = 0
    passed: list[list[int]] = field(default_factory=list)
    wants_to_stop: bool = False
    is_asked_to_stop: bool = False


@dataclass
class Run:
    """All that the loop holds in its hands on one rank."""

    job: Job
    trainee: Trainee
    progress: Progress
    meter: Meter
    channel: Channel
    saver: Saver

    @property
    def mesh(self) -> Mesh:
        return self.trainee.mesh

    def log(self, kind: str, sentence: str, **details: Any) -> None:
        """Add to events.jsonl (rank 0 speaks for all)."""
        if self.mesh.rank == 0:
            log_event(self.job.folder.events, kind, sentence, attempt=self.progress.attempt, step=self.progress.step, **details)


def train_stage(channel: Channel, run_folder: str, recipe: Recipe, stage: str, *, launched: float, device_type: str = "cpu",
                accelerator: str = "cpu", peak_flops: float | None = None, is_fresh: bool = False,
                idle: dict[str, int] | None = None) -> dict[str, Any]:
    """Rank function: train one stage of a recipe (its plan already in it) in a run folder.

    `launched`: when starting the ranks began, on the host's monotonic clock; `peak_flops`: of one device, in the compute
    dtype, for MFU and the ledger, None when unknown; `idle`: devices without a rank, by account. `channel` gets of each step,
    from rank 0, {"step", "steps", "loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu", "validation_loss",
    "accounts"}, the last being device-seconds of this attempt until the ranks last compared notes.
    Returns {"run", "step", "steps", "is_asked_to_stop", "loss", "grad_norm", "tokens_per_second"}.
    """
    progress = Progress()
    job: Job | None = None
    mesh: Mesh | None = None
    previous = signal.signal(signal.SIGTERM, lambda *_: setattr(progress, "wants_to_stop", True))
    try:
        job = resolve(RunFolder(Path(run_folder)), recipe, stage, int(os.environ.get("WORLD_SIZE", "1")))
        beat.start(job.folder.beats, lambda: progress.step, launched)
        is_mixed = compute_dtype(job.settings.precision) is not None and not keeps_masters(job)
        mesh = make_mesh(job.layout, device_type, is_mixed)
        _claim(job, mesh, is_fresh)
        if not is_finished(job):
            trainee = build(job, mesh)
            resume(job, trainee, progress, launched, idle)
            saver = Saver(job.folder, trainee.stages, trainee.optimizer, keep_latest_k=job.settings.keep_latest_k,
                          keep_every=job.settings.keep_every, is_async=job.settings.save_async, owner=progress.owner)
            ran_on = RanOn(job.layout.world_size, accelerator, peak_flops, str(job.layout))
            meter = Meter(job.folder.ledger, ran_on, launched=launched, attempt=progress.attempt, first_step=progress.step,
                          peers=mesh.peers(), idle=idle)
            beat.follow(meter.recorder)
            run = Run(job, trainee, progress, meter, channel, saver)
            meter.stragglers = Stragglers(mesh.peers(), lambda rank, host, told: run.log("straggler", told, rank=rank, host=host))
            run_loop(run)
        return summarise(job, progress)
    except (RuntimeError, MemoryError) as error:
        if job is None or mesh is None or not is_out_of_memory(error):
            raise
        raise explain(job, mesh.device) from error
    finally:
        activate(None)
        signal.signal(signal.SIGTERM, previous)
        leave()
        beat.stop()


def _claim(job: Job, mesh: Mesh, is_fresh: bool) -> None:
    """Rank 0 opens the stage's folder; what it refuses, all ranks refuse."""
    problem = None
    if mesh.rank == 0:
        try:
            claim_folder(job, is_fresh)
        except UserError as error:
            problem = str(error)
    if (problem := mesh.share(problem)) is not None:
        raise UserError(problem)


def describe_model(job: Job, blocks: range | None = None, is_first: bool = True, is_last: bool = True) -> Decoder:
    """The model, or one stage of it, with weights that take no memory."""
    with torch.device("meta"):
        model = load_architecture(job.recipe.model.architecture).build(job.shape, blocks, is_first, is_last)
    return model.to(storage_dtype(job.settings.precision))  # type: ignore[no-any-return]


def keeps_masters(job: Job) -> bool:
    """Whether mixed precision keeps exact weights in the optimizer, since no rank shares its part with another."""
    return job.layout.world_size == job.layout.tp


def build(job: Job, mesh: Mesh) -> Trainee:
    """This rank's stages of the model, with the weights that training begins with."""
    stages, sharded = lay_out(job, mesh)
    for part in stages.parts.values():
        assert isinstance(part, Decoder)
        part.to_empty(device=mesh.device)
        if job.start is None:
            initialize(part, job.settings.seed)
        else:
            load_weights(part, job.start)
    return equip(job, stages, sharded)


def lay_out(job: Job, mesh: Mesh) -> tuple[Stages, list[DataParallel]]:
    """This rank's stages, their parameters sharded but still without memory."""
    settings, pipeline = job.settings, job.pipeline
    tensor_dims = load_architecture(job.recipe.model.architecture).TENSOR_DIMS
    chosen = job.recipe.parallel.keep_whole
    is_whole = keeps_whole(mesh.layout, job.shape.parameters()) if chosen is None else chosen
    choices = Choices(settings.recompute, settings.compile, settings.precision, is_whole, settings.exact_shards)
    last = len(pipeline.blocks) - 1
    described = {number: describe_model(job, blocks, number == 0, number == last)
                 for number, blocks in enumerate(pipeline.blocks)}
    parts = {number: copy.deepcopy(described[number]) for number in pipeline.stages_of(mesh.coordinates["pp"])}
    if settings.precision == "fp8":
        for part in parts.values():
            fp8.convert(part, mesh.layout.tp)
    sharded = [parallelize(part, mesh, tensor_dims, choices) for part in parts.values()]
    return Stages(parts, pipeline, mesh, described), [each for each in sharded if each is not None]


def equip(job: Job, stages: Stages, sharded: Sequence[DataParallel]) -> Trainee:
    """What trains the stages: objective, optimizer and, where there is one, the pipeline's runner."""
    settings, mesh = job.settings, stages.mesh
    dtype, masters = compute_dtype(settings.precision), None
    if dtype is not None and keeps_masters(job):
        masters = Masters((p for _, p in stages.named_parameters()), dtype, is_accumulated=settings.num_microbatches > 1)
    optimizer = Optimizer(stages, settings.optimizer, settings.weight_decay, groups=settings.groups or (),
                          state_dtype=STATE_DTYPES[settings.optimizer_state_dtype], masters=masters,
                          is_exact=settings.exact_shards is not None)
    trainee = Trainee(stages, mesh, load_objective(settings.objective), optimizer, sharded, z_loss=settings.z_loss,
                      guard=Guard(settings.spike_sigma, settings.spike_window, mesh.device), mtp_weight=settings.mtp_weight or 0,
                      balancer=Balancer(stages, optimizer.placed, settings.expert_bias_rate))
    if settings.exact_shards is not None:
        trainee.exact = Exact(settings.exact_shards, trainee)
    if mesh.layout.pp > 1:
        tokens = settings.micro_batch_size * settings.seq_len
        dtype = compute_dtype(settings.precision) or storage_dtype(settings.precision)
        hidden = torch.empty(-(-tokens // mesh.layout.cp // mesh.layout.tp), job.shape.hidden_size, dtype=dtype, device="meta")
        trainee.runner = Runner(stages, hidden, tokens // mesh.layout.cp, trainee.compute)
    return trainee


def resume(job: Job, trainee: Trainee, progress: Progress, launched: float, idle: dict[str, int] | None) -> None:
    """Go on from the newest intact checkpoint, if there is one; damaged ones are named in events.jsonl."""
    folder, mesh = job.folder, trainee.mesh
    found: Path | None = None
    if mesh.rank == 0:
        events = read_jsonl(folder.events)
        for line in unwritten(folder):
            append_when_possible(folder.ledger, line)
        progress.passed = [row["passed"] for row in events if row.get("kind") == "rollback"]  # an older checkpoint does not know
        progress.attempt = sum(row.get("kind") == "start" for row in events)
        progress.owner = checkpoint.claim(folder.owner, progress.attempt)

        def on_damage(path: Path, reason: str) -> None:
            log_event(folder.events, "damaged", f"checkpoint {path.name} cannot be used: {reason}", attempt=progress.attempt)

        found = checkpoint.find_intact(folder.checkpoints, on_damage)
    found, progress.attempt, progress.passed = mesh.share((found, progress.attempt, progress.passed))
    begin = time.perf_counter()
    if found is not None:
        guards.restore(trainee.guard, progress, checkpoint.load(found, trainee.stages, trainee.optimizer, job.hashes))
    if mesh.rank == 0:
        name, ranks, now = job.settings.stage, job.layout.world_size, time.perf_counter()
        log_event(folder.events, "start", f"{name} starts on {ranks} rank{'s' if ranks > 1 else ''}: {job.layout}",
                  attempt=progress.attempt, step=progress.step, ranks=ranks, idle=idle, load_seconds=now - begin,
                  startup_seconds=now - launched)
        if progress.attempt > 0:
            roll_back(folder.ledger, progress.step, progress.attempt)
            log_event(folder.events, "restart", f"goes on from step {progress.step}", attempt=progress.attempt,
                      step=progress.step)


def run_loop(run: Run) -> None:
    """Steps until the last one or until asked to stop, then the book; after the last step, the model's folder."""
    job, progress, meter = run.job, run.progress, run.meter
    settings, is_warm = job.settings, False
    with interval("startup"):
        sampler = Sampler(run.trainee, describe_model(job), job.held_out, settings.data, job.run.data / "tokenizer")
    while progress.step < settings.steps and not progress.is_asked_to_stop:
        begin, first = time.perf_counter(), pass_over(progress.samples, progress.passed)
        with interval("input"):
            batches = fetch(job, run.mesh, run.trainee, first)
        fetched = time.perf_counter()
        rate = learning_rate(progress.step + 1, settings.steps, settings.learning_rate, settings.warmup_steps,
                             settings.learning_rate_schedule)
        outcome = run_step(run.trainee, batches, rate, settings.gradient_clip, progress.wants_to_stop)
        end = time.perf_counter()
        progress.step += 1
        progress.samples = first + settings.rows_of_step(first)
        progress.tokens += 0 if outcome.is_skipped else outcome.kept_tokens
        progress.is_asked_to_stop = outcome.is_asked_to_stop
        is_last = progress.step == settings.steps
        checked = evaluate(run, sampler) if is_last or progress.step % settings.evaluate_every == 0 else None
        record(run, outcome, rate, (begin, fetched, end), checked)
        if guards.follow(run, outcome.is_skipped, first):
            continue
        is_due = settings.is_saved(progress.step) and (is_last or not outcome.is_skipped)  # a skipped step changed nothing
        if progress.is_asked_to_stop or is_due:
            save(run)
        if not is_warm:
            is_warm = True
            with interval("startup"):
                gc.collect()
                gc.freeze()  # what exists now stays; the collector need not look at it again
    with whole("checkpoint", meter):
        run.saver.finish()
    if progress.step == settings.steps:
        publish(run)
    book = meter.close()
    if book is not None:
        book.write(job.folder.actual)
        run.log("stop" if progress.step < settings.steps else "done",
                f"stopped after step {progress.step}, as asked" if progress.step < settings.steps else "the model is complete")


def fetch(job: Job, mesh: Mesh, trainee: Trainee, samples: int) -> list[Batch]:
    """This rank's micro-batches of the step after `samples` rows: its contiguous part of the step's, whatever the layout."""
    settings = job.settings
    mine = settings.rows_of_step(samples) // job.layout.data_ranks
    rows = job.rows.take(samples + mesh.data_rank * mine, mine)
    size = settings.micro_batch_size
    return [trainee.objective.collate(rows[i:i + size], settings.seq_len) for i in range(0, mine, size)]


def evaluate(run: Run, sampler: Sampler) -> float | None:
    """Loss on held-out rows; samples go to samples.jsonl. Ranks wait for each other here."""
    settings = run.job.settings
    with whole("evaluation", run.meter):
        run.trainee.stages.train(False)
        loss = validate(run.trainee, run.job.held_out, settings.seq_len, settings.micro_batch_size, settings.evaluate_rows)
        for row in sampler(run.progress.step):
            append_when_possible(run.job.folder.samples, row)
        run.trainee.stages.train()
        run.mesh.share(None)
    return loss


def record(run: Run, outcome: Outcome, rate: float, times: tuple[float, float, float], checked: float | None) -> None:
    """Count a finished step everywhere: the meter, metrics.jsonl, the channel. `times`: began, had its rows, ended."""
    job, progress, meter = run.job, run.progress, run.meter
    tokens, seconds = outcome.kept_tokens, times[2] - times[0]
    with interval("metering"):
        flops = job.shape.flops(tokens, outcome.keys_seen / max(1, tokens))
        flops_full = job.shape.flops_full(tokens, job.settings.seq_len)
        if run.mesh.rank == 0:
            row = {"step": progress.step, "samples": progress.samples, "tokens": progress.tokens, "loss": _finite(outcome.loss),
                   "grad_norm": _finite(outcome.grad_norm), "learning_rate": rate, "step_seconds": seconds,
                   "input_seconds": times[1] - times[0], "tokens_per_second": tokens / seconds,
                   "mfu": meter.mfu(flops, seconds), "skipped": outcome.is_skipped, "time": time.time()}
            row |= {name: _finite(value) for name, value in outcome.metrics.items() if name != "loss" and value}
            append_when_possible(job.folder.metrics, row if checked is None else {**row, "validation_loss": checked})
            shown = {key: row[key] for key in ("step", "loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu")}
            run.channel(**shown, steps=job.settings.steps, validation_loss=checked, accounts=meter.so_far(),
                        attempt=progress.attempt)
    meter.end_step(tokens=tokens, flops=flops, flops_full=flops_full, is_skipped=outcome.is_skipped)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def save(run: Run) -> None:
    """Begin a checkpoint."""
    job, progress = run.job, run.progress
    run.meter.exchange()  # steps that a checkpoint keeps must be in the ledger before it, whatever happens after
    with whole("checkpoint", run.meter):
        run.saver.save(checkpoint.Meta(
            progress.step, progress.samples, progress.tokens, run.trainee.optimizer.updates, progress.attempt,
            job.settings.data_shards, asdict(job.layout), job.hashes,
            {"torch": torch.__version__, "python": platform.python_version()},
            {**run.trainee.guard.state(), "skipped_steps": progress.skipped_steps, "passed": progress.passed}))


def publish(run: Run) -> None:
    """Write model/: weights and shape as Hugging Face keeps them, with the tokenizer and its chat template."""
    def bring(name: str) -> torch.Tensor | None:
        beat.tick()
        return run.trainee.stages.whole(name)

    with whole("checkpoint", run.meter), run.trainee.optimizer.exact():
        is_writer = run.mesh.rank == 0  # the others give their parts
        with folder_renamed_last(run.job.folder.model) if is_writer else contextlib.nullcontext(Path()) as folder:
            save_model(describe_model(run.job), folder, bring)
            for name in TOKENIZER_FILES if is_writer else ():
                if (source := run.job.run.data / "tokenizer" / name).is_file():
                    shutil.copyfile(source, folder / name)
        run.mesh.share(None)


def summarise(job: Job, progress: Progress) -> dict[str, Any]:
    """The stage so far, from its metrics, over all attempts; a step done again counts once, one gone back from not at all."""
    rows = {row["step"]: row for row in read_jsonl(job.folder.metrics) if row["step"] <= (progress.step or job.settings.steps)}
    steady = [rows[step] for step in sorted(rows)][1:] or list(rows.values())
    seconds = sum(row["step_seconds"] for row in steady)
    tokens = sum(row["tokens_per_second"] * row["step_seconds"] for row in steady)
    return {"run": str(job.folder.root), "step": max(rows, default=0), "steps": job.settings.steps,
            "is_asked_to_stop": progress.is_asked_to_stop, "loss": [rows[step]["loss"] for step in sorted(rows)],
            "grad_norm": [rows[step]["grad_norm"] for step in sorted(rows)],
            "tokens_per_second": tokens / seconds if seconds else 0.0}
