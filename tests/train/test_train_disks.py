"""Whole runs on a real disk that is full or read-only, and killed while they save."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train_saver import OFTEN, Train, kinds

from athanor.foundation.errors import RankError
from athanor.foundation.run_folder import RunFolder, read_json, read_jsonl
from athanor.ledger.book import read_book
from athanor.train import checkpoint
from athanor.train.saver import MOST_FAILED_SAVES

IN_A_NAMESPACE = """
import sys, time
from pathlib import Path
from athanor.foundation.launch import run_ranks
from athanor.foundation.recipe import load_recipe

recipe = load_recipe(sys.argv[1], ["stage.pretrain.steps=8", "stage.pretrain.evaluate_every=8", "parallel.dp_shard=2",
                                   "stage.pretrain.checkpoint_every=1"])
commands = {step: command for step, command in zip((2, 4), sys.argv[4:], strict=False)}
run_ranks("saver_ranks:train_and_do", {"run_folder": sys.argv[2], "recipe": recipe, "stage": "pretrain", "commands": commands,
          "launched": time.perf_counter()}, 2, log_folder=Path(sys.argv[3]), threads=1, timeout=100)
"""


@pytest.mark.slow
@pytest.mark.parametrize("ends", [True, False], ids=["for a while", "for good"])
@pytest.mark.parametrize(("spoil", "mend", "told"), [
    ("head -c 100M /dev/zero > {disk}/filler; true", "rm {disk}/filler", "MB are free|No space left on device"),
    ("until mount -o remount,ro {disk}; do sleep 0.01; done",  # a save holds files open for a moment
     "mount -o remount,rw {disk}", "Read-only file system")], ids=["full", "read-only"])
def test_a_disk_that_is_full_or_read_only(tmp_path: Path, recipe_file: Path, data_folder: Path, spoil: str, mend: str, told: str,
                                          ends: bool) -> None:
    """A real small file system, which only exists in a name space of the test's own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = (f'mount -t tmpfs -o size=8m none {disk} && ln -s {data_folder} {disk}/data && "$@"; code=$?; cp -r {disk} '
              f'{disk}-after; exit $code')
    if subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("this user may not make a name space")
    command = ["unshare", "-rm", "sh", "-c", script, "sh", sys.executable, "-c", IN_A_NAMESPACE]
    orders = [order.format(disk=disk) for order in (spoil, mend)[:1 + ends]]
    done = subprocess.run([*command, str(recipe_file), str(disk), str(tmp_path / "logs"), *orders],
                          capture_output=True, text=True, timeout=200, check=False)
    stage = RunFolder(tmp_path / "disk-after").stage("pretrain")
    if not ends:
        assert done.returncode != 0 and "DiskError" in done.stderr and re.search(told, done.stderr), done.stderr
        return
    assert done.returncode == 0, done.stderr
    events = read_jsonl(stage.events)
    unsaved = [row for row in events if row["kind"] == "unsaved"]
    assert 1 <= len(unsaved) <= MOST_FAILED_SAVES and all(re.search(told, row["sentence"]) for row in unsaved), unsaved
    assert [row["step"] for row in read_jsonl(stage.metrics)] == [1, 2, 3, 4, 5, 6, 7, 8], "nothing was lost meanwhile"
    assert "done" in kinds(stage) and checkpoint.find_damage(stage.checkpoints / "step-00000008") is None
    assert read_book(stage.actual).tokens == read_jsonl(stage.metrics)[-1]["tokens"]


@pytest.mark.parametrize("rounds", [3, pytest.param(12, marks=pytest.mark.slow), pytest.param(60, marks=pytest.mark.drill)])
def test_kills_while_saving_leave_no_unreadable_checkpoint(train: Train, tmp_path: Path, data_folder: Path, rounds: int) -> None:
    """Of one rank or both, at random moments of a save; the run goes on from what is there to the bits of a calm one."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    chance = random.Random(seed)
    calm, run = tmp_path / "calm", tmp_path / "run"
    for each in (calm, run):
        each.mkdir()
        (each / "data").symlink_to(data_folder)
    last = 5 * rounds + 5  # more than what can be saved before the kills
    steps = [*OFTEN, f"stage.pretrain.steps={last}", f"stage.pretrain.evaluate_every={last}"]
    train(calm, *steps)
    stage = RunFolder(run).stage("pretrain")
    for _ in range(rounds):
        with pytest.raises(RankError, match="killed by signal 9"):
            train(run, *steps, target="saver_ranks:train_and_die_saving", save=chance.randrange(1, 3),
                  moment=chance.uniform(0, 0.25), who=chance.choice([[0], [1], [0, 1]]))
        found = checkpoint.list_checkpoints(stage.checkpoints)
        assert [checkpoint.find_damage(path) for path in found] == [None] * len(found)
    assert train(run, *steps)["step"] == last and "damaged" not in kinds(stage)
    weights = [load_file(RunFolder(each).stage("pretrain").model / "model.safetensors") for each in (calm, run)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert read_json(stage.owner)["attempt"] == kinds(stage).count("start") - 1
