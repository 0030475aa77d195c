"""Blocks that predict further tokens are trained from a recipe, told apart in the metrics, and left out of evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from test_train_architectures import DEEPSEEK

from athanor.foundation.errors import ModelError, RecipeError
from athanor.foundation.recipe import load_recipe
from athanor.foundation.run_folder import RunFolder, read_jsonl
from athanor.train.stage import resolve

Train = Callable[..., dict[str, Any]]
PLAIN = ["model.architecture=deepseek_v3", *DEEPSEEK, "model.tie_word_embeddings=false"]
ONE = [*PLAIN, "model.sizes.num_nextn_predict_layers=1"]


def metrics(folder: Path, stage: str = "pretrain") -> list[dict[str, Any]]:
    return list(read_jsonl(RunFolder(folder).stage(stage).metrics))


def test_they_learn_beside_the_model_and_the_next_stage_goes_on(train: Train, run_folder: Path) -> None:
    overrides = [*ONE, "stage.pretrain.steps=12", "stage.pretrain.evaluate_every=6"]
    train(run_folder, *overrides)
    rows = metrics(run_folder)
    assert all(set(row) >= {"loss", "mtp_loss"} for row in rows)
    assert rows[-1]["mtp_loss"] < 0.9 * rows[0]["mtp_loss"] and rows[0]["mtp_loss"] == pytest.approx(np.log(320), rel=0.05)
    config = json.loads((run_folder / "pretrain" / "model" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1 and config["num_hidden_layers"] == 2
    held = load_file(run_folder / "pretrain" / "model" / "model.safetensors")
    assert {"model.layers.2.eh_proj.weight", "model.layers.2.shared_head.head.weight"} <= held.keys()
    train(run_folder, *overrides, "stage.chat.steps=2", "stage.chat.mtp_weight=0.1", stage="chat")
    first = metrics(run_folder, "chat")[0]
    assert 0 < first["mtp_loss"] < np.log(320)


def test_the_first_steps_losses_and_those_of_held_out_rows_know_nothing_of_them(train: Train, run_folder: Path, data_folder: Path,
                                                                               tmp_path: Path) -> None:
    """Weights are drawn by name, so the model without these blocks begins alike."""
    other = tmp_path / "plain"
    other.mkdir()
    (other / "data").symlink_to(data_folder)
    # a first step that changes nothing
    overrides = ["stage.pretrain.steps=1", "stage.pretrain.evaluate_every=1", "stage.pretrain.learning_rate=1e-300"]
    train(run_folder, *ONE, *overrides)
    train(other, *PLAIN, *overrides)
    (found,), (wanted,) = metrics(run_folder), metrics(other)
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-14)
    assert found["validation_loss"] == pytest.approx(wanted["validation_loss"], rel=1e-14)
    assert "mtp_loss" not in wanted and found["grad_norm"] != wanted["grad_norm"]


def test_a_mistaken_coefficient_is_refused(recipe_file: Path, run_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"stage\.pretrain\.mtp_weight = 0\.2, but the model has no blocks"):
        resolve(RunFolder(run_folder), load_recipe(recipe_file, [*PLAIN, "stage.pretrain.mtp_weight=0.2"]), "pretrain", 1)
    with pytest.raises(RecipeError, match="mtp_weight"):
        load_recipe(recipe_file, ["stage.pretrain.mtp_weight=0"])
    job = resolve(RunFolder(run_folder), load_recipe(recipe_file, ONE), "pretrain", 1)
    assert job.settings.mtp_weight == 0.3 and job.identity["mtp_weight"] == 0.3
    plain = resolve(RunFolder(run_folder), load_recipe(recipe_file, PLAIN), "pretrain", 1)
    assert plain.identity["mtp_weight"] is None, "a stage that was begun before there was this key goes on"
