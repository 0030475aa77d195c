"""What one stage does, with nothing left open: from the recipe, the plan in it, and defaults that suit a small run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from athanor.foundation.errors import LayoutError, ModelError, UserError
from athanor.foundation.layout import AXES, Layout, check_batch, check_model, resolve
from athanor.foundation.recipe import Recipe, Stage
from athanor.foundation.run_folder import hash_file
from athanor.foundation.schedules import DEFAULT_SCHEDULE, stages_of
from athanor.models.shapes.decoder import DecoderShape
from athanor.models.shapes.deepseek_v3 import mtp_weight
from athanor.models.shapes.find import shape_class, tokenizer_size
from athanor.train.elastic import fixed_shards
from athanor.train.groups import Group
from athanor.train.ramp import Ramp, read_ramp
from athanor.train.schedule import SCHEDULES

DEFAULT_BATCH_TOKENS = 4096  # small steps: the fewer the tokens, the more steps matter
DEFAULT_MICRO_BATCH_TOKENS = 2048
EXPERT_BIAS_RATE = 0.001  # DeepSeek-V3's


@dataclass(frozen=True)
class Settings:
    """A stage as it is trained. Sizes in tokens and rows, intervals in steps."""

    stage: str
    objective: str
    data: str
    start_from: str | None
    seed: int
    seq_len: int
    steps: int
    global_batch_tokens: int
    micro_batch_size: int
    num_microbatches: int
    data_shards: int
    reduction: str
    learning_rate: float
    learning_rate_schedule: str
    warmup_steps: int
    weight_decay: float
    gradient_clip: float
    z_loss: float
    expert_bias_rate: float
    mtp_weight: float | None
    spike_sigma: float
    spike_window: int
    most_skipped_steps: int
    most_rollbacks: int
    optimizer: str
    optimizer_state_dtype: str
    groups: tuple[Group, ...] | None
    ramp: Ramp | None
    precision: str
    compile: bool
    recompute: str
    checkpoint_every: int
    keep_latest_k: int
    keep_every: int
    save_async: bool
    evaluate_every: int
    evaluate_rows: int | None

    def is_saved(self, step: int) -> bool:
        """Whether a checkpoint is due after this step."""
        return step % self.checkpoint_every == 0 or (self.keep_every > 0 and step % self.keep_every == 0) or step == self.steps

    @property
    def rows_per_step(self) -> int:
        """Rows of a step, once the batch has grown to its full size."""
        return self.global_batch_tokens // self.seq_len

    def rows_of_step(self, samples: int) -> int:
        """Rows of the step that follows `samples` samples."""
        return self.rows_per_step if self.ramp is None else self.ramp.rows_of_step(samples)

    @property
    def exact_shards(self) -> int | None:
        """The virtual shards over which a fixed tree adds gradients up; None where they are added up fast."""
        return self.data_shards if self.reduction == "exact" else None

    @property
    def micro_batch_counts(self) -> list[int]:
        """Every number of micro-batches that a rank may have in a step."""
        rungs = [self.rows_per_step] if self.ramp is None else self.ramp.rungs
        return [rows * self.num_microbatches // self.rows_per_step for rows in rungs]


# keys that may change between two attempts of a stage: they alter how it is computed, or what becomes of a bad step
INCIDENTAL = ("micro_batch_size", "num_microbatches", "data_shards", "reduction", "compile", "recompute", "checkpoint_every",
              "keep_latest_k", "keep_every", "save_async", "evaluate_every", "evaluate_rows", "spike_sigma", "spike_window",
              "most_skipped_steps", "most_rollbacks")


def layout_of(recipe: Recipe) -> Layout:
    """The recipe's layout; what it leaves open is 1, and dp_shard the rest (-1)."""
    given = recipe.parallel.model_dump(include={*AXES, "ep"}, exclude_none=True)
    return Layout(**({"dp_shard": -1} | given))


def world_size_of(recipe: Recipe, devices: int) -> int:
    """Ranks to start for a recipe: the product of its degrees, or all of `devices` when dp_shard is open."""
    layout = layout_of(recipe)
    if recipe.cluster.devices is not None:
        resolve(layout, recipe.cluster.devices)  # so many were asked for, and none is to stand idle unnoticed
    return devices if layout.dp_shard == -1 else layout.world_size


def check_start(folder: Path, shape: DecoderShape, recipe: Recipe, vocabulary: int | None, tokenizer: Path | None) -> None:
    """Refuse to go on from a model that speaks another vocabulary than the data (how many entries, or a new tokenizer's most, and
    tokenizer.json; None is not known yet), or another one than [model] describes."""
    if type(shape) is not shape_class(recipe.model.architecture):
        raise ModelError(f"model.architecture is '{recipe.model.architecture}', but the model in {folder} is a "
                         f"'{shape.MODEL_TYPE}'; set model.architecture = \"{shape.MODEL_TYPE}\"")
    own, mend = folder / "tokenizer.json", f'build the data with data.tokenizer = "{folder}"'
    if shape.vocab_size < (vocabulary or 0):
        raise ModelError(f"{folder} has {shape.vocab_size} tokens in its vocabulary, the data's tokenizer {vocabulary}; {mend}")
    if own.is_file() and (tokenizer_size(str(own)) > (vocabulary or math.inf) if tokenizer is None else
                          hash_file(own) != hash_file(tokenizer)):
        new = f"{vocabulary} new entries"
        raise ModelError(f"{own} is not the tokenizer that the data are built with ({tokenizer or new}); {mend}")
    for key, value in recipe.model.given().items():
        place = f"model.sizes.{key}" if key in recipe.model.sizes else f"model.{key}"
        if recipe.origin(place) in ("recipe", "override") and getattr(shape, key, None) != value:
            raise ModelError(f"{place} is {value}, but the model in {folder} has {getattr(shape, key, None)}; a recipe has one "
                             f"model, so leave {place} out, or give stages that start from others a recipe of their own")


def settle(recipe: Recipe, stage: Stage, layout: Layout, shape: DecoderShape) -> Settings:
    """Fill what recipe and plan left open. Raises UserError, LayoutError or ModelError with what would work."""
    seq_len = stage.seq_len or 256
    if seq_len > shape.max_position_embeddings:
        raise ModelError(f"stage.{stage.name}.seq_len = {seq_len} is longer than the model's max_position_embeddings = "
                         f"{shape.max_position_embeddings}")
    check_model(layout, shape, seq_len)
    shards = fixed_shards(recipe, stage, layout, seq_len)
    micro_batch_size, batch_tokens = _batch(recipe, stage, seq_len, layout)
    rows, num_microbatches = check_batch(global_batch_tokens=batch_tokens, seq_len=seq_len, micro_batch_size=micro_batch_size,
                                         data_ranks=layout.data_ranks)
    ramp = None if stage.batch_ramp is None else read_ramp(stage.batch_ramp, rows, rows // num_microbatches, stage.data_shards,
                                                           f"stage.{stage.name}.batch_ramp")
    data_shards = shards or (math.gcd(*ramp.rungs) if ramp else rows) // micro_batch_size
    if rows % data_shards or data_shards % layout.data_ranks:
        raise LayoutError(f"data_shards = {data_shards} must divide the {rows} rows of a step and be a multiple of the "
                          f"{layout.data_ranks} data ranks")
    steps, tokens = stage.steps, stage.tokens
    if ramp and steps and recipe.origin(f"stage.{stage.name}.steps") == "plan":
        tokens, steps = float(steps * batch_tokens), None  # a plan counts steps of the full batch
    if steps is None and tokens:
        steps = ramp.steps(tokens / seq_len) if ramp else max(1, round(tokens / batch_tokens))
    if steps is None:
        raise UserError(f"stage.{stage.name} has neither steps nor tokens; give one, or make a plan from a budget first "
                        "(athanor plan)")
    warmup = stage.warmup_steps if stage.warmup_steps is not None else min(steps // 5, max(10, steps // 20))
    if warmup > steps:
        raise UserError(f"stage.{stage.name}.warmup_steps = {warmup} is more than its {steps} steps")
    if stage.keep_latest_k == 1:
        raise UserError(f"stage.{stage.name}.keep_latest_k = 1 leaves nothing to go on from when that one is damaged; keep 2 "
                        "or more, or 0 for all")
    optimizer = stage.optimizer or "muon"
    return Settings(
        stage=stage.name, objective=stage.objective, data=stage.data, start_from=stage.start_from, seed=recipe.seed,
        seq_len=seq_len, steps=steps, global_batch_tokens=batch_tokens, micro_batch_size=micro_batch_size,
        num_microbatches=num_microbatches, data_shards=data_shards, reduction=stage.reduction,
        learning_rate=stage.learning_rate or default_learning_rate(optimizer, shape.hidden_size, stage.start_from is not None),
        learning_rate_schedule=stage.learning_rate_schedule or SCHEDULES[1], warmup_steps=warmup,
        weight_decay=0.1 if stage.weight_decay is None else stage.weight_decay, gradient_clip=stage.gradient_clip or 1.0,
        z_loss=stage.z_loss or 0.0,
        expert_bias_rate=EXPERT_BIAS_RATE if stage.expert_bias_rate is None else stage.expert_bias_rate,
        mtp_weight=mtp_weight(stage.mtp_weight, shape, f"stage.{stage.name}.mtp_weight"),
        spike_sigma=stage.spike_sigma, spike_window=stage.spike_window, most_skipped_steps=stage.most_skipped_steps,
        most_rollbacks=stage.most_rollbacks, optimizer=optimizer, optimizer_state_dtype=stage.optimizer_state_dtype,
        groups=tuple(Group(**group.model_dump()) for group in stage.group) or None, ramp=ramp,
        precision=stage.precision or "fp32", compile=bool(stage.compile), recompute=recipe.parallel.recompute or "none",
        checkpoint_every=stage.checkpoint_every or max(1, -(-steps // 4)), keep_latest_k=stage.keep_latest_k,
        keep_every=stage.keep_every or 0, save_async=stage.save_async,
        evaluate_every=stage.evaluate_every or max(1, -(-steps // 8)), evaluate_rows=stage.evaluate_rows)


def default_learning_rate(optimizer: str, hidden_size: int, goes_on: bool) -> float:
    """Peak rate when nobody says: falls with the square root of the width, and is lower when training goes on.

    At width 128 and 0.8 M tokens of Python, held-out loss was 5.74 with AdamW (3e-3, better than 6e-3), and with Muon 5.16
    (3e-3), 4.72 (6e-3), 4.57 (1.2e-2) and 4.57 (2.4e-2).
    """
    rate = {"adamw": 3e-3, "muon": 1.5e-2}[optimizer] * min(1.5, (128 / hidden_size) ** 0.5)
    return float(f"{rate * (0.3 if goes_on else 1.0):.2g}")


def identity(settings: Settings, shape: DecoderShape, hashes: dict[str, str]) -> dict[str, Any]:
    """Everything that decides what the stage learns: two attempts with the same identity continue each other."""
    kept = {key: value for key, value in asdict(settings).items() if key not in INCIDENTAL}
    return kept | {f"model.{key}": value for key, value in asdict(shape).items()} | {f"hash.{k}": v for k, v in hashes.items()}


def _batch(recipe: Recipe, stage: Stage, seq_len: int, layout: Layout) -> tuple[int, int]:
    """Rows per rank and forward pass, and tokens per step. Raises LayoutError where two keys contradict each other."""
    data_ranks, least = layout.data_ranks, layout.pp * stages_of(recipe.parallel.pipeline_schedule or DEFAULT_SCHEDULE)
    given = stage.global_batch_tokens  # else the same for all layouts whose data ranks can share it out
    rows = given // seq_len if given else max(1, round(DEFAULT_BATCH_TOKENS / seq_len / data_ranks)) * data_ranks
    micro, count = stage.micro_batch_size, recipe.parallel.num_microbatches
    if count is not None:
        fitting = max(1, rows // (count * data_ranks))
        is_given = recipe.origin(f"stage.{stage.name}.micro_batch_size") in ("override", "recipe")
        if rows != fitting * count * data_ranks or (is_given and micro != fitting):
            raise LayoutError(f"parallel.num_microbatches = {count}, but {rows} rows a step on {data_ranks} data rank(s) are "
                              f"{rows / data_ranks / (micro or fitting):g} micro-batches of {micro or fitting}; leave it or "
                              f"stage.{stage.name}.micro_batch_size out")
        micro = fitting
    if micro is None:
        micro = max(1, DEFAULT_MICRO_BATCH_TOKENS // seq_len)
        while micro > 1 and (rows % (micro * data_ranks) or rows < least * micro * data_ranks):
            micro -= 1
    return micro, given or max(1, round(rows / (micro * data_ranks))) * micro * data_ranks * seq_len
