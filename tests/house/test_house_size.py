"""The whole stays small enough to read in a day."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import athanor

PACKAGE = Path(athanor.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
ROOM_LINES = {"data": 4500, "planner": 2000, "cost": 2100, "models": 4150, "foundation": 2185, "report": 1300,
              "evaluate": 1200, "registry": 1300, "laws": 1020,
              "jobs": 1500}  # devices that are given up, fewer ranks, what a job took
OTHER_ROOM_LINES = 1000


def lines(*rooms: str) -> int:
    return sum(len(f.read_text().splitlines()) for f in FILES if f.relative_to(PACKAGE).parts[0] in rooms)


def test_rooms_keep_their_size() -> None:
    assert lines("parallel", "train", "objectives") <= 5000
    assert lines("inference", "serve") <= 1600
    summed = {"parallel", "train", "objectives", "inference", "serve", "cli", "__init__.py"}
    for room in {f.relative_to(PACKAGE).parts[0] for f in FILES} - summed:
        assert lines(room) <= ROOM_LINES.get(room, OTHER_ROOM_LINES), room
    assert sum(len(f.read_text().splitlines()) for f in FILES) <= 30810


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_files_and_functions_stay_short(file: Path) -> None:
    text = file.read_text()
    assert text.count("\n") <= 400, f"{file.name} has {text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 80, f"{file.name}:{node.lineno} {node.name} has {length} lines"
            arguments = len(node.args.args) + len(node.args.kwonlyargs)
            assert arguments <= 11, f"{file.name}:{node.lineno} {node.name} has {arguments} arguments"


def test_no_loose_ends() -> None:
    for file in FILES:
        for word in ("TODO", "FIXME", "XXX", "NotImplementedError("):
            assert word not in file.read_text(), f"{file}: {word}"
