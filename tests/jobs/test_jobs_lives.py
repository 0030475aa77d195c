"""What an agent makes of a life of the ranks, seen without any: its seconds, a folder begun anew, a wish to stop."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from athanor.foundation.errors import AthanorError, RankError
from athanor.foundation.events import log_event
from athanor.foundation.recipe import load_recipe
from athanor.foundation.run_folder import StageFolder, append_jsonl, read_jsonl
from athanor.jobs import agent as agent_module
from athanor.jobs.agent import Agent, Devices, Held, Stopped
from athanor.ledger.attempts import Attempt

Row = dict[str, Any]


def test_an_attempt_that_never_began_is_startup() -> None:
    def attempt(events: list[Row], ledger: list[Row]) -> dict[str, float]:
        found = Attempt(0, 10.0, 110.0, None, events, ledger).accounts()
        assert sum(found.values()) == 10.0 - sum(line["wall_seconds"] for line in ledger if "devices" in line)
        return found

    assert attempt([], []) == {"startup": 10.0, "checkpoint": 0, "lost": 0.0}
    start = {"kind": "start", "time": 103.0}
    saved = {"kind": "checkpoint", "time": 106.0, "seconds": 1.5}
    assert attempt([start], []) == {"startup": 3.0, "checkpoint": 0, "lost": 7.0}
    line = {"time": 104.0, "wall_seconds": 4.0, "devices": 2}
    assert attempt([start, saved], [line]) == {"startup": 0.0, "checkpoint": 1.5, "lost": 4.5}
    waited = {**saved, "until": 103.5}  # the loop had waited before that line, which has it
    assert attempt([start, waited], [line]) == {"startup": 0.0, "checkpoint": 0, "lost": 6.0}
    thrown_away = {"time": 50.0, "wall_seconds": 60.0, "accounts": {"lost": 120.0}}  # by --fresh, which wrote it anew
    assert attempt([start], [thrown_away, {"resumed_step": 0}]) == {"startup": 3.0, "checkpoint": 0, "lost": 7.0}
    for clock in (-3600.0, 3600.0):  # set while the life lasted
        moved = {**line, "time": 104.0 + clock}
        assert attempt([start], [moved]) == {"startup": 0.0, "checkpoint": 0, "lost": 6.0}
        assert attempt([{**start, "time": 103.0 + clock}], [])["checkpoint"] == 0
    assert isinstance(Held("x"), AthanorError)


class Scripted(Devices):
    """Devices on which each life of the ranks does what the script says and is killed, and the one after the last is done."""

    def __init__(self, *lives: Callable[[], None]) -> None:
        super().__init__(2)
        self.lives, self.given = list(lives), []  # type: ignore[var-annotated]

    def launch(self, target: str, arguments: Row, world_size: int, **choices: Any) -> list[Any]:
        self.given.append(arguments)
        if not self.lives:
            return [{"is_asked_to_stop": False}]
        self.lives.pop(0)()
        raise RankError(1, "was killed by signal 9 (SIGKILL)", number=9)


def test_begun_anew_once_is_enough(tmp_path: Path, recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A life that was killed before it had emptied the folder, one that had, one that had begun, and one that had not even
    that; what stood there before is none of theirs, whatever the clock said."""
    stage = StageFolder(tmp_path)

    def start(when: float, step: int) -> None:
        append_jsonl(stage.events, {"time": when, "kind": "start", "step": step, "attempt": 0})

    def empty() -> None:
        stage.events.unlink()
        log_event(stage.events, "fresh", "begins anew")

    def begin() -> None:
        empty()
        start(time.time() - 3600.0, 0)

    monkeypatch.setattr(agent_module, "FIRST_WAIT_SECONDS", 0.0)
    start(time.time() + 3600.0, 5)
    agent = Agent(stage, 2)
    agent.devices = devices = Scripted(lambda: None, empty, begin, lambda: None)
    agent.run("nothing:at all", {"recipe": load_recipe(recipe_file), "stage": "pretrain", "is_fresh": True})
    assert [given["is_fresh"] for given in devices.given] == [True, True, True, False, False]
    assert [row["attempt"] for row in read_jsonl(stage.events) if row["kind"] == "fault"] == [0, 1] and stage.ledger.exists()


def test_a_wish_to_stop_that_starting_ranks_ignore_is_passed_on_after_a_step(tmp_path: Path, recipe_file: Path) -> None:
    asked: list[int] = []

    def live() -> None:
        for step in (0, 1):
            agent._hear({"step": step})
            if step == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            asked.append(step)

    agent = Agent(StageFolder(tmp_path), 2)
    agent.devices = devices = Scripted(live)
    devices.ask = lambda: asked.append(-1)  # type: ignore[method-assign]
    with pytest.raises(Stopped, match="asked to stop"):
        agent.run("nothing:at all", {"recipe": load_recipe(recipe_file), "stage": "pretrain"})
    assert asked == [-1, 0, -1, 1]
