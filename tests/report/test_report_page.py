"""The page says what the files say: figures, books, reasons and samples; whole, escaped, and without a network."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from athanor.cli.chain import locked
from athanor.foundation.errors import UserError
from athanor.foundation.run_folder import RunFolder, append_jsonl, read_json, read_jsonl, write_atomic
from athanor.foundation.units import format_seconds
from athanor.ledger.book import read_book
from athanor.report.page import write_report
from athanor.report.run_record import EXPECTED, read_run
from athanor.report.sections import chain

VOID = {"meta", "link", "input", "br"}


class Page(HTMLParser):
    """Elements of a page as (tag, attributes, path of the elements around it), the text of each, and of the whole."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], list[int]]] = []
        self.texts: list[str] = []
        self.open: list[int] = []
        self.feed(text)
        assert not self.open, "an element is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}, list(self.open)))
        self.texts.append("")
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}, list(self.open)))
        self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self.open.pop()][0] == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        for index in self.open:
            self.texts[index] += data

    def find(self, tag: str = "", inside: int | None = None, **attributes: str) -> list[int]:
        wanted = {name.strip("_").replace("_", "-"): value for name, value in attributes.items()}
        return [i for i, (name, attrs, path) in enumerate(self.elements) if (not tag or name == tag)
                and (inside is None or inside in path) and wanted.items() <= attrs.items()]

    def cells(self, row: int) -> list[str]:
        return [self.texts[cell].strip() for cell in self.find("td", inside=row)]


def page_of(run: RunFolder, tmp_path: Path) -> Page:
    return Page(write_report(run, tmp_path / "page.html").read_text())


@pytest.fixture
def copy(finished: RunFolder, tmp_path: Path) -> RunFolder:
    shutil.copytree(finished.root, tmp_path / "run")
    return RunFolder(tmp_path / "run")


@pytest.fixture(scope="module")
def page(finished: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(finished, tmp_path_factory.mktemp("page"))


@pytest.mark.parametrize(("name", "folder"), [("whole chain", ""), ("pretrain", "pretrain"), ("chat", "chat")])
def test_the_accounts_of_each_book_are_on_the_page(page: Page, finished: RunFolder, name: str, folder: str) -> None:
    forecast, actual = (read_book(finished.root / folder / f"{kind}.json") for kind in ("forecast", "actual"))
    panel, = page.find("section", data_book=name)
    rows = {page.elements[row][1]["data-account"]: page.cells(row) for row in page.find("tr", inside=panel)
            if "data-account" in page.elements[row][1]}
    assert set(rows) == {account for book in (forecast, actual) for account, seconds in book.accounts.items()
                         if abs(seconds) > 1e-6}
    for account, cells in rows.items():
        foreseen, measured = (book.accounts.get(account, 0.0) for book in (forecast, actual))
        assert cells[1:4] == [f"{foreseen:,.1f}", f"{measured:,.1f}", f"{100 * measured / actual.device_seconds:.1f} %"]
        error = 100 * (foreseen / measured - 1)
        assert float(cells[4].replace("\u00a0%", "")) == pytest.approx(error, abs=0.51)
    paid = next(page.cells(row) for row in page.find("tr", inside=panel, class_="sum"))
    assert paid[1:3] == [f"{forecast.device_seconds:,.1f}", f"{actual.device_seconds:,.1f}"]
    assert sum(float(cells[2].replace(",", "")) for cells in rows.values()) == pytest.approx(actual.device_seconds, abs=1.0)
    figures = {page.elements[row][1].get("data-figure"): page.cells(row) for row in page.find("tr", inside=panel)}
    assert figures["mfu"][1:] == [f"{100 * book.derived()['mfu']:.1f} %" for book in (forecast, actual)]
    assert figures["end_to_end"][2] == f"{100 * actual.derived()['end_to_end']:.1f} %"


def test_the_parts_of_a_bar_are_as_long_as_the_accounts(page: Page, finished: RunFolder) -> None:
    actual, forecast = read_book(finished.actual), read_book(finished.forecast)
    panel, = page.find("section", data_book="whole chain")
    bar = page.find("svg", inside=panel, class_="book")[1]
    longest = max(sum(s for s in book.accounts.values() if s > 0) for book in (forecast, actual))
    widths = {page.elements[i][1]["class"].removeprefix("a-"): float(page.elements[i][1]["width"][:-1])
              for i in page.find("rect", inside=bar)}
    assert widths == {name: pytest.approx(100 * seconds / longest, abs=1e-3) for name, seconds in actual.accounts.items()
                      if seconds > 0}


def test_figures_come_first_and_name_their_definitions(page: Page, finished: RunFolder) -> None:
    actual, scores = read_book(finished.actual), read_json(finished.scores)["models"]["pretrain"]
    head, = page.find("div", class_="big")
    text = page.texts[head]
    minutes, seconds = divmod(round(actual.wall_seconds), 60)
    assert f"{minutes}:{seconds:02d}" in text and "too low" in text
    assert f"{scores['bits_per_byte']['value']:.2f}" in text and "xz\u00a01.68" in text and "gzip\u00a02.17" in text
    for key in ("end_to_end", "mfu", "mfu_full_attention", "goodput"):
        assert f"{100 * actual.derived()[key]:.0f}\u00a0%" in text, key
    linked = {page.elements[i][1]["href"] for i in page.find("a", inside=head)}
    assert linked == {"#def-wall-clock", "#def-bits_per_byte", "#def-end_to_end", "#def-mfu", "#def-goodput"}


def test_faults_stand_with_what_each_cost(page: Page, finished: RunFolder) -> None:
    book = read_book(finished.stage("pretrain").actual)
    row, = page.find("tr", data_fault="0")
    cells = page.cells(row)
    assert cells[:3] == ["2:10", "rank 1 was killed by signal 9 (SIGKILL) after step 300", "10"]
    lost = book.accounts["lost"]
    assert [float(cell) for cell in cells[3:]] == [pytest.approx(seconds, abs=0.051) for seconds in (lost, 0, 7, lost + 7)], (
        "the start after it, and not the run's first")
    told = next(page.texts[i] for i in page.find("summary") if "interrupted" in page.texts[i])
    assert told == (f"interrupted once, 10 steps done again: {lost + 7:,.1f} device-seconds, "
                    f"{100 * (lost + 7) / book.device_seconds:.1f} % of what was paid")
    forecast = read_book(finished.forecast).derived()["goodput"]
    assert f"kept stepping time / paid; forecast {100 * forecast:.0f}\u00a0%" in page.texts[page.find("div", class_="big")[0]]


@pytest.mark.parametrize("odd", ["NaN", "null", '"x"', "[]"])
def test_a_ledger_with_odd_lines_is_read_as_far_as_it_goes(copy: RunFolder, tmp_path: Path, odd: str) -> None:
    ledger = copy.stage("pretrain").root / "ledger.jsonl"
    odd_line = json.dumps({"first_step": 0, "last_step": "ODD", "resumed_step": "ODD", "accounts": {"lost": "ODD"}})
    ledger.write_text(odd_line.replace('"ODD"', odd) + "\n" + ledger.read_text() + '{"accounts": [], "first_step": 3}\n')
    assert len(page_of(copy, tmp_path).find("tr", data_fault="0")) == 1


def test_links_lead_somewhere_and_ids_are_unique(page: Page) -> None:
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {attributes["href"] for tag, attributes, _ in page.elements if tag == "a"}
    assert links and all(link.startswith("#") and link[1:] in ids for link in links)
    titled = [attributes for tag, attributes, _ in page.elements if tag == "a" and attributes.get("class") == "def"]
    assert all(attributes["title"] for attributes in titled)


def test_nothing_is_asked_of_a_network_and_no_ratio_is_called_efficiency(finished: RunFolder, tmp_path: Path) -> None:
    text = write_report(finished, tmp_path / "page.html").read_text()
    assert not re.search(r"https?:|//[a-z]|@import|url\(|\ssrc=", text.replace("-src 'unsafe", "").replace("</", "<|"))
    assert "efficien" not in text.lower()
    assert "<svg" in text and len(text) < 400_000


def test_every_picture_says_in_words_what_it_shows(page: Page, finished: RunFolder) -> None:
    for index in page.find("svg"):
        attributes = page.elements[index][1]
        assert attributes.get("aria-hidden") == "true" or (attributes["role"] in ("img", "group") and attributes["aria-label"])
    rows = read_jsonl(finished.stage("pretrain").metrics)
    words = " ".join(page.elements[i][1].get("aria-label", "") for i in page.find("svg"))
    assert f"Loss of pretrain from {rows[0]['loss']:.2f} to {rows[-1]['loss']:.2f} over 2.29 M tokens" in words
    mean = sum(row["step_seconds"] for row in rows) / len(rows)
    assert f"error {100 * (0.41 / mean - 1):+.1f}\u00a0% over all steps" in words


def test_scores_stand_with_their_intervals_beside_the_compressors(page: Page, finished: RunFolder) -> None:
    for model, tasks in read_json(finished.scores)["models"].items():
        for task, score in tasks.items():
            row, = page.find("tr", data_task=task, data_model=model)
            scale, write = (100, "{:.1f} %") if score["unit"] == "share" else (1, "{:.3f}")
            value, low, high = (write.format(scale * score[key]) for key in ("value", "low", "high"))
            assert page.cells(row)[1:3] == [value, f"{low} … {high}"]
    row, = page.find("tr", data_model="xz -9, same bytes")
    assert page.cells(row)[1] == "1.682"


def test_the_funnel_shows_every_reason_and_what_is_left(page: Page, finished: RunFolder) -> None:
    funnel = read_json(finished.data / "funnel.json")
    rows = [page.texts[row] for row in page.find("div", class_="row")]
    reasons = {reason: counts for stage in funnel["stages"] for reason, counts in stage["dropped"].items()}
    assert len(reasons) >= 3
    for reason, counts in reasons.items():
        assert any(row.startswith(f"{reason}−{counts['documents']} document") for row in rows), reason
    assert any(row.startswith("evaluation") and f"{funnel['splits']['evaluation']['documents']} documents" in row for row in rows)


def test_samples_chain_plan_and_recipe_are_there(page: Page, finished: RunFolder) -> None:
    whole = page.texts[0]
    assert "step 540" in whole and "step 0" in whole
    assert any("return file.readlines()" in page.texts[i] for i in page.find("em"))
    assert "36 s · forecast 40 s" in whole and "train pretrain4 min 07 s · forecast 3 min 56 s" in whole
    assert "85 % of the budget of 240 s at 0.41 s a step" in whole
    assert finished.recipe.read_text().strip() in whole
    assert "torch 2.13.0" in whole
    assert "rank 1 was killed by signal 9" in whole


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_missing_file_is_said_not_fatal(copy: RunFolder, tmp_path: Path, name: str) -> None:
    (copy.root / name).unlink()
    assert f"{name} is not in the run folder" in page_of(copy, tmp_path).texts[0]


def test_a_run_that_has_only_been_planned_has_a_page(copy: RunFolder, tmp_path: Path) -> None:
    for path in copy.root.iterdir():
        if path.name not in ("forecast.json", "plan.toml", "recipe.toml", "cluster.toml"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = page_of(copy, tmp_path)
    assert "not measured yet" in page.texts[0] and "No training stage has written anything yet" in page.texts[0]
    panel, = page.find("section", data_book="whole chain")
    assert all(cells[2] == "–" and cells[4] == "–" for row in page.find("tr", inside=panel)
               if "data-account" in page.elements[row][1] for cells in [page.cells(row)])


def test_a_stage_that_is_running_shows_what_there_is(copy: RunFolder, tmp_path: Path) -> None:
    stage = copy.stage("pretrain")
    stage.actual.unlink()
    copy.actual.unlink()
    for file, kept in ((stage.ledger, 12), (stage.metrics, 120), (stage.events, 4)):
        file.write_text("".join(f"{line}\n" for line in file.read_text().splitlines()[:kept]))
    stage.config.write_text("[identity]\nsteps = 560\n")
    stage.beats.mkdir(parents=True)
    (stage.beats / "rank-0.json").write_text("{}")
    found = {pair.name: pair for pair in read_run(copy).books}
    assert found["pretrain"].progress == "running, step 120 of 560" and found["chat"].progress is None
    page = page_of(copy, tmp_path)
    panel, = page.find("section", data_book="pretrain")
    assert "running, step 120 of 560: what was measured so far" in page.texts[panel] and "so far, s" in page.texts[panel]
    rows = {page.elements[row][1]["data-account"]: page.cells(row) for row in page.find("tr", inside=panel)
            if "data-account" in page.elements[row][1]}
    useful = sum(line["model_flops"] / line["peak_flops"] for line in read_jsonl(stage.ledger))
    assert float(rows["useful"][2]) == pytest.approx(useful, abs=0.06)
    assert all(cells[4] == "–" for cells in rows.values()), "part of a stage has no error against all of it"
    other, = page.find("section", data_book="chat")
    assert "so far" not in page.texts[other]
    os.utime(stage.beats / "rank-0.json", (1e9, 1e9))
    assert {pair.name: pair.progress for pair in read_run(copy).books}["pretrain"] == "cut off, step 120 of 560"


@pytest.mark.parametrize(("host", "is_held", "progress"), [
    (socket.gethostname(), False, "not running, step 120 of 560; the same command goes on"),
    (socket.gethostname(), True, "running, step 120 of 560"), ("elsewhere", False, "running, step 120 of 560")])
def test_a_stage_whose_command_was_killed_is_not_running(copy: RunFolder, host: str, is_held: bool, progress: str) -> None:
    stage = copy.stage("pretrain")
    for file, kept in ((stage.ledger, 12), (stage.metrics, 120), (stage.events, 4)):
        file.write_text("".join(f"{line}\n" for line in file.read_text().splitlines()[:kept]))
    stage.config.write_text("[identity]\nsteps = 560\n")
    append_jsonl(stage.beats / "rank-0.json", {"host": host})
    with locked(copy) if is_held else contextlib.nullcontext():
        assert {pair.name: pair.progress for pair in read_run(copy).books}["pretrain"] == progress


def test_layouts_stand_beside_each_other(copy: RunFolder, tmp_path: Path) -> None:
    forecast = read_book(copy.stage("chat").forecast)
    replace(forecast, layout="tp=2").write(copy.stage("chat").forecast)
    page = page_of(copy, tmp_path)
    for name, layouts in (("pretrain", ["dp_shard=2", "dp_shard=2"]), ("chat", ["tp=2", "dp_shard=2"])):
        panel, = page.find("section", data_book=name)
        assert [page.cells(row)[1:] for row in page.find("tr", inside=panel) if page.cells(row)[:1] == ["layout"]] == [layouts]


def test_a_stage_alone_has_a_page(finished: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(finished.root / "pretrain", tmp_path / "run" / "pretrain")
    page = page_of(RunFolder(tmp_path / "run"), tmp_path)
    assert "MFU, causal attention" in page.texts[page.find("div", class_="big")[0]]


def test_what_is_no_run_is_refused(tmp_path: Path, copy: RunFolder) -> None:
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    with pytest.raises(UserError, match="holds nothing of a run"):
        write_report(RunFolder(nothing))
    with pytest.raises(UserError, match="no run folder"):
        write_report(RunFolder(tmp_path / "nowhere"))
    for name in ("scores.json", "plan.toml", "actual.json"):
        whole = (copy.root / name).read_text()
        (copy.root / name).write_text("[[[")
        with pytest.raises(UserError, match=re.escape(name)):
            write_report(copy)
        (copy.root / name).write_text(whole)
    assert not copy.report.exists()


ATTACK = "</pre></script><script>alert('x')</script><img src=x onerror=alert(1)>\"'&lt;"


def test_whatever_a_model_or_a_file_says_is_only_text(copy: RunFolder, tmp_path: Path) -> None:
    stage = copy.stage("pretrain")
    stage.samples.unlink()
    append_jsonl(stage.samples, {"step": 1, "prompt": ATTACK, "text": ATTACK})
    append_jsonl(stage.events, {"time": 1.79e9 + 1, "kind": "fault", "step": 3, "sentence": ATTACK})
    write_atomic(copy.recipe, copy.recipe.read_text() + f"# {ATTACK}\n")
    reason = f"[reason]\n{json.dumps(ATTACK)} = {json.dumps(ATTACK)}\n"
    write_atomic(copy.plan, copy.plan.read_text().replace("[reason]\n", reason))
    scores, funnel = read_json(copy.scores), read_json(copy.data / "funnel.json")
    scores["models"][ATTACK] = scores["models"]["chat"]
    funnel["stages"][0]["dropped"][ATTACK] = {"documents": 1, "bytes": 1}
    funnel["samples"]["dropped"][ATTACK] = [{"uri": ATTACK, "bytes": 3, "excerpt": ATTACK}]
    write_atomic(copy.scores, json.dumps(scores))
    write_atomic(copy.data / "funnel.json", json.dumps(funnel))
    append_jsonl(copy.chain, {"event": "done", "step": ATTACK, "seconds": 1.0, "time": 1.79e9})
    forecast = read_book(copy.forecast)
    forecast.notes.append(ATTACK)
    forecast.write(copy.forecast)
    page = page_of(copy, tmp_path)
    assert len(page.find("script")) == 1 and not page.find("img")
    assert page.texts[0].count(ATTACK) >= 10
    assert not [attributes for _, attributes, _ in page.elements if any(name.startswith("on") for name in attributes)]


@pytest.mark.parametrize("odd", ["NaN", "Infinity", "-Infinity", "null", '"x"', "[]", "1e300"])
def test_a_run_that_diverged_or_has_odd_rows_has_a_page(copy: RunFolder, tmp_path: Path, odd: str) -> None:
    for path, keys in ((copy.stage("pretrain").metrics, ("loss", "validation_loss", "time", "tokens_per_second")),
                       (copy.stage("pretrain").events, ("time", "step")), (copy.stage("pretrain").samples, ("step",)),
                       (copy.chain, ("seconds", "time"))):
        rows = [json.dumps(row | dict.fromkeys(keys, "ODD")) if number % 3 == 1 else json.dumps(row)
                for number, row in enumerate(read_jsonl(path))]
        path.write_text("\n".join(rows).replace('"ODD"', odd) + "\n")
    text = write_report(copy, tmp_path / "page.html").read_text()
    Page(text)
    assert not re.search(r"[ ,\"]-?(nan|inf)[ ,%\"]", text)


@pytest.mark.parametrize("score", [None, {}, {"value": "1", "low": 0, "high": 1, "count": 3}])
def test_a_score_without_numbers_is_one_sentence(copy: RunFolder, tmp_path: Path, score: object) -> None:
    write_atomic(copy.scores, json.dumps({"models": {"chat": {"exact": score}}}))
    with pytest.raises(UserError, match=r"models\.chat\.exact is no score"):
        write_report(copy, tmp_path / "page.html")


def test_a_step_done_again_counts_as_it_last_ran(copy: RunFolder) -> None:
    for seconds in (1234.5, 71.0):
        append_jsonl(copy.chain, {"step": "again", "seconds": seconds})
    assert [item.text.split(" ·")[0] for item in chain(read_run(copy)) if item.label == "again"] == [format_seconds(71.0)]
