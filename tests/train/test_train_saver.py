"""Saving while training goes on: what the loop waits for, what stays, who may save, and what kills and bad disks leave."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from athanor.foundation.errors import CheckpointError, DiskError, UserError
from athanor.foundation.run_folder import RunFolder, StageFolder, append_when_possible, read_jsonl, write_json
from athanor.ledger.book import read_book
from athanor.models.initialize import initialize
from athanor.models.shapes.decoder import DecoderShape
from athanor.models.zoo.llama import build
from athanor.parallel.stages import Stages
from athanor.train import checkpoint
from athanor.train.optimizer import Optimizer
from athanor.train.saver import MOST_FAILED_SAVES, Saver

Train = Callable[..., dict[str, Any]]
SIX = ("stage.pretrain.steps=6", "stage.pretrain.evaluate_every=6", "stage.pretrain.precision=fp32")
OFTEN = (*SIX, "stage.pretrain.checkpoint_every=1", "parallel.dp_shard=2")
SHAPE = DecoderShape(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)


def trained(kind: str = "adamw") -> tuple[Stages, Optimizer]:
    """A model of one rank with state in its optimizer."""
    model = build(SHAPE)
    initialize(model, 0)
    stages = Stages.alone(model)
    optimizer = Optimizer(stages, kind, 0.1)
    for _, _, tensor in optimizer.state():
        tensor.normal_(generator=torch.Generator().manual_seed(tensor.numel()))
    return stages, optimizer


def meta_of(step: int, attempt: int = 0) -> checkpoint.Meta:
    return checkpoint.Meta(step, 8 * step, 64 * step, step, attempt, 1, {}, {}, {})


def names(folder: StageFolder) -> list[str]:
    return sorted(path.name for path in folder.checkpoints.iterdir())


def kinds(folder: StageFolder) -> list[str]:
    return [row["kind"] for row in read_jsonl(folder.events)]


@pytest.fixture
def folder(tmp_path: Path) -> StageFolder:
    return StageFolder(tmp_path / "stage")


@pytest.mark.parametrize("is_async", [True, False])
def test_what_is_saved_are_the_values_of_that_moment(folder: StageFolder, monkeypatch: pytest.MonkeyPatch,
                                                     is_async: bool) -> None:
    stages, optimizer = trained("muon")
    wanted = {entry.key: entry.shard.clone() for entry in checkpoint.entries(stages, optimizer)}
    gate, write = threading.Event(), checkpoint.Part.write

    def late(self: checkpoint.Part, *rest: Any) -> str:
        assert not is_async or gate.wait(20)
        return write(self, *rest)

    monkeypatch.setattr(checkpoint.Part, "write", late)
    saver = Saver(folder, stages, optimizer, is_async=is_async)
    saver.save(meta_of(3))
    with torch.no_grad():
        for entry in checkpoint.entries(stages, optimizer):
            entry.shard.fill_(7)
    assert names(folder) == ([".step-00000003.building-0"] if is_async else ["step-00000003"])
    gate.set()
    saver.finish()
    (path,) = checkpoint.list_checkpoints(folder.checkpoints)
    found = load_file(path / "rank-00000.safetensors")  # an independent reader of the file
    assert set(found) == set(wanted) and all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert sorted(file.name for file in path.iterdir()) == ["COMPLETE", "index.json", "meta.json", "rank-00000.safetensors"]
    assert checkpoint.load(path, stages, optimizer) == meta_of(3)
    assert all(torch.equal(entry.shard, wanted[entry.key]) for entry in checkpoint.entries(stages, optimizer))


@pytest.mark.skipif(sys.platform != "linux" or os.sched_getscheduler(0) == os.SCHED_IDLE or os.geteuid() != 0,
                    reason="needs Linux, a process that is not idle itself, and the right to take idleness back")
def test_who_writes_takes_what_the_loop_leaves_until_the_loop_waits(folder: StageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    policies, begun, write = [], threading.Event(), checkpoint.Part.write

    def late(self: checkpoint.Part, *rest: Any) -> str:
        policies.append(os.sched_getscheduler(0))
        begun.set()
        for _ in range(2000):
            if os.sched_getscheduler(0) != os.SCHED_IDLE:
                break
            time.sleep(0.01)
        policies.append(os.sched_getscheduler(0))
        return write(self, *rest)

    monkeypatch.setattr(checkpoint.Part, "write", late)
    saver = Saver(folder, *trained())
    saver.save(meta_of(1))
    assert begun.wait(20)
    saver.finish()
    assert policies == [os.SCHED_IDLE, os.SCHED_OTHER] and os.sched_getscheduler(0) == os.SCHED_OTHER
    assert names(folder) == ["step-00000001"]


def test_moments_in_bf16_lie_beside_weights_in_fp32(folder: StageFolder) -> None:
    stages, _ = trained()
    optimizer = Optimizer(stages, "adamw", 0.1, state_dtype=torch.bfloat16)
    wanted = {entry.key: entry.shard.clone() for entry in checkpoint.entries(stages, optimizer)}
    Saver(folder, stages, optimizer, is_async=False).save(meta_of(1))
    found = load_file(folder.checkpoints / "step-00000001" / "rank-00000.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.float32, torch.bfloat16}
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(("keep_latest_k", "keep_every", "left"), [(2, 0, [8, 9]), (3, 0, [7, 8, 9]), (2, 4, [4, 8, 9]),
                                                                   (0, 0, [1, 2, 3, 4, 5, 6, 7, 8, 9]), (2, 3, [3, 6, 8, 9])])
def test_the_latest_stay_and_every_nth(folder: StageFolder, keep_latest_k: int, keep_every: int, left: list[int]) -> None:
    saver = Saver(folder, *trained(), keep_latest_k=keep_latest_k, keep_every=keep_every)
    for step in range(1, 10):
        saver.save(meta_of(step))
    saver.finish()
    assert names(folder) == [f"step-{step:08d}" for step in left]


def test_stops_between_skipped_steps_leave_what_can_be_gone_back_to(folder: StageFolder) -> None:
    saver = Saver(folder, *trained(), keep_latest_k=2)
    for step, skipped, left in [(1, 0, [1]), (2, 0, [1, 2]), (3, 1, [1, 2, 3]), (4, 2, [1, 2, 3, 4]), (5, 0, [4, 5])]:
        saver.save(replace(meta_of(step), guards={"skipped_steps": skipped}))
        saver.finish()
        assert names(folder) == [f"step-{number:08d}" for number in left]


def test_steps_between_are_saved_for_good(train: Train, run_folder: Path) -> None:
    train(run_folder, *SIX, "stage.pretrain.steps=7", "stage.pretrain.checkpoint_every=2", "stage.pretrain.keep_every=3")
    stage = RunFolder(run_folder).stage("pretrain")
    assert [row["step"] for row in read_jsonl(stage.events) if row["kind"] == "checkpoint"] == [2, 3, 4, 6, 7]
    assert names(stage) == ["step-00000003", "step-00000006", "step-00000007"]
    with pytest.raises(UserError, match="keep_latest_k = 1 leaves nothing to go on from when that one is damaged"):
        train(run_folder, "stage.pretrain.keep_latest_k=1")


def test_the_loop_goes_on_while_a_slow_disk_is_written(train: Train, run_folder: Path) -> None:
    """None of a save's seven flushes, of 0.3 s each, begins before the loop has done a step more and waits to save again."""
    train(run_folder, *SIX, "parallel.dp_shard=2", "stage.pretrain.checkpoint_every=2", "stage.pretrain.steps=3",
          target="saver_ranks:train_until_it_waits", seconds=0.3)
    stage = RunFolder(run_folder).stage("pretrain")
    first, last = (row for row in read_jsonl(stage.events) if row["kind"] == "checkpoint")
    steps = {row["step"]: row["time"] for row in read_jsonl(stage.metrics)}
    assert steps[3] < first["time"] and first["total_seconds"] > first["seconds"] + 6 * 0.3
    assert first["until"] < steps[3], "the loop waited for the copy alone"
    assert first["step"] == 2 and last["step"] == 3
    assert last["seconds"] > 6 * 0.3 and last["until"] > first["time"], "the next one waits for it"
    assert read_book(stage.actual).accounts["checkpoint"] >= 2 * last["seconds"]


def test_without_asynchronous_saves_the_loop_waits(train: Train, run_folder: Path) -> None:
    train(run_folder, *SIX, "stage.pretrain.checkpoint_every=2", "stage.pretrain.steps=3", "stage.pretrain.save_async=false",
          target="saver_ranks:train_on_slow_disk", seconds=0.1)
    stage = RunFolder(run_folder).stage("pretrain")
    first, _ = (row for row in read_jsonl(stage.events) if row["kind"] == "checkpoint")
    assert first["time"] < {row["step"]: row["time"] for row in read_jsonl(stage.metrics)}[3]
    assert first["seconds"] == first["total_seconds"] > 6 * 0.1


# who may save


def test_an_older_attempt_cannot_complete_what_it_has_begun(folder: StageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """It hangs while it writes, a new attempt takes over and saves, then it goes on."""
    stages, optimizer = trained()
    old = Saver(folder, stages, optimizer, owner=checkpoint.claim(folder.owner, 0))
    old.save(meta_of(1))
    old.finish()
    gate, write = threading.Event(), checkpoint.Part.write

    def late(self: checkpoint.Part, building: Path, content: Any) -> str:
        assert not building.name.endswith("-0") or gate.wait(20)
        return write(self, building, content)

    monkeypatch.setattr(checkpoint.Part, "write", late)
    old.save(meta_of(2))
    new = Saver(folder, stages, optimizer, owner=checkpoint.claim(folder.owner, 1))
    found = checkpoint.find_intact(folder.checkpoints, lambda path, reason: pytest.fail(reason))
    assert found is not None and found.name == "step-00000001"
    for step in (2, 3, 4):
        new.save(meta_of(step, 1))
    new.finish()
    gate.set()
    with pytest.raises(UserError, match=r"another attempt trains in .* by now, or its owner.json was removed"):
        old.finish()
    assert names(folder) == ["step-00000003", "step-00000004"]
    assert all(checkpoint.read_meta(path).attempt == 1 for path in checkpoint.list_checkpoints(folder.checkpoints))
    old.save(meta_of(5))
    with pytest.raises(UserError, match="another attempt"):  # nor what it begins afterwards
        old.finish()
    assert names(folder) == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("moment", ["before it looks", "after it looked"])
def test_between_completing_and_renaming_another_may_take_over(folder: StageFolder, monkeypatch: pytest.MonkeyPatch,
                                                              moment: str) -> None:
    stages, optimizer = trained()
    old = Saver(folder, stages, optimizer, owner=checkpoint.claim(folder.owner, 0))
    place, complete = checkpoint.place, checkpoint.complete

    def take_over() -> None:
        checkpoint.claim(folder.owner, 1)
        assert checkpoint.find_intact(folder.checkpoints, lambda path, reason: pytest.fail(reason)) is None

    def late_complete(*arguments: Any) -> None:
        complete(*arguments)
        take_over()

    def late_place(*arguments: Any) -> None:
        take_over()
        place(*arguments)

    if moment == "before it looks":
        monkeypatch.setattr(checkpoint, "complete", late_complete)
    else:
        monkeypatch.setattr(checkpoint, "place", late_place)
    old.save(meta_of(1))
    with pytest.raises(UserError, match="another attempt"):
        old.finish()
    assert names(folder) == []


# damage


def damage(path: Path, how: str) -> str:
    """Damage a checkpoint; what is to be said of it."""
    shard, complete = path / "rank-00000.safetensors", path / "COMPLETE"
    if how == "bit":
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 16
        shard.write_bytes(content)
        return "rank-00000.safetensors does not have the content that was written"
    if how == "truncated":
        os.truncate(shard, shard.stat().st_size - 1)
        return "rank-00000.safetensors does not have the content that was written"
    if how == "empty COMPLETE":
        complete.write_text("")
        return "COMPLETE is missing or damaged"
    if how == "no index":
        (path / "index.json").unlink()
        return "index.json is missing"
    if how == "nothing listed":
        write_json(complete, {})
        return "COMPLETE does not list its files"
    shutil.rmtree(path)
    if how == "a file":
        path.write_text("")
        return "COMPLETE cannot be read: not a directory"
    path.symlink_to(path)  # as unreadable to root as to others
    return "COMPLETE cannot be read: too many levels of symbolic links"


@pytest.mark.parametrize("how", ["bit", "truncated", "empty COMPLETE", "no index", "nothing listed", "a file", "unreadable"])
def test_damage_is_named_and_the_newest_intact_one_found(folder: StageFolder, how: str) -> None:
    saver = Saver(folder, *trained())
    for step in (1, 2):
        saver.save(meta_of(step))
    saver.finish()
    newest = folder.checkpoints / "step-00000002"
    expected, told = damage(newest, how), []
    found = checkpoint.find_intact(folder.checkpoints, lambda path, reason: told.append((path, reason)))
    assert found == folder.checkpoints / "step-00000001"
    ((path, reason),) = told
    assert path == newest and reason.startswith(expected)
    saver.save(meta_of(2))  # in its place
    saver.finish()
    assert checkpoint.find_damage(newest) is None and names(folder) == ["step-00000001", "step-00000002"]


def test_a_damaged_one_does_not_stay_in_the_place_of_a_good_one(folder: StageFolder) -> None:
    """Step 15 was saved since the run was asked to stop there, and is damaged: steps 10 and 20 are what can be gone on from."""
    saver = Saver(folder, *trained())
    for step in (10, 15):
        saver.save(meta_of(step))
    saver.finish()
    (folder.checkpoints / "step-00000015" / "index.json").unlink()
    assert checkpoint.find_intact(folder.checkpoints, lambda *_: None) == folder.checkpoints / "step-00000010"
    saver.save(meta_of(20))
    saver.finish()
    assert names(folder) == ["step-00000010", "step-00000020"]
    (folder.checkpoints / "step-00000020" / "COMPLETE").unlink()
    assert checkpoint.find_intact(folder.checkpoints, lambda *_: None) == folder.checkpoints / "step-00000010"
    (folder.checkpoints / "step-00000010" / "COMPLETE").unlink()
    assert checkpoint.find_intact(folder.checkpoints, lambda *_: None) is None
    assert names(folder) == ["step-00000010"], "where none is intact all stay"


def test_folders_that_cannot_be_read_and_foreign_meta_are_sentences(folder: StageFolder) -> None:
    Saver(folder, *trained(), is_async=False).save(meta_of(1))
    path = folder.checkpoints / "step-00000001"
    write_json(path / "meta.json", {"format": 1, "steps": 3})
    with pytest.raises(CheckpointError, match=r"meta.json has the keys format, steps; it must have step, samples"):
        checkpoint.read_meta(path)
    write_json(path / "meta.json", [])
    with pytest.raises(CheckpointError, match="has format None"):
        checkpoint.read_meta(path)
    shutil.rmtree(folder.checkpoints)
    folder.checkpoints.write_text("")
    with pytest.raises(CheckpointError, match="checkpoints cannot be read: not a directory"):
        checkpoint.list_checkpoints(folder.checkpoints)


# disks


def test_a_rank_that_cannot_write_is_named_and_nothing_of_it_stays(train: Train, run_folder: Path) -> None:
    stage = RunFolder(run_folder).stage("pretrain")
    one = {"target": "saver_ranks:train_where_one_cannot_write", "rank": 1}
    found = train(run_folder, *OFTEN, **one, steps=[2, 3, 4])
    assert found["step"] == 6 and names(stage) == ["step-00000005", "step-00000006"]
    told = [row for row in read_jsonl(stage.events) if row["kind"] == "unsaved"]
    assert [row["step"] for row in told] == [2, 3, 4] and len(told) == MOST_FAILED_SAVES
    assert all("rank 1 could not save: cannot write" in row["sentence"] and "Input/output error" in row["sentence"]
               and "the run goes on" in row["sentence"] for row in told)
    with pytest.raises(DiskError, match="rank 1 could not save"):
        train(run_folder, *OFTEN, is_fresh=True, **one, steps=[2, 3, 4, 5])
    assert names(stage) == ["step-00000001"]


def test_what_does_not_fit_is_not_begun(folder: StageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Saver(folder, *trained())
    free = shutil.disk_usage(folder.root.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=saver.size_bytes))
    saver.save(meta_of(1))
    saver.finish()
    (row,) = read_jsonl(folder.events)
    assert row["kind"] == "unsaved" and "0.1 MB are free" in row["sentence"] and names(folder) == []


def test_only_saves_that_fail_in_a_row_end_the_run(folder: StageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    saver, usage = Saver(folder, *trained(), is_async=False), shutil.disk_usage
    for step in range(1, 2 * MOST_FAILED_SAVES + 3):
        free = usage(folder.root.parent).free * (step == MOST_FAILED_SAVES + 1)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage(path)._replace(free=free))
        if step == 2 * MOST_FAILED_SAVES + 2:
            with pytest.raises(DiskError, match=r"0\.0 MB are free"):
                saver.save(meta_of(step))
        else:
            saver.save(meta_of(step))
    assert kinds(folder) == ["unsaved"] * MOST_FAILED_SAVES + ["checkpoint"] + ["unsaved"] * MOST_FAILED_SAVES


def test_rows_wait_while_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    append_when_possible(file, {"number": 0})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *_, **__: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
        for number in (1, 2):
            append_when_possible(file, {"number": number})
    assert [row["number"] for row in read_jsonl(file)] == [0]
    append_when_possible(file, {"number": 3})
    assert [row["number"] for row in read_jsonl(file)] == [0, 1, 2, 3]
