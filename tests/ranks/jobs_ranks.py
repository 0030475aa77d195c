"""What the ranks of the agent's tests do: train, where somebody can find them, and fail when told to."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def train_in_sight(channel: Callable[..., None], pids: str, pause: float, hold: int, **arguments: Any) -> dict[str, Any]:
    """Train, with this rank's process number in a file of the folder `pids`, and a pause in every step.

    When `hold` steps are done it waits for a file `hurry` in the folder, so that what is to happen before does, however late
    the machine lets it; there is no pause any more then.
    """
    from athanor.foundation.run_folder import write_atomic
    from athanor.train import loop

    write_atomic(Path(pids, os.environ["RANK"]), str(os.getpid()))
    _before_step(loop, _rest(arguments, Path(pids, "hurry"), pause, hold))
    return loop.train_stage(channel, **arguments)


def train_and_fail(channel: Callable[..., None], marks: str, times: int, step: int, rank: int, kind: str,
                   **arguments: Any) -> dict[str, Any]:
    """Train; in the step after `step` this rank fails, the first `times` times: by an exception, or as `kind` says."""
    import torch.distributed as dist

    from athanor.foundation.errors import DiskError
    from athanor.train import loop
    from athanor.train import step as step_module

    done = 0

    def fail() -> None:
        nonlocal done
        is_here = int(os.environ["RANK"]) == rank and _first_step(arguments) + done == step
        done += 1
        before = len(list(Path(marks).iterdir()))
        if is_here and before < times:
            _until_recorded(arguments, step)
            Path(marks, str(before)).touch()
            if kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            if kind == "asleep":
                time.sleep(600)
            if kind == "asleep inside":
                step_module.to_device = lambda *_: time.sleep(600)  # type: ignore[assignment]
                return
            if kind == "wrong collective":
                dist.barrier()
            if kind == "cut":
                _cut_connections()
                return
            if kind.startswith("clock"):
                time.time = lambda then=time.time: then() - 3600.0  # type: ignore[assignment, misc]
                left = iter(range(2))
                if kind == "clock, killed":  # some steps later
                    _before_step(loop, lambda: None if next(left, None) is not None else os.kill(os.getpid(), signal.SIGKILL))
                return
            if kind == "full disk":
                raise DiskError("rank 1 could not save: the disk is full")
            raise ZeroDivisionError(f"the {before + 1}th of its kind, at {id(object()):x}")

    _before_step(loop, fail)
    return loop.train_stage(channel, **arguments)


def train_and_fail_again(channel: Callable[..., None], marks: str, step: int, **arguments: Any) -> dict[str, Any]:
    """Train; rank 1 is killed in the step after `step`, then rank 0 before it loads, rank 1 when it has loaded, and rank 0
    when its book is written."""
    from athanor.train import checkpoint, loop

    load, summarise, rank, done = checkpoint.load, loop.summarise, int(os.environ["RANK"]), 0
    lives = len(list(Path(marks).iterdir()))

    def die(life: int) -> None:
        if life == lives:
            Path(marks, str(life)).touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def loading(*given: Any) -> Any:
        if rank == 0:
            die(1)
        meta = load(*given)
        if rank == 1:
            die(2)
        return meta

    def work() -> None:
        nonlocal done
        done += 1
        if rank == 1 and done == step + 1:
            _until_recorded(arguments, step)
            die(0)

    def summarising(*given: Any) -> Any:
        if rank == 0:
            die(3)
        return summarise(*given)

    checkpoint.load, loop.summarise = loading, summarising
    _before_step(loop, work)
    return loop.train_stage(channel, **arguments)


def train_and_kill_the_agent(channel: Callable[..., None], marks: str, pause: float, **arguments: Any) -> dict[str, Any]:
    """Train; in its first life it is killed with its agent `pause` seconds after it began to load, in its second as long after
    it began the second step. When goes into a file of `marks`."""
    from athanor.train import checkpoint, loop

    claim, done, life = checkpoint.claim, 0, len(list(Path(marks).glob("killed-*")))
    server = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()

    def die() -> None:
        time.sleep(pause)
        Path(marks, f"killed-{life}").write_text(str(time.time()))
        os.kill(int(server[1]), signal.SIGKILL)
        time.sleep(60)

    def claiming(*given: Any) -> str:
        if life == 0:
            die()
        return claim(*given)

    def work() -> None:
        nonlocal done
        done += 1
        if (life, done, os.environ["RANK"]) == (1, 2, "0"):
            die()

    checkpoint.claim = claiming
    _before_step(loop, work)
    return loop.train_stage(channel, **arguments)


def train_on_a_failing_device(channel: Callable[..., None], marks: str, device: int, step: int, pause: float, hold: int,
                              **arguments: Any) -> dict[str, Any]:
    """Train; the rank on this device is killed in the step after `step`, and from then on before each first step.

    That ends when the folder `marks` has a file `mended`. Until it has a file `hurry` each step takes `pause` seconds longer,
    and not more than `hold` are done.
    """
    from athanor.train import loop

    failed, is_mended = Path(marks, "failed"), Path(marks, "mended").exists()
    is_here, done = int(os.environ["LOCAL_RANK"]) == device and not is_mended, 0
    rest = _rest(arguments, Path(marks, "hurry"), pause, hold)
    if is_here and failed.exists():
        os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        nonlocal done
        if is_here and _first_step(arguments) + done == step:
            _until_recorded(arguments, step)
            failed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1
        rest()

    _before_step(loop, work)
    return loop.train_stage(channel, **arguments)


def _rest(arguments: dict[str, Any], hurry: Path, pause: float, hold: int) -> Callable[[], None]:
    """What to do before each step: pause, and with `hold` steps done wait, until there is a file `hurry`."""
    from athanor.foundation.intervals import interval

    done = 0

    def rest() -> None:
        nonlocal done
        with interval("input"):
            time.sleep(0.0 if hurry.exists() else pause)
            while _first_step(arguments) + done >= hold and not hurry.exists():
                time.sleep(0.01)
        done += 1

    return rest


def _cut_connections() -> None:
    """End every TCP connection of this process, as a dead switch would."""
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not os.readlink(entry).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as one:
                if one.family in (socket.AF_INET, socket.AF_INET6):
                    one.shutdown(socket.SHUT_RDWR)
        except OSError:  # closed since, or only listening
            continue


def _first_step(arguments: dict[str, Any]) -> int:
    from athanor.foundation.run_folder import read_jsonl

    return int(next(row["step"] for row in reversed(read_jsonl(_stage(arguments).events)) if row["kind"] == "start"))


def _until_recorded(arguments: dict[str, Any], step: int) -> None:
    """Wait until rank 0 has written down a step: where it has no processor just then, it may not have when another rank dies."""
    from athanor.foundation.run_folder import read_jsonl

    while max((row["step"] for row in read_jsonl(_stage(arguments).metrics)), default=0) < step:
        time.sleep(0.01)


def _stage(arguments: dict[str, Any]) -> Any:
    from athanor.foundation.run_folder import RunFolder

    return RunFolder(Path(arguments["run_folder"])).stage(arguments["stage"])


def _before_step(loop: Any, work: Callable[[], None]) -> None:
    inner = loop.run_step

    def run_step(*given: Any) -> Any:
        work()
        return inner(*given)

    loop.run_step = run_step
