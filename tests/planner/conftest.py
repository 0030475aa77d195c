"""A machine whose tables follow simple laws, so that forecasts can be worked out by hand."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from athanor.cluster.spec import ClusterSpec
from athanor.foundation.recipe import Recipe, load_recipe

RATE = 1e10  # FLOP/s of every matmul
PEAK = 2e10
PASS_SECONDS = 1e-9  # per element
LATENCY, BANDWIDTH = 1e-4, 1e9


@pytest.fixture
def machine() -> ClusterSpec:
    sizes = itertools.product((256, 4096), (64, 512), (64, 4096))
    return ClusterSpec(
        accelerator="Test CPU", device_type="cpu", devices=2, per_node=2, threads_per_device=1, memory_bytes=4e9,
        peak_flops={"fp32": PEAK}, memory_bytes_per_second=1e10,
        matmul=[["fp32", form, m, k, n, RATE] for m, k, n in sizes
                for form in ("forward", "input_gradient", "weight_gradient")],
        attention=[["fp32", 16, s, d, 16 * 4e-10 * s * s * d, 16 * 8e-10 * s * s * d] for s in (64, 512) for d in (32, 64)],
        elementwise=[["fp32", name, n, PASS_SECONDS * n] for n in (2**14, 2**20)
                     for name in ("multiply", "copy", "silu", "silu_backward", "exp", "log_softmax", "embedding",
                                  "embedding_backward")],
        optimizer=[[tensors, size, tensors * 1e-6 + size * 1e-9] for tensors, size in ((16, 2**14), (64, 2**16), (64, 2**22))],
        overhead_seconds={"forward": 1e-6, "forward_backward": 3e-6, "sharded_block": 1e-3},
        collectives={name: [[float(size), LATENCY + size / BANDWIDTH] for size in (2**12, 2**16, 2**20, 2**24)]
                     for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")},
        jitter=[[0.002, 0.03], [0.02, 0.02], [0.1, 0.01]],
        disk={"write_bytes_per_second": 1e9, "read_bytes_per_second": 1e9, "sync_seconds": 0.001},
        python={"loops_per_second": 31e6, "text_bytes_per_second": 19e6}, startup_seconds={"launch": 4.0, "join": 0.1})


RECIPE = """
name = "toy"
[budget]
minutes = 4
[data]
vocab_size = 4096
[[data.source]]
name = "words"
kind = "folder"
path = "."
[[stage]]
name = "pretrain"
objective = "pretrain"
seq_len = 256
[[stage]]
name = "chat"
objective = "sft"
start_from = "pretrain"
data = "pairs"
"""


@pytest.fixture
def toy(tmp_path: Path):  # type: ignore[no-untyped-def]
    """`toy("key=value", …)` is the recipe above with overrides; `budget` replaces its line of the budget."""

    def make(*overrides: str, budget: str = "minutes = 4") -> Recipe:
        file = tmp_path / "toy.toml"
        file.write_text(RECIPE.replace("minutes = 4", budget))
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / "functions.py").write_text("")  # that there may be pairs
        return load_recipe(file, list(overrides))

    return make
