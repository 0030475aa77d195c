"""Mixed precision without fully_shard: the same losses, the same checkpoints, exact weights in the exported model."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from athanor.foundation.errors import RankError
from athanor.foundation.run_folder import RunFolder, read_json

Train = Callable[..., dict[str, Any]]
MIXED = ("stage.pretrain.precision=bf16", "stage.pretrain.steps=6", "stage.pretrain.checkpoint_every=2",
         "stage.pretrain.evaluate_every=3")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(RunFolder(folder).stage("pretrain").model / "model.safetensors")


def beside(run_folder: Path, name: str) -> Path:
    folder = run_folder.parent / name
    folder.mkdir()
    (folder / "data").symlink_to(run_folder / "data")
    return folder


@pytest.mark.parametrize("choices", [
    ("stage.pretrain.micro_batch_size=4",), pytest.param(("stage.pretrain.micro_batch_size=16",), id="one micro-batch"),
    pytest.param(("stage.pretrain.optimizer=adamw", "stage.pretrain.optimizer_state_dtype=bf16"), marks=pytest.mark.slow),
], ids=str)
def test_it_trains_as_fully_shard_does(train: Train, run_folder: Path, choices: tuple[str, ...]) -> None:
    sharded = beside(run_folder, "sharded")
    found = train(run_folder, *MIXED, *choices)
    wanted = train(sharded, *MIXED, *choices, target="train_ranks:train_sharded")
    assert found["loss"] == wanted["loss"] and found["grad_norm"] == wanted["grad_norm"]
    assert found["loss"][-1] < found["loss"][0] - 0.1
    ours, theirs = weights(run_folder), weights(sharded)
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}
    assert not torch.equal(ours["model.norm.weight"], ours["model.norm.weight"].bfloat16().float())
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.slow
def test_under_tensor_parallelism_it_trains_nearly_as_fully_shard_does(train: Train, run_folder: Path) -> None:
    """Not to the bit: kernels for bf16 add up otherwise where a cut weight is laid out otherwise in memory."""
    found = train(run_folder, *MIXED, "parallel.tp=2")
    wanted = train(beside(run_folder, "sharded"), *MIXED, "parallel.tp=2", target="train_ranks:train_sharded")
    np.testing.assert_allclose(found["loss"], wanted["loss"], rtol=0, atol=5e-3)


def test_checkpoints_are_exchanged_with_fully_shard(train: Train, run_folder: Path) -> None:
    """Killed without it, gone on with it: as if nothing had happened, since a checkpoint holds the exact weights."""
    sharded = beside(run_folder, "sharded")
    wanted = train(sharded, *MIXED)
    with pytest.raises(RankError, match="was killed by signal 9"):
        train(run_folder, *MIXED, target="train_ranks:train_and_signal", at_step=5, number=signal.SIGKILL, rank=0)
    newest = max(RunFolder(run_folder).stage("pretrain").checkpoints.iterdir())
    kept = read_json(newest / "index.json")["tensors"]
    assert {entry["dtype"] for entry in kept.values()} == {"float32"}
    found = train(run_folder, *MIXED, target="train_ranks:train_sharded")
    assert found["loss"] == wanted["loss"]
    assert all(torch.equal(tensor, weights(sharded)[name]) for name, tensor in weights(run_folder).items())


def test_another_state_dtype_is_another_stage(train: Train, run_folder: Path) -> None:
    from athanor.foundation.errors import UserError

    train(run_folder, *MIXED, "stage.pretrain.optimizer_state_dtype=bf16")
    newest = max(RunFolder(run_folder).stage("pretrain").checkpoints.iterdir())
    kept = {entry["dtype"] for key, entry in read_json(newest / "index.json")["tensors"].items() if key.startswith("optimizer.")}
    assert kept == {"bfloat16"}
    with pytest.raises(UserError, match="optimizer_state_dtype was bf16 and is fp32"):
        train(run_folder, *MIXED)
