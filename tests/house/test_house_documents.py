"""Documentation cannot drift: the reference is generated, the README's commands and files exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import click

from athanor.cli.main import VERBS, program

ROOT = Path(__file__).parents[2]


def reference() -> str:
    spec = importlib.util.spec_from_file_location("generate_reference", ROOT / "docs" / "generate_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text: str = module.render()
    return text


def test_the_reference_page_is_what_the_code_says() -> None:
    assert (ROOT / "docs" / "reference.md").read_text() == reference(), "run docs/generate_reference.py"


def test_every_verb_explains_itself_and_speaks_json() -> None:
    def walk(command: click.Command, name: str) -> None:
        assert command.help, f"{name} has no help"
        for option in command.params:
            if isinstance(option, click.Option):
                assert option.help, f"{name} {option.opts[0]} has no help"
        if isinstance(command, click.Group):
            inner = click.Context(command)
            for sub in command.list_commands(inner):
                child = command.get_command(inner, sub)
                assert child is not None
                walk(child, f"{name} {sub}")
        else:
            assert any("--json" in p.opts for p in command.params), f"{name} has no --json"

    context = click.Context(program)
    for verb in VERBS:
        command = program.get_command(context, verb)
        assert command is not None
        walk(command, verb)


def test_the_readme_comes_to_the_point_and_names_what_exists() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line.lstrip().startswith("make demo"))
    assert first_command < 25
    assert not [line for line in lines if len(line) > 130]
    text = "\n".join(lines)
    for verb in re.findall(r"^\s*(?:\.venv/bin/)?athanor ([a-z]+)", text, re.M):
        assert verb in VERBS, verb
    for path in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / path).exists(), path
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for target in re.findall(r"make ([a-z-]+)", text):
        assert target in targets, target
    for room in sorted(p.name for p in (ROOT / "athanor").iterdir() if p.is_dir() and p.name != "__pycache__"):
        assert re.search(rf"\b{room}/", text), f"README's file tree lacks {room}"


def test_the_project_speaks_of_itself_alone() -> None:
    roots = ["athanor", "tests", "docs", "recipes", "benchmarks", "README.md", "CHANGELOG.md", "Makefile", "pyproject.toml"]
    files = [f for r in roots for f in ([ROOT / r] if (ROOT / r).is_file() else (ROOT / r).rglob("*"))
             if f.is_file() and f.suffix in {".py", ".md", ".toml", ".html", ".jinja", "", ".css", ".js"}]
    # spelled in pieces, so that this file may be read too
    for word in ("/wo" + "rk/", "../sha" + "red", "far" + "m-", "help" + "er-"):
        assert not [str(f) for f in files if word in f.read_text(errors="ignore")], word
