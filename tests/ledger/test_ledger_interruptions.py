from __future__ import annotations

from pathlib import Path

import pytest

from athanor.foundation import run_folder
from athanor.foundation.errors import DiskError
from athanor.foundation.run_folder import StageFolder, append_jsonl, read_jsonl
from athanor.ledger.attempts import book_of, note, roll_back, throw_away
from athanor.ledger.interruptions import interruptions

DEVICES = 2


def line(file: Path, attempt: int, first: int, last: int, skipped: int = 0, **accounts: float) -> None:
    """What a meter writes of some steps, each of a second of computing and 0.2 of communication on both devices."""
    steps = last - first
    spent = {"compute": 2.0 * steps, "data_parallel": 0.4 * steps, **accounts}
    append_jsonl(file, {"attempt": attempt, "time": 0.0, "first_step": first, "last_step": last,
                        "wall_seconds": sum(spent.values()) / 2, "device_seconds": sum(spent.values()),
                        "tokens": 10 * steps, "model_flops": 0.0, "model_flops_full": 0.0,
                        "skipped_steps": skipped, "accounts": spent})


def check(file: Path, skipped_seconds: float = 0.0) -> None:
    book, found = book_of(read_jsonl(file), devices=DEVICES, accelerator="CPU", peak_flops=None), interruptions(read_jsonl(file))
    for name in ("lost", "down"):
        cost = sum(each.accounts[name] for each in found)
        assert cost + (skipped_seconds if name == "lost" else 0.0) == pytest.approx(book.accounts.get(name, 0.0)), name


def test_a_run_without_a_fault_was_not_interrupted(tmp_path: Path) -> None:
    line(tmp_path / "ledger", 0, 0, 10, startup=8.0)
    assert interruptions(read_jsonl(tmp_path / "ledger")) == [] == interruptions([])


def test_each_fault_costs_its_steps_its_pause_and_its_start(tmp_path: Path) -> None:
    file = tmp_path / "ledger"
    line(file, 0, 0, 10, startup=8.0, checkpoint=1.0)
    line(file, 0, 10, 14)
    note(file, {"startup": 0.0, "checkpoint": 0.0, "lost": 1.5}, until=0.0, attempt=0, step=15, devices=DEVICES)
    note(file, {"down": 0.25}, until=0.0, attempt=0, step=15, devices=DEVICES)
    roll_back(file, 10, 1)
    line(file, 1, 10, 20, startup=3.0)
    note(file, {"startup": 0.0, "checkpoint": 0.5, "lost": 2.0}, until=0.0, attempt=1, step=21, devices=DEVICES)  # killed again
    note(file, {"down": 0.5}, until=0.0, attempt=1, step=21, devices=DEVICES)
    note(file, {"startup": 1.0, "checkpoint": 0.0, "lost": 0.0}, until=0.0, attempt=2, step=0, devices=DEVICES)  # while starting
    note(file, {"down": 0.75}, until=0.0, attempt=2, step=0, devices=DEVICES)
    roll_back(file, 18, 2)
    line(file, 2, 18, 24, startup=4.0)
    line(file, 2, 24, 30)
    first, second = interruptions(read_jsonl(file))
    assert (first.step, first.resumed_step, first.steps_again) == (15, 10, 5)
    assert first.accounts == pytest.approx({"lost": 4 * 2.4 + 3.0, "down": 0.5, "startup": 3.0})
    assert (second.step, second.resumed_step, second.steps_again) == (21, 18, 3)
    assert second.accounts == pytest.approx({"lost": 2 * 2.4 + 4.0, "down": 2.5, "startup": 2.0 + 4.0})
    check(file)


def test_steps_that_are_lost_twice_are_counted_once(tmp_path: Path) -> None:
    """A checkpoint turns out to be damaged at the second start: it goes further back, past steps that were lost before."""
    file = tmp_path / "ledger"
    line(file, 0, 0, 10)
    line(file, 0, 10, 20)
    roll_back(file, 15, 1)
    line(file, 1, 15, 16)
    note(file, {"startup": 0.0, "lost": 0.5}, until=0.0, attempt=1, step=16, devices=DEVICES)
    roll_back(file, 5, 2)
    line(file, 2, 5, 30)
    first, second = interruptions(read_jsonl(file))
    assert first.accounts["lost"] == pytest.approx(5 * 2.4)
    assert second.accounts["lost"] == pytest.approx((5 + 5 + 1) * 2.4 + 1.0) and second.steps_again == 11
    check(file)


def test_what_was_thrown_away_is_one_interruption(tmp_path: Path) -> None:
    folder = StageFolder(tmp_path)
    line(folder.ledger, 0, 0, 10, startup=8.0)
    line(folder.ledger, 0, 10, 14)
    throw_away(folder)
    line(folder.ledger, 0, 0, 6, startup=3.0)
    line(folder.ledger, 0, 6, 9)
    roll_back(folder.ledger, 6, 1)
    line(folder.ledger, 1, 6, 12, startup=5.0)
    first, second = interruptions(read_jsonl(folder.ledger))
    assert first.accounts == pytest.approx({"lost": 14 * 2.4 + 8.0, "down": 0.0, "startup": 3.0})
    assert (first.step, first.resumed_step, first.steps_again) == (14, 0, 14)
    assert second.accounts["lost"] == pytest.approx(3 * 2.4) and second.steps_again == 3
    check(folder.ledger)


def test_a_rollback_in_place_counts_no_skipped_step_twice(tmp_path: Path) -> None:
    file = tmp_path / "ledger"
    line(file, 0, 0, 8)
    line(file, 0, 8, 18, skipped=5)
    roll_back(file, 8, 0)
    line(file, 0, 8, 20, startup=0.5)
    (only,) = interruptions(read_jsonl(file))
    assert only.accounts == pytest.approx({"lost": 10 * 2.4 / 2, "down": 0.0, "startup": 0.5}) and only.steps_again == 10
    check(file, skipped_seconds=5 * 2.4)


def test_a_line_of_the_agent_waits_for_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise DiskError("full")

    file = tmp_path / "ledger"
    monkeypatch.setattr(run_folder, "append_jsonl", full)
    note(file, {"lost": 1.5}, until=0.0, attempt=0, step=11, devices=DEVICES)
    monkeypatch.undo()
    roll_back(file, 10, 1)
    assert [row.get("accounts") for row in read_jsonl(file)] == [{"lost": 3.0}, None]


def test_a_run_that_was_given_up_has_not_gone_on(tmp_path: Path) -> None:
    file = tmp_path / "ledger"
    line(file, 0, 0, 10)
    note(file, {"startup": 0.0, "checkpoint": 0.0, "lost": 1.5}, until=0.0, attempt=0, step=11, devices=DEVICES)
    (only,) = interruptions(read_jsonl(file))
    assert only.resumed_step is None and only.steps_again == 0 and only.device_seconds == pytest.approx(3.0)
