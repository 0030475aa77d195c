"""A mixture of experts is trained from a recipe, on other layouts alike, and read back by the next stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from athanor.foundation.errors import ModelError, RecipeError
from athanor.foundation.recipe import load_recipe
from athanor.foundation.run_folder import RunFolder
from athanor.train.stage import resolve

Train = Callable[..., dict[str, Any]]
MIXTURE = ("model.architecture=mixtral", "model.num_experts=4", "model.intermediate_size=24", "stage.pretrain.steps=3")


def test_a_recipe_trains_a_mixture_in_any_layout(train: Train, recipe_file: Path, run_folder: Path, data_folder: Path,
                                                 tmp_path: Path) -> None:
    wanted = train(run_folder, *MIXTURE)
    config = json.loads((run_folder / "pretrain" / "model" / "config.json").read_text())
    assert config["model_type"] == "mixtral" and config["num_local_experts"] == 4 and config["num_experts_per_tok"] == 2
    assert wanted["loss"][2] < wanted["loss"][0]
    for number, layout in enumerate((["parallel.tp=2"], ["parallel.dp_shard=2", "stage.pretrain.micro_batch_size=2"])):
        other = tmp_path / str(number)
        other.mkdir()
        (other / "data").symlink_to(data_folder)
        found = train(other, *MIXTURE, *layout)
        np.testing.assert_allclose(found["loss"], wanted["loss"], rtol=0, atol=1e-11)
        np.testing.assert_allclose(found["grad_norm"], wanted["grad_norm"], rtol=0, atol=1e-11)
    with pytest.raises(ModelError, match=r"model\.architecture is 'llama', but the model in .* is a 'mixtral'"):
        resolve(RunFolder(run_folder), load_recipe(recipe_file), "chat", 1)
    goes_on = train(run_folder, *MIXTURE, "stage.chat.steps=1", stage="chat")
    assert np.isfinite(goes_on["loss"]).all() and len(goes_on["loss"]) == 1


def test_sizes_of_another_architecture_are_refused(recipe_file: Path, run_folder: Path) -> None:
    for overrides, words in ((["model.num_experts=4"], "model.num_experts is no size of the architecture 'llama'"),
                             (["model.architecture=mixtral", "model.num_experts=1"], "num_experts_per_tok = 2 is more than")):
        with pytest.raises(ModelError, match=words):
            resolve(RunFolder(run_folder), load_recipe(recipe_file, overrides), "pretrain", 1)
    with pytest.raises(RecipeError, match="num_experts"):
        load_recipe(recipe_file, ["model.num_expert=4"])
