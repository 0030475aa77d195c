"""Starts ranks: from a fork server that has torch imported already, or as the rank that somebody else's launcher made.

Ranks get torchrun's environment names (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), so the same code runs
under torchrun, srun and mpirun. Importing torch with its distributed modules takes seconds; from the fork server a set
of ranks starts in a fraction of one. A rank dies with the fork server, and the fork server with us: kill -9 leaves nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import math
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

from athanor.foundation.errors import AthanorError, RankError
from athanor.foundation.title import set_title

PRELOAD = ["torch", "torch.distributed", "torch.distributed.fsdp", "torch.distributed.tensor",
           "torch.distributed.tensor.parallel", "torch.optim", "torch._dynamo", "torch.profiler", "safetensors.torch", "numpy",
           "athanor.foundation.launch"]

GRACE_SECONDS = 0.5  # how long after a failure we listen for other ranks
SERVER_LOST = 255  # what multiprocessing says of a process whose fork server has died
SERVER_SECONDS = 300.0  # that it may keep us waiting: imports from a slow shared disk
PATROL_SECONDS = 0.25
SEARCH_SECONDS = 5.0  # the same while all that is known are broken connections, which another rank has caused


@dataclass(frozen=True)
class Node:
    """This machine's part of ranks that several machines have: `count` of them from rank `first`; rank 0 is met at `address`,
    `port`. `devices` are the numbers of theirs (LOCAL_RANK; the first ones when left out), `processes` the ranks once started."""

    first: int
    count: int
    address: str
    port: int
    devices: Sequence[int] = ()
    processes: list[Any] = field(default_factory=list)


def launched_from_outside() -> bool:
    """Whether torchrun, srun or mpirun already made this process a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def start_server(*modules: str) -> None:
    """Begin importing torch (and `modules`) in the fork server, so that the first ranks find it ready; returns at once.

    It ignores SIGTERM, SIGHUP and Ctrl-C, which go to whole process groups: ranks must outlive them to save; it ends with us.
    Ranks ignore SIGTERM too, until they can do something about it.
    """
    PRELOAD.extend(module for module in modules if module not in PRELOAD)
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    is_main = threading.current_thread() is threading.main_thread()  # no other may say what signals do
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if is_main else ()
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        forkserver.ensure_running()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run_ranks(target: str, arguments: dict[str, Any], world_size: int, *, log_folder: Path,
              on_message: Callable[[dict[str, Any]], None] | None = None, threads: int | None = None,
              timeout: float | None = None, patrol: Callable[[], None] = lambda: None, node: Node | None = None) -> list[Any]:
    """Run `package.module:function(channel, **arguments)` on every rank and return their results, by rank; with `node`, on
    this machine's part of the ranks.

    `channel(**message)` sends a dictionary to `on_message` here. Standard output and error of a rank go to
    `log_folder/rank-N.log`. `threads` per rank defaults to an equal part of this machine's cores. `patrol` is called a few
    times a second; what it raises ends the ranks.
    When a rank fails, the others are killed and RankError names it; an AthanorError raised in a rank is raised here as it is.
    """
    start_server()
    context = multiprocessing.get_context("forkserver")
    log_folder.mkdir(parents=True, exist_ok=True)
    node = node or Node(0, world_size, "127.0.0.1", free_port())
    threads = threads or max(1, len(os.sched_getaffinity(0)) // node.count)
    processes, pipes = node.processes, []
    try:
        for rank, device in enumerate(node.devices or range(node.count), node.first):
            ours, theirs = context.Pipe(duplex=False)
            environment = {"RANK": str(rank), "LOCAL_RANK": str(device), "WORLD_SIZE": str(world_size),
                           "LOCAL_WORLD_SIZE": str(node.count), "MASTER_ADDR": node.address, "MASTER_PORT": str(node.port)}
            log = log_folder / f"rank-{rank}.log"
            process = context.Process(target=_rank_main, args=(target, arguments, environment, str(log), threads, theirs),
                                      name=f"rank-{rank}", daemon=False)
            try:
                with _waiting_for_server():
                    process.start()
            except (EOFError, OSError) as error:
                raise RankError(rank, f"did not start rank {rank} ({error})", str(log), who="the fork server") from error
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        return _collect(node, pipes, log_folder, on_message or (lambda message: None), timeout, patrol)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
        with _waiting_for_server():
            for process in processes:
                process.join()


@contextlib.contextmanager
def _waiting_for_server() -> Iterator[None]:
    """The fork server is waited for within: should it be stopped it is woken, and killed when it is silent for too long."""
    is_over, until, server = threading.Event(), time.monotonic() + SERVER_SECONDS, cast("Any", forkserver)._forkserver

    def wake() -> None:
        while not is_over.wait(1.0):
            with server._lock:  # else the number might be another process's by now
                if server._forkserver_pid is not None:
                    os.kill(server._forkserver_pid, signal.SIGCONT if time.monotonic() < until else signal.SIGKILL)

    threading.Thread(target=wake, daemon=True).start()
    try:
        yield
    finally:
        is_over.set()


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _collect(node: Node, pipes: list[Any], log_folder: Path,
             on_message: Callable[[dict[str, Any]], None], timeout: float | None, patrol: Callable[[], None]) -> list[Any]:
    """Read every rank's pipe until all have returned a result; after a failure, wait a moment for the one that caused it."""
    results: dict[int, Any] = {}
    failures: dict[int, AthanorError] = {}  # in the order in which we learned of them
    ranks = {pipe: rank for rank, pipe in enumerate(pipes, node.first)}
    deadline = time.monotonic() + timeout if timeout else math.inf
    while ranks:
        ready = cast("list[Any]", wait(list(ranks), timeout=min(PATROL_SECONDS, max(0.0, deadline - time.monotonic()))))
        if not ready and time.monotonic() >= deadline:
            break
        if not failures:
            patrol()
        for pipe in ready:
            rank = ranks[pipe]
            log = str(log_folder / f"rank-{rank}.log")
            try:
                kind, content = pipe.recv()
            except EOFError:
                del ranks[pipe]
                if rank not in results and rank not in failures:
                    failures[rank] = _death(rank, node.processes[rank - node.first], log)
                continue
            if kind == "message":
                on_message(content)
            elif kind == "result":
                results[rank] = content
            elif kind == "refused":
                failures[rank] = content
            else:
                sentence, place, trace = content
                failures[rank] = RankError(rank, f"failed: {sentence}", log, place=place, trace=trace)
        if failures:
            deadline = min(deadline, time.monotonic() + patience(failures))
    if failures:
        raise cause(failures, node.count)
    if ranks:
        raise RankError(min(ranks.values()), f"did not finish within {timeout:.0f} s", str(log_folder))
    return [results[rank] for rank in range(node.first, node.first + node.count)]


def patience(failures: dict[int, AthanorError]) -> float:
    """Seconds to wait for another rank, the one that caused these failures."""
    return SEARCH_SECONDS if all(map(is_consequence, failures.values())) else GRACE_SECONDS


def cause(failures: dict[int, AthanorError], world_size: int) -> AthanorError:
    """The failure to tell: a rank that was killed or refused explains the others' broken connections, not the other way round."""
    causes = [error for error in failures.values() if not is_consequence(error)]
    first = (causes or list(failures.values()))[0]
    if not isinstance(first, RankError) or first.number is None:
        return first
    killed = sorted(rank for rank, error in failures.items() if isinstance(error, RankError) and error.number == first.number)
    if len(killed) == 1:
        return first
    who = f"all {world_size} ranks" if len(killed) == world_size else f"ranks {', '.join(map(str, killed))}"
    return RankError(killed[0], first.reason.replace("was", "were", 1), first.log, number=first.number, who=who)


def is_consequence(error: AthanorError) -> bool:
    """Whether a rank ended only because its connection to another one broke; names of files, in quotes, do not tell."""
    told = re.sub("'[^']*'", "", error.reason) if isinstance(error, RankError) else ""
    return any(word in told for word in ("Connection", "connection", "gloo", "NCCL", "Broken pipe"))


def _death(rank: int, process: Any, log: str) -> RankError:
    with _waiting_for_server():
        process.join(timeout=10)
    code = process.exitcode
    if code is not None and code < 0:
        return RankError(rank, f"was killed by signal {-code} ({signal.Signals(-code).name})", log, number=-code)
    if code == SERVER_LOST:
        return RankError(rank, "ended together with the fork server that starts all ranks", log)
    return RankError(rank, f"ended with exit code {code} before it returned a result", log)


def _rank_main(target: str, arguments: dict[str, Any], environment: dict[str, str], log: str, threads: int,
               pipe: Connection) -> None:
    _die_with_parent()
    os.environ.update(environment)
    folder = Path(log).parent.parent  # runs/<run>/<stage>
    set_title(f"athanor rank {environment['RANK']} of {environment['WORLD_SIZE']} in {folder}",
              f"rank-{environment['RANK']}:{folder.parent.name}")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError:  # a full disk is told by who must write there
        descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    pin_threads(threads, int(environment["LOCAL_RANK"]))
    try:
        result = resolve(target)(lambda **message: pipe.send(("message", message)), **arguments)
        pipe.send(("result", result))
    except BaseException as error:
        with contextlib.suppress(OSError):  # the log's disk may be full
            traceback.print_exc()
        while not isinstance(error, AthanorError) and error.__cause__ is not None:  # what torch's pipeline wraps, for one
            error = error.__cause__
        is_ours = isinstance(error, AthanorError)
        with contextlib.suppress(OSError):
            pipe.send(("refused", error) if is_ours else ("failed", _told(error)))
        sys.exit(1)


def _told(error: BaseException) -> tuple[str, str, str]:
    """An exception as others need it: a sentence, its type and where it was raised, its traceback."""
    name = type(error).__name__
    last = traceback.extract_tb(error.__traceback__)[-1:]
    place = f"{name} at {last[0].filename}:{last[0].lineno}" if last else name
    return f"{name}: {error}", place, "".join(traceback.format_exception(error))


def resolve(target: str) -> Callable[..., Any]:
    """The function that `package.module:function` names."""
    module, _, name = target.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def pin_threads(threads: int, local_rank: int) -> None:
    """Give this rank its own cores and tell torch to use that many threads."""
    cores = sorted(os.sched_getaffinity(0))
    mine = cores[local_rank * threads:(local_rank + 1) * threads]
    if len(mine) == threads:
        os.sched_setaffinity(0, mine)
    import torch

    torch.set_num_threads(threads)


def _die_with_parent() -> None:
    """Die with the fork server (Linux: prctl PR_SET_PDEATHSIG), and let the fork server notice our parent's death.

    The server ends when the last copy of a pipe's writing end is closed; every child gets one, so that it could start
    children of its own. A rank starts none, and closes it.
    """
    server: Any = forkserver._forkserver
    if server._forkserver_alive_fd is not None:
        os.close(server._forkserver_alive_fd)
        server._forkserver_alive_fd = None
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)
        if os.getppid() == 1:
            os._exit(1)
