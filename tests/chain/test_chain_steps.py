"""When a stage is trained again, what is thrown away for it, and where the time of that goes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from athanor.cli.chain import Chain, hash_output
from athanor.cli.run import _refuse_other_plan, _replaced, _stage_inputs
from athanor.foundation.errors import UserError
from athanor.foundation.recipe import load_recipe
from athanor.foundation.run_folder import RunFolder

RECIPE = """
name = "steps"
[data]
[[data.source]]
name = "s"
kind = "text"
[[stage]]
name = "pretrain"
[[stage]]
name = "chat"
data = "{talk}"
"""


def test_changed_conversations_are_trained_on(tmp_path: Path) -> None:
    (tmp_path / "talk.jsonl").write_text("1")
    (tmp_path / "recipe.toml").write_text(RECIPE.format(talk=tmp_path / "talk.jsonl"))
    recipe, run = load_recipe(tmp_path / "recipe.toml"), RunFolder(tmp_path)
    before = [_stage_inputs(recipe, stage, run) for stage in recipe.stage]
    (tmp_path / "talk.jsonl").write_text("2")
    after = [_stage_inputs(recipe, stage, run) for stage in recipe.stage]
    assert before[0] == after[0] and before[1] != after[1]


def test_only_fresh_throws_work_away(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE.format(talk="pairs"))
    stage, run = load_recipe(tmp_path / "recipe.toml").stage[0], RunFolder(tmp_path)
    config = run.stage("pretrain").config
    config.parent.mkdir()
    config.write_text("of another recipe")
    assert _replaced(stage, run) is None
    assert _replaced(stage, run, is_fresh=True) == hash_output(config)


def test_a_plan_that_fits_no_more_is_refused_before_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE.format(talk="pairs"))
    run = RunFolder(tmp_path)
    recipe = load_recipe(tmp_path / "recipe.toml").with_plan({"stage": [{"name": "pretrain", "steps": 40}]})
    stage = run.stage("pretrain")
    stage.root.mkdir()
    stage.config.write_text("[identity]\nsteps = 30\nseed = 1\n")
    _refuse_other_plan(recipe, run)  # nothing has been trained yet
    stage.metrics.write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=r"stage 'pretrain' .* was trained with: steps was 30 and is 40; .*--fresh"):
        _refuse_other_plan(recipe, run)
    stage.config.write_text("[identity]\nsteps = 40\nseed = 1\n")
    _refuse_other_plan(recipe, run)
    stage.config.write_text('[identity]\nsteps = 40\n"model.hidden_size" = 64\n')
    with pytest.raises(UserError, match=r"model\.hidden_size was 64 and is 96; .*--fresh"):
        _refuse_other_plan(recipe.with_plan({"model": {"hidden_size": 96}}), run)
    stage.config.write_text("[identity]\nsteps = ")
    with pytest.raises(UserError, match=r"config\.toml is damaged .*--fresh"):
        _refuse_other_plan(recipe, run)


def test_what_was_paid_for_knows_that_devices_change(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for devices, seconds in ((1, 0.02), (4, 0.05)):
        chain = Chain(run, devices, time.time())
        chain.step(f"train {devices}", {"config": str(devices)}, [], lambda seconds=seconds: time.sleep(seconds))  # type: ignore[misc]
        chain.end()
    one, four = (end - begin for begin, end, _ in chain.spans())
    assert chain.device_seconds() == pytest.approx(one + 4 * four) and chain.wall_seconds() == pytest.approx(one + four)
    outside = {"time": 1.0, "wall_seconds": 3.0, "device_seconds": 6.0}  # two ranks, by `athanor train` alone
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "ledger.jsonl").write_text(json.dumps(outside) + "\n")
    assert chain.device_seconds() == pytest.approx(one + 4 * four + 6.0)
    assert chain.wall_seconds() == pytest.approx(one + four + 3.0)


def test_time_of_replaced_training_is_lost(tmp_path: Path) -> None:
    chain = Chain(RunFolder(tmp_path), 2, time.time())
    chain.step("train pretrain", {"config": "1"}, [], lambda: time.sleep(0.02))
    chain.step("train chat", {"config": "1"}, [], lambda: None)
    assert chain.replaced_seconds() == 0.0
    chain.step("train pretrain", {"config": "2"}, [], lambda: None, "hash of 1")
    assert 0.04 < chain.replaced_seconds() < 1.0
    assert Chain(RunFolder(tmp_path), 2, 0.0).replaced_seconds() == chain.replaced_seconds()
