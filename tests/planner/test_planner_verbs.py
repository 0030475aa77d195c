"""What the verbs of planning say: mistakes before refusals, what to write for sizes that are open, what "Why" holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from athanor.cli.plan import command as plan
from athanor.cli.plan_estimate import command as estimate
from athanor.cluster.spec import ClusterSpec
from athanor.foundation.errors import LayoutError, ModelError, RecipeError, UserError
from athanor.foundation.recipe import Recipe
from athanor.ledger.book import read_book
from athanor.models.shapes.find import find_shape
from athanor.planner.explain import HELD
from athanor.report.search_page import write_search

Toy = Callable[..., Recipe]


@pytest.fixture
def recipe(machine: ClusterSpec, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The toy recipe's file, with text, on a measured machine, and run folders of its own."""
    monkeypatch.setenv("ATHANOR_RUNS", str(tmp_path / "runs"))
    toy()
    (tmp_path / "text" / "a.txt").write_text("words " * 100_000)
    machine.write(tmp_path / "cluster.toml")
    file = tmp_path / "toy.toml"
    file.write_text(file.read_text().replace('path = "."', f'path = "{tmp_path / "text"}"')
                    + f'[cluster]\nfile = "{tmp_path / "cluster.toml"}"\n')
    return file


def call(*arguments: object) -> str:
    return CliRunner().invoke(plan, [str(argument) for argument in arguments], catch_exceptions=False).stderr


@pytest.mark.slow
def test_a_mistake_is_told_before_what_the_folder_holds(recipe: Path, tmp_path: Path) -> None:
    stage = tmp_path / "runs" / "toy" / "pretrain"
    stage.mkdir(parents=True)
    (stage / "metrics.jsonl").write_text("{}\n")
    told = call(recipe)
    assert "written to" in told, "trained without a plan: there is no forecast to keep"
    forecast = read_book(tmp_path / "runs" / "toy" / "forecast.json")
    assert forecast.layout and f"laid out as {forecast.layout}" in " ".join(told.split())
    written = (tmp_path / "runs" / "toy" / "plan.toml").read_text()
    with pytest.raises(RecipeError, match="learning_rat'; did you mean 'learning_rate'"):
        call(recipe, "stage.pretrain.learning_rat=1")
    with pytest.raises(LayoutError, match="num_attention_heads"):
        call(recipe, "parallel.tp=2", "model.hidden_size=96", "model.num_attention_heads=3")
    with pytest.raises(ModelError, match=r"model\.depth is no size of the architecture"):
        call(recipe, "model.sizes.depth=3")
    with pytest.raises(UserError, match="has been trained with its plan"):
        call(recipe, "budget.minutes=8")
    assert (tmp_path / "runs" / "toy" / "plan.toml").read_text() == written
    assert "written to" in call(recipe, "budget.minutes=8", "--out", tmp_path / "other.toml")


def test_open_sizes_are_the_plans_or_named(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        find_shape(recipe)
    for word in ("model.hidden_size", "model.num_hidden_layers", f"athanor plan {recipe}", "published model"):
        assert word in str(caught.value)
    assert "vocab_size" not in str(caught.value) and "\n" not in str(caught.value)
    call(recipe)
    shape = find_shape(recipe)
    printed = json.loads(CliRunner().invoke(plan, [str(recipe), "--json", "--out", str(tmp_path / "p.toml")]).stdout)
    for key in ("hidden_size", "num_hidden_layers", "intermediate_size"):
        assert getattr(shape, key) == printed["model"][key]
    found = CliRunner().invoke(estimate, ["--model", str(recipe), "--cluster", "A100-80", "--json"])
    assert json.loads(found.stdout)["step_seconds"] > 0


def test_a_given_tokenizer_says_the_vocabulary(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {chr(i): i for i in range(1000)}}}))
    text = recipe.read_text().replace("vocab_size = 4096", f'tokenizer = "{tmp_path / "tokenizer.json"}"')
    sizes = "hidden_size = 64\nintermediate_size = 128\nnum_hidden_layers = 2\nnum_attention_heads = 2\n"
    (tmp_path / "given.toml").write_text(text + "[model]\n" + sizes)
    assert find_shape(tmp_path / "given.toml").vocab_size == 1024  # filled up to a multiple of 64


def test_why_says_what_it_holds(tmp_path: Path) -> None:
    from athanor.cli.plan_search import search, show

    choices = {"recompute": ("none",), "precision": "bf16", "program": "megatron-core", "kernel": "", "most_oom": 0.1,
               "schedule": (), "coefficients": None}
    found = search("llama-3-8b", "H100-80 nic_gbps=400", devices=8, global_batch_tokens=131072, seq_len=4096, compare=False,
                   top=1, tokens=None, price=None, **choices)
    assert found["reasons_hold"] == HELD and "holds the others" in HELD
    write_search(found, tmp_path / "page.html")
    assert HELD in (tmp_path / "page.html").read_text()
    show(found)
