"""A small model trained on real code, for engines that are asked about it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

RECIPE = """
name = "small"
[cluster]
accelerator = "cpu"
devices = 1
[data]
vocab_size = 1024
evaluation_share = 0.1
[[data.source]]
name = "email"
kind = "python"
path = "{stdlib}/email"
[[data.source]]
name = "json"
kind = "python"
path = "{stdlib}/json"
[model]
hidden_size = 128
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
[[stage]]
name = "pretrain"
seq_len = 128
steps = 150
global_batch_tokens = 2048
micro_batch_size = 16
learning_rate = 0.01
evaluate_every = 150
"""


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that training leaves, with its tokenizer."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "small.toml").write_text(RECIPE.format(stdlib=sysconfig.get_path("stdlib")))
    for verb in (["data", "build"], ["train"]):
        done = subprocess.run([sys.executable, "-m", "athanor", *verb, "small.toml"], cwd=folder, capture_output=True, text=True,
                              env={**os.environ, "ATHANOR_RUNS": str(folder / "runs")})
        assert done.returncode == 0, done.stderr[-2000:]
    return folder / "runs" / "small" / "pretrain" / "model"
