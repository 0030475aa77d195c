"""What the agent of a job on Slurm decides and writes down, without a Slurm; tests/slurm has one."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from athanor.foundation.errors import UserError
from athanor.foundation.recipe import load_recipe
from athanor.foundation.run_folder import append_jsonl, read_jsonl
from athanor.jobs import slurm
from athanor.jobs.queue import Job, Queue

WISH: dict[str, Any] = {"nodes": 2, "ranks_per_node": 4, "spares": 1, "partition": None, "time": None, "signal_seconds": 60,
                        "options": [], "id": 7}


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Queue]:
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "5", "SLURM_PROCID": "0", "SLURM_NNODES": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", "")
    before = signal.getsignal(signal.SIGTERM)
    yield Queue(tmp_path)
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def job(queue: Queue) -> Job:
    return queue.add(name="tiny", recipe=Path("tiny.toml"), overrides=[], stage="pretrain", run=queue.root / "tiny", minutes=None,
                     slurm=WISH)


def lived(job: Job, *begins: tuple[str, float, int]) -> Path:
    folder = job.log.with_suffix("")
    for life, begun, step in begins:
        append_jsonl(folder / "lives.jsonl", {"life": life, "begun": begun, "step": step, "nodes": 3})
    return folder


@pytest.mark.parametrize(("code", "verdict"), [(0, "0"), (85, "85"), (86, "86")])
def test_how_the_work_ended_is_the_verdict(queue: Queue, job: Job, code: int, verdict: str) -> None:
    folder = lived(job, *((f"7-{number}", float(number), number) for number in range(5)))  # it came a step further each time
    assert slurm.serve(queue, job, lambda: code) == code
    assert (folder / "7-5" / "verdict").read_text() == verdict and (folder / "7-5" / "begun").exists()
    begin, end = read_jsonl(folder / "lives.jsonl")[-2:]
    assert begin["nodes"] == 3 and end["code"] == code and end["life"] == "7-5"


def test_five_lives_without_a_step_further_are_enough(queue: Queue, job: Job) -> None:
    folder = lived(job, ("6-0", 1.0, 0), *((f"7-{number}", 2.0, 0) for number in range(5)))
    assert slurm.serve(queue, job, lambda: pytest.fail("it is not tried again")) == 86
    held = queue.get(job.id)
    assert held.state == "held" and "5 times in a row without a step further" in held.sentence
    assert (folder / "7-5" / "verdict").read_text() == "86"


def test_a_job_that_was_cancelled_meanwhile_leaves_slurm(queue: Queue, job: Job) -> None:
    queue.update(job, is_cancelled=True)
    slurm.serve(queue, job, lambda: pytest.fail("nobody wants it any more"))
    assert (job.log.with_suffix("") / "7-5" / "verdict").read_text() == "cancelled"


def test_starts_that_nobody_ended_lasted_until_their_last_sign_of_life(job: Job) -> None:
    now = time.time()
    folder = lived(job, ("7-0", now - 100, 0), ("7-1", now - 50, 3))
    append_jsonl(folder / "lives.jsonl", {"life": "7-1", "ended": now - 10, "code": 0})
    for sign in (now - 90, now - 80, now - 20):
        append_jsonl(Path(job.run) / "pretrain" / "metrics.jsonl", {"step": 1, "time": sign})
    first, second = slurm.attempts(job)
    assert first["device_seconds"] == pytest.approx(20 * 3 * 4) and second["device_seconds"] == pytest.approx(40 * 3 * 4)
    assert (first["state"], second["state"]) == ("no end was written", "0")


@pytest.mark.parametrize(("said", "told"), [
    ("Could not establish a configuration source", r"controller cannot be reached: squeue: .* source; `scontrol ping` tells"),
    ("Unable to contact slurm controller (connect failure)", r"controller cannot be reached: .*; `scontrol ping` tells"),
    ("Invalid partition", r"^Slurm refused: squeue: Invalid partition; mend the option")])
def test_no_controller_is_no_wrong_option(queue: Queue, monkeypatch: pytest.MonkeyPatch, said: str, told: str) -> None:
    (command := queue.root / "squeue").write_text(f"#!/bin/sh\necho 'squeue: {said}' >&2\nexit 1\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(queue.root))
    with pytest.raises(UserError, match=told):
        slurm.state_of(7)


def test_the_nodes_are_those_of_the_recipe(recipe_file: Path) -> None:
    wish = {**{key: WISH[key] for key in ("spares", "partition", "signal_seconds", "options")}, "time_limit": None}
    given = load_recipe(recipe_file, ["cluster.devices=12", "cluster.per_node=8"])
    assert slurm.settle(load_recipe(recipe_file, ["cluster.devices=16", "cluster.per_node=8"]), nodes=None, ranks_per_node=None,
                        **wish)["nodes"] == 2
    with pytest.raises(UserError, match=r"is 12, but 2 nodes of 8 ranks each have 16; give --ranks-per-node a divisor of it"):
        slurm.settle(given, nodes=None, ranks_per_node=None, **wish)
    with pytest.raises(UserError, match=r"is 12, but 2 nodes of 4 ranks each have 8; leave --nodes out"):
        slurm.settle(given, nodes=2, ranks_per_node=4, **wish)
