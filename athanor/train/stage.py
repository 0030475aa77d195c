"""What a stage is before it runs: its model's shape, its rows, its settings, and whether its folder already has some of it."""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from athanor.data.lineage import check_intact, open_manifest
from athanor.data.rows import Rows, open_rows
from athanor.foundation.errors import LayoutError, ModelError
from athanor.foundation.events import log_event
from athanor.foundation.identity import check_same
from athanor.foundation.layout import Layout, check_experts
from athanor.foundation.layout import resolve as resolve_layout
from athanor.foundation.recipe import Recipe, Stage
from athanor.foundation.run_folder import RunFolder, StageFolder, disk_errors, hash_folder, write_atomic
from athanor.foundation.schedules import DEFAULT_SCHEDULE, Pipeline, check_pipeline, cut, find_schedule
from athanor.foundation.toml import toml_value
from athanor.ledger.attempts import throw_away
from athanor.models import fp8
from athanor.models.find import load_architecture
from athanor.models.huggingface import read_shape
from athanor.models.shapes.decoder import DecoderShape
from athanor.models.shapes.find import filled_up, new_shape, shape_class
from athanor.objectives.find import load_objective
from athanor.parallel import recompute
from athanor.train.elastic import decides_bits
from athanor.train.groups import check_groups
from athanor.train.settings import INCIDENTAL, Settings, check_start, identity, layout_of, settle

HEAD_WIDTH = INNER_MULTIPLE = 32


@dataclass(frozen=True)
class Job:
    """One stage, resolved. `start` is the model folder to begin from, or None for fresh weights."""

    run: RunFolder
    folder: StageFolder
    recipe: Recipe
    settings: Settings
    layout: Layout
    pipeline: Pipeline
    shape: DecoderShape
    start: Path | None
    rows: Rows
    held_out: Rows
    hashes: dict[str, str]

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides what the stage learns."""
        kept = identity(self.settings, self.shape, self.hashes)
        return kept | decides_bits(self.settings, self.layout, torch.get_num_threads())


def resolve(run: RunFolder, recipe: Recipe, stage_name: str, world_size: int) -> Job:
    """Read everything a stage depends on, and write nothing. Raises a UserError of some kind with what would work."""
    stage = recipe.get_stage(stage_name)
    load_objective(stage.objective)
    manifest = open_manifest(run.data)
    start = find_start(run, recipe, stage)
    shape = read_shape(start) if start is not None else fresh_shape(recipe, manifest)
    if start is not None:
        check_start(start, shape, recipe, manifest["vocab_size"], run.data / "tokenizer" / "tokenizer.json")
    layout, settings, pipeline = arrange(recipe, stage, shape, world_size)
    if settings.precision == "fp8":
        fp8.check(shape, layout.tp)
    with torch.device("meta"):
        model = load_architecture(recipe.model.architecture).build(shape)
    check_groups([name for name, _ in model.named_parameters()], settings.groups or (), stage.name)
    rows = open_rows(run.data, settings.data, settings.seq_len, settings.seed)
    held_out = open_rows(run.data, settings.data, settings.seq_len, settings.seed, "evaluation")
    hashes = {"data": manifest["hash"], "rows": rows.fingerprint, "tokenizer": manifest["tokenizer_hash"],
              "template": manifest["template_hash"] or "", "start": "" if start is None else hash_folder(start)}
    return Job(run, run.stage(stage.name), recipe, settings, layout, pipeline, shape, start, rows, held_out, hashes)


def arrange(recipe: Recipe, stage: Stage, shape: DecoderShape, world_size: int) -> tuple[Layout, Settings, Pipeline]:
    """How a stage trains a model on so many ranks. Raises LayoutError, ModelError or UserError with what would work."""
    layout = resolve_layout(layout_of(recipe), world_size)
    check_experts(layout, getattr(shape, "num_experts", 0))
    settings = settle(recipe, stage, layout, shape)
    return layout, settings, make_pipeline(recipe, layout, settings, shape)


def make_pipeline(recipe: Recipe, layout: Layout, settings: Settings, shape: DecoderShape) -> Pipeline:
    """How the model is cut into stages; a single one without a pipeline. Raises LayoutError for what cannot be."""
    recompute.check(settings.recompute, shape.num_hidden_layers)
    chosen, split = recipe.parallel.pipeline_schedule, recipe.parallel.split
    schedule = DEFAULT_SCHEDULE if chosen is None else chosen
    find_schedule(schedule)
    if layout.pp == 1:
        if split is not None and split != [shape.num_hidden_layers]:
            raise LayoutError(f"parallel.split = {split} cuts the model into {len(split)} stages, but pp is 1; leave it out")
        return Pipeline("", (range(shape.num_hidden_layers),), (0,))
    pipeline = cut(layout.pp, schedule, shape.block_costs(settings.seq_len / 2), split)
    for count in settings.micro_batch_counts:
        check_pipeline(layout, schedule, stages=len(pipeline.blocks), num_microbatches=count, is_compiled=settings.compile,
                       recompute=settings.recompute, embedding_uses=shape.embedding_uses())
    return pipeline


def find_start(run: RunFolder, recipe: Recipe, stage: Stage) -> Path | None:
    """The model folder that the stage begins from. Raises ModelError when it is not there."""
    if stage.start_from is None:
        return None
    if stage.start_from in [other.name for other in recipe.stage]:
        folder: Path = run.stage(stage.start_from).model
        if not folder.is_dir():
            raise ModelError(f"stage.{stage.name} starts from stage '{stage.start_from}', which has no model yet; train it "
                             f"first (athanor train … --stage {stage.start_from})")
        return folder
    folder = Path(stage.start_from)
    if not (folder / "config.json").is_file():
        raise ModelError(f"stage.{stage.name}.start_from = '{stage.start_from}' is neither a stage of the recipe "
                         f"({', '.join(s.name for s in recipe.stage)}) nor a model folder with config.json")
    return folder


def fresh_shape(recipe: Recipe, manifest: dict[str, Any]) -> DecoderShape:
    """The shape of a new model: the recipe's sizes, and for what is open those of a small model for a few minutes on a CPU.

    The vocabulary is the tokenizer's, filled up to a multiple of 64.
    """
    given = recipe.model.given()
    hidden_size = given.setdefault("hidden_size", 128)
    given.setdefault("num_hidden_layers", 4)
    given.setdefault("num_attention_heads", max(1, hidden_size // HEAD_WIDTH))
    growth = shape_class(recipe.model.architecture).GROWTH
    given.setdefault("intermediate_size", math.ceil(hidden_size * growth / INNER_MULTIPLE) * INNER_MULTIPLE)
    given.setdefault("max_position_embeddings", max([256, *(stage.seq_len or 0 for stage in recipe.stage)]))
    given.setdefault("tie_word_embeddings", True)
    return new_shape(recipe.model.architecture, vocab_size=filled_up(manifest["vocab_size"]), bos_token_id=manifest["bos_id"],
                     eos_token_id=manifest["eos_id"], pad_token_id=manifest["pad_id"], **given)


def claim_folder(job: Job, is_fresh: bool) -> None:
    """Make the stage's folder this job's: begin it, or go on in it (called on one rank).

    Raises UserError for damaged data, and when it belongs to another configuration; then `is_fresh` empties it.
    """
    folder = job.folder
    check_intact(job.run.data)
    if folder.root.exists() and is_fresh:
        empty(folder)
    check_same(folder, job.identity)
    write_atomic(folder.config, describe(job))


def empty(folder: StageFolder) -> None:
    """Remove all of a stage but its forecast and rehearsal, which were there before, its logs, which its ranks are writing, and
    what it has cost, which is lost.

    config.toml goes last: after a kill half-way, what is left still belongs to the old configuration.
    """
    with disk_errors(folder.root):
        throw_away(folder)
        for path in sorted(folder.root.iterdir(), key=lambda path: path == folder.config):
            if path not in (folder.forecast, folder.rehearsal, folder.logs, folder.ledger):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if folder.ledger.exists():
        log_event(folder.events, "fresh", "what was there before was thrown away, as asked, and the stage begins anew")


def describe(job: Job) -> str:
    """The text of config.toml: the recipe's values with their origin, then what they came to."""
    lines = ["# What this stage is trained with, and where each value came from.",
             job.recipe.annotated("name", "seed", "model", "parallel", "stage"),
             "# What it came to. Another identity is another stage; the rest may change when it goes on.", "[identity]"]
    lines += [f"{toml_value(key)} = {toml_value(value)}" for key, value in job.identity.items() if value is not None]
    lines += ["", "[execution]", f"layout = {toml_value(str(job.layout))}"]
    if job.layout.pp > 1:
        lines += [f"pipeline_schedule = {toml_value(job.pipeline.schedule)}",
                  f"split = {toml_value([len(blocks) for blocks in job.pipeline.blocks])}"]
    lines += [f"{key} = {toml_value(value)}" for key, value in asdict(job.settings).items()
              if key in INCIDENTAL and value is not None]
    return "\n".join(lines) + "\n"


def is_finished(job: Job) -> bool:
    """Whether the stage has its model and its book already (after `claim_folder`, so of this configuration)."""
    return job.folder.actual.is_file() and (job.folder.model / "config.json").is_file()
