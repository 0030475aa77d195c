"""The ledger on the terminal, and the verb."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from athanor.cli.report import command, find_run
from athanor.foundation.errors import UserError
from athanor.foundation.run_folder import RunFolder, StageFolder, append_jsonl, read_jsonl
from athanor.ledger.accounts import BY_NAME
from athanor.ledger.attempts import roll_back, throw_away
from athanor.ledger.book import Book, read_book
from athanor.ledger.reconcile import reconcile
from athanor.report.faults import summary, timeline
from athanor.report.terminal import bar, print_ledger


def printed(run: RunFolder, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    print_ledger(reconcile("whole chain", read_book(run.forecast), read_book(run.actual)), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= width for line in text.splitlines())
    return str(text)


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_table_holds_both_books(finished: RunFolder, width: int) -> None:
    text, actual, forecast = printed(finished, width), read_book(finished.actual), read_book(finished.forecast)
    rows = {line.split()[1]: line.split()[2:] for line in text.splitlines() if line.startswith("■")}
    held = {account for book in (actual, forecast) for account, seconds in book.accounts.items() if abs(seconds) > 1e-6}
    assert list(rows) == [name for name in BY_NAME if name in held]
    for name, cells in rows.items():
        assert cells[:2] == [f"{book.accounts.get(name, 0.0):,.1f}" for book in (forecast, actual)]
        assert cells[2] == f"{100 * actual.accounts.get(name, 0.0) / actual.device_seconds:.1f}"
    assert f"{100 * actual.derived()['mfu']:.1f} %" in text and "useful / paid" in text
    assert "efficien" not in text.lower()


@pytest.mark.parametrize(("layouts", "words"), [
    (("tp=2", "tp=2"), "  layout  tp=2\n"), (("tp=2", "dp_shard=2"), "  layout  dp_shard=2; the forecast is for tp=2\n"),
    (("tp=2", None), "  layout  tp=2\n"), ((None, None), None)])
def test_layouts_and_how_far_a_stage_is_are_told(layouts: tuple[str | None, ...], words: str | None) -> None:
    books = [Book(kind, 2, "CPU", None, 100, 200, accounts={"kernel": 200.0}, layout=layout)  # type: ignore[arg-type]
             for kind, layout in zip(("forecast", "actual"), layouts, strict=True)]
    console = Console(file=io.StringIO(), width=100, color_system=None)
    print_ledger(reconcile("pretrain", books[0], books[1], progress="running, step 3 of 9"), console)
    text = str(console.file.getvalue())  # type: ignore[attr-defined]
    assert words in text if words else "layout" not in text
    assert "wall-clock 1 min 40 s so far (running, step 3 of 9), forecast 1 min 40 s in all" in text
    assert "so far, s" in text and not re.search(r"kernel +200.0 +200.0 +100.0 % +0 %", text), "there is no error yet"


def test_almost_nothing_has_no_sign() -> None:
    console = Console(file=io.StringIO(), width=100, color_system=None)
    book = Book("actual", 1, "CPU", None, 100, 100, accounts={"kernel": 100.04, "unattributed": -0.04})
    print_ledger(reconcile("pretrain", None, book), console)
    text = str(console.file.getvalue())  # type: ignore[attr-defined]
    assert re.search(r"unattributed +– +0\.0 +0\.0 %", text) and "-0.0" not in text


def test_a_bar_has_the_accounts_in_order_and_their_hues() -> None:
    book = Book("actual", 1, "CPU", None, 100, 100)
    for name, seconds in (("startup", 25.0), ("useful", 50.0), ("skew", 0.1), ("kernel", 24.9)):
        book.add(name, seconds)
    text = bar(book.accounts, 200.0, 40)
    assert text.plain == "█" * 20
    assert [(span.end - span.start, span.style) for span in text.spans if span.end > span.start] == [
        (10, BY_NAME["useful"].colour), (5, BY_NAME["kernel"].colour), (5, BY_NAME["startup"].colour)]


def test_the_verb_writes_the_page_and_prints_one_json_document(finished: RunFolder, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    result = CliRunner().invoke(command, [str(finished.root), "--json", "--out", str(out)], catch_exceptions=False)
    value = json.loads(result.stdout)
    actual = read_book(finished.actual)
    assert value["report"] == str(out) and out.read_text().startswith("<!doctype html>")
    assert {name: line["actual"] for name, line in value["chain"]["accounts"].items()} == pytest.approx(actual.accounts)
    assert value["chain"]["wall_error"] == pytest.approx(read_book(finished.forecast).wall_seconds / actual.wall_seconds - 1)
    assert list(value["stages"]) == ["pretrain", "chat"]
    (fault,) = value["faults"]["pretrain"]
    assert value["faults"]["chat"] == [] and "killed by signal 9" in fault["sentence"]
    assert (fault["step"], fault["resumed_step"]) == (300, 290) and fault["seconds_since_start"] == pytest.approx(130.4)
    assert fault["accounts"]["lost"] == pytest.approx(read_book(finished.stage("pretrain").actual).accounts["lost"])


def test_people_get_the_ledger_on_standard_error(finished: RunFolder, tmp_path: Path) -> None:
    result = CliRunner().invoke(command, [str(finished.root), "--out", str(tmp_path / "page.html")], catch_exceptions=False)
    assert result.stdout == ""
    assert "pretrain was interrupted once, 10 steps done again: " in result.stderr and "killed by" in result.stderr


def test_what_was_thrown_away_on_purpose_is_no_interruption(tmp_path: Path) -> None:
    """60 steps of two device-seconds went with --fresh; then there was a fault, and two steps were done again."""
    folder = StageFolder(tmp_path)

    def trained(first: int, last: int) -> None:
        spent = 2.0 * (last - first)
        append_jsonl(folder.ledger, {"attempt": 0, "time": 1.0, "first_step": first, "last_step": last, "wall_seconds": spent / 2,
                                     "device_seconds": spent, "accounts": {"compute": spent}})

    trained(0, 60)
    throw_away(folder)
    trained(0, 8)
    roll_back(folder.ledger, 6, 1)
    trained(6, 10)
    events = [{"kind": "fresh", "time": 5.0, "sentence": "thrown away"}, {"kind": "start", "time": 6.0},
              {"kind": "fault", "time": 9.0, "sentence": "killed"}, {"kind": "restart", "time": 10.0, "attempt": 1, "step": 6}]
    found = timeline(events, read_jsonl(folder.ledger))
    assert [(fault.sentence, fault.is_asked) for fault in found] == [("thrown away", True), ("killed", False)]
    assert summary(found[:1], 0.0) == "begun anew once, 60 steps thrown away as asked: 120.0 device-seconds"
    assert summary(found, 1240.0) == ("interrupted once, 2 steps done again and begun anew once, 60 steps thrown away as asked: "
                                      "124.0 device-seconds, 10.0 % of what was paid")


@pytest.mark.parametrize("lost", ["event", "line", None])
def test_a_kill_between_a_line_of_the_ledger_and_its_event_mixes_nothing_up(tmp_path: Path, lost: str | None) -> None:
    """A rollback whose rank was killed when it had told one of both, then two further faults."""
    file = tmp_path / "ledger.jsonl"
    events: list[dict[str, Any]] = [{"kind": "start", "time": 0.0}]
    for attempt, resumed in ((0, 6), (1, 6), (2, 9)):
        if (attempt, lost) != (0, "line"):
            roll_back(file, resumed, attempt)
        append_jsonl(file, {"attempt": attempt, "time": 1.0, "first_step": 9, "last_step": 9, "wall_seconds": 1.0,
                            "device_seconds": 2.0, "accounts": {"lost": 2.0 + attempt}})
        if (attempt, lost) != (0, "event"):
            kind = "restart" if attempt else "rollback"
            events.append({"kind": kind, "time": 1.0, "sentence": "gone back", "attempt": attempt, "step": resumed})
        events.append({"kind": "fault", "time": 2.0, "sentence": f"fault {attempt}", "attempt": attempt})
    found = [(fault.sentence, fault.cost.resumed_step, fault.cost.accounts["lost"]) for fault in
             timeline(events, read_jsonl(file))]
    wanted = [("gone back", 6, 0.0), ("fault 0", 6, 2.0), ("fault 1", 9, 3.0), ("fault 2", None, 4.0)]
    if lost == "line":
        wanted[:2] = [("gone back; fault 0", 6, 2.0)]
    if lost == "event":
        wanted[0] = ("it ended, and nobody was left to say why", 6, 0.0)
    assert found == wanted


def test_a_recipe_leads_to_its_run_folder(finished: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATHANOR_RUNS", str(finished.root.parent))
    assert find_run(str(finished.recipe), []) == finished.root
    with pytest.raises(UserError, match="has not been run"):
        find_run(str(finished.recipe), ["name=other"])
    with pytest.raises(UserError, match=r"no run folder or recipe .*did you mean '.*stdlib'"):
        find_run(str(finished.root) + "x", [])
    monkeypatch.setenv("ATHANOR_RUNS", str(tmp_path / "none"))
    with pytest.raises(UserError, match="no run is here yet"):
        find_run("nothing", [])
    with pytest.raises(UserError, match="overrides"):
        find_run(str(finished.root), ["name=other"])
