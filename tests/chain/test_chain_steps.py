"""When a stage is trained again, what is thrown away for it, and where the time of that goes."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import pytest

from athanor.cli.chain import Chain, alone, note_training
from athanor.cli.run import _refuse_other_plan, _stage_inputs, actual_book
from athanor.foundation.errors import UserError
from athanor.foundation.recipe import load_recipe
from athanor.foundation.run_folder import RunFolder, append_jsonl, read_jsonl
from athanor.ledger.attempts import book_of, note, throw_away
from athanor.ledger.book import Book

RECIPE = """
name = "steps"
[data]
[[data.source]]
name = "s"
kind = "text"
[[stage]]
name = "pretrain"
[[stage]]
name = "chat"
data = "{talk}"
"""


def test_changed_conversations_are_trained_on(tmp_path: Path) -> None:
    (tmp_path / "talk.jsonl").write_text("1")
    (tmp_path / "recipe.toml").write_text(RECIPE.format(talk=tmp_path / "talk.jsonl"))
    recipe, run = load_recipe(tmp_path / "recipe.toml"), RunFolder(tmp_path)
    before = [_stage_inputs(recipe, stage, run) for stage in recipe.stage]
    (tmp_path / "talk.jsonl").write_text("2")
    after = [_stage_inputs(recipe, stage, run) for stage in recipe.stage]
    assert before[0] == after[0] and before[1] != after[1]


def test_a_plan_that_fits_no_more_is_refused_before_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE.format(talk="pairs"))
    run = RunFolder(tmp_path)
    recipe = load_recipe(tmp_path / "recipe.toml").with_plan({"stage": [{"name": "pretrain", "steps": 40}]})
    stage = run.stage("pretrain")
    stage.root.mkdir()
    stage.config.write_text("[identity]\nsteps = 30\nseed = 1\n")
    _refuse_other_plan(recipe, run)  # nothing has been trained yet
    stage.metrics.write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=r"stage 'pretrain' .* was trained with: steps was 30 and is 40; .*--fresh"):
        _refuse_other_plan(recipe, run)
    stage.config.write_text("[identity]\nsteps = 40\nseed = 1\n")
    _refuse_other_plan(recipe, run)
    stage.config.write_text('[identity]\nsteps = 40\n"model.hidden_size" = 64\n')
    with pytest.raises(UserError, match=r"model\.hidden_size was 64 and is 96; .*--fresh"):
        _refuse_other_plan(recipe.with_plan({"model": {"hidden_size": 96}}), run)
    stage.config.write_text("[identity]\nsteps = ")
    with pytest.raises(UserError, match=r"config\.toml is damaged .*--fresh"):
        _refuse_other_plan(recipe, run)


def test_what_was_paid_for_knows_that_devices_change(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for devices, seconds in ((1, 0.02), (4, 0.05)):
        chain = Chain(run, devices, time.time())
        chain.step(f"train {devices}", {"config": str(devices)}, [], lambda seconds=seconds: time.sleep(seconds))  # type: ignore[misc]
        chain.end()
    one, four = (end - begin for begin, end, _ in chain.spans())
    assert chain.device_seconds() == pytest.approx(one + 4 * four) and chain.wall_seconds() == pytest.approx(one + four)
    outside = {"time": 1.0, "wall_seconds": 3.0, "device_seconds": 6.0}  # two ranks, by `athanor train` alone
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "ledger.jsonl").write_text(json.dumps(outside) + "\n")
    assert chain.device_seconds() == pytest.approx(one + 4 * four + 6.0)
    assert chain.wall_seconds() == pytest.approx(one + four + 3.0)


def test_what_verbs_did_by_themselves_stands_in_the_runs_book(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE.partition('[[stage]]\nname = "chat"')[0] + "[cluster]\ndevices = 2\n")
    recipe, run = load_recipe(tmp_path / "recipe.toml"), RunFolder(tmp_path)
    Book("actual", 2, "", None).write(run.stage("pretrain").actual)
    with alone(run, "data", recipe):
        time.sleep(0.03)
    with contextlib.suppress(UserError), alone(run, "evaluate", recipe):
        time.sleep(0.05)
        raise UserError("no such task")
    with alone(run, "plan", recipe.with_values({"cluster.accelerator": "H100-80"}, "override")):
        pass  # of another cluster, whose devices nobody pays for meanwhile
    with alone(RunFolder(tmp_path / "none"), "data", recipe):
        pass
    assert not (tmp_path / "none").exists()
    chain = Chain(run, 2, time.time())
    chain.step("data", {}, [], lambda: None)
    chain.end()
    book = actual_book(chain, recipe, run)
    (built, evaluated), (begin, end, _) = chain.alone, chain.spans()[-1]
    done = next(line for line in chain.lines if line["event"] == "done")
    assert built["seconds"] >= 0.03 and evaluated["seconds"] >= 0.05
    assert book.accounts["evaluation"] == pytest.approx(2 * evaluated["seconds"])
    assert book.accounts["data"] == pytest.approx(2 * (built["seconds"] + done["seconds"]))
    assert chain.wall_seconds() == pytest.approx(end - begin + built["seconds"] + evaluated["seconds"])
    assert chain.device_seconds() == pytest.approx(2 * chain.wall_seconds())
    assert sum(book.accounts.values()) == pytest.approx(book.device_seconds) and not book.accounts.get("check")
    append_jsonl(run.chain, {**built, "time": (begin + end) / 2})  # while the chain had the devices
    assert Chain(run, 2, time.time()).alone == [built, evaluated]


@pytest.mark.parametrize("is_killed", [True, False])
def test_training_of_a_later_day_is_no_sign_of_life_of_an_earlier_invocation(tmp_path: Path, is_killed: bool) -> None:
    run, begin = RunFolder(tmp_path), time.time() - 90_000.0
    stage = run.stage("pretrain")
    stage.root.mkdir()
    ends = [] if is_killed else [{"event": "end", "time": begin + 12.0}]
    for line in ({"event": "begin", "time": begin, "devices": 2}, {"event": "start", "step": "data", "time": begin + 1.0}, *ends):
        append_jsonl(run.chain, line)
    note(stage.ledger, {"kernel": 9.0}, until=begin + 10.0, attempt=0, step=0, devices=2)
    note_training(run)
    note(stage.ledger, {"kernel": 5.0}, until=time.time() + 5.0, attempt=1, step=0, devices=2)
    lasted = 10.0 if is_killed else 12.0
    chain = Chain(run, 2, time.time())
    assert [end - start for start, end, _ in chain.spans()] == [pytest.approx(lasted)]
    assert chain.wall_seconds() == pytest.approx(lasted + 5.0) and chain.device_seconds() == pytest.approx(2 * (lasted + 5.0))
    chain.step("data", {}, [], lambda: None)
    assert [end - start for start, end, _ in chain.spans()] == [pytest.approx(lasted), pytest.approx(0.0, abs=5.0)]


@pytest.mark.parametrize("is_outside", [True, False], ids=["by the verb train", "by the chain"])
def test_work_that_was_thrown_away_stands_in_the_runs_book(tmp_path: Path, is_outside: bool) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE.partition('[[stage]]\nname = "chat"')[0])
    run, now = RunFolder(tmp_path), time.time()
    stage = run.stage("pretrain")
    stage.root.mkdir()
    if not is_outside:  # an invocation that was killed after five seconds
        run.chain.write_text(json.dumps({"event": "begin", "time": now - 105.0, "devices": 2}) + "\n")
    note(stage.ledger, {"startup": 2.0, "kernel": 3.0}, until=now - 100.0, attempt=0, step=0, devices=2)

    def train() -> None:
        throw_away(stage)
        time.sleep(0.05)
        note(stage.ledger, {"kernel": 0.04}, until=time.time(), attempt=0, step=0, devices=2)
        book_of(read_jsonl(stage.ledger), devices=2, accelerator="CPU", peak_flops=None).write(stage.actual)

    chain = Chain(run, 2, now)
    chain.step("train pretrain", {}, [], train)
    book = actual_book(chain, load_recipe(tmp_path / "recipe.toml"), run)
    begin, end, _ = chain.spans()[-1]
    assert book.accounts["lost"] == pytest.approx(10.0) and book.accounts["kernel"] == pytest.approx(0.08)
    assert book.device_seconds == pytest.approx(10.0 + 2 * (end - begin), abs=0.1) and "startup" not in book.accounts
    assert sum(book.accounts.values()) == pytest.approx(book.device_seconds)
    assert abs(book.accounts["unattributed"]) < 2 * (end - begin)
