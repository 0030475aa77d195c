"""The record of a run's steps: what each read and wrote, by hash, so that what is unchanged is skipped.

`chain.jsonl` has a line when an invocation begins and ends and when a step starts and is done. A step is skipped when its
last done line has the same inputs and its outputs still have the hashes written there; after a kill, the next invocation
therefore goes on with the step that was cut off. A verb by itself (`athanor data build`) leaves a line `alone`.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from athanor.cli.preflight import devices_of
from athanor.foundation.errors import UserError
from athanor.foundation.progress import say
from athanor.foundation.recipe import Recipe
from athanor.foundation.run_folder import (
    RunFolder,
    append_jsonl,
    append_when_possible,
    discard,
    disk_errors,
    hash_file,
    hash_folder,
    read_jsonl,
    sweep,
)
from athanor.foundation.units import format_seconds


class Chain:
    """The steps of one invocation in a run folder; use it inside `with locked(run)`."""

    def __init__(self, run: RunFolder, devices: int, started: float) -> None:
        self.run, self.devices, self.started = run, devices, started
        lines = read_jsonl(run.chain)
        self.lines = [line for line in lines if line["event"] != "alone"]
        self._verbs = [line for line in lines if line["event"] == "alone"]
        self.begun = False

    @property
    def alone(self) -> list[dict[str, Any]]:
        """What verbs did by themselves outside of invocations, within which the devices are paid for already."""
        spans = self.spans()
        return [line for line in self._verbs if not any(begin <= line["time"] <= end for begin, end, _ in spans)]

    def step(self, name: str, inputs: dict[str, str], outputs: Sequence[Path], work: Callable[[], dict[str, Any] | None]) -> bool:
        """Do `work` unless it was done with these inputs and its outputs are still what it wrote. Returns whether it ran.

        `work` returns details for the record, or None.
        """
        last = self.last(name)
        if last is not None and last["inputs"] == inputs and self.is_untouched(name, outputs):
            say(f"{name}: unchanged")
            return False
        if not self.begun:
            self._write({"event": "begin", "time": self.started, "devices": self.devices})
            self.begun = True
        self._write({"event": "start", "step": name, "time": time.time(), "inputs": inputs})
        say(f"{name} …")
        start = time.perf_counter()
        details = work() or {}
        seconds = time.perf_counter() - start
        self._write({"event": "done", "step": name, "time": time.time(), "seconds": seconds, "devices": self.devices,
                     "inputs": inputs, "outputs": self._hashes(outputs), "details": details})
        say(f"{name}: {format_seconds(seconds)}")
        return True

    def is_untouched(self, name: str, outputs: Sequence[Path]) -> bool:
        """Whether the outputs of a step are what it wrote when it was last done, if it ever was."""
        last = self.last(name)
        return last is None or last["outputs"] == self._hashes(outputs)

    def last(self, name: str) -> dict[str, Any] | None:
        """The newest done line of a step."""
        return next((line for line in reversed(self.lines) if line["event"] == "done" and line["step"] == name), None)

    def last_inputs(self, name: str) -> dict[str, str] | None:
        """The inputs of the last attempt at a step, finished or not; None when this chain never began it."""
        return next((line["inputs"] for line in reversed(self.lines) if line["event"] == "start" and line["step"] == name), None)

    def end(self) -> None:
        """Note that this invocation did everything, if it did anything."""
        if self.begun:
            self._write({"event": "end", "time": time.time()})

    def wall_seconds(self) -> float:
        """Time of all invocations so far, and of what verbs did outside of them."""
        return (sum(line["wall_seconds"] for line in self._trained_outside()) + sum(line["seconds"] for line in self.alone)
                + sum(end - begin for begin, end, _ in self.spans()))

    def device_seconds(self) -> float:
        """What was paid for in that time: invocations and training may have had different numbers of devices."""
        return (sum(line["device_seconds"] for line in self._trained_outside())
                + sum(line["seconds"] * line["devices"] for line in self.alone)
                + sum((end - begin) * devices for begin, end, devices in self.spans()))

    def _trained_outside(self) -> list[dict[str, Any]]:
        spans = self.spans()
        return [line for file in self.run.root.glob("*/ledger.jsonl") for line in read_jsonl(file)
                if "time" in line and not any(begin <= line["time"] <= end for begin, end, _ in spans)]

    def spans(self) -> list[tuple[float, float, int]]:
        """Beginning, end and devices of each invocation; a killed one lasted until the last sign of life in the run folder."""
        found = []
        turns = [(i, line) for i, line in enumerate(self.lines) if line["event"] in ("begin", "train")]
        for (index, line), (last, other) in zip(turns, [*turns[1:], (len(self.lines), {"time": math.inf})], strict=True):
            if line["event"] == "train":
                continue
            until, begin = self.lines[index:last], line["time"]
            end = until[-1]["time"]
            if until[-1]["event"] != "end":
                signs = [row["time"] for file in self.run.root.glob("*/*.jsonl") for row in read_jsonl(file)
                         if "time" in row and begin <= row["time"] < other["time"]]
                end = time.time() if last == len(self.lines) and self.begun else max([end, *signs])
            found.append((begin, end, line["devices"]))
        return found

    def _write(self, line: dict[str, Any]) -> None:
        append_jsonl(self.run.chain, line)
        self.lines.append(line)

    def _hashes(self, outputs: Sequence[Path]) -> dict[str, str | None]:
        return {path.relative_to(self.run.root).as_posix(): hash_output(path) for path in outputs}


def hash_output(path: Path) -> str | None:
    """The hash of a file or folder, None when it is not there."""
    if path.is_dir():
        return hash_folder(path)
    return hash_file(path) if path.exists() else None


def note_training(run: RunFolder) -> None:
    """Training by a verb of its own begins, whose seconds are in its ledger: no sign of life of an invocation that was killed."""
    append_when_possible(run.chain, {"event": "train", "time": time.time()})


@contextlib.contextmanager
def alone(run: RunFolder, step: str, recipe: Recipe) -> Iterator[None]:
    """A step that is done by a verb of its own: what it takes, finished or not, is noted if there is a run folder by then.

    Not if the recipe names another cluster, whose devices are not paid for meanwhile.
    """
    start = time.perf_counter()
    try:
        yield
    finally:
        if run.root.is_dir() and not recipe.cluster.accelerator:
            line = {"event": "alone", "step": step, "time": time.time(), "seconds": time.perf_counter() - start}
            append_when_possible(run.chain, {**line, "devices": devices_of(recipe)})  # a full disk is told by what met it first


@contextlib.contextmanager
def locked(run: RunFolder, spent: Collection[str] = ()) -> Iterator[None]:
    """Hold the run folder for this process; a second one is refused. What a killed process left half built is removed.

    Work that is refused leaves no folder that it made, unless more lies in it than its record and what is `spent`.
    """
    is_new = not run.root.exists()
    with disk_errors(run.root):
        run.root.mkdir(parents=True, exist_ok=True)
        lock = (run.root / ".lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is working in {run.root}; wait for it, or give the run another name") from None
        for folder in (run.root, *(p for p in run.root.iterdir() if p.is_dir())):
            sweep(folder)
        try:
            yield
        except UserError:
            if is_new and {path.name for path in run.root.glob("*")} <= {".lock", run.chain.name, *spent}:
                discard(run.root)
            raise
