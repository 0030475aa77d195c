"""Where things lie in a run, and how a file or folder comes to be there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from athanor.foundation.errors import DiskError, UserError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_waiting: dict[Path, list[dict[str, Any]]] = {}  # rows that could not be written yet
_begun: set[Path] = set()  # files of rows that we have written to
_lock = threading.Lock()


@dataclass(frozen=True)
class RunFolder:
    """`runs/<name>/`: the recipe as it was run, the plan, the books, the data and one folder per stage."""

    root: Path

    recipe = property(lambda self: self.root / "recipe.toml")
    cluster = property(lambda self: self.root / "cluster.toml")
    plan = property(lambda self: self.root / "plan.toml")
    forecast = property(lambda self: self.root / "forecast.json")
    actual = property(lambda self: self.root / "actual.json")
    scores = property(lambda self: self.root / "scores.json")
    report = property(lambda self: self.root / "report.html")
    chain = property(lambda self: self.root / "chain.jsonl")
    feedback = property(lambda self: self.root / "feedback.jsonl")
    data = property(lambda self: self.root / "data")
    logs = property(lambda self: self.root / "logs")

    def stage(self, name: str) -> StageFolder:
        return StageFolder(self.root / name)


@dataclass(frozen=True)
class StageFolder:
    """`runs/<name>/<stage>/`: one training stage."""

    root: Path

    config = property(lambda self: self.root / "config.toml")
    forecast = property(lambda self: self.root / "forecast.json")
    rehearsal = property(lambda self: self.root / "rehearsal.json")
    actual = property(lambda self: self.root / "actual.json")
    metrics = property(lambda self: self.root / "metrics.jsonl")
    events = property(lambda self: self.root / "events.jsonl")
    samples = property(lambda self: self.root / "samples.jsonl")
    ledger = property(lambda self: self.root / "ledger.jsonl")
    logs = property(lambda self: self.root / "logs")
    beats = property(lambda self: self.root / "logs" / "beats")
    earlier_beats = property(lambda self: self.root / "logs" / "earlier-beats")
    checkpoints = property(lambda self: self.root / "checkpoints")
    owner = property(lambda self: self.root / "owner.json")
    model = property(lambda self: self.root / "model")


def runs_root() -> Path:
    """`$ATHANOR_RUNS`, or `runs/` in the current folder."""
    return Path(os.environ.get("ATHANOR_RUNS", "runs"))


def registry_root() -> Path:
    """`$ATHANOR_REGISTRY`, or `registry/` in the current folder."""
    return Path(os.environ.get("ATHANOR_REGISTRY", "registry"))


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk into one sentence about `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise DiskError(f"cannot write {path}: {os.strerror(error.errno or 0)}; free some space and run again") from error
        if isinstance(error, (PermissionError, IsADirectoryError, FileExistsError, NotADirectoryError)):
            raise UserError(f"cannot write {path}: {os.strerror(error.errno or 0).lower()}") from error
        raise


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write beside `path`, flush to the disk, then rename: readers see the old file or the new one, never a part."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file, or say in one sentence which file and line is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Add one line; a line cut short by a kill is skipped by `read_jsonl` and overwritten by nothing.

    Raises UserError when the folder was moved away or removed since our last line: it is not made again.
    """
    if path in _begun and not path.parent.exists():
        raise UserError(f"{path.parent} was moved or removed while it was written to")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _begun.add(path)
        with path.open("a+b") as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                file.write(b"\n")
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def append_when_possible(path: Path, row: dict[str, Any]) -> None:
    """Add one line; while the disk is full or read-only, lines wait in memory and are written before the next one."""
    with _lock:
        rows = [*_waiting.pop(path, []), row]
        for number, each in enumerate(rows):
            try:
                append_jsonl(path, each)
            except DiskError:
                _waiting[path] = rows[number:]
                return


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a JSON-lines file (none when it does not exist)."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def is_held(lock: Path) -> bool:
    """Whether a process holds the lock on a file."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, FileNotFoundError) as error:
        return isinstance(error, BlockingIOError)
    return False


@contextlib.contextmanager
def folder_renamed_last(path: Path) -> Iterator[Path]:
    """Build a folder under a temporary name beside `path` and rename it into place when the block ends well.

    An older folder of that name is replaced; after an error nothing of the new one is left. A link stays: what it points
    to is replaced. Raises UserError when there is a file of that name.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, and a folder is to be written there; move it away or give another path")
    path = path.resolve() if path.is_symlink() else path
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.building-"))
        os.chmod(building, 0o755)
        try:
            yield building
            if path.exists():
                old = building.with_name(building.name + "-old")
                path.rename(old)
                building.rename(path)
                shutil.rmtree(old)
            else:
                building.rename(path)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise


def sweep(folder: Path, name: str = "*") -> None:
    """Remove what a killed process left half built in `folder` (names that only this module makes); of `name` alone, when
    others may be building beside it."""
    for path in folder.glob(f".{name if name == '*' else glob.escape(name)}.building-*"):
        target = folder / path.name[1:].split(".building-")[0]
        if path.name.endswith("-old") and not target.exists():
            path.rename(target)
        else:
            discard(path)


def discard(path: Path) -> None:
    """Remove a folder, or a file: at once under its name, so that nobody finds or moves a part of it."""
    with contextlib.suppress(OSError):
        path = path.rename(path.with_name(f".{path.name.removeprefix('.')}.building-discarded"))
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def sync_folder(path: Path) -> None:
    """Flush the names in a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    """The sha256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_folder(path: Path) -> str:
    """One sha256 over the relative names and contents of all files below `path`."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{hash_file(file)}\n".encode())
    return digest.hexdigest()


def hash_value(value: Any) -> str:
    """The sha256 of a JSON-able value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
