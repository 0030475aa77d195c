"""That the actual book is true: seconds put into one place appear in exactly that account, and hidden ones in none."""

from __future__ import annotations

import signal
import statistics
import time
from pathlib import Path
from typing import Any

import pytest

from athanor.foundation.run_folder import RunFolder, read_jsonl
from athanor.ledger.accounts import NAMES
from athanor.ledger.attempts import so_far
from athanor.ledger.book import Book, read_book

STEPS, DELAY = 16, 0.08
SIZES = ("stage.pretrain.precision=fp32", "model.hidden_size=64", f"stage.pretrain.steps={STEPS}",
         "stage.pretrain.global_batch_tokens=256", "stage.pretrain.evaluate_every=1000", "stage.pretrain.warmup_steps=1")
# with a single micro-batch, so that nothing hides a delay
PIPELINE = ("parallel.pp=2", "parallel.pipeline_schedule=GPipe", "stage.pretrain.micro_batch_size=8")
# Where the seconds are put, in which layout, and which multiple of them appears where. What runs after a pause is some
# milliseconds slower on cold caches: where that could blur an account, the pauses are moved there from the loader.
PLACES = [
    ("loader", ["parallel.dp_shard=2"], {"input": 1}),
    ("one rank", ["parallel.dp_shard=2"], {"skew": 2}),  # its own time and the other's waiting
    ("save", ["parallel.dp_shard=2", "stage.pretrain.checkpoint_every=2"], {"checkpoint": 1}),
    ("gather", ["parallel.tp=2"], {"tensor": 1}),
    ("reduction", ["parallel.dp_shard=2"], {"data_parallel": 1}),
    ("exchange", ["parallel.cp=2"], {"context": 1}),
    ("stage", PIPELINE, {"kernel": 1, "bubble": 1}),  # a stage that takes longer, and one that waits for it
    ("link", PIPELINE, {"pipeline": 1, "bubble": 1}),  # what is long under way is waited for by both stages
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


def explained(train: Any, folder: Path, data: Path, share: float, *layout: str) -> Book:
    """A book of which less than `share` is unattributed: other processes can spoil a run, and the next one is made anew."""
    for attempt in range(4):
        book = book_with(train, folder / f"run-{attempt}", data, "nowhere", *layout)
        if abs(book.derived()["unattributed_share"]) < share:
            return book
    pytest.fail(f"too much is unattributed: {book.accounts}")


def paused(folder: Path) -> float:
    """Seconds that the ranks of a run were held up, together."""
    return sum(float(file.read_text()) for file in folder.glob("paused-*"))


@pytest.mark.parametrize(("place", "layout", "expected"), [
    pytest.param(*case, marks=() if case[0] in ("loader", "one rank", "save") else pytest.mark.slow) for case in PLACES],
    ids=[case[0] for case in PLACES])
def test_injected_seconds_appear_in_exactly_one_account(train: Any, tmp_path: Path, data_folder: Path, place: str,
                                                        layout: list[str], expected: dict[str, int]) -> None:
    origin = "nowhere" if place in ("loader", "save") else "loader"
    changes: list[dict[str, float]] = []
    for attempt in range(6):  # other processes on the machine can spoil a run, but do not make a wrong book right
        folders = tmp_path / f"before-{attempt}", tmp_path / f"after-{attempt}"
        before = book_with(train, folders[0], data_folder, origin, *layout).accounts
        after = book_with(train, folders[1], data_folder, place, *layout).accounts
        injected = {name: times * paused(folders[1]) for name, times in expected.items()}
        if origin == "loader":
            injected["input"] = -paused(folders[0])
        assert all(abs(seconds) >= STEPS * DELAY / 2 for seconds in injected.values())
        # what an account grew by more than was injected, over the largest injection
        largest = max(injected.values())
        changes.append({name: (after[name] - before.get(name, 0.0) - injected.get(name, 0.0)) / largest for name in after})
        surplus = {name: statistics.median(change.get(name, 0.0) for change in changes) for name in after}
        if all(abs(surplus[name]) < (0.1 if name in injected else 0.25) for name in set(surplus) - {"startup", "evaluation"}):
            return
    pytest.fail(f"{injected} device-seconds were expected; over the largest, the accounts changed by this much more: {surplus}")


def test_what_is_shown_on_the_way_stands_in_accounts(train: Any, run_folder: Path) -> None:
    told: list[dict[str, Any]] = []
    train(run_folder, *SIZES, "stage.pretrain.steps=6", on_message=told.append, peak_flops=1e11)
    assert all(set(message["accounts"]) <= set(NAMES) for message in told)
    assert told[-1]["accounts"]["useful"] == 0.0 or told[-1]["accounts"]["kernel"] > 0


def test_a_stage_that_is_not_done_has_a_book_so_far(train: Any, run_folder: Path) -> None:
    stage, seen = RunFolder(run_folder).stage("pretrain"), list[tuple[Book, str]]()
    often = (*SIZES, "stage.pretrain.steps=6", "stage.pretrain.checkpoint_every=1")
    assert so_far(stage) is None, "nothing was begun"

    def look(message: dict[str, Any]) -> None:
        if (found := so_far(stage)) is not None and message["step"] < 6:
            seen.append(found)
        (run_folder / "heard").write_text(str(message["step"]))

    train(run_folder, *often, target="train_ranks:train_and_signal", at_step=4, number=signal.SIGTERM, rank=0, on_message=look,
          heard=str(run_folder / "heard"))
    assert seen and all(state.startswith("running, step ") and state.endswith(" of 6") for _, state in seen)
    book, _ = seen[-1]
    assert 0 < book.tokens < 6 * 256 and sum(book.accounts.values()) == pytest.approx(book.device_seconds)
    assert (book.layout, book.devices, book.accelerator) == ("one rank", 1, "cpu")
    stopped = so_far(stage)
    assert stopped is not None and stopped[1] == f"stopped, step {read_jsonl(stage.metrics)[-1]['step']} of 6"
    assert stopped[0].device_seconds == pytest.approx(read_book(stage.actual).device_seconds)
    train(run_folder, *often)
    assert so_far(stage) is None, "it is done"


def test_little_is_unattributed_and_a_hidden_interval_shows(train: Any, tmp_path: Path, data_folder: Path) -> None:
    for attempt in range(4):  # other processes can make the optimizer's time of one run several times that of another
        (folder := tmp_path / str(attempt)).mkdir()
        whole = explained(train, folder, data_folder, 0.05, "parallel.dp_shard=2")
        hidden = book_with(train, folder / "hidden", data_folder, "hide", "parallel.dp_shard=2")
        assert hidden.accounts.get("optimizer", 0.0) == 0.0
        assert sum(hidden.accounts.values()) == pytest.approx(hidden.device_seconds)
        if hidden.accounts["unattributed"] - whole.accounts["unattributed"] > 0.5 * whole.accounts["optimizer"]:
            return
    pytest.fail(f"nothing shows: {hidden.accounts}, {whole.accounts}")


def test_devices_without_a_rank_are_paid_for(train: Any, run_folder: Path) -> None:
    train(run_folder, *SIZES, idle={"spare": 2, "down": 1}, launched=time.perf_counter())
    book = read_book(run_folder / "pretrain" / "actual.json")
    assert book.accounts["spare"] == pytest.approx(2 * book.wall_seconds)
    assert book.accounts["down"] == pytest.approx(book.wall_seconds)
    assert book.device_seconds == pytest.approx((1 + 3) * book.wall_seconds, rel=1e-3) and book.devices == 1
    assert abs(book.accounts["unattributed"]) < 0.05 * book.wall_seconds, book.accounts


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_explains_its_seconds(train: Any, tmp_path: Path, data_folder: Path, layout: str) -> None:
    book = explained(train, tmp_path, data_folder, 0.02, *LAYOUTS[layout])
    axes = {"tp": "tensor", "cp": "context", "pp": "bubble"}
    for axis, account in axes.items():
        assert (book.accounts.get(account, 0.0) > 0) == (axis in layout), book.accounts
