"""Tiny Hugging Face folders, and a run folder as training and evaluation leave it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from athanor.foundation.run_folder import RunFolder, write_json
from athanor.ledger.book import Book
from athanor.registry.store import Registry

RECIPE = """name = "tiny"
[budget]
minutes = 1
[cluster]
price_per_device_hour = 3.0
[[data.source]]
name = "here"
kind = "python"
[[stage]]
name = "pretrain"
[[stage]]
name = "chat"
objective = "sft"
start_from = "pretrain"
data = "pairs"
"""


def make_model(folder: Path, seed: int = 0) -> Path:
    """A folder with real safetensors weights (40 x 8 embedding, 8 x 8 projection) and a tokenizer's file."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    save_file({"model.embed_tokens.weight": generator.normal(size=(40, 8)).astype(np.float32),
               "model.layers.0.self_attn.q_proj.weight": generator.normal(size=(8, 8)).astype(np.float32)},
              folder / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 40, "hidden_size": 8}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def make_book(seconds: float, layout: str) -> Book:
    book = Book("actual", 2, "cpu", 1e11, wall_seconds=seconds, device_seconds=2 * seconds, tokens=5e5, model_flops=3e12,
                layout=layout)
    book.add("useful", 1.5 * seconds)
    return book.close()


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Path]:
    return lambda name="model", seed=0: make_model(tmp_path / name, seed)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A finished run of two stages, not yet scored."""
    run = RunFolder(tmp_path / "runs" / "tiny")
    for seed, stage in enumerate(("pretrain", "chat")):
        folder = run.stage(stage)
        make_model(folder.model, seed)
        folder.metrics.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 31)))
        folder.config.write_text('[stage]\nname = "x"  # recipe\nseq_len = 64  # plan\n')
        make_book(900.0, ["dp_shard=2", "tp=2"][seed]).write(folder.actual)
    run.recipe.write_text(RECIPE)
    write_json(run.data / "manifest.json", {"schema": 1, "hash": "d" * 64, "sources": {"here": {"documents": 3}}, "seconds": 1})
    return run
