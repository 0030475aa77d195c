"""That the actual book is true: seconds put into one place appear in exactly that account, and hidden ones in none."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import pytest

from athanor.ledger.accounts import NAMES
from athanor.ledger.book import Book, read_book

STEPS, DELAY = 16, 0.08
SIZES = ("stage.pretrain.precision=fp32", "model.hidden_size=64", f"stage.pretrain.steps={STEPS}",
         "stage.pretrain.global_batch_tokens=256", "stage.pretrain.evaluate_every=1000", "stage.pretrain.warmup_steps=1")
# with a single micro-batch, so that nothing hides a delay
PIPELINE = ("parallel.pp=2", "parallel.pipeline_schedule=GPipe", "stage.pretrain.micro_batch_size=8")
# Where the seconds are put, in which layout, and how many delays of one device appear where. What runs after a pause is some
# milliseconds slower on cold caches: where that could blur an account, the delays are moved there from the loader.
PLACES = [
    ("loader", ["parallel.dp_shard=2"], {"input": 2 * STEPS}),
    ("one rank", ["parallel.dp_shard=2"], {"skew": 2 * STEPS}),  # its own time and the other's waiting
    ("save", ["parallel.dp_shard=2", "stage.pretrain.checkpoint_every=2"], {"checkpoint": STEPS}),
    ("gather", ["parallel.tp=2"], {"tensor": 2 * STEPS}),
    ("reduction", ["parallel.dp_shard=2"], {"data_parallel": 2 * STEPS}),
    ("exchange", ["parallel.cp=2"], {"context": 2 * STEPS}),
    ("stage", PIPELINE, {"kernel": STEPS, "bubble": STEPS}),  # a stage that takes longer, and one that waits for it
    ("link", PIPELINE, {"pipeline": STEPS, "bubble": STEPS}),  # what is long under way is waited for by both stages
]
LAYOUTS = {"dp_shard 2": ["parallel.dp_shard=2"], "tp 2": ["parallel.tp=2"], "cp 2": ["parallel.cp=2"],
           "pp 2": ["parallel.pp=2", "stage.pretrain.micro_batch_size=2"],
           "dp_shard 2 x pp 2": ["parallel.dp_shard=2", "parallel.pp=2", "parallel.pipeline_schedule=1F1B",
                                 "stage.pretrain.micro_batch_size=1"],
           "dp_shard 2 x tp 2": ["parallel.dp_shard=2", "parallel.tp=2"]}


def book_with(train: Any, folder: Path, data: Path, place: str, *overrides: str) -> Book:
    folder.mkdir()
    (folder / "data").symlink_to(data)
    every = () if any("checkpoint_every" in item for item in overrides) else ("stage.pretrain.checkpoint_every=1000",)
    train(folder, *SIZES, *every, *overrides, target="inject_ranks:train_with", place=place, seconds=DELAY, peak_flops=1e11,
          launched=time.perf_counter())
    return read_book(folder / "pretrain" / "actual.json")


@pytest.mark.parametrize(("place", "layout", "expected"), [
    pytest.param(*case, marks=() if case[0] in ("loader", "one rank", "save") else pytest.mark.slow) for case in PLACES],
    ids=[case[0] for case in PLACES])
def test_injected_seconds_appear_in_exactly_one_account(train: Any, tmp_path: Path, data_folder: Path, place: str,
                                                        layout: list[str], expected: dict[str, int]) -> None:
    origin = "nowhere" if place in ("loader", "save") else "loader"
    injected = {name: DELAY * times for name, times in expected.items()}
    if origin == "loader":
        injected["input"] = -2 * STEPS * DELAY
    before: list[dict[str, float]] = []
    after: list[dict[str, float]] = []
    for attempt in range(6):  # other processes on the machine can spoil a run, but do not make a wrong book right
        before.append(book_with(train, tmp_path / f"before-{attempt}", data_folder, origin, *layout).accounts)
        after.append(book_with(train, tmp_path / f"after-{attempt}", data_folder, place, *layout).accounts)
        change = {name: typical(after, name) - typical(before, name) for name in after[-1]}
        others = set(change) - set(injected) - {"startup", "evaluation"}
        if (all(abs(change[name] - seconds) < 0.1 * abs(seconds) for name, seconds in injected.items())
                and all(abs(change[name]) < 0.25 * max(injected.values()) for name in others)):
            return
    pytest.fail(f"{injected} device-seconds were expected, but the medians changed by {change}: {before}, {after}")


def typical(books: list[dict[str, float]], account: str) -> float:
    return statistics.median(book.get(account, 0.0) for book in books)


def test_what_is_shown_on_the_way_stands_in_accounts(train: Any, run_folder: Path) -> None:
    told: list[dict[str, Any]] = []
    train(run_folder, *SIZES, "stage.pretrain.steps=6", on_message=told.append, peak_flops=1e11)
    assert all(set(message["accounts"]) <= set(NAMES) for message in told)
    assert told[-1]["accounts"]["useful"] == 0.0 or told[-1]["accounts"]["kernel"] > 0


def test_little_is_unattributed_and_a_hidden_interval_shows(train: Any, tmp_path: Path, data_folder: Path) -> None:
    whole = book_with(train, tmp_path / "whole", data_folder, "nowhere", "parallel.dp_shard=2")
    assert abs(whole.derived()["unattributed_share"]) < 0.05, whole.accounts
    hidden = book_with(train, tmp_path / "hidden", data_folder, "hide", "parallel.dp_shard=2")
    assert hidden.accounts.get("optimizer", 0.0) == 0.0
    grown = hidden.accounts["unattributed"] - whole.accounts["unattributed"]
    assert grown > 0.5 * whole.accounts["optimizer"], (hidden.accounts, whole.accounts)
    assert sum(hidden.accounts.values()) == pytest.approx(hidden.device_seconds)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_explains_its_seconds(train: Any, tmp_path: Path, data_folder: Path, layout: str) -> None:
    book = book_with(train, tmp_path / "run", data_folder, "nowhere", *LAYOUTS[layout])
    assert abs(book.derived()["unattributed_share"]) < 0.02, book.accounts
    axes = {"tp": "tensor", "cp": "context", "pp": "bubble"}
    for axis, account in axes.items():
        assert (book.accounts.get(account, 0.0) > 0) == (axis in layout), book.accounts
