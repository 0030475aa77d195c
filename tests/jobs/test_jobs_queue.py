"""The list of jobs, and how an agent ends: what is said to people, and the three exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from athanor.cli.jobs import command
from athanor.foundation.errors import RecipeError, UserError
from athanor.jobs import local
from athanor.jobs.agent import Held, Stopped
from athanor.jobs.queue import FILE, Job, Queue


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Queue:
    monkeypatch.setenv("ATHANOR_RUNS", str(tmp_path / "runs"))
    return Queue(tmp_path / "runs")


@pytest.fixture
def signals() -> Iterator[None]:
    """What an agent does with signals is undone."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def add(queue: Queue, name: str = "tiny", minutes: float | None = None) -> Job:
    return queue.add(name=name, recipe=Path("tiny.toml"), overrides=["a=1"], stage="pretrain", run=queue.root / name,
                     minutes=minutes)


def test_rows_are_kept_and_found_by_id_or_number(queue: Queue) -> None:
    first, second = add(queue), add(queue, "other")
    assert [job.id for job in queue.all()] == ["other-2", "tiny-1"] and queue.get("tiny-1") == queue.get("1") == first
    assert second.overrides == ["a=1"] and Path(second.recipe).is_absolute() and second.run == str(queue.root / "other")
    assert queue.update(first, state="done", only_running=True).state == "done"
    assert queue.update(first, state="lost", only_running=True).state == "done", "it had ended"
    with pytest.raises(UserError, match="there is no job 'tiny-3'; did you mean 'tiny-1'"):
        queue.get("tiny-3")


def test_a_damaged_or_newer_file_is_refused_in_a_sentence(queue: Queue) -> None:
    with pytest.raises(UserError, match=r"there is no job '1'; nothing was submitted to .* yet"):
        queue.get("1")
    assert not queue.root.exists(), "looking leaves nothing behind"
    add(queue)
    base = sqlite3.connect(queue.root / FILE)
    base.execute("PRAGMA user_version = 9")
    base.close()
    with pytest.raises(UserError, match="has schema 9, this version reads up to 2"):
        queue.all()
    (queue.root / FILE).write_text("no database, but long enough to be looked at" * 9)
    with pytest.raises(UserError, match=r"cannot be used: .*; when it is damaged, move it away"):
        queue.all()


def test_a_file_of_before_slurm_is_read(queue: Queue) -> None:
    job = add(queue)
    base = sqlite3.connect(queue.root / FILE)
    base.execute("ALTER TABLE job DROP COLUMN slurm")
    base.execute("PRAGMA user_version = 1")
    base.commit()
    base.close()
    assert queue.get(job.id) == job and add(queue, "other").id == "other-2"


def test_another_process_may_bring_the_file_up_to_date_meanwhile(queue: Queue) -> None:
    job = add(queue)
    with contextlib.closing(sqlite3.connect(queue.root / FILE, isolation_level=None)) as base, ThreadPoolExecutor(1) as pool:
        base.execute("ALTER TABLE job DROP COLUMN slurm")
        base.execute("PRAGMA user_version = 1")
        base.execute("BEGIN IMMEDIATE")
        base.execute("ALTER TABLE job ADD COLUMN slurm TEXT")
        base.execute("PRAGMA user_version = 2")
        found = pool.submit(queue.all)
        time.sleep(1.0)
        base.execute("COMMIT")
        assert found.result() == [job]


def test_looking_at_jobs_waits_for_no_writer(queue: Queue) -> None:
    job = add(queue)
    base = sqlite3.connect(queue.root / FILE, isolation_level=None)
    base.execute("BEGIN IMMEDIATE")
    begun = time.monotonic()
    assert queue.all() == [job] and time.monotonic() - begun < 5.0, "of 10 s after which it would give up"
    base.close()


def test_a_job_without_its_agent_is_lost(queue: Queue) -> None:
    job = add(queue)
    assert local.find(queue, job.id).state == "running", "it may just be starting"
    with pytest.raises(UserError, match="tiny-1 is being started; try again in a moment"):
        local.cancel(queue, job.id)
    queue.update(job, process=1)
    lost = local.find(queue, job.id)
    assert lost.state == "lost" and "`athanor jobs resume tiny-1` goes on" in lost.sentence
    with pytest.raises(UserError, match=r"tiny-1 has ended already: lost \(its agent was killed"):
        local.cancel(queue, job.id)
    queue.update(job, state="done")
    with pytest.raises(UserError, match="tiny-1 is done; nothing is left to do"):
        local.resume(queue, job.id)


def raising(error: BaseException) -> Callable[[], object]:
    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize(("act", "code", "state", "sentence"), [
    (lambda: None, 0, "done", ""),
    (raising(Stopped("as asked")), 85, "stopped", "as asked"),
    (lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(5)), 85, "stopped", "stopped between two stages, as asked"),
    (raising(RecipeError("not like this")), 86, "held", "not like this"),
    (raising(Held("twice")), 86, "held", "twice"),
    (raising(ZeroDivisionError()), 86, "held", "its agent failed; see its log"),
], ids=["done", "stopped", "SIGTERM", "a recipe's fault", "held", "our fault"])
def test_every_end_is_one_of_three_exit_codes(queue: Queue, signals: None, act: Callable[[], object], code: int, state: str,
                                              sentence: str) -> None:
    job = add(queue)
    assert local.work(queue, job, act) == code
    ended = queue.get(job.id)
    assert (ended.exit_code, ended.state, ended.sentence) == (code, state, sentence) and ended.ended is not None


def test_a_time_limit_asks_to_stop_and_a_cancelled_job_says_so(queue: Queue, signals: None) -> None:
    job = add(queue, minutes=0.2 / 60)
    begin = time.monotonic()
    assert local.work(queue, job, lambda: time.sleep(5)) == 85 and time.monotonic() - begin < 2
    assert queue.get(job.id).state == "stopped"
    other = queue.update(add(queue), is_cancelled=True)
    assert local.work(queue, other, raising(Stopped("as asked"))) == 85 and queue.get(other.id).state == "cancelled"


def test_the_verbs_speak_json_and_refuse_early(queue: Queue, recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(*arguments: str) -> object:
        return json.loads(CliRunner().invoke(command, [*arguments, "--json"], catch_exceptions=False).stdout)

    assert call("list") == {"jobs": []}
    with pytest.raises(RecipeError, match="has no stage 'pretrian'; did you mean 'pretrain'"):
        CliRunner().invoke(command, ["submit", str(recipe_file), "--stage", "pretrian"], catch_exceptions=False)
    monkeypatch.setenv("PATH", "")
    for options, error in ((["--nodes", "2"], click.UsageError), (["--slurm"], UserError), (["--slurm", "--minutes", "1"],
                                                                                            click.UsageError)):
        with pytest.raises(error, match=r"go with --slurm|command scontrol is not on PATH|--time limits each start"):
            command.main(["submit", str(recipe_file), "--stage", "pretrain", *options], standalone_mode=False)
    for minutes in ("0", "-1", "nan", "inf", "1e30"):
        with pytest.raises(click.UsageError, match=r"minutes is|not in the range x>0"):
            command.main(["submit", str(recipe_file), "--stage", "pretrain", "--minutes", minutes], standalone_mode=False)
    assert call("list") == {"jobs": []}, "what was refused is not listed"
    job = add(queue)
    with pytest.raises(UserError, match=r"tiny-2 is working in .*; wait for it, cancel it, or give the run another name"):
        CliRunner().invoke(command, ["submit", str(recipe_file), "--stage", "pretrain"], catch_exceptions=False)
    shown = call("show", "2")
    assert isinstance(shown, dict) and shown["id"] == job.id and shown["step"] == 0 and shown["faults"] == []
    with pytest.raises(UserError, match="tiny-2 has no log of rank 0; no rank was started yet"):
        CliRunner().invoke(command, ["logs", "2", "--rank", "0"], catch_exceptions=False)
