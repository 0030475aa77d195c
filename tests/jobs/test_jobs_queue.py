"""The list of jobs, and how an agent ends: what is said to people, and the three exit codes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from athanor.cli.chain import locked
from athanor.cli.jobs import command
from athanor.cli.jobs_show import describe, progress
from athanor.cli.train import begins_anew
from athanor.foundation.errors import LayoutError, RecipeError, UserError
from athanor.foundation.run_folder import RunFolder, append_jsonl
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
    with pytest.raises(UserError, match="has schema 9, this version reads up to 3"):
        queue.all()
    (queue.root / FILE).write_text("no database, but long enough to be looked at" * 9)
    with pytest.raises(UserError, match=r"cannot be used: .*; when it is damaged, move it away"):
        queue.all()


def test_a_file_of_before_slurm_is_read(queue: Queue) -> None:
    job = add(queue)
    base = sqlite3.connect(queue.root / FILE)
    base.execute("ALTER TABLE job DROP COLUMN slurm")
    base.execute("ALTER TABLE job DROP COLUMN is_fresh")
    base.execute("PRAGMA user_version = 1")
    base.commit()
    base.close()
    assert queue.get(job.id) == job and add(queue, "other").id == "other-2"


def test_another_process_may_bring_the_file_up_to_date_meanwhile(queue: Queue) -> None:
    job = add(queue)
    with contextlib.closing(sqlite3.connect(queue.root / FILE, isolation_level=None)) as base, ThreadPoolExecutor(1) as pool:
        base.execute("ALTER TABLE job DROP COLUMN is_fresh")
        base.execute("PRAGMA user_version = 2")
        base.execute("BEGIN IMMEDIATE")
        base.execute("ALTER TABLE job ADD COLUMN is_fresh INTEGER NOT NULL DEFAULT 0")
        base.execute("PRAGMA user_version = 3")
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
    (raising(Stopped(f"as asked; {local.GO_ON}")), 85, "stopped", "as asked; `athanor jobs resume tiny-1` goes on"),
    (lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(60)), 85, "stopped", "stopped between two stages, as asked"),
    (raising(RecipeError("not like this")), 86, "held", "not like this"),
    (raising(Held("twice")), 86, "held", "twice"),
    (raising(ZeroDivisionError()), 86, "held", "its agent failed; see its log"),
], ids=["done", "stopped", "can go on", "SIGTERM", "a recipe's fault", "held", "our fault"])
def test_every_end_is_one_of_three_exit_codes(queue: Queue, signals: None, act: Callable[[], object], code: int, state: str,
                                              sentence: str) -> None:
    job = add(queue)
    assert local.work(queue, job, act) == code
    ended = queue.get(job.id)
    assert (ended.exit_code, ended.state, ended.sentence) == (code, state, sentence) and ended.ended is not None


def test_a_job_whose_run_is_moved_away_ends_with_its_code(queue: Queue, signals: None) -> None:
    job = add(queue)

    def move() -> None:
        Path(job.run).rename(queue.root / "elsewhere")
        raise UserError("it was moved")

    assert local.work(queue, job, move) == 86
    assert queue.get(job.id).sentence == "it was moved" and not Path(job.run).exists()


def test_what_a_job_took_leaves_out_the_time_it_lay_still(queue: Queue, signals: None) -> None:
    job = add(queue)
    assert job.starts() == [] and describe(job, [])["took_seconds"] == 0
    for seconds in (0.2, 0.1):
        local.work(queue, job, lambda seconds=seconds: time.sleep(seconds))  # type: ignore[misc]
        time.sleep(0.5)
    first, second = job.starts()
    assert first["state"] == second["state"] == "0" and second["begun"] - first["ended"] >= 0.5
    assert 0.3 <= describe(job, job.starts())["took_seconds"] < second["ended"] - first["begun"] - 0.4
    now = time.time()
    append_jsonl(job.lives, {"life": "killed", "begun": now - 60})
    assert job.starts()[-1]["state"] == "running" and now <= job.starts()[-1]["ended"] <= time.time()
    append_jsonl(queue.root / "tiny" / "pretrain" / "metrics.jsonl", {"step": 1, "time": now - 50})
    last = queue.update(job, state="lost").starts()[-1]
    assert last["state"] == "no end was written" and last["ended"] - last["begun"] == pytest.approx(10)


def test_a_job_tells_what_happened_to_it_and_not_to_others(queue: Queue) -> None:
    stage = RunFolder(queue.root / "tiny").stage("pretrain")

    def happened(kind: str, at: float, **details: object) -> None:
        append_jsonl(stage.events, {"kind": kind, "time": at, "sentence": f"{kind} at {at:.0f}", **details})

    happened("fault", 5.0)
    job = queue.update(add(queue), submitted=10.0, ended=30.0, state="held")
    for at, kind in enumerate(("start", "fault", "restart", "damaged", "fewer"), 11):
        happened(kind, float(at), ranks=4 - at // 15 * 2)
    happened("held", 31.0)
    for step, at in ((7, 8.0), (11, 11.5), (9, 29.0), (12, 40.0)):  # it went back, and another went on later
        append_jsonl(stage.metrics, {"step": step, "time": at})
    assert progress(job) == {"stage": "pretrain", "step": 9, "ranks": 2, "restarts": 1, "faults": ["fault at 12"],
                             "damaged": ["damaged at 14"], "told": ["fault at 12", "damaged at 14", "fewer at 15"]}
    append_jsonl(job.lives, {"life": "a", "begun": 11.0})
    append_jsonl(job.lives, {"life": "a", "ended": 13.0, "code": 86})
    told = CliRunner().invoke(command, ["show", job.id], catch_exceptions=False).output
    assert "at step 9 of stage pretrain on 2 ranks" in told and "  damaged at 14" in told and "took 2.00 s in 1 start" in told


def test_a_time_limit_asks_to_stop_and_a_cancelled_job_says_so(queue: Queue, signals: None) -> None:
    job = add(queue, minutes=0.2 / 60)
    begin = time.monotonic()
    assert local.work(queue, job, lambda: time.sleep(60)) == 85 and time.monotonic() - begin < 30
    assert queue.get(job.id).state == "stopped"
    other = queue.update(add(queue), is_cancelled=True)
    assert local.work(queue, other, raising(Stopped("as asked"))) == 85 and queue.get(other.id).state == "cancelled"


ON_A_FULL_DISK = """
import sys
from pathlib import Path
from athanor.foundation.errors import UserError
from athanor.foundation.progress import say
from athanor.jobs import local
from athanor.jobs.queue import Queue

def full(*given, **values):
    raise UserError("the disk is full")

Queue.update = full
say("it goes on")
sys.exit(local.work(Queue(Path(sys.argv[1])), Queue(Path(sys.argv[1])).get("1"), full))
"""


def test_a_full_disk_does_not_change_the_exit_code(queue: Queue) -> None:
    add(queue)
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", ON_A_FULL_DISK, str(queue.root)], stderr=full, timeout=60, check=False)
    assert done.returncode == 86


@pytest.mark.parametrize(("options", "error", "sentence"), [
    (["--data", "nowhere"], UserError, r"--data nowhere is not a data folder"),
    ([], UserError, r"manifest.json"),
    (["--data", "{data}", "plan.file=nowhere.toml"], UserError, r"nowhere.toml"),
    (["--data", "{data}", "parallel.tp=3", "parallel.dp_shard=1"], LayoutError, r"tp = 3 does not divide"),
    (["--data", "{data}", "stage.pretrain.learning_rate=0.5"], UserError, r"was trained with another configuration: .*--fresh"),
])
def test_what_the_agent_would_refuse_is_refused_at_once(queue: Queue, recipe_file: Path, data_folder: Path, options: list[str],
                                                        error: type[UserError], sentence: str) -> None:
    stage = RunFolder(queue.root / "tiny").stage("pretrain")
    stage.root.mkdir(parents=True)
    stage.config.write_text("[identity]\nlearning_rate = 0.01")
    with pytest.raises(error, match=sentence):
        command.main(["submit", str(recipe_file), "--stage", "pretrain", "parallel.dp_shard=1",
                      *(option.format(data=data_folder) for option in options)], standalone_mode=False)
    assert queue.all() == [] and not (queue.root / "tiny" / "data").is_symlink(), "what was refused leaves no trace"


@pytest.mark.parametrize(("options", "error", "sentence"), [
    (["--data", "x"], click.UsageError, "--data goes with --stage; a whole chain builds its own"),
    (["data.source.modules.path=nowhere"], UserError, r"nowhere does not exist"),
    (["stage.pretrain.objective=pretrian"], UserError, r"did you mean 'pretrain'"),
    (["cluster.accelerator=H100-80"], UserError, r"is another machine"),
])
def test_a_chain_is_refused_at_once_too(queue: Queue, recipe_file: Path, options: list[str], error: type[Exception],
                                        sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        command.main(["submit", str(recipe_file), *options], standalone_mode=False)
    assert queue.all() == [] and not (queue.root / "tiny").exists()


def test_what_the_agent_would_refuse_is_not_gone_on_with(queue: Queue, recipe_file: Path, data_folder: Path, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    run, recipe = RunFolder(queue.root / "tiny"), tmp_path / "tiny.toml"
    run.stage("pretrain").root.mkdir(parents=True)
    run.data.symlink_to(data_folder)
    run.stage("pretrain").config.write_text("[identity]\nlearning_rate = 0.01")
    started: list[Job] = []
    monkeypatch.setattr(local, "start", lambda queue, job: started.append(job) or job)

    def resume(sentence: str) -> None:
        with pytest.raises(UserError, match=sentence):
            command.main(["resume", job.id], standalone_mode=False)
        assert not started and queue.get(job.id) == job, "nothing was started or counted"

    job = queue.update(queue.add(name="tiny", recipe=recipe, overrides=["parallel.dp_shard=1"], stage="pretrain", run=run.root,
                                 minutes=None), state="held")
    resume(r"tiny\.toml")
    recipe.write_text(recipe_file.read_text())
    resume(r"was trained with another configuration: .*--fresh \(of `train`, `run` or `jobs submit`\)")
    run.stage("pretrain").config.unlink()
    command.main(["resume", job.id], standalone_mode=False)
    assert started == [job]


def test_an_empty_log_is_said_to_be_empty(queue: Queue) -> None:
    job = add(queue)
    job.log.parent.mkdir(parents=True)
    job.log.touch()
    told = CliRunner().invoke(command, ["logs", job.id], catch_exceptions=False)
    assert told.stdout == "" and told.stderr == f"{job.log} is empty\n"


def test_a_folder_in_use_is_refused_at_once(queue: Queue, recipe_file: Path) -> None:
    with locked(RunFolder(queue.root / "tiny")), pytest.raises(UserError, match="another process is working in"):
        command.main(["submit", str(recipe_file), "--stage", "pretrain"], standalone_mode=False)


def test_what_a_fresh_job_began_itself_stays(queue: Queue, recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = RunFolder(queue.root / "tiny").stage("pretrain")
    assert [begins_anew(stage, before) for before in (0.0, 10.0, math.inf)] == [False, True, True]
    append_jsonl(stage.events, {"kind": "start", "time": 9.0})
    append_jsonl(stage.events, {"kind": "fault", "time": 12.0})
    assert [begins_anew(stage, before) for before in (0.0, 9.0, 10.0, math.inf)] == [False, False, True, True]
    job = queue.update(add(queue), submitted=10.0, is_fresh=True)
    asked: list[list[str]] = []
    verb = click.Command("train", callback=lambda: None)
    monkeypatch.setattr(verb, "main", lambda arguments, **_: asked.append(arguments))
    monkeypatch.setattr("athanor.cli.train.command", verb)
    monkeypatch.setattr(local, "work", lambda queue, job, act: act() or 0)
    with (queue.root / "lock").open("w") as lock, pytest.raises(SystemExit, match="0"):
        command.main(["agent", job.id, "--lock", str(lock.fileno())], standalone_mode=False)
    assert asked[0][2:4] == ["--fresh-before", "10.0"]


def test_the_verbs_speak_json_and_refuse_early(queue: Queue, recipe_file: Path, data_folder: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    def call(*arguments: str) -> object:
        return json.loads(CliRunner().invoke(command, [*arguments, "--json"], catch_exceptions=False).stdout)

    assert call("list") == {"jobs": []}
    with pytest.raises(RecipeError, match="has no stage 'pretrian'; did you mean 'pretrain'"):
        CliRunner().invoke(command, ["submit", str(recipe_file), "--stage", "pretrian"], catch_exceptions=False)
    monkeypatch.setenv("PATH", "")
    for options, error in ((["--nodes", "2"], click.UsageError), (["--slurm", "--data", str(data_folder)], UserError),
                           (["--slurm", "--minutes", "1"], click.UsageError)):
        with pytest.raises(error, match=r"go with --slurm|command scontrol is not on PATH|--time limits each start"):
            command.main(["submit", str(recipe_file), "--stage", "pretrain", *options], standalone_mode=False)
    for minutes in ("0", "-1", "nan", "inf", "1e30"):
        with pytest.raises(click.UsageError, match=r"minutes is|not in the range x>0"):
            command.main(["submit", str(recipe_file), "--stage", "pretrain", "--minutes", minutes], standalone_mode=False)
    assert call("list") == {"jobs": []}, "what was refused is not listed"
    job = add(queue)  # with the first number, since no other job ever was
    with pytest.raises(UserError, match=r"tiny-1 is working in .*; wait for it, cancel it, or give the run another name"):
        CliRunner().invoke(command, ["submit", str(recipe_file), "--stage", "pretrain"], catch_exceptions=False)
    shown = call("show", "1")
    assert isinstance(shown, dict) and shown["id"] == job.id and shown["step"] == 0 and shown["faults"] == []
    with pytest.raises(UserError, match="tiny-1 has no log of rank 0; no rank was started yet"):
        CliRunner().invoke(command, ["logs", "1", "--rank", "0"], catch_exceptions=False)
