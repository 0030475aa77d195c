"""That the watchdog cries no wolf: clean runs under an agent, whose ranks compare notes every few steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import data_folder, recipe_file, run_folder

from athanor.foundation.launch import start_server
from athanor.foundation.recipe import load_recipe
from athanor.foundation.run_folder import RunFolder, read_jsonl
from athanor.jobs.agent import Agent
from athanor.train.straggler import WINDOWS

__all__ = ["data_folder", "recipe_file", "run_folder"]
pytestmark = pytest.mark.drill
STEPS = 6000  # at most: a run is over when its ranks were compared often enough to be called slow


@pytest.mark.parametrize("run", range(20))
def test_a_clean_run_raises_no_alarm(recipe_file: Path, run_folder: Path, run: int) -> None:
    start_server("athanor.train.loop")
    recipe = load_recipe(recipe_file, ["stage.pretrain.precision=fp32", f"stage.pretrain.steps={STEPS}", "parallel.dp_shard=2",
                                       "stage.pretrain.hang_seconds=10"])
    stage = RunFolder(run_folder).stage("pretrain")
    found = Agent(stage, 2, 1).run("watch_ranks:train_unevenly", {
        "run_folder": str(run_folder), "recipe": recipe, "stage": "pretrain", "slow": None, "seconds": 0.0, "enough": WINDOWS})
    windows = [row["medians"] for row in read_jsonl(run_folder / "windows.jsonl")]
    print(f"{found['step']} steps, ratios", *(f"{second / first:.2f}" for first, second in windows))
    assert not [row["sentence"] for row in read_jsonl(stage.events) if row["kind"] in ("straggler", "fault", "held")]
    assert len(windows) >= WINDOWS
