"""Signs of life of ranks, and who among equals is slow: told of a slow rank, and not of ranks that have other work."""

from __future__ import annotations

import inspect
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import watch_ranks

from athanor.foundation import intervals
from athanor.foundation.errors import DiskError, UserError
from athanor.foundation.intervals import Interval, Recorder, activate, interval
from athanor.foundation.launch import run_ranks
from athanor.foundation.recipe import load_recipe
from athanor.foundation.run_folder import StageFolder, append_when_possible, read_json, read_jsonl
from athanor.models.shapes.decoder import DecoderShape
from athanor.models.zoo.llama import build
from athanor.parallel.stages import Stages
from athanor.train import beat, checkpoint
from athanor.train.optimizer import Optimizer
from athanor.train.saver import Saver
from athanor.train.straggler import WINDOW, WINDOWS, Pace, Stragglers

SIZES = ("stage.pretrain.precision=fp32", "stage.pretrain.evaluate_every=9999", "stage.pretrain.checkpoint_every=9999",
         "parallel.dp_shard=2")


@pytest.fixture
def stragglers_of(recipe_file: Path, data_folder: Path, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """What is told of slow ranks in a run of two, in which `slow` takes some seconds longer for each step."""

    def run(slow: int | None, seconds: float, windows: int) -> list[dict[str, Any]]:
        folder = tmp_path / f"slow-{slow}"
        folder.mkdir()
        (folder / "data").symlink_to(data_folder)
        arguments = {"run_folder": str(folder), "recipe": load_recipe(recipe_file, [*SIZES, "stage.pretrain.steps=6000"]),
                     "stage": "pretrain", "launched": time.perf_counter(), "slow": slow, "seconds": seconds, "enough": windows}
        run_ranks("watch_ranks:train_unevenly", arguments, 2, log_folder=folder, threads=1, timeout=240)
        found = [row for row in read_jsonl(folder / "pretrain" / "events.jsonl") if row["kind"] == "straggler"]
        assert found or len(read_jsonl(folder / "windows.jsonl")) >= windows, "the ranks were compared"
        return found

    return run


def test_a_rank_tells_its_step_its_phase_and_that_it_is_done(train: Any, run_folder: Path) -> None:
    train(run_folder, *SIZES[:1], "stage.pretrain.steps=40", target="watch_ranks:train_and_keep_signs",
          signs=str(run_folder / "signs.jsonl"))
    seen = read_jsonl(run_folder / "signs.jsonl")
    last = read_json(run_folder / "pretrain" / "logs" / "beats" / "rank-0.json")
    assert last == seen[-1]
    assert last["phase"] == "done" and last["step"] == 40 and last["ticks"] > 0, "validation counts its batches"
    assert seen[0]["phase"] == "startup" and all(a["beats"] <= b["beats"] for a, b in pairwise(seen))
    assert {row["pid"] for row in seen} == {last["pid"]}


def test_where_no_sign_can_be_written_a_rank_ends_with_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "open", lambda *_, **__: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    with pytest.raises(DiskError, match=r"cannot write .*beats: Read-only file system"):
        beat.Beat(tmp_path / "beats", lambda: 0)


def test_cleared_logs_do_not_look_like_a_hang_and_a_moved_stage_is_not_made_again(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path / "stage")
    alive = beat.Beat(stage.beats, lambda: 0, time.perf_counter() - 100.0)
    alive.end()  # from here on we write
    append_when_possible(stage.metrics, {"step": 0})
    shutil.rmtree(stage.logs)
    alive.write()
    line = read_json(stage.beats / "rank-0.json")
    assert line["time"] - line["launched"] == pytest.approx(100.0, abs=5.0) and abs(line["time"] - time.time()) < 5.0
    stage.root.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError):
        alive.write()
    with pytest.raises(UserError, match=r"stage was moved or removed while it was written to"):
        append_when_possible(stage.metrics, {"step": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_long_saves_and_loads_count_what_they_do(tmp_path: Path) -> None:
    """A large checkpoint takes longer than the watchdog's patience: it sees that the ranks get on with it."""
    shape = DecoderShape(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    stages = Stages.alone(build(shape))
    optimizer, folder = Optimizer(stages, "adamw", 0.1), StageFolder(tmp_path)
    saver = Saver(folder, stages, optimizer, is_async=False)
    beat.start(folder.beats, lambda: 0)
    try:
        alive = beat._active
        assert alive is not None and alive.ticks == 0
        saver.save(checkpoint.Meta(1, 8, 0, 1, 0, 1, {}, {}, {}))
        saved = alive.ticks
        assert saved > 0
        found = checkpoint.find_intact(folder.checkpoints, lambda *_: None)
        assert found is not None and (hashed := alive.ticks) >= saved + 3, "each file"
        checkpoint.load(found, stages, optimizer)
        assert alive.ticks >= hashed + len(list(stages.named_parameters()))
    finally:
        beat.stop()


def test_ranks_say_where_they_stand(tmp_path: Path) -> None:
    beats = tmp_path / "beats"
    run_ranks("watch_ranks:stand_still", {"folder": str(beats)}, 2, log_folder=tmp_path, threads=1, timeout=120)
    waiting, standing = (read_json(beats / f"dump-{rank}.json") for rank in (0, 1))
    lines, _ = inspect.getsourcelines(watch_ranks)
    assert waiting["word"] == standing["word"] == (beats / "ask").read_text()
    assert standing["file"] == watch_ranks.__file__ and "time.sleep" in lines[standing["line"] - 1] and not standing["is_waiting"]
    assert Path(waiting["file"]).name == "mesh.py" and waiting["is_waiting"]
    (theirs,), (ours,) = waiting["groups"].values(), standing["groups"].values()
    assert theirs["ranks"] == ours["ranks"] == [0, 1]
    number = ours["entered"][-1][0]
    assert ours["entered"][-1] == [number, "all_reduce", True] and theirs["entered"][-1] == [number + 1, "all_reduce", False]


def test_a_beat_costs_nothing_while_nobody_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beat, "BEATS_PER_SECOND", 100.0)
    beat.start(tmp_path / "beats", lambda: 1)
    try:
        used, count, deadline = time.process_time(), 0, time.monotonic() + 60
        while count < 30 and time.monotonic() < deadline:
            time.sleep(0.1)
            count = read_json(tmp_path / "beats" / "rank-0.json")["beats"]
        used = time.process_time() - used
    finally:
        beat.stop()
    assert count >= 30 and used / count < 0.005, "at two beats a second, not one hundredth of a core"
    assert read_json(tmp_path / "beats" / "rank-0.json")["phase"] == "done"
    assert not [thread for thread in threading.enumerate() if thread.name == "beat"]


def spread(slow: int | None, factor: float, base: float, seed: int) -> list[list[float]]:
    """Seconds of a window of four ranks, with a fifth of noise and now and then a pause."""
    chance = random.Random(seed)
    return [[base * (factor if rank == slow else 1.0) * chance.uniform(0.9, 1.1) + (0.05 if chance.random() < 0.2 else 0.0)
             for _ in range(WINDOW)] for rank in range(4)]


@pytest.mark.parametrize(("factor", "base", "expected"), [(1.5, 0.01, [2]), (1.3, 0.1, [2]), (1.05, 0.1, []), (1.5, 0.002, [])])
def test_a_rank_is_named_once_after_windows_in_a_row(factor: float, base: float, expected: list[int]) -> None:
    found: list[tuple[int, str, str]] = []
    stragglers = Stragglers([[0, 1, 2, 3]], lambda *event: found.append(event))
    for window in range(WINDOWS - 1):
        stragglers.add(spread(2, factor, base, window), "abcd")
    stragglers.add(spread(None, 1.0, base, 50), "abcd")  # it was something else
    assert not found
    for window in range(2 * WINDOWS):
        stragglers.add(spread(2, factor, base, 100 + window), "abcd")
    assert [rank for rank, _, _ in found] == expected
    if expected:
        assert found[0][1] == "c" and "times as long before its collectives as the others" in found[0][2]
        assert float(found[0][2].split()[5]) == pytest.approx(factor, abs=0.1)


def test_only_ranks_with_equal_work_are_compared() -> None:
    found: list[Any] = []
    for peers in ([[0, 1], [2, 3]], [[0], [1], [2], [3]]):
        stragglers = Stragglers(peers, lambda *event: found.append(event))
        for _ in range(10):
            stragglers.add([[0.01] * WINDOW] * 2 + [[0.03] * WINDOW] * 2, "abcd")
    assert not found


def test_time_without_a_processor_is_not_a_ranks_own(monkeypatch: pytest.MonkeyPatch) -> None:
    now, waited, recorder = 0.0, 0.0, Recorder()
    monkeypatch.setattr(intervals, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(Pace, "delay", lambda self: waited)
    pace = Pace(recorder)
    activate(recorder)
    try:
        for own, in_compute, in_wait in [(0.02, 0.0, 0.0), (0.02, 0.01, 0.0), (0.02, 0.0, 0.01)]:
            with interval("compute"):
                now += own + in_compute
                waited += in_compute
                with interval("data_parallel", group="g"):
                    now += 0.05
                    waited += in_wait
            with interval("metering"):
                now += 0.05
                waited += in_wait
            pace.end_step()
    finally:
        activate(None)
    recorder.rows.append(Interval("metering", 0.0, 9.0, 0, None, 0.0))  # after the last step
    assert pace.take() == pytest.approx([0.02, 0.02, 0.02])
    assert not recorder.rows and pace.take() == []


def test_the_system_tells_how_long_a_thread_had_no_processor() -> None:
    """Two threads that compute in turns on one core wait for each other about as long as they run."""
    pace, allowed = Pace(Recorder()), os.sched_getaffinity(0)
    told: list[tuple[float, float]] = []
    os.sched_setaffinity(0, {min(allowed)})
    try:
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as rival:
            while len(told) < 10 and not (told and told[-1][0] > 0.1 and told[-1][0] == pytest.approx(told[-1][1], rel=0.2)):
                before, begin, used = pace.delay(), time.perf_counter(), time.thread_time()
                while time.thread_time() - used < 0.5:
                    pass
                told.append((pace.delay() - before, time.perf_counter() - begin - 0.5))
            rival.kill()
    finally:
        os.sched_setaffinity(0, allowed)
    pace.close()
    assert len(told) < 10, f"a virtual machine may lose its processors untold now and then, but not always: {told}"


def test_a_rank_slowed_by_4_ms_a_step_is_named(stragglers_of: Any) -> None:
    (event,) = stragglers_of(slow=1, seconds=0.004, windows=4 * WINDOWS)
    assert event["rank"] == 1 and event["sentence"].startswith(f"rank 1 (host {event['host']}) takes ")


def test_no_rank_of_a_clean_run_is_named(stragglers_of: Any) -> None:
    assert not stragglers_of(slow=None, seconds=0.0, windows=WINDOWS)
