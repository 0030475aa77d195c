"""A way to train the tiny run on any layout."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_run import data_folder, recipe_file, run_folder

from athanor.foundation.launch import run_ranks
from athanor.foundation.recipe import load_recipe
from athanor.train.settings import layout_of

__all__ = ["data_folder", "recipe_file", "run_folder", "train"]
Train = Callable[..., dict[str, Any]]


@pytest.fixture
def train(recipe_file: Path, tmp_path: Path) -> Train:
    """`train(run folder, overrides, stage=…)`: train on as many ranks as the layout has (one unless given)."""

    def run(folder: Path, *overrides: str, stage: str = "pretrain", target: str = "athanor.train.loop:train_stage",
            on_message: Any = None, **arguments: Any) -> dict[str, Any]:
        recipe = load_recipe(recipe_file, list(overrides))
        arguments = {"run_folder": str(folder), "recipe": recipe, "stage": stage, "launched": time.perf_counter(), **arguments}
        layout = layout_of(recipe)
        ranks = abs(layout.world_size)  # dp_shard -1, the rest, is one
        return dict(run_ranks(target, arguments, ranks, log_folder=tmp_path / "logs", threads=1, timeout=240,
                              on_message=on_message)[0])

    return run
