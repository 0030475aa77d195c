"""A recipe small enough to walk its whole chain in a test, on real text: two packages of the standard library."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

RECIPE = """
name = "small"
seed = 3
[cluster]
file = "{cluster}"
[data]
vocab_size = 512
evaluation_share = 0.2
[[data.source]]
name = "email"
kind = "python"
path = "{stdlib}/email"
[[data.source]]
name = "json"
kind = "python"
path = "{stdlib}/json"
[model]
hidden_size = 64
num_hidden_layers = 2
[parallel]
tp = 1
[[stage]]
name = "pretrain"
seq_len = 64
steps = 24
global_batch_tokens = 1024
micro_batch_size = 4
checkpoint_every = 6
evaluate_every = 12
[[stage]]
name = "chat"
objective = "sft"
start_from = "pretrain"
data = "pairs"
seq_len = 128
steps = 12
global_batch_tokens = 1024
micro_batch_size = 2
checkpoint_every = 4
evaluate_every = 12
[evaluate]
tasks = ["bits_per_byte", "identifiers", "python_parses"]
limit = 12
"""

Athanor = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "ATHANOR_RUNS": str(tmp_path / "runs"), "ATHANOR_REGISTRY": str(tmp_path / "registry")}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The small recipe, on a cluster that was measured once and is kept beside this file."""
    path = tmp_path / "small.toml"
    path.write_text(RECIPE.format(cluster=Path(__file__).with_name("cluster.toml"), stdlib=sysconfig.get_path("stdlib")))
    return path


@pytest.fixture
def athanor(environment: dict[str, str], tmp_path: Path) -> Athanor:
    """Run the command as a user would: `athanor("run", recipe)`."""

    def call(*arguments: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "athanor", *map(str, arguments)]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=timeout)

    return call
