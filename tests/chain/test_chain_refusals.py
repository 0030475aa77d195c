"""What is refused before anything is built or trained, by `athanor plan`, `run` and `jobs submit`, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import click
import pytest

from athanor.cli.chain import locked
from athanor.cli.jobs import command as jobs
from athanor.cli.plan import command as plan
from athanor.cli.run import command as run
from athanor.foundation.errors import DiskError, UserError
from athanor.foundation.run_folder import RunFolder, write_json
from athanor.jobs import local
from athanor.jobs.queue import Queue
from athanor.models.shapes.decoder import DecoderShape

RECIPE = """
name = "small"
[budget]
minutes = 1
[cluster]
file = "{cluster}"
[data]
vocab_size = 512
[[data.source]]
name = "words"
kind = "text"
path = "text"
[[stage]]
name = "pretrain"
seq_len = 64
[[stage]]
name = "chat"
objective = "sft"
start_from = "pretrain"
data = "talks.jsonl"
seq_len = 64
[evaluate]
tasks = ["bits_per_byte"]
"""
ASK, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe that can be planned, in the current folder, with text and conversations."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ATHANOR_RUNS", "runs")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("some words to read\n\n" * 20_000)
    write_talks([[ASK, ANSWER]] * 4)
    file = tmp_path / "small.toml"
    file.write_text(RECIPE.format(cluster=Path(__file__).with_name("cluster.toml")))
    return file


def write_talks(talks: list[list[dict[str, str]]]) -> None:
    Path("talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))


def call(verb: click.Command, *arguments: object) -> None:
    verb.main([str(argument) for argument in arguments], standalone_mode=False)


def plan_small(recipe: Path, *arguments: object) -> None:
    """Plan with sizes that are given, which is quick."""
    call(plan, recipe, "model.hidden_size=64", "model.num_hidden_layers=2", *arguments)


def model_folder(name: str, **sizes: int) -> Path:
    """The configuration of a model to start from."""
    usual = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    (folder := Path(name)).mkdir()
    write_json(folder / "config.json", DecoderShape(**{**usual, **sizes}).to_config())
    return folder


def test_the_recipe_of_these_tests_is_planned(recipe: Path) -> None:
    plan_small(recipe, "--out", "plan.toml")
    assert Path("plan.toml").is_file() and not Path("runs").exists()


@pytest.mark.parametrize(("override", "words"), [
    ("stage.pretrain.warmup_steps=1e6", r"stage\.pretrain\.warmup_steps = 1000000 is more than its \d+ steps"),
    ("stage.chat.keep_latest_k=1", r"stage\.chat\.keep_latest_k = 1 leaves nothing to go on from"),
    ("parallel.num_microbatches=7", "num_microbatches = 7, but"),
    ("model.max_position_embeddings=32", r"seq_len = 64 is longer than the model's max_position_embeddings = 32"),
    ("evaluate.tp=100000", r"tp = 100000 does not divide num_attention_heads"),
    ("stage.chat.data=pairs", r"stage\.chat\.data = 'pairs' are made from Python functions .*, and no source has a Python file"),
    ("stage.chat.data=lost.jsonl", r"stage\.chat\.data = 'lost\.jsonl' does not exist"),
    ("data.source.words.path=lost", "source 'words': .*lost does not exist")])
def test_what_training_would_refuse_is_told_by_the_plan(recipe: Path, override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        plan_small(recipe, override)
    assert not Path("runs").exists()


@pytest.mark.parametrize(("override", "most"), [
    ("stage.pretrain.learning_rate=1e99", "10"), ("stage.pretrain.weight_decay=1e4", "1000"), ("stage.pretrain.steps=1e30", "10"),
    ("stage.pretrain.global_batch_tokens=1e18", "10"), ("stage.pretrain.tokens=1e300", "10"), ("budget.minutes=1e300", "10"),
    ("model.rms_norm_eps=2", "1"), ("model.num_hidden_layers=1000000000", "10000"), ("parallel.tp=1000000000000", "10")])
def test_what_no_run_can_have_is_out_of_range(recipe: Path, override: str, most: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(UserError, match=rf"'{key}' is .*: input should be less than or equal to {most}"):
        call(plan, recipe, override)
    with pytest.raises(UserError, match=r"'parallel\.recompute' is 'every-0': string should match pattern .* 'every-k' blocks"):
        call(plan, recipe, "parallel.recompute=every-0")


def test_batches_of_many_rows_are_planned_in_time(recipe: Path) -> None:
    """A trillion tokens are 15,625,000,000 rows, which are not counted one by one."""
    with pytest.raises(UserError, match="the budget pays for"):
        plan_small(recipe, "stage.pretrain.global_batch_tokens=1e12")


def test_conversations_are_looked_at_by_the_plan(recipe: Path) -> None:
    write_talks([[ASK, ANSWER], [ASK, ANSWER], [ASK, {**ANSWER, "role": "asistant"}]])
    with pytest.raises(UserError, match=r"talks\.jsonl line 3: .*the role of a message is 'asistant'; allowed: system, user"):
        call(plan, recipe)
    write_talks([[ASK]])
    with pytest.raises(UserError, match=r"'talks\.jsonl' has no message of the role 'assistant'"):
        call(plan, recipe)


def test_rows_that_are_no_text_are_told_by_the_plan(recipe: Path) -> None:
    Path("rows.csv").write_text("body,year\nhello,1\n")
    with pytest.raises(UserError, match=r"source 'words': rows\.csv has no column 'text'; its columns are body, year"):
        call(plan, recipe, "data.source.words.kind=csv", "data.source.words.path=rows.csv")
    Path("rows.jsonl").write_text('{"body": "hello"}\n' * 5)
    with pytest.raises(UserError, match=r"none of the first 5 rows of rows\.jsonl can be read: no field 'text'"):
        call(plan, recipe, "data.source.words.kind=jsonl", "data.source.words.path=rows.jsonl")
    with Path("rows.jsonl").open("a") as file:
        file.write(json.dumps({"text": "hello " * 20_000}) + "\n")
    plan_small(recipe, "data.source.words.kind=jsonl", "data.source.words.path=rows.jsonl", "--out", "plan.toml")
    Path("rows").mkdir()
    Path("rows.jsonl").rename("rows/second.jsonl")
    Path("rows/first.jsonl").write_text('{"title": "what is in the second"}\n' * 200)
    plan_small(recipe, "data.source.words.kind=jsonl", "data.source.words.path=rows", "--out", "plan.toml")


def test_ranks_that_divide_the_vocabulary_are_not_refused(recipe: Path) -> None:
    """Three, of a tokenizer with three times 256 entries."""
    call(plan, recipe, "data.vocab_size=768", "evaluate.tp=3", "model.num_attention_heads=3", "model.intermediate_size=192",
         "model.hidden_size=96", "model.num_hidden_layers=2", "--out", "plan.toml")


def test_a_recipe_has_one_model(recipe: Path) -> None:
    """A stage that starts anew and one that starts from a folder share [model]; told before the first of them is trained."""
    start = f"stage.chat.start_from={model_folder('base')}"
    call(plan, recipe, start, "--out", "plan.toml")
    for overrides, words in (
            (["model.hidden_size=96"], r"model\.hidden_size is 96, but the model in base has 64; a recipe has one model"),
            (["data.vocab_size=1024"], "base has 512 tokens in its vocabulary, the data's tokenizer 1024"),
            (["model.architecture=qwen3"], "'qwen3', but the model in base is a 'llama'"),
            ([f"stage.pretrain.start_from={model_folder('other', hidden_size=128)}"],
             r"stage\.chat\.start_from = 'base' has hidden_size = 64, but the model that another stage starts from 128")):
        with pytest.raises(UserError, match=words):
            call(plan, recipe, start, *overrides)
    Path("given").mkdir()
    (Path("given") / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"last": 511}}}))
    (Path("base") / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"last": 500}}}))
    with pytest.raises(UserError, match=r"base/tokenizer\.json is not .* built with \(400 new entries\); build .* = \"base\""):
        call(plan, recipe, start, "data.vocab_size=400")  # while with 512 it may be the same one
    call(plan, recipe, start, "--out", "plan.toml")
    recipe.write_text(recipe.read_text().replace("vocab_size = 512", 'tokenizer = "given"'))
    with pytest.raises(UserError, match=r"base/tokenizer\.json is not the tokenizer that the data are built with \(given/"):
        call(plan, recipe, start, "stage.chat.data=documents")
    with pytest.raises(UserError, match=r"data\.tokenizer = 'lost' does not exist"):
        call(plan, recipe, start, "data.tokenizer=lost")


def test_a_refused_run_leaves_no_folder(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("athanor.foundation.launch.start_server", lambda module: None)  # no rank is ever started
    sizes = "model.hidden_size=64", "model.num_hidden_layers=2"
    for override in ("stage.chat.data=lost.jsonl", "stage.pretrain.warmup_steps=1e6"):  # before the chain begins, and by its plan
        with pytest.raises(UserError, match=r"does not exist|is more than"):
            call(run, recipe, override, *sizes)
        assert os.listdir("runs") == []
    Path("runs/small").mkdir()
    Path("runs/small/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="does not exist"):
        call(run, recipe, "stage.chat.data=lost.jsonl")
    assert Path("runs/small/notes.txt").read_text() == "mine", "what was there before stays"


def test_a_new_run_that_is_moved_away_ends_with_its_sentence(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")

    def move() -> None:
        folder.root.rename(tmp_path / "elsewhere")
        raise UserError("it was moved")

    with pytest.raises(UserError, match="it was moved"), locked(folder):
        move()


def test_a_refused_job_leaves_nothing(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="is more than its"):
        call(jobs, "submit", recipe, "stage.pretrain.warmup_steps=1e6", "model.hidden_size=64", "model.num_hidden_layers=2")
    assert not Path("runs").exists()
    monkeypatch.setenv("PATH", "")  # on which there is no sbatch
    with pytest.raises(UserError, match="is not on PATH"):
        call(jobs, "submit", recipe, "--slurm", "--nodes", "1", "--ranks-per-node", "2", "model.hidden_size=64")
    assert os.listdir("runs") == ["jobs.sqlite"]


def test_numbers_of_jobs_do_not_skip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(tmp_path / "runs")
    wish = {"name": "small", "recipe": tmp_path / "small.toml", "overrides": [], "stage": None, "minutes": None,
            "run": tmp_path / "runs" / "small"}
    first = queue.add(**{**wish, "run": tmp_path / "runs" / "other"})

    def refuse(queue: Queue, job: object) -> None:
        raise DiskError("the disk is full")

    monkeypatch.setattr(local, "start", refuse)
    with pytest.raises(DiskError):
        local.submit(queue, **wish)
    assert [job.number for job in queue.all()] == [first.number] and not (tmp_path / "runs" / "small").exists()
    (tmp_path / "runs" / "small").write_text("")  # where its folder would be
    with pytest.raises(DiskError):
        local.submit(queue, **wish)
    assert queue.add(**wish).number == first.number + 1
    shutil.rmtree(tmp_path / "runs")
