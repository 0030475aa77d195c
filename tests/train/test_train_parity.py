"""Every layout trains the same model: in fp64, so that no tolerance hides a mistake."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Train = Callable[..., dict[str, Any]]
LAYOUTS = {
    "accumulated": ["stage.pretrain.micro_batch_size=2"],
    "dp_shard 2": ["parallel.dp_shard=2"],
    "dp_shard 2, accumulated": ["parallel.dp_shard=2", "stage.pretrain.micro_batch_size=2"],
    "dp_replicate 2, accumulated": ["parallel.dp_replicate=2", "stage.pretrain.micro_batch_size=2"],
    "tp 2": ["parallel.tp=2"],
    "pp 2": ["parallel.pp=2"],
    "cp 2": ["parallel.cp=2"],
    "dp_shard 2, selective": ["parallel.dp_shard=2", "parallel.recompute=selective", "stage.pretrain.micro_batch_size=4"],
    "pp 2, selective": ["parallel.pp=2", "parallel.recompute=selective", "stage.pretrain.micro_batch_size=4"],
    "recomputed": ["parallel.recompute=every-2", "stage.pretrain.micro_batch_size=8"],
    "dp_replicate 2 x dp_shard 2": ["parallel.dp_replicate=2", "parallel.dp_shard=2"],
    "dp_shard 2 x tp 2": ["parallel.dp_shard=2", "parallel.tp=2", "stage.pretrain.micro_batch_size=2"],
}
QUICK = [("accumulated", "adamw"), ("dp_shard 2, accumulated", "adamw"), ("dp_replicate 2, accumulated", "adamw"),
         ("tp 2", "adamw"), ("pp 2", "muon"),
         ("recomputed", "adamw"), ("dp_shard 2, selective", "adamw"), ("dp_shard 2, accumulated", "muon")]
SLOW = [(layout, optimizer) for layout in LAYOUTS for optimizer in ("adamw", "muon") if (layout, optimizer) not in QUICK]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("alone")


@pytest.mark.parametrize(("layout", "optimizer"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_layouts_train_the_same(train: Train, run_folder: Path, alone: Path, data_folder: Path, layout: str,
                                optimizer: str) -> None:
    choice = f"stage.pretrain.optimizer={optimizer}"
    reference = alone / optimizer
    if not reference.exists():
        reference.mkdir()
        (reference / "data").symlink_to(data_folder)
    wanted = train(reference, choice)  # the second time it is finished, and tells what it was
    found = train(run_folder, choice, *LAYOUTS[layout])
    assert len(wanted["loss"]) == 4 and wanted["loss"][3] < wanted["loss"][0] - 0.1
    np.testing.assert_allclose(found["loss"], wanted["loss"], rtol=0, atol=1e-11)
    np.testing.assert_allclose(found["grad_norm"], wanted["grad_norm"], rtol=0, atol=1e-11)
