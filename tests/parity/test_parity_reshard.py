"""What one layout saves any other loads: weights and optimizer state bit for bit, and the next step is the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from saved import assemble
from test_parity_layouts import KINDS, overrides

Result = dict[str, Any]
STEPS = 2
MORE = {"adamw mixture": [*KINDS["mixture"], "stage.pretrain.optimizer=adamw"]}
QUICK = [("dense", "dp_shard=2", "tp=2"), ("muon", "pp=2", "dp_shard=2"), ("mixture", "dp_shard=2 ep=2", "tp=2"),
         ("adamw mixture", "dp_shard=1", "dp_shard=2 ep=2")]
SLOW = [
    ("dense", "tp=2", "dp_shard=3 global_batch_tokens=432"), ("dense", "dp_shard=4", "dp_shard=2 tp=2"),
    ("dense", "pp=2 tp=2", "dp_replicate=2 dp_shard=2"), ("dense", "cp=2", "pp=4 pipeline_schedule=ZBVZeroBubble"),
    ("dense", "pp=3 split=[1,2,5]", "cp=2 tp=2"), ("untied", "pp=4 split=[3,1,1,3]", "dp_shard=4"),
    ("dense", "pp=2 pipeline_schedule=Interleaved1F1B", "pp=2 pipeline_schedule=DualPipeV"),
    ("dense", "dp_shard=2 tp=2 pp=2", "dp_shard=1"), ("muon", "dp_shard=1", "pp=2 dp_shard=2 tp=2"),
    ("muon", "dp_replicate=2 tp=2", "pp=2 split=[5,3]"), ("muon", "tp=4", "dp_shard=4"),
    ("mixture", "tp=2", "dp_shard=4 ep=2"), ("mixture", "pp=2 dp_shard=2 ep=2", "dp_shard=2 ep=2 tp=2"),
    ("mixture", "dp_shard=2 cp=2 ep=4", "dp_shard=1"), ("adamw mixture", "dp_replicate=2 dp_shard=2 ep=2", "pp=2"),
    ("deepseek", "dp_shard=2 ep=2", "pp=2 tp=2"), ("gpt2", "tp=2", "pp=2 dp_shard=2"), ("yuan", "cp=2 tp=2", "dp_shard=2"),
]


@pytest.fixture(scope="module")
def saved(in_layout: Callable[..., list[Result]], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Result]]:
    """`saved(overrides…)`: a checkpoint after two steps in that layout, and what the third step found there; asked for once."""
    known: dict[tuple[str, ...], tuple[Path, Result]] = {}

    def run(*chosen: str) -> tuple[Path, Result]:
        if chosen not in known:
            folder = tmp_path_factory.mktemp("saved")
            found = in_layout(*chosen, target="saver_ranks:train_and_save", folder=str(folder), steps=STEPS)
            known[chosen] = folder / "checkpoints" / f"step-{STEPS:08d}", found[0]
        return known[chosen]

    return run


@pytest.mark.parametrize(("kind", "first", "second"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_another_layout_loads_the_same_bits(in_layout: Callable[..., list[Result]], saved: Callable[..., tuple[Path, Result]],
                                            tmp_path: Path, kind: str, first: str, second: str) -> None:
    model = {**KINDS, **MORE}[kind]
    batch = [item for item in overrides(f"{first} {second}") if "global_batch_tokens" in item]
    path, wanted = saved(*model, *batch, *overrides(first))
    ranks = in_layout(*model, *batch, *overrides(second), target="saver_ranks:load_and_save", source=str(path),
                      folder=str(tmp_path), steps=STEPS)
    before, after = assemble(path), assemble(tmp_path / "checkpoints" / path.name)
    assert set(before) == set(after) and all(torch.equal(before[key], after[key]) for key in before)
    state = [tensor for key, tensor in before.items() if key.startswith("optimizer.")]
    assert len(state) >= len(before) / 3 and sum(bool(tensor.any()) for tensor in state) > 0.9 * len(state)
    weights = ranks[0]["weights"]  # gathered by collectives, which know nothing of checkpoints
    assert set(weights) == {key for key in before if not key.startswith("optimizer.")} and ranks[0]["updates"] == STEPS
    assert all(np.array_equal(before[name].numpy(), found) for name, found in weights.items())
    for found in ranks:
        np.testing.assert_allclose([found["loss"], found["grad_norm"]], [wanted["loss"], wanted["grad_norm"]], rtol=0, atol=1e-11)
