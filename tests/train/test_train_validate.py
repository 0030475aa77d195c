"""Validation on some of the held-out rows: spread over all of them, and the same in every layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from athanor.data.rows import open_rows
from athanor.foundation.run_folder import read_jsonl

Train = Callable[..., dict[str, Any]]


def loss_of(train: Train, run_folder: Path, name: str, *overrides: str) -> float:
    folder = run_folder.with_name(name)
    folder.mkdir()
    (folder / "data").symlink_to(run_folder / "data")
    train(folder, "stage.pretrain.steps=1", "stage.pretrain.warmup_steps=0", *overrides)
    (found,) = [row["validation_loss"] for row in read_jsonl(folder / "pretrain" / "metrics.jsonl") if "validation_loss" in row]
    return float(found)


def test_some_rows_are_the_same_in_every_layout(train: Train, run_folder: Path) -> None:
    count = open_rows(run_folder / "data", "documents", 32, 0, "evaluation").count
    assert count > 8
    whole = loss_of(train, run_folder, "whole")
    assert loss_of(train, run_folder, "more", f"stage.pretrain.evaluate_rows={10 * count}") == whole
    some = loss_of(train, run_folder, "some", "stage.pretrain.evaluate_rows=5")
    assert abs(some - whole) > 1e-6
    assert abs(loss_of(train, run_folder, "two", "stage.pretrain.evaluate_rows=5", "parallel.dp_shard=2") - some) < 1e-9
