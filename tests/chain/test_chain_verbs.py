"""The chain goes on with what single verbs did: data that are the same are not built again, and other training is told apart."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from athanor.cli.chain import Chain
from athanor.cli.data import command as data
from athanor.cli.preflight import plan_inputs, planned
from athanor.cli.run import _build_data, _plan, _stage_inputs
from athanor.cli.train import command as train
from athanor.data.sources import inputs_of, scan
from athanor.foundation.errors import RecipeError, UserError
from athanor.foundation.recipe import Recipe, load_recipe
from athanor.foundation.run_folder import RunFolder, read_jsonl

RECIPE = """
name = "rebuilt"
[data]
vocab_size = 400
evaluation_share = 0.3
[[data.source]]
name = "json"
kind = "python"
path = "{path}"
[[stage]]
name = "pretrain"
seq_len = 64
"""


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe whose data `athanor data build` has built."""
    monkeypatch.setenv("ATHANOR_RUNS", str(tmp_path / "runs"))
    shutil.copytree(Path(sysconfig.get_path("stdlib")) / "json", tmp_path / "json", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "recipe.toml").write_text(RECIPE.format(path=tmp_path / "json"))
    assert CliRunner().invoke(data, ["build", str(tmp_path / "recipe.toml"), "--json"], catch_exceptions=False).exit_code == 0
    return load_recipe(tmp_path / "recipe.toml")


def test_data_of_the_same_are_not_built_again(built: Recipe, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "runs" / "rebuilt")
    manifest = (run.data / "manifest.json").read_bytes()
    assert _build_data(built, run, inputs_of(built))["was_built"]
    assert (run.data / "manifest.json").read_bytes() == manifest

    other = built.model_copy(update={"data": built.data.model_copy(update={"vocab_size": 420})})
    assert not _build_data(other, run, inputs_of(other))["was_built"], "another vocabulary"
    assert json.loads((run.data / "manifest.json").read_text())["vocab_size"] == 420

    file = tmp_path / "json" / "decoder.py"
    os.utime(file, (1, 1))
    assert not _build_data(other, run, inputs_of(other))["was_built"], "a file was changed"
    assert _build_data(other, run, inputs_of(other))["was_built"]

    (run.data / "train-json.bin").write_bytes(b"")
    assert not _build_data(other, run, inputs_of(other))["was_built"], "damaged"
    assert (run.data / "train-json.bin").stat().st_size > 0
    (run.data / "manifest.json").write_text("{")
    assert not _build_data(other, run, inputs_of(other))["was_built"], "no manifest"


def test_a_build_of_the_same_trains_nothing_anew(built: Recipe, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "runs" / "rebuilt")
    before = _stage_inputs(built, built.stage[0], run)
    content = json.loads((run.data / "manifest.json").read_text())
    content["seconds"]["read"] += 1.0
    (run.data / "manifest.json").write_text(json.dumps(content))
    assert _stage_inputs(built, built.stage[0], run) == before
    (run.data / "manifest.json").write_text(json.dumps(content | {"hash": "0" * 64}))
    assert _stage_inputs(built, built.stage[0], run) != before


def test_a_named_plan_is_followed_before_the_run_folders(built: Recipe, tmp_path: Path) -> None:
    run, file = RunFolder(tmp_path / "runs" / "rebuilt"), tmp_path / "recipe.toml"
    assert planned(built, run) == built, "there is no plan"
    for name, steps in ((run.plan, 7), (tmp_path / "named.toml", 9)):
        name.write_text(f'[[stage]]\nname = "pretrain"\nsteps = {steps}\nseq_len = 32\n')
    named = load_recipe(file, [f"plan.file={tmp_path / 'named.toml'}"])
    assert [planned(recipe, run).stage[0].steps for recipe in (built, named)] == [7, 9]
    assert planned(named, run).stage[0].seq_len == 64, "the recipe wins"
    with pytest.raises(RecipeError, match=r"plan .*none\.toml does not exist"):
        planned(load_recipe(file, [f"plan.file={tmp_path / 'none.toml'}"]), run)


def test_what_text_without_python_cannot_give_is_told_before_training(built: Recipe, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "runs" / "prose")
    (tmp_path / "prose").mkdir()
    for number in range(6):
        words = " ".join(f"word{number * 97 + i * i}" for i in range(400))
        (tmp_path / "prose" / f"{number}.txt").write_text(words)
    file, source = tmp_path / "recipe.toml", [f"data.source.json.path={tmp_path / 'prose'}", "data.source.json.kind=text"]
    for overrides, words in (
            (['evaluate.tasks=["bits_per_byte", "python_parses"]'], r"functions\.jsonl is empty, .* leave out tasks that ask"),
            (['evaluate.tasks=["identifiers"]'], r"holds no Python file; .* leave out the task identifiers"),
            (["data.evaluation_share=0"], r"evaluation\.jsonl is empty, .* raise data\.evaluation_share, or give more documents"),
            (["stage.pretrain.data=pairs"], r"'pairs' are made from Python functions with docstrings, and .* has none")):
        recipe = load_recipe(file, [*source, *overrides])
        with pytest.raises(UserError, match=words):
            _build_data(recipe, run, inputs_of(recipe))
    recipe = load_recipe(file, source)
    assert _build_data(recipe, run, inputs_of(recipe))["was_built"]


def test_a_plan_stays_when_only_the_evaluation_of_what_it_trained_changes(
        built: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run, file, made = RunFolder(tmp_path / "runs" / "rebuilt"), tmp_path / "recipe.toml", list[int]()

    class Made(Exception):
        pass

    def plan_run(*arguments: object, **options: object) -> None:
        made.append(1)
        raise Made

    monkeypatch.setattr("athanor.cli.plan.plan_run", plan_run)
    sources = scan(built)
    run.forecast.write_text("{}")
    lines = [f'{key} = "{value}"\n' for key, value in plan_inputs(built, run, sources).items()]
    run.plan.write_text("[inputs]\n" + "".join(lines))

    def plan(*overrides: str, is_fresh: bool = False) -> bool:
        with contextlib.suppress(Made):
            _plan(Chain(run, 2, time.time()), load_recipe(file, list(overrides)), run, sources, is_fresh)
        return bool(made and made.pop())

    other = "evaluate.limit=3"
    assert not plan() and "plan.toml was made before\n" in capsys.readouterr().err
    assert plan(other), "nothing is trained with it yet"
    run.stage("pretrain").root.mkdir()
    run.stage("pretrain").metrics.write_text('{"step": 1}\n')
    assert not plan(other) and "the stages are trained with it already" in capsys.readouterr().err
    assert plan(other, "seed=3") and plan("evaluate.limit=4", is_fresh=True)
    run.plan.write_text(run.plan.read_text() + "\n[model]\nhidden_size = 64\n")
    assert plan("evaluate.limit=5"), "it is not the plan that was made"


def test_the_stage_may_be_left_out_where_there_is_one(built: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    with pytest.raises(UserError, match=r"stage.pretrain has neither steps nor tokens"):  # so that stage was taken
        CliRunner().invoke(train, [str(file)], catch_exceptions=False)
    file.write_text(file.read_text() + '[[stage]]\nname = "chat"\n')
    with pytest.raises(UserError, match="which stage\\? Give --stage with one of pretrain, chat"):
        CliRunner().invoke(train, [str(file)], catch_exceptions=False)
    with pytest.raises(RecipeError, match="no stage 'pretain'; did you mean 'pretrain'\\? allowed: chat, pretrain"):
        CliRunner().invoke(train, [str(file), "--stage", "pretain"], catch_exceptions=False)


@pytest.mark.slow
def test_training_without_a_plan_and_then_the_chain(athanor: Any, recipe: Path, tmp_path: Path) -> None:
    assert athanor("data", "build", recipe).returncode == 0
    trained = athanor("train", recipe, "--stage", "pretrain")
    assert trained.returncode == 0, trained.stderr
    run = tmp_path / "runs" / "small"
    refused = athanor("run", recipe)
    assert refused.returncode == 2 and "--fresh" in refused.stderr.splitlines()[-1], refused.stderr
    config = (run / "pretrain" / "config.toml").read_text()
    done = athanor("run", recipe, "--fresh")
    assert done.returncode == 0 and "built before" in done.stderr, done.stderr
    assert (run / "pretrain" / "config.toml").read_text() != config
    built = [line["details"] for line in read_jsonl(run / "chain.jsonl") if line["event"] == "done" and line["step"] == "data"]
    assert [each["was_built"] for each in built] == [True]
    again = athanor("run", recipe)
    assert again.returncode == 0 and again.stderr.count("unchanged") == 9
    assert athanor("run", recipe, "--fresh").stderr.count("unchanged") == 9, "what is done is done"
    assert athanor("data", "build", recipe).returncode == 0
    assert athanor("run", recipe).stderr.count("unchanged") == 8, "another build of the same trains and scores nothing again"
