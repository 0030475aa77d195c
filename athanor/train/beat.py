"""Signs of life of a rank, outside of its collectives: a thread writes them down, and tells when asked where the rank stands.

In the stage's `logs/beats` each rank keeps `rank-N.json`, one line that is written over in place:
    {"pid", "host", "step", "phase", "ticks", "beats", "step_seconds", "launched", "time"}
`phase` is the outermost interval that is open ("startup" until the first step of this life is done, "done" at the end), `ticks`
counts what is done within a phase, `beats` grows as long as the process runs, `step_seconds` is the median of recent steps; times
are in seconds since 1970.
When there is a file `ask` with a word that it has not answered, the thread writes `dump-N.json`:
    {"word", "pid", "host", "file", "line", "is_waiting",
     "groups": {name: {"kind", "ranks", "entered": [[number, operation, is over]]}}}
the line of the main thread's code (torch and the standard library are skipped), whether it waits inside torch.distributed, and
the last collectives of each process group, which torch's flight recorder keeps on gloo and NCCL alike.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import statistics
import sys
import sysconfig
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from athanor.foundation.intervals import Recorder
from athanor.foundation.run_folder import disk_errors

BEATS_PER_SECOND = 2.0  # of a rank; of all ranks together at most:
MOST_BEATS_PER_SECOND = 512.0  # for they may share one file system
RECORD_BYTES = 512
RECORDED = "1000"  # collectives that the flight recorder keeps
TOLD = 48  # of them, for each group
STEPS = 32  # over which the median is taken
TORCH, LIBRARY = str(Path(torch.__file__).parent), sysconfig.get_paths()["stdlib"]


class Beat:
    """The signs of life of this process, launched then by the monotonic clock, or a DiskError; `step` says how many are done."""

    def __init__(self, folder: Path, step: Callable[[], int], launched: float | None = None) -> None:
        self.launched = time.time() - (0.0 if launched is None else time.perf_counter() - launched)
        self.step, self.thread_id = step, threading.get_ident()
        self.rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.folder, self.host = folder, socket.gethostname()
        self.dump, self.file = (folder / f"{name}-{self.rank}.json" for name in ("dump", "rank"))
        self.pause = max(1.0 / BEATS_PER_SECOND, world_size / MOST_BEATS_PER_SECOND)
        self.recorder: Recorder | None = None
        self.first_step, self.ticks, self.beats, self.answered = -1, 0, 0, ""
        self.paces: deque[float] = deque(maxlen=STEPS)
        self.changed = (0.0, -1)  # when the number of steps was seen to change, and to what
        self.is_over, self.thread = threading.Event(), threading.Thread(target=self.live, name="beat", daemon=True)
        with disk_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            self.write()
        self.thread.start()

    def live(self) -> None:
        while not self.is_over.wait(self.pause):
            with contextlib.suppress(OSError):  # the loop meets a failing disk by itself, and can tell it
                self.write()
                self.answer()

    def write(self) -> None:
        """Write the line anew, in place, so that a full disk does not look like a hang; an open file would keep it mounted."""
        self.beats += 1
        for folder in (self.folder.parent, self.folder):  # cleared away, perhaps; if the whole stage is gone, so are we
            folder.mkdir(exist_ok=True)
        self.file.touch()
        line = {"pid": os.getpid(), "host": self.host, "step": self.count(), "phase": self.phase(), "ticks": self.ticks,
                "beats": self.beats, "step_seconds": statistics.median(self.paces) if self.paces else None,
                "launched": self.launched, "time": time.time()}
        with self.file.open("r+b", buffering=0) as file:
            file.write(json.dumps(line).encode().ljust(RECORD_BYTES - 1) + b"\n")

    def count(self) -> int:
        """Steps done; what they took is remembered when there are more than before."""
        now, step = time.monotonic(), self.step()
        since, before = self.changed
        if step != before:
            if before > self.first_step >= 0:
                self.paces.append((now - since) / abs(step - before))
            self.changed = now, step
        return step

    def phase(self) -> str:
        if self.is_over.is_set():
            return "done"
        if self.recorder is None or self.step() == self.first_step:
            return "startup"
        return (self.recorder.names[:1] or ["loop"])[0]

    def answer(self) -> None:
        """Tell where this rank stands, if that is asked and was not told yet."""
        asked = self.folder / "ask"
        if not asked.exists() or (word := asked.read_text()) == self.answered:
            return
        self.dump.write_text(json.dumps({"word": word, "pid": os.getpid(), "host": self.host, **standing(self.thread_id),
                                         "groups": collectives()}))
        self.answered = word

    def end(self) -> None:
        self.is_over.set()
        self.thread.join()
        with contextlib.suppress(OSError):
            self.write()


_active: Beat | None = None


def start(folder: Path, step: Callable[[], int], launched: float | None = None) -> None:
    """Begin to give signs of life, as `Beat` says. Called by the thread that trains, before it joins a process group."""
    global _active
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", RECORDED)
    _active = Beat(folder, step, launched)


def follow(recorder: Recorder) -> None:
    """Steps begin: the next one is the first of this life, and `recorder` knows in which phase it is."""
    if _active is not None:
        _active.first_step, _active.recorder = _active.step(), recorder


def tick() -> None:
    """Something was done within a phase that may take long."""
    if _active is not None:
        _active.ticks += 1


def stop() -> None:
    """This rank is done; nobody should wait for its signs any more."""
    global _active
    if _active is not None:
        _active.end()
        _active = None


def standing(thread_id: int) -> dict[str, Any]:
    """Where a thread's Python code stands: "file" and "line" (of our or the user's code), and "is_waiting"."""
    frame: FrameType | None = sys._current_frames().get(thread_id)
    is_waiting = frame is not None and (frame.f_code.co_filename.startswith(f"{TORCH}/distributed/")
                                        or frame.f_code.co_name == "wait")  # of work under way, as fully_shard has it
    while frame is not None and _is_foreign(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return {"file": None, "line": None, "is_waiting": is_waiting}
    return {"file": frame.f_code.co_filename, "line": frame.f_lineno, "is_waiting": is_waiting}


def _is_foreign(file: str) -> bool:
    is_library = file.startswith(LIBRARY) and not re.search("(site|dist)-packages", file)
    return file.startswith((TORCH, "<")) or is_library


def collectives() -> dict[str, Any]:
    """The last collectives of each process group, oldest first, by the group's name; nothing when torch recorded none."""
    read = getattr(torch._C._distributed_c10d, "_dump_fr_trace_json", None) if dist.is_available() else None
    if read is None or not dist.is_initialized():
        return {}
    world: Any = dist.distributed_c10d._world
    members = {name: sorted(world.pg_group_ranks[group]) for group, name in world.pg_names.items()}  # those of this rank
    found: dict[str, Any] = {}
    for entry in json.loads(read(True, False)).get("entries", []):
        name, kind = entry["process_group"]
        if name not in members or entry["is_p2p"]:
            continue
        group = found.setdefault(name, {"kind": kind, "ranks": members[name], "entered": deque(maxlen=TOLD)})
        operation = entry["profiling_name"].partition(":")[2] or entry["profiling_name"]
        group["entered"].append([entry["collective_seq_id"], operation, entry["retired"] or entry["state"] == "completed"])
    return {name: {**group, "entered": list(group["entered"])} for name, group in found.items()}
