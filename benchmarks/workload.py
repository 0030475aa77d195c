"""What benchmarks train on: rows of equal documents, text of the standard library, and stages of the real trainer."""

from __future__ import annotations

import shutil
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np

from athanor.data.build import build
from athanor.data.rows import Rows, Windows
from athanor.data.shards import Shard, ShardWriter
from athanor.foundation.launch import run_ranks
from athanor.foundation.recipe import load_recipe
from athanor.foundation.run_folder import read_json, read_jsonl
from athanor.models.shapes.decoder import DecoderShape
from athanor.train.settings import layout_of

RECIPE = """
name = "benchmark"
[data]
vocab_size = {vocabulary}
evaluation_share = 0.02
[[data.source]]
name = "modules"
kind = "python"
path = "{source}"
[[stage]]
name = "pretrain"
precision = "fp32"
optimizer = "adamw"
learning_rate_schedule = "constant"
"""
MODEL_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings")


def equal_rows(folder: Path, vocabulary: int, seq_len: int, count: int) -> Rows:
    """Rows that are one document of `seq_len` random tokens each."""
    generator = np.random.default_rng(0)
    prefix = folder / "equal"
    with ShardWriter(prefix, vocabulary) as writer:
        for _ in range(count + 1):
            writer.append(generator.integers(0, vocabulary, seq_len).tolist())
    return Rows([Windows(Shard(prefix), seq_len, 0, keep_rest=False)], [1.0], 0, True, "equal")


def prepare_run(folder: Path, vocabulary: int, files: int) -> Path:
    """A recipe over `files` modules of the standard library (the longest are left out), with its data built beside it."""
    source, recipe = folder / "modules", folder / "recipe.toml"
    source.mkdir()
    library = Path(sysconfig.get_paths()["stdlib"])
    modules = sorted((path for path in library.glob("*.py") if path.stat().st_size < 60_000), key=lambda path: path.name)
    for path in modules[:files]:
        shutil.copyfile(path, source / path.name)
    recipe.write_text(RECIPE.format(vocabulary=vocabulary, source=source))
    build(load_recipe(recipe), folder / "data")
    return recipe


def train(recipe_file: Path, shape: DecoderShape, ranks: int, *overrides: str,
          target: str = "athanor.train.loop:train_stage") -> dict[str, Any]:
    """Train the recipe's stage in a run of its own on all cores, each rank on its part of them.

    Returns what `train_stage` returns, the stage's book as `book`, the lines of its `events` and `metrics`, and `loop_seconds`
    from the first step's end to the last's.
    """
    run = recipe_file.parent / f"run-{time.monotonic_ns()}"
    run.mkdir()
    (run / "data").symlink_to(recipe_file.parent / "data")
    recipe = load_recipe(recipe_file, [*(f"model.{key}={toml(getattr(shape, key))}" for key in MODEL_KEYS), *overrides])
    assert layout_of(recipe).dp_shard in (-1, ranks)
    arguments = {"run_folder": str(run), "recipe": recipe, "stage": "pretrain", "launched": time.perf_counter()}
    found = run_ranks(target, arguments, ranks, log_folder=run / "logs", timeout=600)[0]
    found["book"] = read_json(run / "pretrain" / "actual.json")
    found["events"], found["metrics"] = (read_jsonl(run / "pretrain" / f"{name}.jsonl") for name in ("events", "metrics"))
    ends = [row["time"] for row in found["metrics"]]
    found["loop_seconds"] = ends[-1] - ends[0]
    shutil.rmtree(run)
    return dict(found)


def toml(value: object) -> str:
    """A number or a truth as TOML writes it."""
    return str(value).lower()
