"""Every architecture trains from a recipe, and the next stage goes on from its folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from athanor.models.huggingface import load_model

Train = Callable[..., dict[str, Any]]
DEEPSEEK = ["model.num_key_value_heads=4", "model.num_experts=4", "model.num_experts_per_tok=2", *(
    f"model.sizes.{size}" for size in ("moe_intermediate_size=24", "kv_lora_rank=10", "qk_nope_head_dim=6", "qk_rope_head_dim=4",
                                       "v_head_dim=8", "first_k_dense_replace=1"))]


@pytest.mark.parametrize(("name", "sizes"), [
    ("gpt2", ["model.num_key_value_heads=4"]), ("yuan", ["model.num_key_value_heads=4"]),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("yuan", ["model.num_key_value_heads=4", "model.num_experts=32", "model.head_dim=8"]),
        ("mistral", []), ("qwen2", ["model.tie_word_embeddings=false"]), ("qwen3", ["model.head_dim=6"]),
        ("deepseek_v3", DEEPSEEK),
        ("qwen3_moe", ["model.num_experts=4", "model.num_experts_per_tok=2"])))])
def test_a_recipe_trains_it_and_goes_on(train: Train, run_folder: Path, name: str, sizes: list[str]) -> None:
    overrides = [f"model.architecture={name}", *sizes, "stage.pretrain.steps=4"]
    found = train(run_folder, *overrides)
    assert found["loss"][-1] < found["loss"][0]
    folder = run_folder / "pretrain" / "model"
    assert json.loads((folder / "config.json").read_text())["model_type"] == name
    vectors = [parameter for key, parameter in load_model(folder).named_parameters() if key.endswith("bias")]
    assert all(vector.abs().max() > 0 for vector in vectors)
    assert bool(vectors) == (name in ("gpt2", "qwen2", "deepseek_v3", "yuan"))
    goes_on = train(run_folder, *overrides, "stage.chat.steps=1", stage="chat")
    assert np.isfinite(goes_on["loss"]).all() and len(goes_on["loss"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sizes"), [
    ("gpt2", ["model.num_key_value_heads=4"]), ("qwen3", ["model.head_dim=6"]),
    ("yuan", ["model.num_key_value_heads=4", "model.num_experts=4"]), ("deepseek_v3", DEEPSEEK)])
def test_the_folder_of_eight_ranks_is_that_of_one(train: Train, run_folder: Path, data_folder: Path, tmp_path: Path, name: str,
                                                  sizes: list[str]) -> None:
    other = tmp_path / "eight"
    other.mkdir()
    (other / "data").symlink_to(data_folder)
    overrides = [f"model.architecture={name}", *sizes, "stage.pretrain.steps=2"]
    train(run_folder, *overrides)
    train(other, *overrides, "parallel.tp=2", "parallel.pp=2", "parallel.dp_shard=2", "stage.pretrain.micro_batch_size=1")
    wanted, found = (load_file(folder / "pretrain" / "model" / "model.safetensors") for folder in (run_folder, other))
    assert wanted.keys() == found.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-9, msg=key)
