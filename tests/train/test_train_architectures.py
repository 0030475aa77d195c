"""Every architecture trains from a recipe, and the next stage goes on from its folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from athanor.models.huggingface import load_model

Train = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(("name", "sizes"), [
    ("gpt2", ["model.num_key_value_heads=4"]), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("mistral", []), ("qwen2", ["model.tie_word_embeddings=false"]), ("qwen3", ["model.head_dim=6"]),
        ("qwen3_moe", ["model.num_experts=4", "model.num_experts_per_tok=2"])))])
def test_a_recipe_trains_it_and_goes_on(train: Train, run_folder: Path, name: str, sizes: list[str]) -> None:
    overrides = [f"model.architecture={name}", *sizes, "stage.pretrain.steps=4"]
    found = train(run_folder, *overrides)
    assert found["loss"][-1] < found["loss"][0]
    folder = run_folder / "pretrain" / "model"
    assert json.loads((folder / "config.json").read_text())["model_type"] == name
    vectors = [parameter for key, parameter in load_model(folder).named_parameters() if key.endswith(".bias")]
    assert all(vector.abs().max() > 0 for vector in vectors) and bool(vectors) == (name in ("gpt2", "qwen2"))
    goes_on = train(run_folder, *overrides, "stage.chat.steps=1", stage="chat")
    assert np.isfinite(goes_on["loss"]).all() and len(goes_on["loss"]) == 1
