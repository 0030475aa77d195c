"""Every benchmark runs at toy size; and what they say of pairs of times is right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"


def run(script: str, *arguments: str) -> Any:
    """The JSON document that a benchmark prints last."""
    done = subprocess.run([sys.executable, str(FOLDER / script), "--quick", *arguments], capture_output=True, text=True,
                          check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_the_ratio_of_pairs_and_its_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    import pairs

    assert pairs.ratio([2.0] * 9, [1.0] * 9) == (2.0, 2.0, 2.0)
    median, low, high = pairs.ratio([1.0, 1.1, 1.2, 1.3, 9.0], [1.0] * 5)
    assert median == 1.2 and low == 1.0 and high == 9.0  # of five pairs nothing is certain
    median, low, high = pairs.ratio([1.0 + 0.01 * i for i in range(99)], [1.0] * 99)
    assert 1.35 < low < median < high < 1.63
    order: list[str] = []
    turns = pairs.take_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b", "b", "a", "a", "b"] and [len(mine) for mine in turns.values()] == [2, 2]


def test_dispatch_runs() -> None:
    blocks = run("dispatch.py", "--json")["blocks"]
    assert set(blocks) == {"plain torch", "athanor, one rank", "athanor, tensor parallel", "DTensor"}
    assert all(row["cpu_milliseconds"] > 0 for row in blocks.values())
    assert blocks["DTensor"]["cpu_milliseconds"] > blocks["athanor, tensor parallel"]["cpu_milliseconds"]


@pytest.mark.slow
def test_peers_learn_the_same() -> None:
    found = run("peers.py", "--json")
    equal, packed, whole = found["cases"]
    assert set(equal["contestants"]) == {"athanor", "plain torch", "Trainer"}
    assert set(packed["contestants"]) == {"athanor", "Trainer"}
    assert 0 < equal["contestants"]["athanor"]["share_of_matmul_rate"] < 1 and whole["tokens_per_second"] > 0


@pytest.mark.slow
def test_sharding_runs() -> None:
    (found,) = run("sharding.py", "--json")
    one, two = found["layouts"].values()
    assert one["accounts"]["data_parallel"] == 0 and two["accounts"]["data_parallel"] > 0


@pytest.mark.slow
def test_model_speed_runs() -> None:
    speeds = run("model_speed.py")["tokens_per_second"]
    assert set(speeds) == {"float32", "bfloat16"} and all(value > 0 for value in speeds["float32"].values())


@pytest.mark.slow
def test_metering_runs() -> None:
    found = run("metering.py", "--json")
    assert [(each["contest"].split()[0], each["ranks"]) for each in found] == [
        (kind, ranks) for kind in ("metered", "watched", "both") for ranks in (1, 2)]
    assert all(each["pairs"] == 2 and each["ratio"][1] <= each["ratio"][0] <= each["ratio"][2] for each in found)


@pytest.mark.slow
def test_saving_runs() -> None:
    for found in run("saving.py", "--json"):
        assert found["size_bytes"] > 1e5 and found["blocked_seconds"]["async"] > 0 and found["blocked_share"][0] > 0


@pytest.mark.slow
def test_restart_runs() -> None:
    for found in run("restart.py", "--json"):
        assert found["detect"] < 5 and 0 < found["after_detection"] < 30
