"""A job as a user has it: in the background, with its ranks and its agent killed, cancelled, and gone on with."""

from __future__ import annotations

import json
import os
import pty
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_run import train_here

from athanor.foundation.recipe import load_recipe
from athanor.foundation.run_folder import RunFolder, hash_folder, read_jsonl

STEPS = 150
OVERRIDES = [f"stage.pretrain.steps={STEPS}", "stage.pretrain.checkpoint_every=10", "stage.pretrain.precision=fp32",
             "stage.pretrain.evaluate_every=1000", "parallel.dp_shard=2", "name=run"]
PACED = "stage.pretrain.objective=paced.objective"  # a tenth of a second for each step, in which commands can be given


def ranks_of(agent: int) -> list[int]:
    """The processes that an agent's fork server has started, in the order of ranks."""
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = file.read_text().rpartition(")")
        except OSError:
            continue
        parents[int(name.split()[0])] = int(rest.split()[1])
    return sorted(child for child, parent in parents.items() if parents.get(parent) == agent)


def until(condition: Callable[[], Any], seconds: float = 90) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


IN_A_TERMINAL = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever these tests were started with: nohup ignores it
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "athanor", "train", *sys.argv[1:]])
"""


@pytest.fixture
def athanor(tmp_path: Path) -> Callable[..., Any]:
    """The command with its runs in one folder: what it prints, or for a refusal the sentence."""

    def call(*arguments: object, code: int = 0) -> Any:
        done = subprocess.run([sys.executable, "-m", "athanor", *map(str, arguments), "--json"], text=True, capture_output=True,
                              env={**os.environ, "ATHANOR_RUNS": str(tmp_path)}, timeout=120, check=False)
        assert done.returncode == code, done.stderr
        return done.stderr if code else json.loads(done.stdout)

    return call


@pytest.mark.drill
def test_a_fresh_job_throws_away_once_what_was_there(athanor: Any, recipe_file: Path, data_folder: Path, tmp_path: Path) -> None:
    stage = RunFolder(tmp_path / "run").stage("pretrain")
    other = [*OVERRIDES, PACED, "stage.pretrain.steps=2", "stage.pretrain.learning_rate=0.5"]
    assert "no manifest.json" in athanor("jobs", "submit", recipe_file, "--stage", "pretrain", *OVERRIDES, "--data", "x", code=2)
    athanor("train", recipe_file, "--stage", "pretrain", "--data", data_folder, *other)
    submit = ("jobs", "submit", recipe_file, "--stage", "pretrain", "--data", data_folder, *OVERRIDES, PACED)
    assert "another configuration: learning_rate was 0.5 and is" in athanor(*submit, code=2)
    job = athanor(*submit, "--fresh")
    until(lambda: max((row["step"] for row in read_jsonl(stage.metrics)), default=0) > 22)  # that of step 10 is saved by then
    os.kill(job["process"], signal.SIGKILL)
    until(lambda: athanor("jobs", "show", job["id"])["state"] == "lost")
    athanor("jobs", "resume", job["id"])
    done = until(lambda: (found := athanor("jobs", "show", job["id"]))["state"] != "running" and found)
    assert done["state"] == "done" and done["step"] == STEPS and len(done["attempts"]) == 2
    assert [row["step"] >= 10 for row in read_jsonl(stage.events) if row["kind"] == "start"] == [False, True]
    assert done["took_seconds"] == pytest.approx(sum(row["ended"] - row["begun"] for row in done["attempts"]))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_outlives_its_ranks_its_agent_and_a_change_of_mind(athanor: Any, recipe_file: Path, data_folder: Path,
                                                                 tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    chance = random.Random(seed)

    def step() -> int:
        return max((row["step"] for row in read_jsonl(stage.metrics)), default=0)

    for name in ("run", "calm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").symlink_to(data_folder)
    stage = RunFolder(tmp_path / "run").stage("pretrain")
    job = athanor("jobs", "submit", recipe_file, "--stage", "pretrain", *OVERRIDES, PACED)

    until(lambda: step() >= 12)
    time.sleep(chance.uniform(0, 0.2))
    victim = chance.randrange(2)
    os.kill(ranks_of(job["process"])[victim], signal.SIGKILL)
    until(lambda: athanor("jobs", "show", job["id"])["restarts"] == 1)
    shown = athanor("jobs", "show", job["id"])
    assert shown["state"] == "running" and f"rank {victim} was killed by signal 9" in shown["faults"][0]

    begun = step()
    until(lambda: step() > begun + 5)
    ranks = ranks_of(job["process"])
    os.kill(job["process"], signal.SIGKILL)
    until(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks), 8)
    assert [row["state"] for row in athanor("jobs", "list")["jobs"]] == ["lost"]

    athanor("jobs", "resume", job["id"])
    begun = step()
    until(lambda: step() > begun + 5)
    athanor("jobs", "cancel", job["id"])
    cancelled = until(lambda: (found := athanor("jobs", "show", job["id"]))["state"] != "running" and found)
    assert cancelled["state"] == "cancelled" and cancelled["exit_code"] == 85
    assert (stage.checkpoints / f"step-{cancelled['step']:08d}" / "COMPLETE").is_file(), "it saved"

    again = athanor("jobs", "submit", recipe_file, "--stage", "pretrain", *OVERRIDES, PACED)
    done = until(lambda: (found := athanor("jobs", "show", again["id"]))["state"] != "running" and found)
    assert done["state"] == "done" and done["exit_code"] == 0 and done["step"] == STEPS
    assert any("the model is in" in line for line in athanor("jobs", "logs", again["id"])["lines"])

    assert hash_folder(stage.model) == hash_folder(train_here(tmp_path / "calm", load_recipe(recipe_file, OVERRIDES), 2).model)


@pytest.mark.slow
def test_a_closed_terminal_asks_to_stop(recipe_file: Path, data_folder: Path, tmp_path: Path) -> None:
    """Nobody reads any more what would be shown there; it saves all the same, and leaves nothing behind."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "data").symlink_to(data_folder)
    stage, (ours, theirs) = RunFolder(tmp_path / "run").stage("pretrain"), pty.openpty()
    command = [sys.executable, "-c", IN_A_TERMINAL, str(recipe_file), "--stage", "pretrain", *OVERRIDES, PACED,
               "stage.pretrain.checkpoint_every=100"]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
                          env={**os.environ, "ATHANOR_RUNS": str(tmp_path), "TERM": "xterm"}) as agent:
        os.close(theirs)
        deadline = time.monotonic() + 90
        while max((row["step"] for row in read_jsonl(stage.metrics)), default=0) < 5 and time.monotonic() < deadline:
            if select.select([ours], [], [], 0.05)[0]:
                os.read(ours, 4096)
        ranks = ranks_of(agent.pid)
        os.close(ours)
        assert agent.wait(90) == 85 and len(ranks) == 2 and not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    (stop,) = [row for row in read_jsonl(stage.events) if row["kind"] == "stop"]
    assert 5 <= stop["step"] < 100 and (stage.checkpoints / f"step-{stop['step']:08d}" / "COMPLETE").is_file()
