"""The direction of imports is data: who may import whom, and nothing heavier than needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import athanor

PACKAGE = Path(athanor.__file__).parent
ALLOWED: dict[str, set[str]] = {
    "foundation": set(),
    "ledger": set(),
    "cluster": {"ledger"},
    "models": set(),
    "laws": {"models.shapes"},
    "cost": {"ledger", "cluster", "models.shapes"},
    "planner": {"laws", "cost", "ledger", "cluster", "models.shapes"},
    "data": {"ledger"},
    "parallel": set(),
    "objectives": set(),
    "inference": {"models", "parallel"},
    "evaluate": {"ledger", "data", "inference"},
    "train": {"ledger", "models", "data", "parallel", "objectives", "inference", "evaluate"},
    "registry": {"ledger", "models"},
    "serve": {"ledger", "data", "inference", "registry"},
    "jobs": {"ledger", "cluster"},
    "report": {"ledger", "registry"},
    "cli": {"ledger", "cluster", "models", "laws", "cost", "planner", "data", "parallel", "objectives", "inference", "evaluate",
            "train", "registry", "serve", "jobs", "report"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported_modules(file: Path) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute"
            found.append((node.lineno, node.module or ""))
    return found


def test_every_folder_is_a_known_room() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms <= set(ALLOWED), f"unknown rooms {rooms - set(ALLOWED)}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_go_down(file: Path) -> None:
    parts = file.relative_to(PACKAGE).parts
    if len(parts) == 1:
        return
    room = parts[0]
    for line, module in imported_modules(file):
        if not module.startswith("athanor."):
            assert module != "athanor", f"{file}:{line}: name the room"
            continue
        target = module.removeprefix("athanor.")
        allowed = ALLOWED[room] | {room, "foundation"}
        legal = any(target == name or target.startswith(name + ".") for name in allowed)
        assert legal, f"{file}:{line}: {room} may not import {module}"


def test_package_files_are_empty() -> None:
    assert not [file for file in FILES if file.name == "__init__.py" and file.read_text()]


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(' '.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize("room", ["foundation", "ledger", "laws", "cost", "planner", "registry", "report"])
def test_rooms_without_torch(room: str) -> None:
    modules = [".".join(f.relative_to(PACKAGE.parent).with_suffix("").parts) for f in FILES
               if f.relative_to(PACKAGE).parts[0] == room and f.name != "__init__.py"]
    assert "torch" not in loaded_by("import " + ", ".join(modules))


def test_training_path_is_lean() -> None:
    modules = [".".join(f.relative_to(PACKAGE.parent).with_suffix("").parts) for f in FILES
               if f.relative_to(PACKAGE).parts[0] in ("train", "parallel", "objectives", "models") and f.name != "__init__.py"]
    loaded = loaded_by("import " + ", ".join(modules))
    assert "torch" in loaded
    assert not loaded & {"pyarrow", "starlette", "uvicorn", "click"}


def test_help_is_instant() -> None:
    assert not loaded_by("import athanor.cli.main") & {"torch", "numpy", "pyarrow", "pydantic", "rich", "starlette"}
