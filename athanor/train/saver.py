"""Saves checkpoints while training goes on: the loop waits for a copy, and a thread of each rank writes it.

Only the main thread takes part in collectives. A rank's thread leaves a small file beside its shards when it has written them;
rank 0's, when all have, completes the checkpoint, tells of it and removes those that need not stay. The ranks compare notes
before the next checkpoint begins, and at the end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from athanor.foundation.errors import AthanorError, DiskError, UserError
from athanor.foundation.events import log_event
from athanor.foundation.run_folder import StageFolder, disk_errors, read_json, write_json
from athanor.parallel.stages import Stages
from athanor.train import checkpoint
from athanor.train.optimizer import Optimizer

MOST_FAILED_SAVES = 3  # in a row
LOOK_SECONDS = 0.05  # how often rank 0 looks whether the others have written
PAGE_BYTES = 4096
SPARE = 1.02  # of a disk's free bytes that a checkpoint leaves to others


@dataclass
class Pending:
    """A checkpoint under way. `written` is this rank's hash; `completed` is set by rank 0's thread.

    `hashes` of all files come from the main thread when it meets the others first, None with a rank that could not write.
    """

    meta: checkpoint.Meta
    building: Path
    target: Path
    begun: float
    waited_seconds: float = 0.0
    copied: float = 0.0  # when the loop went on, in seconds since 1970
    written: Future[str | None] = field(default_factory=Future)
    completed: Future[None] = field(default_factory=Future)
    hashes: dict[str, str] | None = None
    have_met: threading.Event = field(default_factory=threading.Event)
    thread: int = 0  # that writes; 0 as long as it is the caller's


class Saver:
    """One per rank: `save` begins a checkpoint of a stage, `finish` waits for it. All ranks must call them alike.

    `owner` is what `checkpoint.claim` returned on rank 0; None: nobody else may be saving. With `is_async` off, `save` finishes.
    """

    def __init__(self, folder: StageFolder, stages: Stages, optimizer: Optimizer, *, keep_latest_k: int = 2, keep_every: int = 0,
                 is_async: bool = True, owner: str | None = None) -> None:
        self.folder, self.mesh, self.owner = folder, stages.mesh, owner
        self.keep_latest_k, self.keep_every, self.is_async = keep_latest_k, keep_every, is_async
        self.part = checkpoint.Part(stages, optimizer)
        gathered = self.mesh.collect((self.part.name, self.part.size_bytes, self.part.tensors))
        self.size_bytes = sum(size for _, size, _ in gathered)
        self.names = [name for name, _, _ in gathered]
        self.index = checkpoint.join([tensors for _, _, tensors in gathered]) if self.mesh.rank == 0 else ""
        self.copy = Copy(self.part, self.mesh.device) if is_async and self.part.name else None
        if self.copy is not None:
            optimizer.copied = self.copy.event
        self.pending: Pending | None = None
        self.failed = 0

    def save(self, meta: checkpoint.Meta) -> None:
        """Begin the checkpoint of `meta.step`, after the one before.

        When it cannot be saved, events.jsonl says so and the run goes on. Raises DiskError on all ranks after more than
        MOST_FAILED_SAVES in a row, and UserError when another attempt saves here by now.
        """
        begun = time.perf_counter()
        self.finish()
        target = self.folder.checkpoints / f"step-{meta.step:08d}"
        building = self.folder.checkpoints / f".{target.name}.building-{meta.attempt}"
        problem = self.mesh.share(self._prepare(building) if self.mesh.rank == 0 else None)
        if problem is not None:
            self._failed(f"{target.name} could not be saved: {problem}", meta)
            return
        content = self.part.shards if self.copy is None else self.copy.fill()
        pending = self.pending = Pending(meta, building, target, begun)
        pending.waited_seconds, pending.copied = time.perf_counter() - begun, time.time()
        if self.is_async:
            threading.Thread(target=self._work, args=(pending, content), name="saver", daemon=True).start()
        else:
            _fulfil(pending.written, lambda: self._write(pending, content))
            self.finish()

    def finish(self) -> None:
        """Wait until the checkpoint under way is complete on all ranks, or has failed; raises as `save` does."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        _schedule(pending.thread, as_idle=False)  # it has somebody waiting now
        hash_, problem = _outcome(pending.written)
        outcomes = self.mesh.collect((hash_, problem))
        problem = next((f"rank {rank} could not save: {told}" for rank, (_, told) in enumerate(outcomes) if told), None)
        is_ours = True
        if self.mesh.rank == 0:
            if problem is None:
                pending.hashes = {name: found for name, (found, _) in zip(self.names, outcomes, strict=True) if name}
            pending.have_met.set()
            if not self.is_async:
                _fulfil(pending.completed, lambda: self._complete(pending))
            _, told = _outcome(pending.completed)
            problem = problem or (told and f"rank 0 could not save: {told}")
            is_ours = self._is_ours()
            if problem is not None:
                shutil.rmtree(pending.building, ignore_errors=True)
        problem, is_ours = self.mesh.share((problem, is_ours))
        if not is_ours:
            raise UserError(f"another attempt trains in {self.folder.root} by now, or its {self.folder.owner.name} was "
                            "removed, so this one saves nothing more and ends")
        if problem is None:
            self.failed = 0
        else:
            self._failed(problem, pending.meta)

    def _failed(self, problem: str, meta: checkpoint.Meta) -> None:
        self.failed += 1
        if self.failed > MOST_FAILED_SAVES:
            raise DiskError(problem)
        if self.mesh.rank == 0:
            log_event(self.folder.events, "unsaved", f"{problem}; the run goes on without this checkpoint", attempt=meta.attempt,
                      step=meta.step)

    def _prepare(self, building: Path) -> str | None:
        """Make the folder to build in; why that, or what is to come into it, cannot be. (A full disk would hurt others, too.)"""
        try:
            with _disk(building):
                shutil.rmtree(building, ignore_errors=True)
                building.mkdir(parents=True)
                free = shutil.disk_usage(building).free
        except (DiskError, UserError) as error:
            return str(error)
        if free < SPARE * self.size_bytes:
            building.rmdir()
            return f"it takes {self.size_bytes / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free"
        return None

    def _work(self, pending: Pending, content: Iterable[torch.Tensor]) -> None:
        """What a rank's thread does."""
        pending.thread = threading.get_native_id()
        _schedule(0, as_idle=True)
        _fulfil(pending.written, lambda: self._write(pending, content))
        if self.mesh.rank == 0:
            _fulfil(pending.completed, lambda: self._complete(pending))

    def _write(self, pending: Pending, content: Iterable[torch.Tensor]) -> str | None:
        """Write this rank's part, if it has one, and say so to rank 0. Returns its hash."""
        if self.part.name is None:
            return None
        if self.copy is not None:
            self.copy.wait()
        with _disk(pending.building):
            found = self.part.write(pending.building, content)
            write_json(_note(pending, self.part.name), found)
        return found

    def _complete(self, pending: Pending) -> None:
        """On rank 0, when all have written: make it a checkpoint, unless somebody else saves here now."""
        hashes = self._gather(pending)
        if hashes is None:
            return  # a rank could not write, which it says itself
        with _disk(pending.building):
            for name in hashes:
                _note(pending, name).unlink()
            found = checkpoint.list_checkpoints(self.folder.checkpoints)
            checkpoint.complete(pending.building, self.index, pending.meta, hashes)
            if not self._is_ours():
                raise UserError("another attempt saves here by now")
            checkpoint.place(pending.building, pending.target)
        if not pending.meta.guards.get("skipped_steps"):  # else it may be one of the older that is gone back to
            checkpoint.prune(found, pending.target, self.keep_latest_k, self.keep_every)
        seconds = time.perf_counter() - pending.begun
        waited, until = (pending.waited_seconds, pending.copied) if self.is_async else (seconds, time.time())
        told = f"checkpoint {pending.target.name} is complete, the loop waited {waited:.2f} of {seconds:.2f} s"
        log_event(self.folder.events, "checkpoint", told, attempt=pending.meta.attempt, step=pending.meta.step, seconds=waited,
                  until=until, total_seconds=seconds, size_bytes=self.size_bytes)

    def _gather(self, pending: Pending) -> dict[str, str] | None:
        """The hashes of all files: from what ranks leave beside them, or from the main thread; None when one could not write."""
        missing, found = [name for name in self.names if name], {}
        while not pending.have_met.wait(LOOK_SECONDS):
            while missing and _note(pending, missing[-1]).exists():
                name = missing.pop()
                found[name] = read_json(_note(pending, name))
            if not missing:
                return found
        return pending.hashes

    def _is_ours(self) -> bool:
        if self.owner is None:
            return True
        try:
            return bool(self.folder.owner.read_text(encoding="utf-8") == self.owner)
        except OSError:
            return False


class Copy:
    """Host memory for what a rank saves, laid out as in its file and kept from one checkpoint to the next.

    On a GPU it is pinned, and filled by a stream of its own while the next step computes; only its update has to wait.
    """

    def __init__(self, part: checkpoint.Part, device: torch.device) -> None:
        self.bytes, self.device, self.shards = torch.empty(part.size_bytes, dtype=torch.uint8), device, part.shards
        self.views, begin = [], 0
        for shard in part.shards:
            self.views.append(self.bytes[begin:begin + shard.nbytes].view(shard.dtype).view(shard.shape))
            begin += shard.nbytes
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.event = torch.cuda.Event() if device.type == "cuda" else None
        self.prepared: Future[None] = Future()
        threading.Thread(target=_fulfil, args=(self.prepared, self._prepare), name="saver", daemon=True).start()

    def fill(self) -> list[torch.Tensor]:
        """Begin to copy what the shards are now. Returns the content of the file, to be read after `wait`."""
        self.prepared.result()
        with torch.no_grad():
            if self.stream is None or self.event is None:
                torch._foreach_copy_(self.views, self.shards)
            else:
                self.stream.wait_stream(torch.cuda.current_stream(self.device))
                with torch.cuda.stream(self.stream):
                    torch._foreach_copy_(self.views, self.shards, non_blocking=True)
                    self.event.record(self.stream)
        return [self.bytes]

    def wait(self) -> None:
        """Wait until the copy is made."""
        if self.event is not None:
            self.event.synchronize()

    def _prepare(self) -> None:
        """Get the memory from the system, page by page, while the first steps are done instead of in the first save."""
        _schedule(0, as_idle=True)
        self.bytes.numpy()[::PAGE_BYTES] = 0
        if self.device.type == "cuda" and len(self.bytes):
            with torch.cuda.device(self.device):
                torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), len(self.bytes), 0)))
            weakref.finalize(self, torch.cuda.cudart().cudaHostUnregister, self.bytes.data_ptr()).atexit = False


def _fulfil(promise: Future[Any], work: Callable[[], Any]) -> None:
    """Do the work; what comes of it, errors too, is found by who waits for the promise."""
    try:
        promise.set_result(work())
    except BaseException as error:
        promise.set_exception(error)


def _outcome(promise: Future[Any]) -> tuple[Any, str | None]:
    """What was promised, or why it could not be."""
    try:
        return promise.result(), None
    except AthanorError as error:
        return None, str(error)


def _note(pending: Pending, name: str) -> Path:
    """What says that a rank has written its file."""
    return pending.building / f"{name}.written"


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Whatever the system says of files here is a sentence."""
    try:
        with disk_errors(path):
            yield
    except OSError as error:
        raise DiskError(f"cannot write {path}: {os.strerror(error.errno or 0)}") from error


def _schedule(thread: int, *, as_idle: bool) -> None:
    """On Linux: give a thread (0: the caller) only what others leave of the processors, or, where one may, as much as others."""
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setscheduler(thread, os.SCHED_IDLE if as_idle else os.sched_getscheduler(0), os.sched_param(0))
