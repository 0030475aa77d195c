"""When a stage is trained again, what is thrown away for it, and where the time of that goes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from athanor.cli.chain import Chain, hash_output
from athanor.cli.run import _replaced, _stage_inputs
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


def test_a_kill_before_the_folder_was_emptied_is_gone_on_from(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE.format(talk="pairs"))
    stage, run = load_recipe(tmp_path / "recipe.toml").stage[0], RunFolder(tmp_path)
    config = run.stage("pretrain").config
    config.parent.mkdir()

    def killed() -> None:
        raise KeyboardInterrupt

    def attempt(inputs: str) -> str | None:
        chain = Chain(run, 2, time.time())
        replaced = _replaced(chain, stage, {"config": inputs}, run)
        with pytest.raises(KeyboardInterrupt):
            chain.step("train pretrain", {"config": inputs}, [], killed, replaced)
        return replaced

    config.write_text("by hand")
    assert attempt("first") is None  # what was begun by hand is never thrown away
    config.write_text("first")
    old = hash_output(config)
    assert attempt("first") is None
    assert attempt("second") == old
    assert attempt("second") == old  # the first of these two was killed before it had emptied the folder
    config.write_text("second")
    assert attempt("second") is None
    assert attempt("first") == hash_output(config)


def test_time_of_replaced_training_is_lost(tmp_path: Path) -> None:
    chain = Chain(RunFolder(tmp_path), 2, time.time())
    chain.step("train pretrain", {"config": "1"}, [], lambda: time.sleep(0.02))
    chain.step("train chat", {"config": "1"}, [], lambda: None)
    assert chain.replaced_seconds() == 0.0
    chain.step("train pretrain", {"config": "2"}, [], lambda: None, "hash of 1")
    assert 0.04 < chain.replaced_seconds() < 1.0
    assert Chain(RunFolder(tmp_path), 2, 0.0).replaced_seconds() == chain.replaced_seconds()
