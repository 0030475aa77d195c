from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from athanor.foundation.errors import UserError
from athanor.foundation.run_folder import StageFolder, append_when_possible, read_jsonl, write_json
from athanor.ledger.accounts import ACCOUNTS, STEPPING
from athanor.ledger.attempts import book_of, note, roll_back, throw_away, unwritten
from athanor.ledger.book import Book, read_book, total


def a_book() -> Book:
    book = Book("actual", 2, "CPU", 100.0, wall_seconds=10, device_seconds=20, tokens=1000, model_flops=600, model_flops_full=900)
    for name, seconds in {"useful": 6, "kernel": 4, "data_parallel": 2, "checkpoint": 1, "startup": 5}.items():
        book.add(name, seconds)
    return book.close()


def test_a_closed_book_sums_to_what_was_paid() -> None:
    book = a_book()
    assert book.accounts["unattributed"] == 2 and sum(book.accounts.values()) == book.device_seconds
    assert book.close().accounts["unattributed"] == 2, "closing twice changes nothing"


def test_ratios_follow_their_definitions() -> None:
    derived = a_book().derived()
    assert derived["mfu"] == pytest.approx(6 / 12) and derived["mfu_full_attention"] == pytest.approx(0.75)
    assert derived["goodput"] == pytest.approx(12 / 20) and derived["end_to_end"] == pytest.approx(6 / 20)
    assert derived["unattributed_share"] == pytest.approx(0.1)


def test_the_list_of_accounts_is_closed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'optimizer'"):
        a_book().add("optimiser", 1)
    with pytest.raises(ValueError, match="cannot hold"):
        a_book().add("kernel", float("nan"))
    assert len({account.name for account in ACCOUNTS}) == len(ACCOUNTS) == 27
    assert "input" in STEPPING and "checkpoint" not in STEPPING and "startup" not in STEPPING


def test_books_survive_the_disk_and_others_are_refused(tmp_path: Path) -> None:
    a_book().write(tmp_path / "actual.json")
    assert read_book(tmp_path / "actual.json") == a_book()
    write_json(tmp_path / "other.json", {"schema": 9})
    with pytest.raises(UserError, match=r"other\.json is not a book"):
        read_book(tmp_path / "other.json")
    write_json(tmp_path / "odd.json", {"schema": 1, "accounts": {"kernal": 1}})
    with pytest.raises(UserError, match="kernel"):
        read_book(tmp_path / "odd.json")


def test_a_chain_adds_up_and_the_gaps_are_unattributed() -> None:
    check = Book("actual", 2, "CPU", 100.0, wall_seconds=3, device_seconds=6)
    check.add("check", 6)
    whole = total([check.close(), a_book()], "actual", wall_seconds=14, devices=2)
    assert whole.device_seconds == 28 and whole.accounts["useful"] == 6 and whole.accounts["check"] == 6
    assert whole.accounts["unattributed"] == pytest.approx(28 - 6 - 18)
    assert whole.tokens == 1000 and whole.accelerator == "CPU"


def test_a_chain_has_a_layout_when_its_stages_agree() -> None:
    books = [replace(a_book(), layout=layout) for layout in ("tp=2", "tp=2", "dp_shard=2")]
    assert total(books[:2], "actual", wall_seconds=20, devices=2).layout == "tp=2"
    assert total(books, "actual", wall_seconds=30, devices=2).layout is None


def line(first: int, last: int, **accounts: float) -> dict[str, object]:
    seconds = sum(accounts.values())
    return {"attempt": 0, "first_step": first, "last_step": last, "wall_seconds": seconds, "device_seconds": seconds,
            "tokens": 10.0 * (last - first), "model_flops": 100.0 * (last - first), "model_flops_full": 0.0, "accounts": accounts}


def test_rolled_back_steps_are_lost_and_their_tokens_not_counted() -> None:
    lines = [line(0, 10, startup=5, compute=20), line(10, 20, compute=20, checkpoint=1), {"attempt": 1, "resumed_step": 15},
             line(15, 25, startup=3, compute=20)]
    book = book_of(lines, devices=1, accelerator="CPU", peak_flops=100.0)
    assert book.tokens == 100 + 50 + 100
    assert book.accounts["lost"] == pytest.approx(10) and book.accounts["checkpoint"] == 1 and book.accounts["startup"] == 8
    assert book.accounts["useful"] == pytest.approx(25) and book.accounts["kernel"] == pytest.approx(50 - 25)
    assert book.accounts["unattributed"] == pytest.approx(0)


def test_a_rollback_on_a_full_disk_is_told_after_the_lines_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "ledger.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        append_when_possible(file, {"last_step": 20})
        roll_back(file, 10, 0)
    append_when_possible(file, {"last_step": 12})
    assert [row.get("last_step", row.get("resumed_step")) for row in read_jsonl(file)] == [20, 10, 12]


def test_skipped_steps_are_lost_too() -> None:
    skipping = {**line(10, 20, compute=20, checkpoint=1), "skipped_steps": 2, "tokens": 80.0, "model_flops": 800.0}
    book = book_of([line(0, 10, compute=20), skipping], devices=1, accelerator="CPU", peak_flops=100.0)
    assert book.accounts["lost"] == pytest.approx(4) and book.accounts["checkpoint"] == 1 and book.tokens == 180
    assert book.accounts["useful"] == pytest.approx(18) and book.accounts["kernel"] == pytest.approx(36 - 18)
    rolled = book_of([skipping, {"attempt": 1, "resumed_step": 15}], devices=1, accelerator="CPU", peak_flops=100.0)
    assert rolled.accounts["lost"] == pytest.approx(12) and rolled.tokens == 40, "of the half that is kept, a fifth"
    assert rolled.accounts["unattributed"] == pytest.approx(0)


def told(folder: StageFolder) -> list[tuple[float, float, dict[str, float]]]:
    """Of what a killed attempt could not tell: until when, device-seconds, accounts; each only once."""
    found = unwritten(folder)
    for row in found:
        append_when_possible(folder.ledger, row)
    assert not unwritten(folder)
    return [(row["time"], row["device_seconds"], row["accounts"]) for row in found]


def test_what_is_killed_together_with_its_agent_is_told_by_the_next(tmp_path: Path) -> None:
    folder = StageFolder(tmp_path)

    def sign(launched: float, time: float, phase: str = "startup") -> None:
        folder.earlier_beats.mkdir(parents=True, exist_ok=True)
        for rank in (0, 1):
            (folder.earlier_beats / f"rank-{rank}.json").write_text(json.dumps(
                {"launched": launched, "time": time, "phase": phase}))

    def start(time: float, attempt: int) -> None:
        append_when_possible(folder.events, {"kind": "start", "time": time, "ranks": 2, "attempt": attempt, "step": 0,
                                             "startup_seconds": 5.0, "idle": {"spare": 1}})

    assert told(folder) == []
    sign(100.0, 103.0)
    assert told(folder) == [(103.0, 6.0, {"startup": 6.0})], "before it began"
    sign(110.0, 111.0, "done")
    assert told(folder) == [], "was refused"
    start(125.0, 0)
    sign(120.0, 130.0, "compute")
    append_when_possible(folder.metrics, {"step": 1, "time": 128.0})
    assert told(folder) == [(130.0, 30.0, {"startup": 10.0, "lost": 10.0, "spare": 10.0})], "before its first line"
    start(145.0, 1)
    append_when_possible(folder.ledger, line(0, 10, compute=18, spare=9) | {"time": 149.0, "attempt": 1})
    append_when_possible(folder.metrics, {"step": 11, "time": 150.0})
    sign(160.0, 162.0)  # the next one was killed before it could tell of this
    assert told(folder) == [(150.0, 3.0, {"startup": 0.0, "lost": 2.0, "spare": 1.0}), (162.0, 4.0, {"startup": 4.0})]
    book = book_of(read_jsonl(folder.ledger), devices=2, accelerator="CPU", peak_flops=100.0)
    assert book.device_seconds == 6 + 30 + 27 + 3 + 4 and book.accounts["unattributed"] == pytest.approx(0)
    start(175.0, 2)
    append_when_possible(folder.events, {"kind": "stop", "time": 190.0})
    sign(170.0, 190.5, "done")
    assert told(folder) == [], "it has told all"


def test_a_clock_that_was_set_back_and_lines_of_an_earlier_version_count_nothing_twice(tmp_path: Path) -> None:
    folder = StageFolder(tmp_path)
    append_when_possible(folder.events, {"kind": "start", "time": 1000.0, "ranks": 2, "attempt": 1, "startup_seconds": 5.0})
    for row in ({"attempt": 1, "resumed_step": 0, "time": 990.0, "wall_seconds": 3.0, "device_seconds": 6.0},
                line(0, 10, startup=10, compute=4) | {"time": 500.0, "attempt": 1, "devices": 2}):
        append_when_possible(folder.ledger, row)
    for step, time in ((1, 1003.0), (11, 502.0)):
        append_when_possible(folder.metrics, {"step": step, "time": time})
    assert told(folder) == [(502.0, 4.0, {"startup": 0.0, "lost": 4.0})]
    note(folder.ledger, {"down": 1.0}, until=504.0, attempt=1, step=11, devices=2)
    assert told(folder) == []


def test_what_is_thrown_away_is_lost_when_it_was_spent(tmp_path: Path) -> None:
    folder = StageFolder(tmp_path)
    throw_away(folder)
    assert not folder.ledger.exists(), "nothing was spent"
    rows = [line(0, 10, startup=5, compute=20) | {"time": 100.0}, {"attempt": 1, "resumed_step": 4},
            line(4, 10, compute=9, checkpoint=1) | {"time": 120.0, "device_seconds": 20.0}]
    for row in rows:
        append_when_possible(folder.ledger, row)
    append_when_possible(folder.events, {"kind": "start", "time": 80.0, "ranks": 2, "attempt": 0})
    append_when_possible(folder.metrics, {"step": 12, "time": 123.0})
    throw_away(folder)
    *lines, begun = read_jsonl(folder.ledger)
    assert [(row["time"], row["device_seconds"], row["accounts"]) for row in lines] == [
        (100.0, 25.0, {"lost": 25.0}), (120.0, 20.0, {"lost": 20.0}), (123.0, 6.0, {"lost": 6.0})]
    assert begun["resumed_step"] == 0 and [row["last_step"] for row in lines] == [10, 10, 12]
    throw_away(folder)
    assert read_jsonl(folder.ledger) == [*lines, begun], "once more, as after a kill in between, changes nothing"
    book = book_of([*lines, begun, line(0, 10, compute=20), {"attempt": 1, "resumed_step": 5}], devices=2, accelerator="CPU",
                   peak_flops=100.0)
    assert book.accounts["lost"] == pytest.approx(51 + 10) and book.tokens == 50
    assert book.wall_seconds == pytest.approx(25 + 10 + 3 + 20) and book.accounts["unattributed"] == pytest.approx(0)


def test_useful_above_computing_is_an_error_and_not_clamped() -> None:
    book = book_of([line(0, 10, compute=5)], devices=1, accelerator="CPU", peak_flops=100.0)
    assert book.accounts["kernel"] == pytest.approx(-5) and book.notes[0].startswith("error: useful exceeds")


@pytest.mark.parametrize(("changes", "words"), [
    ({"accounts": {"useful": "x"}}, "accounts must be numbers"), ({"accounts": []}, "accounts must be"),
    ({"device_seconds": None, "tokens": "x"}, "device_seconds, tokens must be numbers"), ({"devices": ...}, "not a whole book")])
def test_a_damaged_book_is_one_sentence(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    a_book().write(tmp_path / "actual.json")
    fields = json.loads((tmp_path / "actual.json").read_text()) | changes
    (tmp_path / "actual.json").write_text(json.dumps({key: value for key, value in fields.items() if value is not ...}))
    with pytest.raises(UserError, match=words):
        read_book(tmp_path / "actual.json")
