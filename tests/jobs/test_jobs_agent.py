"""Ranks that are killed or fail are started again where they are, and the stage ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from disturbed import (
    EVERY,
    STEPS,
    assert_every_second_is_told,
    assert_only_uncheckpointed_steps_are_lost,
    events,
    in_sight,
    when,
)
from tiny_run import seconds_until_book

from athanor.foundation.errors import DiskError, UserError
from athanor.foundation.events import EXIT_HOLD, EXIT_REQUEUE
from athanor.foundation.launch import start_server
from athanor.foundation.recipe import load_recipe
from athanor.foundation.run_folder import RunFolder, StageFolder, hash_folder, read_jsonl
from athanor.jobs import agent as agent_module
from athanor.jobs.agent import Agent, Held, Stopped
from athanor.ledger.book import read_book
from athanor.train.settings import layout_of

CHOICES = ("stage.pretrain.precision=fp32", f"stage.pretrain.steps={STEPS}", f"stage.pretrain.checkpoint_every={EVERY}",
           "stage.pretrain.evaluate_every=1000", "parallel.dp_shard=2")


@pytest.fixture
def supervised(recipe_file: Path) -> Callable[..., dict[str, Any]]:
    """Train on ranks that an agent owns, two unless `overrides` lay them out otherwise."""

    def run(folder: Path, target: str = "athanor.train.loop:train_stage", overrides: Sequence[str] = (),
            **arguments: Any) -> dict[str, Any]:
        launched = time.perf_counter()
        start_server("athanor.train.loop")
        recipe = load_recipe(recipe_file, [*CHOICES, *overrides])
        arguments = {"run_folder": str(folder), "recipe": recipe, "stage": "pretrain", "launched": launched, **arguments}
        return Agent(RunFolder(folder).stage("pretrain"), layout_of(recipe).world_size, 1).run(target, arguments)

    return run


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("calm")


@pytest.fixture
def wanted(calm: Path, supervised: Any, data_folder: Path) -> str:
    """The model of the same run without any disturbance, as a hash."""
    if not (calm / "data").exists():
        (calm / "data").symlink_to(data_folder)
        supervised(calm)
    return hash_folder(RunFolder(calm).stage("pretrain").model)


@pytest.mark.parametrize("who", ["one", pytest.param("all", marks=pytest.mark.slow)])
def test_killed_ranks_are_named_and_started_again(supervised: Any, run_folder: Path, wanted: str, tmp_path: Path,
                                                  who: str) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    chance = random.Random(seed)
    stage = RunFolder(run_folder).stage("pretrain")
    pids, ranks = tmp_path / "pids", [chance.randrange(2)] if who == "one" else [0, 1]

    def kill() -> None:
        for number in (signal.SIGSTOP, signal.SIGKILL):  # first none of them can tell that it lost another
            for rank in ranks:
                os.kill(int((pids / str(rank)).read_text()), number)

    begun = time.time()
    with when(stage, chance.randrange(1, STEPS - 4), chance.uniform(0, 0.05), kill, pids):
        supervised(run_folder, **in_sight(pids))
    (fault,) = events(stage, "fault")
    named = f"rank {ranks[0]} was" if who == "one" else "all 2 ranks were"
    assert f"{named} killed by signal 9 (SIGKILL)" in fault["sentence"] and fault["signal"] == 9
    assert fault["rank"] == ranks[0] and fault["exception"] is None and f"after step {fault['step']}," in fault["sentence"]
    assert hash_folder(stage.model) == wanted
    assert_only_uncheckpointed_steps_are_lost(stage)
    assert_every_second_is_told(stage, begun)
    accounts = read_book(stage.actual).accounts
    assert accounts["down"] > 0 and accounts["lost"] > 0 and accounts["startup"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("layout", [("parallel.dp_shard=1", "parallel.tp=2"),
                                    ("parallel.pp=2", "stage.pretrain.micro_batch_size=1")], ids=["tp 2", "dp_shard 2 x pp 2"])
def test_a_killed_rank_of_any_layout_is_named(supervised: Any, run_folder: Path, data_folder: Path, tmp_path: Path,
                                              layout: tuple[str, ...]) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    chance, stage, pids, calm = random.Random(seed), RunFolder(run_folder).stage("pretrain"), tmp_path / "pids", tmp_path / "calm"
    victim, step = chance.randrange(4 if "parallel.pp=2" in layout else 2), chance.randrange(1, STEPS - 4)
    calm.mkdir()
    (calm / "data").symlink_to(data_folder)
    supervised(calm, overrides=layout)
    with when(stage, step, chance.uniform(0, 0.05), lambda: os.kill(int((pids / str(victim)).read_text()), signal.SIGKILL), pids):
        supervised(run_folder, overrides=layout, **in_sight(pids))
    (fault,) = events(stage, "fault")
    assert f"rank {victim} was killed by signal 9" in fault["sentence"] and fault["rank"] == victim
    assert hash_folder(stage.model) == hash_folder(RunFolder(calm).stage("pretrain").model)


@pytest.mark.slow
def test_killed_again_while_it_loads_when_it_has_loaded_and_at_the_end(supervised: Any, run_folder: Path, wanted: str,
                                                                       tmp_path: Path) -> None:
    """Faults that follow each other before a step further is done; each is told, and each second."""
    marks, stage = tmp_path / "marks", RunFolder(run_folder).stage("pretrain")
    marks.mkdir()
    begun = time.time()
    supervised(run_folder, "jobs_ranks:train_and_fail_again", marks=str(marks), step=13)  # that of step 6 is saved by then
    faults = events(stage, "fault")
    assert [fault["rank"] for fault in faults] == [1, 0, 1, 0] and all(fault["signal"] == 9 for fault in faults)
    assert faults[0]["sentence"].startswith("after step 13, rank 1")
    assert faults[1]["sentence"].startswith("before the first step, rank 0")
    assert [fault["attempt"] for fault in faults][:3] == [0, 1, 1], "the life that was killed before it began has no number"
    assert hash_folder(stage.model) == wanted
    assert_only_uncheckpointed_steps_are_lost(stage)
    assert_every_second_is_told(stage, begun)


@pytest.mark.slow
def test_an_exception_once_is_told_and_forgiven(supervised: Any, run_folder: Path, wanted: str, tmp_path: Path) -> None:
    marks, stage = tmp_path / "marks", RunFolder(run_folder).stage("pretrain")
    marks.mkdir()
    supervised(run_folder, "jobs_ranks:train_and_fail", marks=str(marks), times=1, step=9, rank=1, kind="exception")
    (fault,) = events(stage, "fault")
    assert fault["sentence"].startswith("after step 9, rank 1 failed: ZeroDivisionError: the 1th of its kind")
    assert fault["rank"] == 1 and fault["step"] == 9 and fault["exception"].startswith("ZeroDivisionError at ")
    assert hash_folder(stage.model) == wanted
    assert_only_uncheckpointed_steps_are_lost(stage)


@pytest.mark.slow
def test_a_cut_connection_is_told_and_the_ranks_meet_again(supervised: Any, run_folder: Path, wanted: str,
                                                           tmp_path: Path) -> None:
    marks, stage = tmp_path / "marks", RunFolder(run_folder).stage("pretrain")
    marks.mkdir()
    supervised(run_folder, "jobs_ranks:train_and_fail", marks=str(marks), times=1, step=9, rank=1, kind="cut")
    (fault,) = events(stage, "fault")
    assert re.search(r"after step 9, .*(onnection|Broken pipe|SIGABRT)", fault["sentence"]), fault
    assert hash_folder(stage.model) == wanted
    assert_only_uncheckpointed_steps_are_lost(stage)


@pytest.mark.slow
def test_a_clock_that_is_set_back_changes_nothing(supervised: Any, run_folder: Path, wanted: str, tmp_path: Path) -> None:
    """An hour, on rank 0, which writes the records; killed afterwards, its ranks go on all the same."""
    marks, stage = tmp_path / "marks", RunFolder(run_folder).stage("pretrain")
    marks.mkdir()
    begun = time.time()
    supervised(run_folder, "jobs_ranks:train_and_fail", marks=str(marks), times=1, step=9, rank=0, kind="clock")
    assert hash_folder(stage.model) == wanted and not events(stage, "fault")
    assert_every_second_is_told(stage, begun)


@pytest.mark.slow
def test_killed_after_the_clock_was_set_back_a_life_is_told_with_its_seconds(supervised: Any, run_folder: Path, wanted: str,
                                                                             tmp_path: Path) -> None:
    marks, stage = tmp_path / "marks", RunFolder(run_folder).stage("pretrain")
    marks.mkdir()
    begun = time.time()
    supervised(run_folder, "jobs_ranks:train_and_fail", marks=str(marks), times=1, step=8, rank=0, kind="clock, killed")
    (fault,) = events(stage, "fault")
    assert fault["sentence"].startswith("after step 11, rank 0 was killed by signal 9") and fault["attempt"] == 0
    assert hash_folder(stage.model) == wanted
    assert_every_second_is_told(stage, begun)


@pytest.mark.slow
def test_data_that_rot_are_named_and_not_trained_on(supervised: Any, run_folder: Path, data_folder: Path, tmp_path: Path,
                                                    wanted: str) -> None:
    pids, stage, data = tmp_path / "pids", RunFolder(run_folder).stage("pretrain"), tmp_path / "data"
    shutil.copytree(data_folder, data)
    (run_folder / "data").unlink()
    (run_folder / "data").symlink_to(data)
    file = next(path for path in sorted(data.glob("*.bin")) if path.stem != "evaluation")

    def rot_and_kill() -> None:
        with file.open("r+b") as stream:
            stream.seek(1001)
            stream.write(b"\xff")
        os.kill(int((pids / "1").read_text()), signal.SIGKILL)

    with when(stage, 4, 0.0, rot_and_kill, pids), pytest.raises(UserError, match=rf"{file.name} in .* not what was built"):
        supervised(run_folder, **in_sight(pids))
    shutil.copy(data_folder / file.name, file)
    supervised(run_folder)
    assert max(row["step"] for row in read_jsonl(stage.metrics)) == STEPS


AGENT = """
import json, sys, time
from pathlib import Path
from athanor.foundation.recipe import load_recipe
from athanor.foundation.run_folder import RunFolder
from athanor.jobs.agent import Agent
if __name__ == "__main__":
    recipe, folder, marks, number, *choices = sys.argv[1:]
    Path(marks, f"begun-{number}").write_text(str(time.time()))
    Agent(RunFolder(Path(folder)).stage("pretrain"), 2, 1).run("jobs_ranks:train_and_kill_the_agent", {
        "run_folder": folder, "recipe": load_recipe(Path(recipe), choices), "stage": "pretrain", "marks": marks, "pause": 3.0})
"""


@pytest.mark.slow
def test_killed_with_its_agent_before_a_line_was_written_every_second_is_told(
        supervised: Any, run_folder: Path, recipe_file: Path, wanted: str, tmp_path: Path) -> None:
    """While it loads, and in its second step; the next life tells of both."""
    script, stage, seconds = tmp_path / "agent.py", RunFolder(run_folder).stage("pretrain"), 0.0
    script.write_text(AGENT)
    for life in (0, 1):
        command = [sys.executable, script, recipe_file, run_folder, tmp_path, life, *CHOICES]
        assert subprocess.run(list(map(str, command)), timeout=120, check=False).returncode == -signal.SIGKILL
        seconds += float((tmp_path / f"killed-{life}").read_text()) - float((tmp_path / f"begun-{life}").read_text())
    begun = time.time()
    supervised(run_folder)
    assert hash_folder(stage.model) == wanted
    book, seconds = read_book(stage.actual), seconds + seconds_until_book(stage, begun)
    assert book.wall_seconds == pytest.approx(seconds, rel=0.05, abs=3.0), "a sign each half second, if there is a processor"
    assert book.accounts["startup"] > 2 * 2.5 and book.accounts["lost"] > 2 * 2.5
    assert abs(book.accounts["unattributed"]) <= 0.05 * book.device_seconds + 0.1, book.accounts


def test_the_same_exception_at_the_same_step_is_held_with_its_traceback(supervised: Any, run_folder: Path, tmp_path: Path,
                                                                        wanted: str) -> None:
    marks, stage = tmp_path / "marks", RunFolder(run_folder).stage("pretrain")
    marks.mkdir()
    with pytest.raises(Held, match=r"rank 0 failed: ZeroDivisionError: .* at the same step as before") as caught:
        supervised(run_folder, "jobs_ranks:train_and_fail", marks=str(marks), times=9, step=7, rank=0, kind="exception")
    assert caught.value.exit_code == EXIT_HOLD and len(events(stage, "fault")) == 2
    (held,) = events(stage, "held")
    assert "in fail" in held["traceback"] and "raise ZeroDivisionError" in held["traceback"] and held["step"] == 7
    supervised(run_folder)  # mended
    assert hash_folder(stage.model) == wanted


@pytest.mark.slow
def test_faults_without_progress_are_tried_ever_more_slowly_and_not_for_ever(
        supervised: Any, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marks, stage = tmp_path / "marks", RunFolder(run_folder).stage("pretrain")
    marks.mkdir()
    monkeypatch.setattr(agent_module, "FIRST_WAIT_SECONDS", 0.2)
    naps, sleep = set(), time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: (naps.add(len(events(stage, "fault"))), sleep(seconds)))
    with pytest.raises(Held, match=r"rank 1 was killed by signal 9 .* the 5th fault in a row without a step further"):
        supervised(run_folder, "jobs_ranks:train_and_fail", marks=str(marks), times=9, step=2, rank=1, kind="killed")
    down = [line["wall_seconds"] for line in read_jsonl(stage.root / "ledger.jsonl") if "down" in line.get("accounts", {})]
    assert len(down) == 4 and all(a >= b for a, b in zip(down[1:], (0.2, 0.4, 0.8), strict=True))
    assert naps == {2, 3, 4}, "the first time it does not wait at all"


def test_asked_to_stop_it_saves_also_right_after_a_fault(supervised: Any, run_folder: Path, tmp_path: Path, wanted: str) -> None:
    stage, pids = RunFolder(run_folder).stage("pretrain"), tmp_path / "pids"
    with when(stage, 4, 0.0, lambda: os.kill(os.getpid(), signal.SIGTERM), pids):
        stopped = supervised(run_folder, **in_sight(pids, hold=8))
    assert stopped["is_asked_to_stop"] and (stage.checkpoints / f"step-{stopped['step']:08d}" / "COMPLETE").is_file()

    def stop_and_kill() -> None:
        os.kill(int((pids / "0").read_text()), signal.SIGSTOP)  # it cannot finish its step
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        os.kill(int((pids / "0").read_text()), signal.SIGKILL)

    with (when(stage, stopped["step"] + 2, 0.0, stop_and_kill, pids),
          pytest.raises(Stopped, match=r"rank 0 was killed .* asked to stop") as caught):
        supervised(run_folder, **in_sight(pids))
    assert caught.value.exit_code == EXIT_REQUEUE
    supervised(run_folder)
    assert hash_folder(stage.model) == wanted


def test_a_second_ctrl_c_ends_at_once(supervised: Any, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, pids = RunFolder(run_folder).stage("pretrain"), tmp_path / "pids"
    ask, is_asked = Agent._ask, threading.Event()
    monkeypatch.setattr(Agent, "_ask", lambda self, *_: (ask(self), is_asked.set()))
    before = signal.getsignal(signal.SIGINT)  # which a shell has its background jobs ignore

    def interrupt() -> None:
        os.kill(int((pids / "0").read_text()), signal.SIGSTOP)  # it cannot finish its step
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            is_asked.wait(60)

    with when(stage, 4, 0.0, interrupt, pids), pytest.raises(KeyboardInterrupt):
        supervised(run_folder, **in_sight(pids))
    assert not any(Path("/proc", file.read_text()).exists() for file in pids.glob("[01]"))
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("has_nohup", [True, False])
def test_nobody_listens_for_a_closed_terminal_under_nohup(tmp_path: Path, has_nohup: bool) -> None:
    agent = Agent(StageFolder(tmp_path), 1)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if has_nohup else signal.SIG_DFL)
    try:
        with agent._listening():
            if has_nohup or signal.getsignal(signal.SIGHUP) != signal.SIG_DFL:  # or we would end here
                os.kill(os.getpid(), signal.SIGHUP)
        assert agent.is_asked_to_stop is not has_nohup
        assert signal.getsignal(signal.SIGHUP) == (signal.SIG_IGN if has_nohup else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_ranks_refuse_is_not_tried_again(supervised: Any, run_folder: Path) -> None:
    stage = RunFolder(run_folder).stage("pretrain")
    stage.root.mkdir()
    stage.config.write_text("[identity]\nsteps = 7")
    with pytest.raises(UserError, match="was trained with another configuration"):
        supervised(run_folder)
    assert not stage.events.exists() and not (stage.root / "ledger.jsonl").exists()


def test_what_a_stage_gives_up_on_is_held_and_its_seconds_are_told(supervised: Any, run_folder: Path, tmp_path: Path) -> None:
    marks, stage = tmp_path / "marks", RunFolder(run_folder).stage("pretrain")
    marks.mkdir()
    with pytest.raises(DiskError, match="the disk is full"):
        supervised(run_folder, "jobs_ranks:train_and_fail", marks=str(marks), times=9, step=2, rank=1, kind="full disk")
    (held,) = events(stage, "held")
    assert held["sentence"] == "after step 2: rank 1 could not save: the disk is full" and not events(stage, "fault")
    assert read_jsonl(stage.root / "ledger.jsonl")[-1]["accounts"]["startup"] > 0



@pytest.mark.parametrize("kills", [pytest.param(15, marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
                                   pytest.param(200, marks=[pytest.mark.drill, pytest.mark.timeout(3600)])])
def test_many_kills_at_random_moments(supervised: Any, run_folder: Path, data_folder: Path, tmp_path: Path, kills: int,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank, both, or the process that starts them, also while they start and save."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    chance, stage, pids = random.Random(seed), RunFolder(run_folder).stage("pretrain"), tmp_path / "pids"
    monkeypatch.setattr(agent_module, "MOST_FAULTS", 10**6)
    monkeypatch.setattr(agent_module, "LONGEST_WAIT_SECONDS", 0.0)
    calm = tmp_path / "calm"
    calm.mkdir()
    (calm / "data").symlink_to(data_folder)
    steps = 25 * kills
    longer = (f"stage.pretrain.steps={steps}",)
    supervised(calm, overrides=longer)

    victims: list[list[int]] = []  # ranks, none when it was the server

    def kill() -> None:
        before: list[int] = []
        for _ in range(kills):
            deadline = time.monotonic() + 60
            while len(found := [int(file.read_text()) for file in sorted(pids.glob("[01]"))]) < 2 or set(found) & set(before):
                assert time.monotonic() < deadline
                time.sleep(0.005)
            before = found
            server = int(Path(f"/proc/{found[0]}/stat").read_text().split()[3])
            time.sleep(chance.uniform(0.0, 3.0))
            victims.append(chance.choice([*([0], [1], [0, 1]) * 4, []]))
            for pid in [found[rank] for rank in victims[-1]] or [server]:
                with suppress(ProcessLookupError):  # the other one's death was quicker
                    os.kill(pid, signal.SIGKILL)

    begun = time.time()
    with when(stage, 0, 0.0, kill, pids):
        supervised(run_folder, overrides=longer, **in_sight(pids, hold=steps - 1))
    assert len(events(stage, "fault")) == kills and not events(stage, "damaged")
    for fault, ranks in zip(events(stage, "fault"), victims, strict=True):
        assert fault["signal"] == 9 and fault["rank"] in ranks if ranks else "with the fork server" in fault["sentence"]
    print([len(ranks) for ranks in victims], [fault["sentence"][:40] for fault in events(stage, "fault")])
    assert hash_folder(stage.model) == hash_folder(RunFolder(calm).stage("pretrain").model)
    assert_only_uncheckpointed_steps_are_lost(stage)
    assert_every_second_is_told(stage, begun)
