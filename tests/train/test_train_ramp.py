"""A batch that grows: the ladder by its published figures, what cannot be a ladder, budgets, and going on half-way up."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from athanor.foundation.errors import LayoutError, RankError, RecipeError
from athanor.foundation.layout import Layout
from athanor.foundation.recipe import load_recipe
from athanor.foundation.run_folder import RunFolder, read_jsonl
from athanor.models.shapes.decoder import DecoderShape
from athanor.train.ramp import Ramp, read_ramp
from athanor.train.settings import settle

Train = Callable[..., dict[str, Any]]
YUAN = Ramp(448, 448, 488_280, 2688)  # Yuan 1.0 with 13 B parameters: rows of 2,048 tokens, 146,484,375 in all


def walk(ramp: Ramp, steps: int) -> list[int]:
    rows: list[int] = []
    for _ in range(steps):
        rows.append(ramp.rows_of_step(sum(rows)))
    return rows


def test_the_ladder_of_yuan() -> None:
    assert YUAN.rungs == [448, 896, 1344, 1792, 2240, 2688]
    for rung in range(5):  # each holds for 488,280 / 5 = 97,656 samples
        assert YUAN.rows_of_step(97_656 * rung) == 448 * (rung + 1)
        assert YUAN.rows_of_step(97_656 * (rung + 1) - 1) == 448 * (rung + 1)
    assert YUAN.rows_of_step(488_280) == YUAN.rows_of_step(10**9) == 2688
    rows = walk(YUAN, 520)
    assert [rows.count(rung) for rung in YUAN.rungs[:5]] == [218, 109, 73, 55, 43]
    assert abs(sum(rows[:498]) * 2048 - 1e9) < 2688 * 2048, "the ramp takes a billion tokens"
    assert YUAN.steps(146_484_375) == 498 + round((146_484_375 - sum(rows[:498])) / 2688)


def test_steps_meet_a_number_of_samples_as_nearly_as_whole_steps_can() -> None:
    ramp = Ramp(2, 2, 20, 6)
    assert walk(ramp, 9) == [2, 2, 2, 2, 2, 4, 4, 4, 6]
    reached = [sum(walk(ramp, steps)) for steps in range(60)]
    for samples in range(1, 200):
        steps = ramp.steps(samples)
        assert abs(reached[steps] - samples) == min(abs(one - samples) for one in reached[1:]), samples


def test_what_is_no_ladder_is_refused() -> None:
    assert read_ramp([4, 4, 64], 16, 4, None, "key") == Ramp(4, 4, 64, 16)
    with pytest.raises(RecipeError, match=r"key = \[16, 4, 64\]: .* the first less than the 16 rows of a step"):
        read_ramp([16, 4, 64], 16, 4, None, "key")
    with pytest.raises(RecipeError, match="all three must be at least 1"):
        read_ramp([4, 4, 0], 16, 4, None, "key")
    with pytest.raises(RecipeError, match=r"5 rows a time do not lead from 4 to 16 rows; the nearest increment is (4|6)"):
        read_ramp([4, 5, 64], 16, 4, None, "key")
    with pytest.raises(LayoutError, match="over 6, 10, 14, 18 rows, which micro_batch_size x data ranks = 4 does not divide"):
        read_ramp([6, 4, 64], 18, 4, None, "key")
    with pytest.raises(LayoutError, match="data_shards = 8 does not"):
        read_ramp([4, 4, 64], 16, 4, 8, "key")


def test_a_budget_of_tokens_is_met(recipe_file: Path) -> None:
    shape = DecoderShape(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    recipe = load_recipe(recipe_file, ["stage.pretrain.batch_ramp=[8, 8, 64]"])
    stage = recipe.get_stage("pretrain").model_copy(update={"steps": None, "tokens": 16_384.0})
    settings = settle(recipe, stage, Layout(dp_shard=2), shape)
    assert settings.ramp == Ramp(8, 8, 64, 16) and settings.data_shards == 2
    assert sum(walk(settings.ramp, settings.steps)) * 32 == 16_384 and settings.steps == 36
    planned = load_recipe(recipe_file, ["stage.pretrain.batch_ramp=[8, 8, 64]"])
    planned._origins["stage.pretrain.steps"] = "plan"
    assert settle(planned, planned.get_stage("pretrain"), Layout(dp_shard=2), shape).steps == 8
    assert settle(recipe, recipe.get_stage("pretrain"), Layout(dp_shard=2), shape).steps == 4


def test_a_batch_that_nobody_gives_is_the_same_for_all_layouts_that_can_share_it_out(recipe_file: Path) -> None:
    """Or a stage could not go on in another one, nor be compared with it. 4,096 tokens are 16 rows of 256."""
    shape = DecoderShape(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=8, num_attention_heads=2)

    def settled(layout: Layout, schedule: str | None = None, **given: int) -> tuple[int, int, int]:
        recipe = load_recipe(recipe_file, [f"parallel.pipeline_schedule={schedule}"] if schedule else [])
        sizes = {"seq_len": 256, "micro_batch_size": None, "global_batch_tokens": None, **given}
        found = settle(recipe, recipe.get_stage("pretrain").model_copy(update=sizes), layout, shape)
        return found.rows_per_step, found.micro_batch_size, found.num_microbatches

    assert [settled(Layout(dp_shard=ranks)) for ranks in (1, 2, 4, 8, 16)] == [
        (16, 8, 2), (16, 8, 1), (16, 4, 1), (16, 2, 1), (16, 1, 1)]
    assert [settled(Layout(dp_shard=ranks))[0] for ranks in (3, 5, 32)] == [15, 15, 32], "the nearest that splits"
    assert settled(Layout(dp_shard=2), micro_batch_size=3) == (18, 3, 3)
    assert settled(Layout(pp=4)) == (16, 4, 4), "a pipeline of four stages is filled by as many"
    assert settled(Layout(pp=4), "DualPipeV") == (16, 2, 8) and settled(Layout(pp=2, dp_shard=4), "GPipe") == (16, 2, 2)
    assert settled(Layout(pp=2, dp_shard=2), global_batch_tokens=256 * 12) == (12, 3, 2)


def test_killed_on_the_ramp_it_ends_with_the_same_bits(train: Train, run_folder: Path, tmp_path: Path,
                                                       data_folder: Path) -> None:
    choices = ("stage.pretrain.steps=7", "stage.pretrain.checkpoint_every=2", "stage.pretrain.evaluate_every=7",
               "stage.pretrain.precision=fp32", "stage.pretrain.batch_ramp=[4, 4, 24]",
               "stage.pretrain.optimizer_state_dtype=bf16", "stage.pretrain.micro_batch_size=2")
    other = tmp_path / "other"
    other.mkdir()
    (other / "data").symlink_to(data_folder)
    wanted = train(other, *choices)
    rows = [row["samples"] for row in read_jsonl(RunFolder(other).stage("pretrain").metrics)]
    assert rows == [4, 8, 16, 28, 44, 60, 76]
    with pytest.raises(RankError, match="was killed by signal 9"):
        train(run_folder, *choices, target="train_ranks:train_and_signal", at_step=3, number=signal.SIGKILL, rank=0,
              is_saved=True)
    found = train(run_folder, *choices)
    assert found["loss"] == wanted["loss"] and found["grad_norm"] == wanted["grad_norm"]
    files = [RunFolder(folder).stage("pretrain").model / "model.safetensors" for folder in (run_folder, other)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [row["step"] for row in read_jsonl(RunFolder(run_folder).stage("pretrain").events) if row["kind"] == "start"] == [0, 2]
