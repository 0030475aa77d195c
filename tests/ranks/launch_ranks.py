"""What the ranks of the launcher's tests do."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_up(channel: Callable[..., None], offset: int) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    total = torch.tensor([float(rank)])
    dist.all_reduce(total)
    channel(rank=rank)
    print(f"hello from {rank}", flush=True)
    dist.destroy_process_group()
    return {"rank": rank, "sum": float(total) + offset, "threads": torch.get_num_threads()}


def tell_names(channel: Callable[..., None]) -> dict[str, str]:
    """What `ps` shows of this process, and which device it has."""
    title = Path("/proc/self/cmdline").read_bytes().rstrip(b"\0").decode()
    return {"title": title, "name": Path("/proc/self/comm").read_text().strip(), "device": os.environ["LOCAL_RANK"]}


def wait_with_pid(channel: Callable[..., None], pids: str) -> None:
    Path(pids, f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    time.sleep(60)


def kill_rank_one(channel: Callable[..., None], pids: str) -> None:
    if os.environ["RANK"] == "1":
        while not (Path(pids, "pid-0").exists() and Path(pids, "pid-0").read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    wait_with_pid(channel, pids)


def stop_the_server_and_die(channel: Callable[..., None]) -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getppid(), signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def divide(channel: Callable[..., None]) -> float:
    if os.environ["RANK"] == "0":
        time.sleep(60)
    return 1 / 0


def wrap(channel: Callable[..., None]) -> None:
    """Refuse from within somebody else's code, which wraps it."""
    try:
        refuse(channel)
    except Exception as error:
        raise RuntimeError("a page of arguments") from error


def refuse(channel: Callable[..., None]) -> None:
    from athanor.foundation.errors import RecipeError

    raise RecipeError("not like this")


def hang(channel: Callable[..., None]) -> None:
    time.sleep(60)


def tell_and_wait(channel: Callable[..., None]) -> None:
    if os.environ["RANK"] == "1":
        channel(ready=True)
    time.sleep(60)
