"""A recipe with a tiny model in fp64, its data, and a run folder that has them; fixtures of several folders of tests."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from athanor.data.build import build
from athanor.foundation.launch import run_ranks
from athanor.foundation.recipe import Recipe, load_recipe
from athanor.foundation.run_folder import RunFolder, StageFolder

RECIPE = """
name = "tiny"
[data]
vocab_size = 320
evaluation_share = 0.08
[[data.source]]
name = "modules"
kind = "python"
path = "{source}"
[model]
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
intermediate_size = 48
[[stage]]
name = "pretrain"
seq_len = 32
steps = 4
global_batch_tokens = 512
micro_batch_size = 4
precision = "fp64"
learning_rate = 0.01
warmup_steps = 1
evaluate_every = 4
[[stage]]
name = "chat"
objective = "sft"
start_from = "pretrain"
data = "pairs"
seq_len = 96
steps = 3
global_batch_tokens = 768
micro_batch_size = 2
precision = "fp64"
"""


def write_modules(folder: Path) -> None:
    """Modules of functions, some long, many far shorter than a row."""
    words = [f"{verb}_{noun}" for verb in ("read", "write", "parse", "count") for noun in ("line", "row", "table", "key")]
    function = 'def {}_{}(path, limit={}):\n    """Handle {} of {}."""\n    return [{!r}, limit + {}]\n\n\n'
    folder.mkdir()
    for number in range(40):
        rng = random.Random(number)
        functions = [function.format(rng.choice(words), i, rng.randrange(99), rng.choice(words), rng.choice(words),
                                     rng.choice(words), rng.randrange(999)) for i in range(1 + number % 4)]
        (folder / f"module_{number:02d}.py").write_text(f"NUMBER = {number * 7919}\nNAME = {rng.choice(words)!r}\n\n\n"
                                                        + "".join(functions))


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    write_modules(folder / "source")
    file = folder / "tiny.toml"
    file.write_text(RECIPE.format(source=folder / "source"))
    return file


@pytest.fixture(scope="session")
def data_folder(recipe_file: Path) -> Path:
    folder = recipe_file.parent / "data"
    build(load_recipe(recipe_file), folder)
    return folder


def train_here(folder: Path, recipe: Recipe, ranks: int) -> StageFolder:
    """Train the first stage in a run folder on ranks of this process's fork server, which has torch already."""
    stage = RunFolder(folder).stage("pretrain")
    run_ranks("athanor.train.loop:train_stage", {"run_folder": str(folder), "recipe": recipe, "stage": "pretrain",
                                                 "launched": time.perf_counter()}, ranks, log_folder=stage.logs, threads=1)
    return stage


def seconds_until_book(stage: StageFolder, begun: float) -> float:
    """From `begun`, in seconds since 1970, until the stage's book was written; how long processes need to end is not in it."""
    return stage.actual.stat().st_mtime - begun


@pytest.fixture
def run_folder(tmp_path: Path, data_folder: Path) -> Path:
    """A run that has its data and no stage yet."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "data").symlink_to(data_folder)
    return folder
