"""Ranks that hang are noticed, who holds up the others is named with a reason, and the stage goes on to the same end."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jobs_ranks
import pytest
from tiny_run import seconds_until_book

from athanor.foundation.errors import RankError
from athanor.foundation.launch import start_server
from athanor.foundation.recipe import load_recipe
from athanor.foundation.run_folder import RunFolder, StageFolder, hash_folder, read_json, read_jsonl
from athanor.jobs import watch
from athanor.jobs.agent import Agent
from athanor.jobs.verdict import judge
from athanor.ledger.book import read_book
from athanor.train.settings import layout_of

LIMIT, STEPS = 4.0, 12  # a process may well have no processor for three seconds on a busy machine
CHOICES = ("stage.pretrain.precision=fp32", f"stage.pretrain.steps={STEPS}", "stage.pretrain.checkpoint_every=4",
           "stage.pretrain.evaluate_every=1000", f"stage.pretrain.hang_seconds={LIMIT}")
# Two seconds are for the last sign of life, the question and the answers. On a busy machine, which starves the ranks' threads and
# the agent alike, all of that takes longer, and time in which the agent had no processor is not counted: this much, and the
# limit once more, are forgiven. Where patience is not that of a step it would be twenty times as long.
SLOWNESS = 10.0
SLEEPER = "step_module.to_device = lambda *_: time.sleep(600)  # type: ignore[assignment]"
HOST = socket.gethostname()
LAYOUTS = {"dp_shard 2": ["parallel.dp_shard=2"], "tp 2": ["parallel.dp_shard=1", "parallel.tp=2"],
           "dp_shard 4": ["parallel.dp_shard=4"],
           "dp_shard 2 x pp 2": ["parallel.dp_shard=2", "parallel.pp=2", "stage.pretrain.micro_batch_size=1"]}
KINDS = {"asleep": r"never entered all_reduce #\d+; it stands at {asleep}",
         "asleep inside": r"(never entered \w+ #\d+.*; it stands at|goes no further than) {inside}",
         "stopped": r"is stopped \(SIGSTOP\)",
         "wrong collective": r"entered barrier as #\d+ where (rank \d|the others) entered all_reduce; it stands at {barrier}"}
Row = dict[str, Any]


def place_of(code: str) -> str:
    """`jobs_ranks.py:88`, where the ranks of these tests have a line of code."""
    lines, _ = inspect.getsourcelines(jobs_ranks)
    return f"jobs_ranks.py:{next(number for number, line in enumerate(lines, 1) if line.strip() == code)}"


@pytest.fixture
def supervised(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setattr(watch, "ANSWER_SECONDS", 10.0)

    def run(folder: Path, layout: str, target: str = "athanor.train.loop:train_stage", **arguments: Any) -> None:
        launched = time.perf_counter()
        start_server("athanor.train.loop")
        recipe = load_recipe(recipe_file, [*CHOICES, *LAYOUTS[layout]])
        arguments = {"run_folder": str(folder), "recipe": recipe, "stage": "pretrain", "launched": launched, **arguments}
        Agent(RunFolder(folder).stage("pretrain"), layout_of(recipe).world_size, 1).run(target, arguments)

    return run


FOUR = {("asleep", "dp_shard 2 x pp 2"), ("wrong collective", "tp 2"), ("stopped", "dp_shard 4")}  # the others are drills


@pytest.mark.parametrize(("kind", "layout"), [
    *((kind, "dp_shard 2") for kind in KINDS if kind != "asleep inside"),
    pytest.param("asleep inside", "dp_shard 2", marks=pytest.mark.slow),
    *(pytest.param(kind, layout, marks=pytest.mark.slow if (kind, layout) in FOUR else pytest.mark.drill)
      for kind in KINDS for layout in LAYOUTS if layout != "dp_shard 2")])
def test_a_hang_is_named_and_the_stage_goes_on(supervised: Any, run_folder: Path, data_folder: Path, tmp_path: Path, kind: str,
                                               layout: str) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    chance, stage = random.Random(seed), RunFolder(run_folder).stage("pretrain")
    marks, calm = tmp_path / "marks", tmp_path / "calm"
    rank, step = chance.randrange(4 if layout in ("dp_shard 4", "dp_shard 2 x pp 2") else 2), chance.randrange(2, STEPS - 1)
    for folder in (marks, calm):
        folder.mkdir()
    begun = time.time()
    supervised(run_folder, layout, "jobs_ranks:train_and_fail", marks=str(marks), times=1, step=step, rank=rank, kind=kind)
    (fault,) = [row for row in read_jsonl(stage.events) if row["kind"] == "fault"]
    places = {"asleep": place_of("time.sleep(600)"), "inside": place_of(SLEEPER), "barrier": place_of("dist.barrier()")}
    wanted = rf"after step {step}, rank {rank} \(node {HOST}\) {KINDS[kind].format(**places)}$"
    assert re.match(wanted, fault["sentence"]), (fault["sentence"], wanted)
    assert fault["rank"] == rank and fault["step"] == step
    told = read_json(next(stage.logs.glob("hang-*.json")))
    late = fault["time"] - (marks / "0").stat().st_mtime - told["limit_seconds"]
    assert late < 2.0 + SLOWNESS + told["limit_seconds"], f"noticed {late:.1f} s after the limit of {told['limit_seconds']:.1f} s"
    assert_hang_is_accounted(stage, fault["time"] - (marks / "0").stat().st_mtime, seconds_until_book(stage, begun))
    (calm / "data").symlink_to(data_folder)
    supervised(calm, layout)
    assert hash_folder(stage.model) == hash_folder(RunFolder(calm).stage("pretrain").model)


def assert_hang_is_accounted(stage: StageFolder, hang_seconds: float, wall_seconds: float) -> None:
    """The seconds of the hang are lost on all ranks, and every second of the stage stands in an account."""
    book = read_book(stage.actual)
    assert book.accounts["lost"] >= 0.95 * book.devices * hang_seconds and book.accounts["down"] > 0
    assert book.wall_seconds == pytest.approx(wall_seconds, rel=0.1, abs=0.3)
    assert sum(book.accounts.values()) == pytest.approx(book.device_seconds)
    assert abs(book.accounts["unattributed"]) <= 0.05 * book.device_seconds + 0.1, book.accounts


def dump(*entered: tuple[int, str, bool], at: str = "step.py:7", waits: bool = False, kind: str = "default_pg",
         ranks: Sequence[int] = (0, 1, 2, 3), more: Row | None = None) -> Row:
    """What a rank says: number, name and whether it is over of the collectives of a group; where it stands."""
    name, _, line = at.partition(":")
    groups = {f"{kind}{ranks}": {"kind": kind, "ranks": list(ranks), "entered": [list(each) for each in entered]}}
    return {"file": f"/code/{name}", "line": int(line), "is_waiting": waits, "groups": groups | (more or {})}


def shard(ranks: Sequence[int], *entered: tuple[int, str, bool]) -> Row:
    return dump(*entered, kind="mesh_shard", ranks=ranks)["groups"]


BEFORE = [(number, operation, True) for number, operation in enumerate(["all_reduce", "all_gather", "gather"] * 3, 1)]
IN_30 = dump((29, "all_gather", True), (30, "all_reduce", True), (31, "all_reduce", False), waits=True)
CASES: dict[str, tuple[dict[int, Row], dict[int, str | None], list[int], str]] = {
    "one lags behind": ({0: IN_30, 1: IN_30, 2: IN_30, 3: dump((30, "all_reduce", True), at="data.py:88")}, {}, [3],
                        "never entered all_reduce #31; it stands at data.py:88"),
    "two lag behind": ({0: IN_30, 1: IN_30, 2: dump((30, "all_reduce", True), at="data.py:88"),
                        3: dump((30, "all_reduce", True), at="rows.py:9")}, {}, [2, 3],
                       "never entered all_reduce #31; they stand at data.py:88 and rows.py:9"),
    "most are right": ({0: IN_30, 1: dump((30, "all_reduce", True), (31, "barrier", False), at="mine.py:5", waits=True), 2: IN_30,
                        3: IN_30}, {}, [1], "entered barrier as #31 where the others entered all_reduce; it stands at mine.py:5"),
    "of two the novelty strays": (
        {0: dump(*BEFORE, (10, "barrier", False), at="mine.py:5", waits=True, ranks=(0, 1)),
         1: dump(*BEFORE, (10, "all_reduce", False), waits=True, ranks=(0, 1))}, {}, [0],
        "entered barrier as #10 where rank 1 entered all_reduce; it stands at mine.py:5"),
    "groups of the same kind tell": (
        {rank: dump((5, "barrier" if rank == 2 else "all_gather", False), kind="mesh_shard", ranks=ranks, waits=True)
         for ranks in ((0, 1), (2, 3)) for rank in ranks}, {}, [2],
        "entered barrier as #5 of shard where rank 3 entered all_gather; it stands at step.py:7"),
    "stopped": ({0: IN_30, 1: IN_30, 2: IN_30}, {3: "T"}, [3], "is stopped (SIGSTOP)"),
    "two stopped": ({0: IN_30, 1: IN_30}, {2: "T", 3: "T"}, [2, 3], "are stopped (SIGSTOP)"),
    "silent": ({0: IN_30, 1: IN_30, 2: IN_30}, {3: "D"}, [3], "does not answer (process state D)"),
    "silent elsewhere": ({0: IN_30, 1: IN_30, 2: IN_30}, {3: None}, [3], "does not answer"),
    "never began": ({0: dump(waits=True)}, {9: None}, [9], "never began"),
    # rank 0 computes for ever; rank 2 waits for its message, which nobody records; 1 and 3 wait for those two
    "in a pipeline": (
        {0: dump(at="data.py:88", more=shard((0, 1), (4, "all_reduce", True))),
         1: dump(waits=True, more=shard((0, 1), (4, "all_reduce", True), (5, "all_reduce", False))),
         2: dump(waits=True, more=shard((2, 3), (4, "all_reduce", True))),
         3: dump(waits=True, more=shard((2, 3), (4, "all_reduce", True), (5, "all_reduce", False)))}, {}, [0],
        "never entered all_reduce #5 of shard; it stands at data.py:88"),
    "only messages": ({0: dump(at="data.py:88"), 1: dump(waits=True), 2: dump(waits=True)}, {}, [0],
                      "goes no further than data.py:88"),
    "all compute": ({0: dump(at="a.py:1"), 1: dump(at="a.py:1")}, {}, [0, 1], "go no further than a.py:1"),
    "alone": ({0: dump(at="a.py:1", waits=True)}, {}, [0], "goes no further than a.py:1"),
    # rank 1 gave its part of all_gather early, and sleeps: rank 0 waits for it elsewhere
    "given early": ({0: dump((7, "all_reduce", False), waits=True, ranks=(0, 1), more=shard((0, 1), (3, "all_gather", True))),
                     1: dump((6, "all_reduce", True), ranks=(0, 1), at="data.py:88",
                             more=shard((0, 1), (3, "all_gather", True), (4, "all_gather", False)))}, {}, [1],
                    "never entered all_reduce #7; it stands at data.py:88"),
    "in different orders": (
        {0: dump((7, "all_reduce", False), ranks=(0, 1), waits=True, at="a.py:1", more=shard((0, 1), (3, "all_gather", True))),
         1: dump((6, "all_reduce", True), ranks=(0, 1), waits=True, at="b.py:2",
                 more=shard((0, 1), (3, "all_gather", True), (4, "all_gather", False)))}, {}, [0, 1],
        "wait for each other: 0 in all_reduce #7 at a.py:1, 1 in all_gather #4 of shard at b.py:2"),
    "cut connection": ({0: IN_30, 1: IN_30, 2: IN_30, 3: IN_30}, {}, [0, 1, 2, 3], "wait for each other: "
                       + ", ".join(f"{rank} in all_reduce #31 at step.py:7" for rank in range(4)))}


@pytest.mark.parametrize("case", CASES)
def test_the_verdict_follows_from_what_ranks_say(case: str) -> None:
    dumps, silent, ranks, reason = CASES[case]
    assert judge(dumps, silent, lambda rank: None if rank == 9 else "n1") == (ranks, reason)


class Clock:
    """A clock that the test sets, and ranks that it lets speak."""

    def __init__(self, folder: Path) -> None:
        self.now, self.stage = 1000.0, StageFolder(folder)

    def monotonic(self) -> float:
        return self.now

    def say(self, rank: int, step: int, phase: str = "compute", seconds: float | None = None, ticks: int = 0) -> None:
        self.stage.beats.mkdir(parents=True, exist_ok=True)
        (self.stage.beats / f"rank-{rank}.json").write_text(json.dumps({
            "pid": os.getpid(), "host": "elsewhere", "step": step, "phase": phase, "ticks": ticks, "beats": int(self.now),
            "step_seconds": seconds}))

    def wait(self, guard: watch.Watch, seconds: float) -> None:
        """Let the guard look as often as it does."""
        for _ in range(round(seconds / 0.5)):
            self.now += 0.5
            guard.check()


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock(tmp_path)
    monkeypatch.setattr(watch.time, "monotonic", clock.monotonic)
    monkeypatch.setattr(watch.Watch, "ask", lambda self: {})
    monkeypatch.setattr(watch, "Signs", lambda: WATCHED(since=clock.now))
    return clock


WATCHED = watch.Signs


def test_patience_is_that_of_the_phase_and_of_the_steps(clock: Clock) -> None:
    for phase, seconds, limit in [("compute", 0.1, 10.0), ("compute", 4.0, 40.0), ("evaluation", 0.1, 200.0),
                                  ("checkpoint", None, 200.0), ("startup", None, 200.0)]:
        guard = watch.Watch(clock.stage, 2, 10.0)
        clock.say(0, 5, phase, seconds)
        clock.say(1, 5, "compute", 0.1)
        clock.wait(guard, limit)
        with pytest.raises(RankError, match=r"ranks 0 and 1 .node elsewhere. do not answer"):
            clock.wait(guard, 1.5)


@pytest.mark.parametrize("kind", ["step", "phase", "ticks"])
def test_any_progress_of_any_rank_counts(clock: Clock, kind: str) -> None:
    guard = watch.Watch(clock.stage, 2, 10.0)
    for number in range(9):
        clock.say(0, 1)
        clock.say(1, number if kind == "step" else 1, "input" if kind == "phase" and number % 2 else "compute",
                  ticks=number if kind == "ticks" else 0)
        clock.wait(guard, 8.0)
    clock.say(1, 10, "done")
    with pytest.raises(RankError, match=r"rank 0 .node elsewhere. does not answer"):  # those who are done hold up nobody
        clock.wait(guard, 1.5)


def test_after_the_agent_was_stopped_ranks_get_their_time_again(clock: Clock) -> None:
    guard = watch.Watch(clock.stage, 1, 10.0)
    clock.say(0, 1)
    clock.wait(guard, 3.0)
    clock.now += 3600.0
    clock.wait(guard, 7.0)
    with pytest.raises(RankError):
        clock.wait(guard, 1.5)


ON_A_SMALL_DISK = """
import sys, time
from pathlib import Path
from athanor.foundation.errors import RankError
from athanor.foundation.run_folder import StageFolder
from athanor.jobs.watch import Watch

def watch(seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        guard.check()
        time.sleep(0.05)

stage = StageFolder(Path(sys.argv[1]))
guard = Watch(stage, 1, 0.6)
stage.beats.mkdir(parents=True)
(stage.beats / "rank-0.json").write_text('{"pid": 1, "host": "elsewhere", "step": 3, "phase": "compute", "ticks": 0}')
import subprocess
subprocess.run(["mount", "-o", "remount,ro", sys.argv[1]], check=True)
watch(2.0)
subprocess.run(["mount", "-o", "remount,rw", sys.argv[1]], check=True)
begun = time.monotonic()
try:
    watch(60.0)
except RankError as error:
    print(error, time.monotonic() - begun)
"""


def test_where_no_rank_can_give_a_sign_none_is_said_to_hang(tmp_path: Path) -> None:
    """On a file system that becomes read-only, in a name space of the test's own, and writable again."""
    if subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("this user may not make a name space")
    script = f'mount -t tmpfs -o size=1m none {tmp_path} && exec "$@"'
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script, "sh", sys.executable, "-c", ON_A_SMALL_DISK, str(tmp_path)],
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("rank 0 (node elsewhere) does not answer"), done.stdout


def test_an_earlier_life_is_forgotten_and_ranks_that_never_begin_are_noticed(clock: Clock) -> None:
    clock.say(0, 7, "done")
    for _ in range(2):  # what was refused before a rank began has no signs of its own
        guard = watch.Watch(clock.stage, 1, 10.0)
    assert read_json(clock.stage.earlier_beats / "rank-0.json")["step"] == 7
    clock.wait(guard, 200.0)
    with pytest.raises(RankError, match=r"^rank 0 never began"):
        clock.wait(guard, 1.5)


def test_a_stopped_process_finds_no_patience_for_what_it_once_did(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["sleep", "60"]) as child, contextlib.ExitStack() as ends:
        ends.callback(child.kill)
        monkeypatch.setattr(os, "getpid", lambda: child.pid)
        guard = watch.Watch(clock.stage, 2, 10.0)
        clock.say(0, 0, "startup")
        clock.say(1, 0, "checkpoint")  # where it waits for the other
        line = clock.stage.beats / "rank-0.json"
        line.write_text(line.read_text().replace("elsewhere", HOST))
        clock.wait(guard, 100.0)
        child.send_signal(19)
        while WATCHED(read_json(line)).state() != "T":
            pass
        with pytest.raises(RankError, match=rf"^rank 0 \(node {HOST}\) is stopped \(SIGSTOP\)"):
            clock.wait(guard, 1.0)


def test_a_rank_that_is_stopped_when_it_is_done_is_noticed(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has said so, but its process cannot end, and the agent waits for that."""
    with subprocess.Popen(["sleep", "60"]) as child, contextlib.ExitStack() as ends:
        ends.callback(child.kill)
        monkeypatch.setattr(os, "getpid", lambda: child.pid)
        guard = watch.Watch(clock.stage, 2, 10.0)
        line = clock.stage.beats / "rank-1.json"
        for rank in (0, 1):
            clock.say(rank, 4, "done")
        line.write_text(line.read_text().replace("elsewhere", HOST))
        clock.wait(guard, 1000.0)
        child.send_signal(19)
        while WATCHED(read_json(line)).state() != "T":
            pass
        with pytest.raises(RankError, match=rf"^rank 1 \(node {HOST}\) is stopped \(SIGSTOP\)"):
            clock.wait(guard, 11.0)
