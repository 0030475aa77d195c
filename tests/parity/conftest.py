"""A tiny model on ragged documents, trained in any layout and beside it by one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from athanor.foundation.launch import run_ranks
from athanor.foundation.recipe import load_recipe
from athanor.train.settings import layout_of

RECIPE = """
name = "parity"
[[data.source]]
name = "unused"
kind = "text"
path = "unused"
[model]
hidden_size = 16
num_hidden_layers = 8
num_attention_heads = 4
num_key_value_heads = 4
intermediate_size = 24
max_position_embeddings = 64
initializer_range = 0.3
[parallel]
dp_shard = 1
[[stage]]
name = "pretrain"
seq_len = 24
steps = 4
global_batch_tokens = 384
micro_batch_size = 2
precision = "fp64"
learning_rate = 0.02
gradient_clip = 0.42
"""
Result = dict[str, Any]
Train = Callable[..., list[Result]]


@pytest.fixture(scope="session")
def parity_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("parity") / "recipe.toml"
    file.write_text(RECIPE)
    return file


@pytest.fixture(scope="session")
def in_layout(parity_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """`in_layout(overrides…)`: what each rank found."""

    def run(*overrides: str, target: str = "parity_ranks:train", **arguments: Any) -> list[Result]:
        recipe = load_recipe(parity_recipe, list(overrides))
        logs = tmp_path_factory.mktemp("logs")
        return run_ranks(target, {"recipe": recipe, **arguments}, layout_of(recipe).world_size, log_folder=logs, threads=1,
                         timeout=240)

    return run


@pytest.fixture(scope="session")
def alone(in_layout: Train) -> Callable[..., Result]:
    """`alone(overrides…)`: what one process finds; asked for once."""
    known: dict[tuple[str, ...], Result] = {}

    def run(*overrides: str) -> Result:
        if overrides not in known:
            known[overrides] = in_layout(*overrides)[0]
        return known[overrides]

    return run
