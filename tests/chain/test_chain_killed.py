"""Killed at random moments, a rerun ends where an undisturbed run ends, bit for bit."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from athanor.cli.chain import hash_output
from athanor.foundation.run_folder import read_jsonl


def last_losses(run: Path) -> dict[str, list[float]]:
    rows = {stage: read_jsonl(run / stage / "metrics.jsonl") for stage in ("pretrain", "chat")}
    by_step = {stage: {row["step"]: row["loss"] for row in found} for stage, found in rows.items()}
    return {stage: [losses[step] for step in sorted(losses)] for stage, losses in by_step.items()}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_kills_change_nothing(athanor: Any, recipe: Path, environment: dict[str, str], tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    chance = random.Random(seed)
    begin = time.monotonic()
    undisturbed = athanor("run", recipe, "name=calm")
    seconds = time.monotonic() - begin
    assert undisturbed.returncode == 0, undisturbed.stderr
    calm, killed = tmp_path / "runs" / "calm", tmp_path / "runs" / "killed"
    arguments = ["run", recipe, "name=killed", f"plan.file={calm / 'plan.toml'}"]
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-m", "athanor", *map(str, arguments)], env=environment, cwd=tmp_path,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(chance.uniform(0.5, 0.9 * seconds))
        process.send_signal(signal.SIGKILL)
        process.wait()
    result = athanor(*arguments)
    assert result.returncode == 0, result.stderr
    assert last_losses(killed) == last_losses(calm)
    for stage in ("pretrain", "chat"):
        assert hash_output(killed / stage / "model") == hash_output(calm / stage / "model"), (seed, stage)
    assert not list(killed.rglob(".*.building-*"))
