"""The benchmark of a card runs from end to end where there is none, at toy sizes, and refuses to measure without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("matmul", "attention", "block", "train", "peers")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "benchmarks/gpu.py", *arguments], cwd=ROOT, env=environment, capture_output=True,
                          text=True, timeout=280, check=False)


def test_without_a_card_it_says_so(tmp_path: Path) -> None:
    found = run("matmul", "--out", str(tmp_path / "out"))
    assert found.returncode == 2 and found.stdout == "" and not (tmp_path / "out").exists()
    assert found.stderr.count("\n") == 1 and "needs a CUDA device" in found.stderr


@pytest.mark.slow
def test_every_part_runs_at_toy_sizes(tmp_path: Path) -> None:
    found = run(*PARTS, "--out", str(tmp_path), "--dry")
    assert found.returncode == 0, found.stdout + found.stderr
    results = {part: json.loads((tmp_path / f"{part}.json").read_text()) for part in PARTS}
    assert all(result["versions"]["dry"] and result["problems"] == [] for result in results.values())
    assert {(row["product"], row["kind"]) for row in results["matmul"]["products"]} >= {
        ("qkv", "forward bf16"), ("down", "wgrad fp8 fast"), ("head", "dgrad bf16")}
    assert {row["backend"] for row in results["attention"]["attention"]} == {"flash", "ours"}
    assert all(row["least_cosine"] > 0.98 for row in results["block"]["gradients"])
    assert {row["peer"] for row in results["peers"]["peers"]} == {"athanor", "transformers"}
    for row in results["train"]["train"]:
        if "refused" not in row:
            assert row["mfu_full"] > row["mfu_causal"] > 0 and row["share_of_sustained"] > 0
            assert row["losses"][-1] < row["losses"][0]
    assert sum("refused" not in row for row in results["train"]["train"]) >= 4
