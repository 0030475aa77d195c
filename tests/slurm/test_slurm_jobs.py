"""Jobs on a real Slurm: what happens to ranks, nodes, agents and Slurm itself costs no step that was saved, and no job."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, command_of, processes
from tiny_run import train_here

from athanor.foundation.recipe import load_recipe
from athanor.foundation.run_folder import RunFolder, StageFolder, hash_folder, read_jsonl
from athanor.ledger.book import read_book

STEPS, EVERY = 60, 5
OVERRIDES = [f"stage.pretrain.steps={STEPS}", f"stage.pretrain.checkpoint_every={EVERY}", "stage.pretrain.precision=fp32",
             "stage.pretrain.evaluate_every=10000", "stage.pretrain.reduction=exact"]
PACED = "stage.pretrain.objective=paced.objective"
# Agents import torch, four of them on perhaps two slow and busy cores; what is asserted about speed is measured from a fault
PATIENCE_SECONDS = 240
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
Row = dict[str, Any]


class Runner:
    """`athanor jobs` with runs in one folder, on the machine that stands for all nodes."""

    def __init__(self, runs: Path, recipe: Path, data: Path) -> None:
        self.runs, self.recipe, self.data = runs, recipe, data

    def call(self, *arguments: object) -> Any:
        done = subprocess.run([sys.executable, "-m", "athanor", *map(str, arguments), "--json"], text=True, capture_output=True,
                              env={**os.environ, "ATHANOR_RUNS": str(self.runs)}, timeout=PATIENCE_SECONDS, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def submit(self, name: str, nodes: int, *options: object, steps: int = STEPS) -> Row:
        self.prepare(name)
        job: Row = self.call("jobs", "submit", self.recipe, "--stage", "pretrain", f"name={name}", *OVERRIDES, PACED,
                             f"stage.pretrain.steps={steps}", "--slurm", "--nodes", nodes, *options)
        return job

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Ranks go no further than some steps, until this is over."""
        hold = self.runs / "hold"
        hold.parent.mkdir(exist_ok=True)
        hold.touch()
        yield
        hold.unlink()

    def prepare(self, name: str) -> None:
        (self.runs / name).mkdir(parents=True)
        (self.runs / name / "data").symlink_to(self.data)

    def show(self, job: Row) -> Row:
        found: Row = self.call("jobs", "show", job["id"])
        return found

    def stage(self, name: str) -> StageFolder:
        return RunFolder(self.runs / name).stage("pretrain")

    def step(self, name: str) -> int:
        return max((row["step"] for row in read_jsonl(self.stage(name).metrics)), default=0)

    def events(self, name: str, kind: str) -> list[Row]:
        return [row for row in read_jsonl(self.stage(name).events) if row["kind"] == kind]


@pytest.fixture
def runner(tmp_path: Path, recipe_file: Path, data_folder: Path) -> Runner:
    return Runner(tmp_path / "runs", recipe_file, data_folder)


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory, recipe_file: Path, data_folder: Path) -> Callable[[int], str]:
    """The model of the same run without Slurm and without any disturbance on so many ranks, as a hash."""
    found: dict[int, str] = {}
    runner = Runner(tmp_path_factory.mktemp("calm"), recipe_file, data_folder)

    def train(ranks: int) -> str:
        if ranks not in found:
            name = f"calm-{ranks}"
            runner.prepare(name)
            found[ranks] = hash_folder(train_here(runner.runs / name, load_recipe(recipe_file, OVERRIDES), ranks).model)
        return found[ranks]

    return train


def until(condition: Callable[[], Any], seconds: float = PATIENCE_SECONDS) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def agents_on(node: str) -> list[int]:
    return [pid for pid, _ in processes(f"SLURMD_NODENAME={node}") if "athanor jobs agent" in command_of(pid)
            and "srun" not in command_of(pid)]


def ranks_on(node: str) -> list[int]:
    """The processes that the fork server of a node's agent has started."""
    found = dict(processes(f"SLURMD_NODENAME={node}"))
    return [pid for pid, parent in found.items() if found.get(parent) in agents_on(node) and "forkserver" in command_of(parent)]


def slurm_number(cluster: Cluster, job: Row) -> str:
    return cluster.call("squeue", "--noheader", "--states=all", f"--jobs={job['slurm']['id']}", "--format=%i %T %N")


def assert_done(runner: Runner, job: Row, name: str, wanted: str) -> Row:
    shown: Row = until(lambda: (found := runner.show(job))["state"] not in ("running", "waiting") and found)
    assert shown["state"] == "done" and shown["exit_code"] == 0, shown
    assert hash_folder(runner.stage(name).model) == wanted, "bitwise as if nothing had happened"
    return shown


def split(stage: StageFolder, fault: float) -> dict[str, float]:
    """Seconds from a fault to the first new step: detect, restart (agents decide), start (ranks come up), load, step."""
    events, metrics = read_jsonl(stage.events), read_jsonl(stage.metrics)
    told = next(row["time"] for row in events if row["kind"] == "fault" and row["time"] > fault)
    launched = next(line["time"] for line in read_jsonl(stage.root / "ledger.jsonl")
                    if "down" in line.get("accounts", {}) and line["time"] >= told)
    begun = next(row for row in events if row["kind"] == "start" and row["time"] > fault)
    stepped = min(row["time"] for row in metrics if row["time"] > begun["time"])
    load = begun["load_seconds"]
    parts = {"detect": told - fault, "restart": launched - told, "start": begun["time"] - load - launched, "load": load,
             "step": stepped - begun["time"], "all": stepped - fault}
    print({name: round(seconds, 2) for name, seconds in parts.items()})
    return parts


def test_a_killed_rank_is_started_again_in_the_same_job(cluster: Cluster, runner: Runner, wanted: Callable[[int], str]) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    chance = random.Random(seed)
    number = chance.randrange(4)
    with runner.held():
        job = runner.submit("run", 4)
        until(lambda: runner.step("run") >= 12)
        time.sleep(chance.uniform(0, 0.2))
        (victim,) = ranks_on(f"n{number + 1}")
        fault = time.time()
        os.kill(victim, signal.SIGKILL)
    shown = assert_done(runner, job, "run", wanted(4))
    (told,) = runner.events("run", "fault")
    assert f"rank {number} was killed by signal 9 (SIGKILL)" in told["sentence"] and shown["restarts"] == 1
    assert len(shown["attempts"]) == 1
    until(lambda: slurm_number(cluster, job).split()[:2] == [str(job["slurm"]["id"]), "COMPLETED"])
    parts = split(runner.stage("run"), fault)
    # 5 s of an idle machine; on a busy one the start of four ranks that share its cores is as slow as its neighbours make it
    assert parts["detect"] < 8 and parts["restart"] < 8 and parts["all"] < 45


def test_a_spare_takes_the_place_of_a_lost_node(cluster: Cluster, runner: Runner, wanted: Callable[[int], str]) -> None:
    with runner.held():
        job = runner.submit("run", 2, "--spares", 1)
        until(lambda: runner.step("run") >= 12)
        nodes = expand(cluster, slurm_number(cluster, job).split()[2])
        assert [len(ranks_on(node)) for node in nodes] == [1, 1, 0], "the last one waits"
        fault = cluster.crash(nodes[1])
    try:
        shown = assert_done(runner, job, "run", wanted(2))
    finally:
        cluster.start_node(nodes[1])
    (told,) = runner.events("run", "fault")
    assert f"rank 1 ended with node {nodes[1]}" in told["sentence"] and len(shown["attempts"]) == 1
    assert split(runner.stage("run"), fault)["all"] < 60
    book = read_book(runner.stage("run").actual)
    assert book.device_seconds == pytest.approx(3 * book.wall_seconds, rel=0.02), "the spare node is paid for as well"
    assert book.accounts["spare"] > 0 and book.accounts["down"] > 0
    assert book.accounts["unattributed"] < 0.05 * book.device_seconds, book.accounts
    assert book.device_seconds == pytest.approx(shown["attempts"][0]["device_seconds"], rel=0.5), "and what Slurm counts is more"


def test_without_a_spare_the_job_goes_on_with_fewer_ranks(cluster: Cluster, runner: Runner, wanted: Callable[[int], str]) -> None:
    with runner.held():
        job = runner.submit("run", 2)
        until(lambda: runner.step("run") >= 12)
        nodes = expand(cluster, slurm_number(cluster, job).split()[2])
        fault = cluster.crash(nodes[1])
    try:
        shown = assert_done(runner, job, "run", wanted(1))
    finally:
        cluster.start_node(nodes[1])
    assert [row["ranks"] for row in runner.events("run", "start")] == [2, 1] and len(shown["attempts"]) == 1
    assert "there are devices for 1 of 2 ranks, so it goes on with 1" in shown["told"][-1] and shown["ranks"] == 1
    split(runner.stage("run"), fault)
    book = read_book(runner.stage("run").actual)
    assert book.device_seconds == pytest.approx(2 * book.wall_seconds, rel=0.02), "the lost node is paid for until the end"


@pytest.mark.drill
def test_a_job_that_is_interrupted_goes_on_from_where_it_saved(cluster: Cluster, runner: Runner,
                                                               wanted: Callable[[int], str]) -> None:
    """An agent killed (its ranks are done without), the leading one killed, requeued by hand, preempted by somebody urgent."""
    job = runner.submit("run", 2)
    number = job["slurm"]["id"]

    def kill(position: int) -> None:
        node = expand(cluster, slurm_number(cluster, job).split()[2])[position]
        for agent in agents_on(node):
            os.kill(agent, signal.SIGKILL)

    def preempt() -> None:
        cluster.call("srun", "--partition=urgent", "--nodes=4", "true", timeout=120)

    acts: list[tuple[bool, Callable[[], object]]] = [
        (False, lambda: kill(1)), (False, lambda: kill(0)), (True, lambda: cluster.call("scontrol", "requeue", str(number))),
        (True, preempt)]
    random.SystemRandom().shuffle(acts)
    for times, (saves, act) in enumerate(acts, 1):
        begun = runner.step("run")
        until(lambda begun=begun: runner.step("run") >= begun + EVERY + 1)  # type: ignore[misc]
        act()
        until(lambda times=times: len(runner.events("run", "start")) == times + 1)  # type: ignore[misc]
        started = runner.events("run", "start")[-1]
        before = [row["step"] for row in read_jsonl(runner.stage("run").metrics) if row["time"] < started["time"]]
        lost = before[-1] - started["step"]
        print(f"{'saved' if saves else 'killed'}: {lost} steps lost")
        assert lost == 0 if saves else lost <= 2 * EVERY  # the newest may not have been complete
    shown = assert_done(runner, job, "run", wanted(2))
    assert len(shown["attempts"]) == len(acts), "one of them was for the agents alone"
    assert sorted(row["ranks"] for row in runner.events("run", "start")) == [1, 2, 2, 2, 2]
    until(lambda: slurm_number(cluster, job).split()[:2] == [str(number), "COMPLETED"])


@pytest.mark.drill
def test_a_slurm_that_requeues_by_no_exit_code_is_asked_to(cluster: Cluster, runner: Runner) -> None:
    configuration = cluster.folder / "slurm.conf"
    before = configuration.read_text()
    configuration.write_text("\n".join(line for line in before.splitlines() if not line.startswith("RequeueExit")) + "\n")
    try:
        cluster.call("scontrol", "reconfigure")
        job = runner.submit("run", 2)
        assert "exec scontrol requeue" in Path(job["log"]).with_suffix(".sbatch").read_text()
        until(lambda: runner.step("run") >= 2)
        for agent in agents_on(expand(cluster, slurm_number(cluster, job).split()[2])[0]):
            os.kill(agent, signal.SIGKILL)
        until(lambda: len(runner.events("run", "start")) == 2)
        cancel(cluster, runner, job)
    finally:
        configuration.write_text(before)
        cluster.call("scontrol", "reconfigure")


@pytest.mark.drill
@pytest.mark.parametrize("cycles", [1, pytest.param(4, marks=pytest.mark.timeout(1500))])
def test_the_end_of_a_time_limit_costs_no_step(cluster: Cluster, runner: Runner, cycles: int) -> None:
    job = runner.submit("run", 2, "--time", 2, "--signal-seconds", 45, steps=10**5)  # Slurm looks twice a minute
    until(lambda: len(runner.events("run", "start")) == cycles + 1, 200 * (cycles + 1))
    until(lambda: runner.step("run") > runner.events("run", "start")[-1]["step"] + 3)
    steps = [row["step"] for row in read_jsonl(runner.stage("run").metrics)]
    assert steps == list(range(1, len(steps) + 1)), "none twice"
    assert len(runner.events("run", "stop")) == cycles and not runner.events("run", "fault")
    cancel(cluster, runner, job)


@pytest.mark.drill
def test_a_cancelled_job_saves_and_can_go_on(cluster: Cluster, runner: Runner, wanted: Callable[[int], str]) -> None:
    job = runner.submit("run", 2)
    until(lambda: runner.step("run") >= 7)
    shown = cancel(cluster, runner, job)
    assert (runner.stage("run").checkpoints / f"step-{shown['step']:08d}" / "COMPLETE").is_file()
    again = runner.call("jobs", "resume", job["id"])
    assert again["slurm"]["id"] > job["slurm"]["id"]
    assert_done(runner, job, "run", wanted(2))
    lines = runner.call("jobs", "logs", job["id"])["lines"]
    assert any("the model is in" in line for line in lines)


def cancel(cluster: Cluster, runner: Runner, job: Row) -> Row:
    runner.call("jobs", "cancel", job["id"])
    shown: Row = until(lambda: (found := runner.show(job))["state"] != "running" and found)
    assert shown["state"] == "cancelled" and shown["exit_code"] == 85
    until(lambda: slurm_number(cluster, job).split()[1] == "CANCELLED")
    return shown


def test_a_waiting_job_says_for_what_and_leaves_the_queue(cluster: Cluster, runner: Runner) -> None:
    job = runner.submit("run", 2, "--sbatch=--hold")
    shown = runner.show(job)
    assert shown["state"] == "waiting" and "pending: JobHeldUser" in shown["sentence"]
    assert [row["state"] for row in runner.call("jobs", "list")["jobs"]] == ["waiting"]
    assert runner.call("jobs", "cancel", job["id"])["state"] == "cancelled"
    assert slurm_number(cluster, job).split()[1] == "CANCELLED"


@pytest.mark.drill
def test_a_job_that_somebody_must_look_at_is_held(cluster: Cluster, runner: Runner) -> None:
    data = runner.runs / "data"
    shutil.copytree(runner.data, data)
    file = next(path for path in sorted(data.glob("*.bin")) if path.stem != "evaluation")
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")  # which only who reads all of it sees
    job = runner.call("jobs", "submit", runner.recipe, "--stage", "pretrain", "name=run", *OVERRIDES, "--data", data, "--slurm",
                      "--nodes", 2)
    shown = until(lambda: (found := runner.show(job))["state"] not in ("running", "waiting") and found)
    assert shown["state"] == "held" and shown["exit_code"] == 86 and file.name in shown["sentence"]
    until(lambda: slurm_number(cluster, job).split()[1] in ("SPECIAL_EXIT", "REQUEUE_HOLD"))
    shutil.copy(runner.data / file.name, file)
    again = runner.call("jobs", "resume", job["id"])
    until(lambda: runner.step("run") > 0)
    assert again["slurm"]["id"] != job["slurm"]["id"] and slurm_number(cluster, job).split()[1] == "CANCELLED"
    cancel(cluster, runner, again)


def test_a_node_that_fails_the_gate_is_drained_and_the_job_runs_elsewhere(cluster: Cluster, runner: Runner) -> None:
    mark = cluster.folder / "unhealthy.n1"
    mark.touch()
    try:
        begin = time.monotonic()
        job = runner.submit("run", 2, steps=10**5)
        until(lambda: slurm_number(cluster, job).split()[1:] == ["RUNNING", "n[2-3]"])
        seconds = time.monotonic() - begin
        assert "drain" in cluster.call("sinfo", "--noheader", "--nodes=n1", "--partition=main", "--format=%T")
        until(lambda: runner.step("run") > 0)
        cancel(cluster, runner, job)
        print(f"elsewhere after {seconds:.1f} s")
        assert seconds < 60  # 15 s, and what submitting takes on a busy machine
    finally:
        mark.unlink()
        cluster.call("scontrol", "update", "nodename=n1", "state=resume")


@pytest.mark.drill
def test_a_job_does_not_notice_that_slurm_is_gone(cluster: Cluster, runner: Runner, wanted: Callable[[int], str]) -> None:
    job = runner.submit("run", 2)
    until(lambda: runner.step("run") >= 2)
    cluster.kill("slurmctld")
    begun, gone = runner.step("run"), time.monotonic()
    try:
        shown = runner.show(job)
        assert shown["state"] == "running" and "Slurm" in shown["sentence"] and "scontrol ping" in shown["sentence"]
        time.sleep(max(0.0, gone + 10 - time.monotonic()))
        assert runner.step("run") > begun
    finally:
        cluster.start_controller()
    shown = assert_done(runner, job, "run", wanted(2))
    assert shown["restarts"] == 0 and len(shown["attempts"]) == 1


def test_slurms_refusals_are_told_in_its_own_words(cluster: Cluster, runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*options: object) -> str:
        with contextlib.suppress(FileExistsError):
            runner.prepare("run")
        done = subprocess.run([sys.executable, "-m", "athanor", "jobs", "submit", str(runner.recipe), "--stage", "pretrain",
                               "name=run", *map(str, options)], text=True, capture_output=True, check=False,
                              env={**os.environ, "ATHANOR_RUNS": str(runner.runs)})
        assert done.returncode == 2 and "Traceback" not in done.stderr
        return done.stderr

    assert "Slurm refused: sbatch: error: invalid partition specified: moon" in refused("--slurm", "--partition", "moon")
    assert "Slurm refused: sbatch: error: Invalid --time specification" in refused("--slurm", "--time", "soon")
    assert "cluster.devices is 3, but 2 nodes of 2 ranks each have 4" in refused(
        "cluster.devices=3", "--slurm", "--nodes", 2, "--ranks-per-node", 2)
    assert "go with --slurm" in refused("--nodes", 2)
    assert runner.call("jobs", "list") == {"jobs": []}, "what was refused is not listed"
    monkeypatch.setenv("PATH", str(runner.runs))  # where no command lies, however Slurm was installed
    assert "Slurm's command scontrol is not on PATH" in refused("--slurm")


def expand(cluster: Cluster, nodes: str) -> list[str]:
    return cluster.call("scontrol", "show", "hostnames", nodes).split()
