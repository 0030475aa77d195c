"""Which files a source of a recipe consists of, and how much there is; nothing is parsed, nothing heavy is imported."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from athanor.foundation.errors import DataError
from athanor.foundation.recipe import Recipe, Source
from athanor.foundation.run_folder import hash_file, hash_folder, hash_value

# folders of the standard library that hold its tests, and installed packages
LEFT_OUT = {"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "__pycache__"}
SUFFIXES: dict[str, tuple[str, ...]] = {
    "python": (".py",), "text": (".txt", ".md", ".rst"), "jsonl": (".jsonl", ".jsonl.gz", ".ndjson"),
    "parquet": (".parquet",), "csv": (".csv", ".csv.gz"), "html": (".html", ".htm"),
    "warc": (".warc", ".warc.gz"), "pdf": (".pdf",), "tokens": (".bin",)}
NEEDS = {"warc": "warcio", "pdf": "pypdf"}  # kinds that need a package which is not installed with athanor
ROWS = ("jsonl", "csv", "parquet")  # kinds with many texts in a file
SAMPLE_BYTES = 1 << 20


def root(source: Source) -> Path:
    """The file or folder of a source; DataError when it is not there or its kind needs a package that is missing."""
    package = NEEDS.get(source.kind)
    if package and importlib.util.find_spec(package) is None:
        raise DataError(f"source '{source.name}' of kind '{source.kind}' needs the package '{package}', which is not installed")
    if source.path == "auto":
        if source.kind != "python":
            raise DataError(f"source '{source.name}' of kind '{source.kind}' needs a path; 'auto' is for kind 'python' only")
        return Path(sysconfig.get_path("stdlib"))
    try:
        path = Path(source.path).expanduser()
    except RuntimeError:
        raise DataError(f"source '{source.name}': {source.path} names a user that this machine does not know") from None
    if source.kind == "tokens" and not path.is_dir() and path.with_name(path.name + ".bin").is_file():
        path = path.with_name(path.name + ".bin")
    if not path.exists():
        raise DataError(f"source '{source.name}': {path.absolute()} does not exist")
    if not path.is_dir() and not path.is_file():
        raise DataError(f"source '{source.name}': {source.path} is neither a file nor a folder")
    return path


def list_files(source: Source) -> list[Path]:
    """The files of a source, sorted by their path; DataError when there are none."""
    start = root(source)
    if source.kind == "git":
        files = _tracked_files(source, start)
    elif start.is_file():
        files = [start]
    else:
        suffixes = SUFFIXES.get(source.kind)
        left_out = LEFT_OUT if source.kind == "python" and source.path == "auto" else {"__pycache__"}
        files = [file for file in _walk(start, left_out) if suffixes is None or file.name.lower().endswith(suffixes)]
    if not files:
        wanted = ", ".join(SUFFIXES.get(source.kind, ("any",)))
        raise DataError(f"source '{source.name}': there is no file of kind '{source.kind}' ({wanted}) in {start}")
    return sorted(files)


def uri_of(start: Path, file: Path) -> str:
    """The name of a file in the lineage: its path below the source, the same on every machine."""
    name = file.name if start == file else file.relative_to(start).as_posix()
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def scan(recipe: Recipe) -> dict[str, Any]:
    """Bytes and documents of each source and of all, from file sizes alone.

    Documents of files with many of them are estimated from the first megabyte ("estimated": true).
    """
    result: dict[str, Any] = {"bytes": 0, "documents": 0, "sources": {}}
    for source in recipe.data.source:
        sizes = {file: file.stat().st_size for file in list_files(source)}
        by_line = source.kind in ROWS
        documents = sum(_estimate_lines(file, size) for file, size in sizes.items()) if by_line else len(sizes)
        total = sum(sizes.values())
        result["sources"][source.name] = {"bytes": total, "documents": documents, "estimated": by_line}
        result["bytes"] += total
        result["documents"] += documents
    return result


def inputs_of(recipe: Recipe) -> dict[str, str]:
    """What a build reads, by hash: [data] and the seed, paths, sizes and times of the sources' files, a given tokenizer."""
    files = [[source.name, *([str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in list_files(source))]
             for source in recipe.data.source]
    found = {"data": hash_value([recipe.data.model_dump(), recipe.seed]), "sources": hash_value(files)}
    if recipe.data.tokenizer is not None:
        given = Path(recipe.data.tokenizer)
        found["tokenizer"] = hash_folder(given) if given.is_dir() else hash_file(given) if given.exists() else "None"
    return found


def _walk(folder: Path, left_out: set[str]) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            if entry.name not in left_out and not entry.name.startswith("."):
                yield from _walk(entry, left_out)
        elif entry.is_file() and not entry.name.startswith("."):
            yield entry


def _tracked_files(source: Source, folder: Path) -> list[Path]:
    try:
        done = subprocess.run(["git", "-C", str(folder), "ls-files", "-z", "--recurse-submodules"], capture_output=True,
                              check=False)
    except FileNotFoundError:
        raise DataError(f"source '{source.name}' of kind 'git' needs the program git, which is not installed") from None
    if done.returncode:
        raise DataError(f"source '{source.name}': {folder} is not a git work tree: {os.fsdecode(done.stderr).strip()}")
    files = [folder / name for name in os.fsdecode(done.stdout).split("\0") if name]
    return [file for file in files if file.is_file() and not file.is_symlink()]


def _estimate_lines(file: Path, size: int) -> int:
    with file.open("rb") as handle:
        sample = handle.read(SAMPLE_BYTES)
    lines = sample.count(b"\n")
    return max(1, round(lines * size / len(sample))) if sample else 0
