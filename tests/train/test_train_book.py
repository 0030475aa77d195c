"""That the actual book is true: seconds put into one place appear in exactly that account, and hidden ones in none."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from athanor.ledger.book import Book, read_book

STEPS, DELAY = 50, 0.02
SIZES = ("parallel.dp_shard=2", "stage.pretrain.precision=fp32", "model.hidden_size=64", f"stage.pretrain.steps={STEPS}",
         "stage.pretrain.global_batch_tokens=256", "stage.pretrain.evaluate_every=1000", "stage.pretrain.warmup_steps=1")


def book_with(train: Any, folder: Path, data: Path, place: str, *overrides: str) -> Book:
    folder.mkdir()
    (folder / "data").symlink_to(data)
    train(folder, *SIZES, *overrides, target="inject_ranks:train_with", place=place, seconds=DELAY, peak_flops=1e11,
          launched=time.perf_counter())
    return read_book(folder / "pretrain" / "actual.json")


@pytest.mark.parametrize(("place", "account", "times"), [("loader", "input", STEPS), ("one rank", "skew", STEPS),
                                                          ("save", "checkpoint", 25)])
def test_injected_seconds_appear_in_exactly_one_account(train: Any, tmp_path: Path, data_folder: Path, place: str,
                                                        account: str, times: int) -> None:
    every = f"stage.pretrain.checkpoint_every={2 if place == 'save' else 1000}"
    injected = 2 * DELAY * times  # device-seconds: a late rank costs its own time and the other's waiting
    seen = []
    for attempt in range(3):  # other processes on the machine can spoil a pair of runs, but never make a wrong one right
        before = book_with(train, tmp_path / f"before-{attempt}", data_folder, "nowhere", every)
        after = book_with(train, tmp_path / f"after-{attempt}", data_folder, place, every)
        change = {name: after.accounts.get(name, 0.0) - before.accounts.get(name, 0.0) for name in after.accounts}
        others = set(change) - {account, "startup", "evaluation"}
        seen.append(change)
        if abs(change[account] - injected) < 0.1 * injected and all(abs(change[name]) < 0.25 * injected for name in others):
            return
    pytest.fail(f"{injected} device-seconds were injected into {account}, but the changes were {seen}")


def test_little_is_unattributed_and_a_hidden_interval_shows(train: Any, tmp_path: Path, data_folder: Path) -> None:
    whole = book_with(train, tmp_path / "whole", data_folder, "nowhere")
    assert abs(whole.derived()["unattributed_share"]) < 0.05, whole.accounts
    hidden = book_with(train, tmp_path / "hidden", data_folder, "hide")
    assert hidden.accounts.get("optimizer", 0.0) == 0.0
    grown = hidden.accounts["unattributed"] - whole.accounts["unattributed"]
    assert grown > 0.5 * whole.accounts["optimizer"], (hidden.accounts, whole.accounts)
    assert sum(hidden.accounts.values()) == pytest.approx(hidden.device_seconds)
