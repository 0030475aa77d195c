"""When a device cannot be used any more, the stage goes on with fewer ranks, the same batches and, where sums are exact, bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_run import seconds_until_book

from athanor.cli.fewer import fewer_ranks
from athanor.foundation.errors import AthanorError, RankError
from athanor.foundation.launch import start_server
from athanor.foundation.recipe import Recipe, load_recipe
from athanor.foundation.run_folder import RunFolder, StageFolder, hash_folder, read_jsonl
from athanor.jobs import agent as agent_module
from athanor.jobs.agent import Agent, Devices, Held
from athanor.jobs.nodes import Leader
from athanor.ledger.book import read_book
from athanor.train.settings import layout_of
from athanor.train.stage import Job, resolve

STAGE = "stage.pretrain."
STEPS = 16
CHOICES = (f"{STAGE}precision=fp32", f"{STAGE}steps={STEPS}", f"{STAGE}checkpoint_every=3", f"{STAGE}evaluate_every=1000",
           f"{STAGE}micro_batch_size=2", f"{STAGE}data_shards=4", "parallel.dp_shard=4")
EXACT = f"{STAGE}reduction=exact"
FOLLOW = """
import sys
from pathlib import Path
from athanor.foundation.launch import start_server
from athanor.jobs.nodes import join
if __name__ == "__main__":
    start_server("athanor.train.loop")
    sys.exit(join(Path(sys.argv[1]), 1, "n2"))
"""
Row = dict[str, Any]


@pytest.fixture
def stage(run_folder: Path) -> StageFolder:
    return RunFolder(run_folder).stage("pretrain")


@pytest.fixture
def make(recipe_file: Path) -> Callable[..., tuple[Job, Recipe]]:
    """A stage as it is to be trained, and its recipe."""

    def of(folder: Path, *overrides: str) -> tuple[Job, Recipe]:
        recipe = load_recipe(recipe_file, [*CHOICES, *overrides])
        return resolve(RunFolder(folder), recipe, "pretrain", layout_of(recipe).world_size), recipe

    return of


@pytest.fixture
def supervised(make: Any) -> Callable[..., Row]:
    """Train on ranks that an agent owns, which knows on how many the stage goes on."""

    def run(folder: Path, *overrides: str, target: str = "athanor.train.loop:train_stage", devices: Devices | None = None,
            **arguments: Any) -> Row:
        launched = time.perf_counter()
        start_server("athanor.train.loop")
        job, recipe = make(folder, *overrides)
        agent = Agent(job.folder, job.layout.world_size, 1, fewer=fewer_ranks(job))
        agent.devices = devices or agent.devices
        return agent.run(target, {"run_folder": str(folder), "recipe": recipe, "stage": "pretrain", "launched": launched,
                                  **arguments})

    return run


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("calm")


@pytest.fixture
def wanted(supervised: Any, calm: Path, data_folder: Path) -> str:
    """The model of the same run on four ranks without any disturbance, as a hash."""
    if not (calm / "data").exists():
        (calm / "data").symlink_to(data_folder)
        supervised(calm, EXACT)
    return hash_folder(RunFolder(calm).stage("pretrain").model)


def events(stage: StageFolder, *kinds: str) -> list[Row]:
    return [row for row in read_jsonl(stage.events) if row["kind"] in kinds]


def reached(stage: StageFolder, step: int) -> None:
    """Wait until a step is done."""
    deadline = time.monotonic() + 120
    while max((row["step"] for row in read_jsonl(stage.metrics)), default=0) < step and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.slow
def test_a_device_that_fails_for_good_is_done_without_until_the_next_start(supervised: Any, stage: StageFolder, run_folder: Path,
                                                                           tmp_path: Path, wanted: str) -> None:
    """The rank on device 1 of four dies in step 5 and then at each start; two ranks go on, beside the device, and four again."""
    marks = tmp_path / "marks"
    marks.mkdir()

    def stop() -> None:
        reached(stage, 9)
        os.kill(os.getpid(), signal.SIGTERM)
        (marks / "hurry").touch()

    failing: Row = {"target": "jobs_ranks:train_on_a_failing_device", "marks": str(marks), "device": 1, "step": 4, "pause": 0.1,
                    "hold": 10}
    thread = threading.Thread(target=stop)
    thread.start()
    begun = time.time()
    stopped = supervised(run_folder, EXACT, **failing)
    thread.join()
    assert stopped["is_asked_to_stop"] and 9 <= stopped["step"] < STEPS
    faults = events(stage, "fault")
    assert len(faults) == 4 and all("rank 1 was killed by signal 9" in row["sentence"] for row in faults)
    (given_up,), (fewer,) = events(stage, "given up"), events(stage, "fewer")
    told = "rank 1 has ended 3 times in a row before it did a step, so device 1 of this machine is given up"
    assert given_up["sentence"] == told
    assert "there are devices for 3 of 4 ranks, so it goes on with 2 and the same batches" in fewer["sentence"]
    assert [row["ranks"] for row in events(stage, "start")] == [4, 2]

    book, lines = read_book(stage.actual), read_jsonl(stage.root / "ledger.jsonl")
    late = [line for line in lines if line.get("time", 0.0) > fewer["time"] and line["wall_seconds"] > 0]
    assert late and all(line["accounts"]["spare"] == pytest.approx(line["wall_seconds"]) for line in late), "one could work"
    assert all(line["accounts"]["down"] == pytest.approx(line["wall_seconds"]) for line in late), "one is given up"
    assert not any("spare" in line.get("accounts", {}) for line in lines if line.get("time", 0.0) < fewer["time"])
    assert book.wall_seconds == pytest.approx(seconds_until_book(stage, begun), rel=0.1, abs=0.3), "every second is told"
    assert book.device_seconds == pytest.approx(4 * book.wall_seconds, rel=0.02), "four devices are paid for all the time"
    assert abs(book.accounts["unattributed"]) < 0.05 * book.device_seconds, book.accounts

    (marks / "mended").touch()
    supervised(run_folder, EXACT, **failing)
    assert [row["ranks"] for row in events(stage, "start")] == [4, 2, 4] and len(events(stage, "fault")) == 4
    assert hash_folder(stage.model) == wanted
    assert sorted({row["step"] for row in read_jsonl(stage.metrics)}) == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_lost_node_without_a_spare_is_done_without(supervised: Any, stage: StageFolder, run_folder: Path, tmp_path: Path,
                                                     wanted: str) -> None:
    """Two nodes of two ranks, here two processes; the second one is killed in the middle."""
    script = tmp_path / "follow.py"
    script.write_text(FOLLOW)
    start_server("athanor.train.loop")
    follower = subprocess.Popen([sys.executable, str(script), str(tmp_path / "leader.json")])

    def lose() -> None:
        reached(stage, 5)
        follower.kill()
        (pids / "hurry").touch()

    thread, pids = threading.Thread(target=lose), tmp_path / "pids"
    try:
        with Leader(tmp_path / "leader.json", 2, 2, "n1") as leader:
            thread.start()
            supervised(run_folder, EXACT, target="jobs_ranks:train_in_sight", pids=str(pids), pause=0.1, hold=10,
                       devices=leader)
    finally:
        follower.kill()
        follower.wait()
    thread.join()
    (fault,), (fewer,) = events(stage, "fault"), events(stage, "fewer")
    assert "ranks 2 to 3 ended with node n2" in fault["sentence"] and "for 2 of 4 ranks" in fewer["sentence"]
    assert [row["ranks"] for row in events(stage, "start")] == [4, 2]
    book = read_book(stage.actual)
    assert book.device_seconds == pytest.approx(4 * book.wall_seconds, rel=0.02) and "spare" not in book.accounts
    assert abs(book.accounts["unattributed"]) < 0.05 * book.device_seconds, book.accounts
    assert hash_folder(stage.model) == wanted


class Scripted(Devices):
    """Devices on which each life ends as the script says; a script that is over is a stage that is done."""

    def __init__(self, count: int, *ends: AthanorError) -> None:
        super().__init__(count)
        self.ends, self.lives = list(ends), []  # type: ignore[var-annotated]

    def launch(self, target: str, arguments: Row, world_size: int, **choices: Any) -> list[Any]:
        self.lives.append((world_size, self.usable[:world_size], arguments["idle"]))
        if self.ends:
            raise self.ends.pop(0)
        return [{"is_asked_to_stop": False}]

    @property
    def sizes(self) -> list[int]:
        return [size for size, *_ in self.lives]


@pytest.fixture
def lived(stage: StageFolder, recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Scripted]:
    """An agent's lives on scripted devices; `sizes` are the numbers of ranks on which the stage goes on."""
    monkeypatch.setattr(agent_module, "FIRST_WAIT_SECONDS", 0.0)

    def run(*ends: AthanorError, count: int = 4, world_size: int = 4, sizes: tuple[int, ...] = (1, 2)) -> Scripted:
        recipe, agent = load_recipe(recipe_file), Agent(stage, world_size, 1)

        def fewer(most: int) -> tuple[int, Recipe] | None:
            return max(((size, recipe) for size in sizes if size <= most), default=None, key=lambda found: found[0])

        agent.fewer, agent.devices = fewer, Scripted(count, *ends)
        try:
            agent.run("nothing:at all", {"recipe": recipe, "stage": "pretrain"})
        except Held as held:
            agent.devices.lives.append((0, [], {"held": str(held)}))
        return agent.devices

    return run


def killed(rank: int) -> RankError:
    return RankError(rank, "was killed by signal 9 (SIGKILL)", number=9)


def failed(rank: int, sentence: str, place: str = "RuntimeError at mesh.py:140") -> RankError:
    return RankError(rank, f"failed: RuntimeError: {sentence}", place=place)


ECC = "CUDA error: uncorrectable ECC error encountered"
TOGETHER = RankError(1, "were killed by signal 9 (SIGKILL)", number=9, who="all 4 ranks")


@pytest.mark.parametrize(("ends", "sizes", "held"), [
    ([killed(1)] * 3, [4, 4, 4, 2], ""),
    ([killed(1), killed(2), killed(1), killed(1)], [4, 4, 4, 4, 4], ""),
    ([killed(1), killed(2)] * 3, [4] * 5 + [0], "5th fault in a row"),
    ([TOGETHER] * 5, [4] * 5 + [0], "5th fault in a row"),
    ([failed(1, "Connection closed by peer", "x") for _ in range(2)], [4] * 2 + [4], ""),
    ([failed(2, ECC)] * 2, [4, 4, 2], ""),
    ([*[failed(2, ECC)] * 2, *[failed(0, ECC)] * 2], [4, 4, 2, 2, 2], ""),
    ([*[failed(2, ECC)] * 2, *[failed(0, ECC)] * 4], [4, 4, 2, 2, 2, 2, 1], ""),
    ([failed(2, "shapes differ")] * 2, [4, 4, 0], "the same exception at the same step"),
    ([*[killed(1)] * 3, *[killed(0)] * 10], [4] * 3 + [2] * 6 + [1] * 4 + [0], "5th fault in a row"),
], ids=["the same rank", "others between", "in turn", "all at once", "a broken connection", "a device that says so",
        "two of them", "three of them", "our own fault", "to the last"])
def test_when_a_device_is_given_up(lived: Any, ends: list[AthanorError], sizes: list[int], held: str) -> None:
    found = lived(*ends)
    assert found.sizes == sizes and (sizes[-1] or held in found.lives[-1][2]["held"])


def test_where_a_stage_cannot_do_without_a_device_none_is_given_up(lived: Any, stage: StageFolder) -> None:
    assert lived(*[killed(1)] * 9, sizes=()).sizes == [4] * 5 + [0]
    assert not events(stage, "given up", "fewer") and len(events(stage, "held")) == 1


def test_a_spare_comes_before_fewer_ranks(lived: Any, stage: StageFolder) -> None:
    found = lived(*[killed(1)] * 6, count=5)
    assert found.lives == [*[(4, [0, 1, 2, 3], {"spare": 1})] * 3, *[(4, [0, 2, 3, 4], {"down": 1})] * 3,
                           (2, [0, 3], {"spare": 1, "down": 2})]
    assert [row["sentence"].split(", so ")[1] for row in events(stage, "given up")] == [
        "device 1 of this machine is given up", "device 2 of this machine is given up"]
    assert len(events(stage, "fewer")) == 1
    down = [line for line in read_jsonl(stage.root / "ledger.jsonl") if line["accounts"].get("down", 0.0) > 0]
    assert all(line["device_seconds"] == pytest.approx(5 * line["wall_seconds"]) for line in down)


@pytest.mark.parametrize(("overrides", "most", "ranks", "layout"), [
    ((), 3, 2, (1, 2)),
    ((), 1, 1, (1, 1)),
    ((EXACT,), 3, 2, (1, 2)),
    (("parallel.tp=2", "parallel.dp_shard=2"), 3, 2, (1, 1)),
    (("parallel.dp_shard=2", "parallel.dp_replicate=2"), 3, 2, (1, 2)),
    (("parallel.dp_shard=1", "parallel.dp_replicate=4"), 2, 2, (2, 1)),
    (("parallel.dp_shard=1", "parallel.tp=2"), 1, None, None),
    ((), 0, None, None),
], ids=["dp_shard", "to one", "exact", "a fixed tp", "replicas first", "replicas", "nothing to share out", "nothing left"])
def test_fewer_ranks_have_the_same_batches(make: Any, run_folder: Path, overrides: tuple[str, ...], most: int, ranks: int | None,
                                           layout: tuple[int, int] | None) -> None:
    job, _ = make(run_folder, *overrides)
    found = fewer_ranks(job)(most)
    if found is None:
        assert ranks is None
        return
    size, recipe = found
    smaller = resolve(job.run, recipe, "pretrain", size)
    assert size == ranks and (smaller.layout.dp_replicate, smaller.layout.dp_shard) == layout
    for key in ("global_batch_tokens", "micro_batch_size", "data_shards", "steps", "learning_rate"):
        assert getattr(smaller.settings, key) == getattr(job.settings, key), key
    assert smaller.identity == job.identity and recipe.origin("parallel.dp_shard") == "fewer devices"


def test_micro_batches_that_were_counted_do_not_grow(make: Any, run_folder: Path) -> None:
    """A plan fixes how many a rank has; half the ranks have twice as many of the same size, or their memory would not do."""
    job, _ = make(run_folder, "parallel.num_microbatches=2")
    assert job.settings.micro_batch_size == 2
    found = fewer_ranks(job)(2)
    assert found is not None
    smaller = resolve(job.run, found[1], "pretrain", 2)
    assert (smaller.settings.micro_batch_size, smaller.settings.num_microbatches) == (2, 4)
