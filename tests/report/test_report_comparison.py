"""Models side by side: the table of the Yuan 2.0-M32 paper again, a run's stages, registered versions, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from test_report_page import Page

from athanor.cli.models_compare import compare
from athanor.evaluate.scores import Score, items, merge_scores, share, wilson
from athanor.foundation.errors import AthanorError
from athanor.foundation.run_folder import RunFolder, write_json
from athanor.ledger.book import Book
from athanor.models.find import load_architecture
from athanor.models.huggingface import save_model
from athanor.models.initialize import initialize
from athanor.models.shapes.find import shape_class
from athanor.registry.store import Registry, register
from athanor.report.comparison import rows

DOCS = Path(__file__).parents[2] / "docs"
SCORES = DOCS / "yuan2-m32-scores.json"
# of the paper's table: billions of parameters, active ones, GFLOP per token, mean accuracy, mean accuracy per GFLOP of a token
PRINTED = {"llama-3-70b": (70, 70, 140, 79.25, 0.57), "llama-3-8b": (8, 8, 16, 64.15, 4.00),
           "mixtral-8x22b": (141, 39, 78, 72.38, 0.93), "mixtral-8x7b": (47, 12.9, 25.8, 60.83, 2.36),
           "yuan2-m32": (40, 3.7, 7.4, 79.15, 10.69)}
PAPERS_TASKS = ("GSM8K", "MMLU", "MATH", "ARC-C")
RECIPE = """name = "tiny"
[[data.source]]
name = "here"
kind = "python"
[[stage]]
name = "pretrain"
[[stage]]
name = "chat"
objective = "sft"
start_from = "pretrain"
data = "pairs"
"""


def call(tmp_path: Path, *arguments: object) -> dict[str, Any]:
    common = ["--json", "--out", str(tmp_path / "c.html"), "--registry", str(tmp_path / "registry")]
    result = CliRunner().invoke(compare, [*map(str, arguments), *common], catch_exceptions=False)
    assert result.exit_code == 0
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def by_name(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in found["models"]}


def test_the_papers_table_comes_out_again_without_humaneval(tmp_path: Path) -> None:
    """Its mean is that of four tasks. From published sizes its ratios are met to 0.01; of Mixtral-8x7B, whose printed mean is not
    that of its printed scores, the mean to 0.1."""
    four = by_name(call(tmp_path, *PRINTED, "--scores", SCORES, *(part for task in PAPERS_TASKS for part in ("--task", task))))
    five = by_name(call(tmp_path, *PRINTED, "--scores", SCORES))
    rows = []
    for name, (total, active, gflop, mean, ratio) in PRINTED.items():
        own, points = four[name], four[name]["mean_accuracy_points"]["value"]
        assert points == pytest.approx(mean, abs=0.07 if name == "mixtral-8x7b" else 0.006)
        assert points / (2 * active) == pytest.approx(ratio, abs=0.0105) and 2 * active == gflop
        assert own["parameters"] / 1e9 == pytest.approx(total, rel=0.01)
        assert own["forward_flops_2n"] / 1e9 == pytest.approx(gflop, rel=0.01)
        assert own["points_per_pflop_2n"]["value"] == pytest.approx(1e6 * ratio, rel=0.015)
        with_all = five[name]["mean_accuracy_points"]["value"]
        assert abs(with_all - mean) > (0.35 if name != "llama-3-8b" else 0.3), "HumanEval is not in it"
        rows.append(f"| {name} | {gflop:g} | {mean:.2f} | {ratio:.2f} | {points:.2f} | {points / gflop:.2f} | {with_all:.2f} | "
                    f"{own['points_per_pflop_2n']['value'] / 1e6:.2f} | {own['points_per_pflop_shape']['value'] / 1e6:.2f} |")
    page = (DOCS / "accuracy-per-flop.md").read_text()
    for row in rows:
        assert row in page, row
    assert four["yuan2-m32"]["pd_6nd"] == pytest.approx(6 * 3.704e9 * 2e12 / 8.64e19, rel=1e-3)
    assert four["mixtral-8x7b"]["pd_6nd"] is None and four["mixtral-8x7b"]["points_per_pd"] is None


def test_the_published_scores_have_wilsons_intervals() -> None:
    for tasks in json.loads(SCORES.read_text())["models"].values():
        for score in tasks.values():
            interval = wilson(score["value"] * score["count"], score["count"])
            assert (score["low"], score["high"]) == pytest.approx(interval, abs=6e-5)


def make_run(root: Path) -> RunFolder:
    """A run of two stages of different sizes with books and scores that keep their items."""
    run = RunFolder(root)
    run.root.mkdir(parents=True)
    run.recipe.write_text(RECIPE)
    for number, stage in enumerate(("pretrain", "chat")):
        shape = shape_class("llama")(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2 + number,
                                     num_attention_heads=4, max_position_embeddings=64)
        module = load_architecture("llama").build(shape)
        initialize(module, 0)
        save_model(module, run.stage(stage).model)
        (run.stage(stage).model / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"a": 0}}}')
        book = Book("actual", 2, "cpu", 1e11, wall_seconds=9.0, device_seconds=18.0, tokens=4e5 / (1 + 3 * number),
                    model_flops=2e11 / (1 + 3 * number))
        book.close().write(run.stage(stage).actual)
    right = [i % 3 == 0 for i in range(300)]
    better = [value or i % 5 == 0 for i, value in enumerate(right)]
    bits, sizes = [400.0 + 7 * (i % 11) for i in range(60)], [200.0 + i for i in range(60)]
    scores = {}
    for number, (stage, values) in enumerate((("pretrain", right), ("chat", better))):
        own = [value - 20 * number for value in bits]
        value = math.fsum(own) / math.fsum(sizes)
        scores[stage] = {"identifiers": share([float(v) for v in values], identity="these"),
                         "bits_per_byte": Score(value, value - 0.1, value + 0.1, 60, "bits per byte", False,
                                                {"bytes": sum(sizes), **items("text", own, sizes)})}
    merge_scores(run.scores, scores)
    return run


def test_stages_of_a_run_with_what_they_took_and_differences_on_the_same_items(tmp_path: Path) -> None:
    run = make_run(tmp_path / "tiny")
    found = call(tmp_path, run.root)
    first, second = found["models"]
    assert (first["name"], second["name"]) == ("tiny/pretrain", "tiny/chat") and found["context_tokens"] == 64
    assert (first["tokens"], second["tokens"]) == (4e5, 5e5), "a stage took what it started from took, too"
    assert second["pd_ledger"] == pytest.approx(2.5e11 / 8.64e19) and second["parameters"] > first["parameters"]
    assert second["pd_6nd"] == pytest.approx(6 * second["parameters"] * 5e5 / 8.64e19)
    accuracy = sum(i % 3 == 0 or i % 5 == 0 for i in range(300)) / 3
    assert found["mean_tasks"] == ["identifiers"] and second["mean_accuracy_points"]["value"] == pytest.approx(accuracy)
    assert second["points_per_pd"]["value"] == pytest.approx(accuracy / (2.5e11 / 8.64e19))
    told = {row["task"]: row for row in found["differences"]}
    gained = sum(i % 5 == 0 and i % 3 != 0 for i in range(300)) / 300
    row = told["identifiers"]
    error = math.sqrt(gained * (1 - gained) / 300)  # items that only one of them has right
    assert row["difference"] == pytest.approx(gained)
    assert (row["low"], row["high"]) == pytest.approx((gained - 1.96 * error, gained + 1.96 * error), abs=0.012)
    bits = told["bits_per_byte"]
    assert bits["low"] < bits["difference"] < bits["high"] < 0 and bits["high"] - bits["low"] < 0.02, "pairing makes it narrow"


def test_the_page_and_the_terminal_say_the_same(tmp_path: Path) -> None:
    run = make_run(tmp_path / "tiny & <co>")
    result = CliRunner().invoke(compare, [str(run.root), "--out", str(tmp_path / "c.html")], catch_exceptions=False)
    page = Page((tmp_path / "c.html").read_text())
    whole = page.texts[page.find("main")[0]]
    for words in ("tiny & <co>/chat", "bits per byte", "active parameters", "points per PD of training", "mean accuracy of 1"):
        assert words in whole
    assert "nats per" not in whole and "://" not in (tmp_path / "c.html").read_text()
    (row,) = page.find("tr", data_task="identifiers", data_second="tiny & <co>/chat")
    assert page.cells(row)[1].startswith("+13.3 points") and page.cells(row)[3] == "better"
    (row,) = page.find("tr", data_task="bits_per_byte", data_second="tiny & <co>/chat")
    assert page.cells(row)[3] == "better", "fewer bits are"
    assert "identifiers: +13.3 points" in " ".join(result.stderr.split())
    links = {page.elements[i][1]["href"].removeprefix("#") for i in page.find("a", class_="def")}
    assert links <= {page.elements[i][1].get("id") for i in page.find("dt")}


def test_registered_versions_and_folders_go_together(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "tiny")
    for stage in ("pretrain", "chat"):
        register(run.root, stage, tmp_path / "registry")
    found = by_name(call(tmp_path, "tiny-chat", run.stage("pretrain").model, "yuan2-m32"))
    chat, pretrain, published = found.values()
    assert chat["name"].startswith("tiny-chat@") and chat["tokens"] == 5e5 and chat["scores"]["identifiers"]["count"] == 300
    assert pretrain["tokens"] == 4e5 and pretrain["scores"]
    assert published["scores"] == {} and published["mean_accuracy_points"] is None


def test_what_is_known_of_a_model_from_a_base_of_elsewhere_is_told_as_at_least(tmp_path: Path) -> None:
    """Of a base that was imported nobody knows what it took: the fine-tuning's 1e5 tokens and 5e10 FLOPs are at least so many."""
    made, run = make_run(tmp_path / "runs" / "base"), make_run(tmp_path / "runs" / "tiny")
    base = made.stage("pretrain").model
    run.recipe.write_text(RECIPE.replace('start_from = "pretrain"', f'start_from = "{base}"'))
    register(run.root, "chat", tmp_path / "registry")
    for imported in (False, True):
        if imported:
            Registry(tmp_path / "registry").import_folder(base, "base")
        for name in ("tiny-chat", run.stage("chat").model):
            found = call(tmp_path, name, "yuan2-m32")
            chat, published = found["models"]
            assert chat["tokens"] is chat["pd_ledger"] is chat["points_per_pd"] is published["known_tokens"] is None
            assert (chat["known_tokens"], chat["known_pd"]) == (1e5, pytest.approx(5e10 / 8.64e19))
            cells = {row: cells for row, _, cells in rows(found)}
            assert cells["tokens"] == ["at least 100 k", "–"] and cells["training, ledger"][0].startswith("at least 5e+10 FLOP")


def test_what_was_asked_otherwise_is_told_and_not_averaged(tmp_path: Path) -> None:
    run = make_run(tmp_path / "tiny")
    scores = json.loads(run.scores.read_text())
    chat = scores["models"]["chat"]
    chat["identifiers"]["details"]["items"]["hash"] = chat["bits_per_byte"]["details"]["items"]["hash"] = "others"
    chat["python_parses"] = {**chat["identifiers"], "details": {}}
    write_json(run.scores, scores)
    found = call(tmp_path, run.root)
    assert found["mean_tasks"] == [] and found["differences"] == []
    assert found["notes"] == ["identifiers is not in the mean: tiny/chat was asked other items than tiny/pretrain",
                              "python_parses is not in the mean: tiny/pretrain has no score of it",
                              "bits per byte: tiny/chat was asked other items than tiny/pretrain"]


@pytest.mark.parametrize(("arguments", "words"), [
    (["yuan2-m32"], "yuan2-m32 alone is no comparison"),
    (["yuan2-m32", "YUAN2-M32"], "'yuan2-m32' is named twice"),
    (["yuan2-m32", "yuan2-m23"], "did you mean 'yuan2-m32'"),
    (["yuan2-m32", "tests"], "'tests' is neither a folder, nor registered in"),
    (["yuan2-m32", "."], ". is neither a model folder (config.json) nor a run folder (recipe.toml)"),
    (["yuan2-m32", "gpt2", "--scores", "nothing.json"], "nothing.json does not exist"),
    (["gpt2", "bloom-176b", "--scores", str(SCORES)], "and of none of gpt2, bloom-176b"),
    (["yuan2-m32", "llama-3-8b", "--scores", str(SCORES), "--task", "GSM9K"],
     "no model has a score of 'GSM9K'; did you mean 'GSM8K'"),
    (["yuan2-m32", "llama-3-8b", "gpt2", "--scores", str(SCORES), "--task", "MMLU"],
     "cannot take 'MMLU': gpt2 has no score of it"),
    (["yuan2-m32", "gpt2", "--scores", "bad.json"], "models.gpt2.x is no score with the numbers")])
def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str],
                                                      words: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text('{"models": {"gpt2": {"x": {"value": "much"}}}}')
    with pytest.raises(AthanorError) as caught:
        CliRunner().invoke(compare, arguments, catch_exceptions=False)
    assert words in str(caught.value) and "\n" not in str(caught.value) and not Path("comparison.html").exists()
