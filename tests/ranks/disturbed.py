"""How tests disturb a stage while it trains, and what its records must say afterwards."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny_run import seconds_until_book

from athanor.foundation.run_folder import StageFolder, read_jsonl
from athanor.ledger.book import read_book
from athanor.ledger.interruptions import interruptions

STEPS, EVERY = 24, 6  # of the stage, and between its checkpoints
Row = dict[str, Any]


@contextmanager
def when(stage: StageFolder, step: int, later: float, act: Callable[[], None], pids: Path) -> Iterator[None]:
    """Do something `later` seconds after a step is done; ranks `in_sight` wait for that, and hurry when it is done."""

    def watch() -> None:
        deadline = time.monotonic() + 150  # for a start of ranks on a busy machine
        while max((row["step"] for row in read_jsonl(stage.metrics)), default=0) < step and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(later)
        act()
        (pids / "hurry").touch()

    (pids / "hurry").unlink(missing_ok=True)
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def events(stage: StageFolder, *kinds: str) -> list[Row]:
    return [row for row in read_jsonl(stage.events) if row["kind"] in kinds]


def assert_only_uncheckpointed_steps_are_lost(stage: StageFolder) -> None:
    """After each fault the ranks go on from the newest checkpoint that was told before, or a later one."""
    saved = 0
    for row in events(stage, "checkpoint", "fault", "restart"):
        if row["kind"] == "checkpoint":
            saved = row["step"]
        elif row["kind"] == "restart":
            assert row["step"] >= saved
    steps = {row["step"] for row in read_jsonl(stage.metrics)}
    most = 2 * EVERY + 1  # since the last checkpoint, and that one may still have been on its way to the disk
    assert len(read_jsonl(stage.metrics)) <= len(steps) + most * len(events(stage, "fault"))


def in_sight(pids: Path, hold: int = STEPS - 1) -> Row:
    """What trains where it can be disturbed, and waits for that when `hold` steps are done."""
    return {"target": "jobs_ranks:train_in_sight", "pids": str(pids), "pause": 0.02, "hold": hold}


def assert_every_second_is_told(stage: StageFolder, begun: float) -> None:
    book, wall_seconds = read_book(stage.actual), seconds_until_book(stage, begun)
    assert book.wall_seconds == pytest.approx(wall_seconds, rel=0.1, abs=0.3)
    assert abs(book.accounts["unattributed"]) <= 0.05 * book.device_seconds + 0.1, book.accounts
    assert book.tokens == read_jsonl(stage.metrics)[-1]["tokens"]
    costs = interruptions(read_jsonl(stage.root / "ledger.jsonl"))
    for account in ("lost", "down"):
        assert sum(each.accounts[account] for each in costs) == pytest.approx(book.accounts.get(account, 0.0)), account
    assert [each.resumed_step for each in costs] == [row["step"] for row in events(stage, "restart")]
