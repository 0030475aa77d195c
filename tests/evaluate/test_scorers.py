"""Scorers say what is right and why; the contract holds for everything in the folders and for modules from outside."""

from __future__ import annotations

import argparse
import inspect
import sys
import textwrap
from pathlib import Path

import pytest

from athanor.data.pairs import find_functions
from athanor.evaluate.find import load, names
from athanor.evaluate.scorers import exact, python_parses
from athanor.foundation.errors import UserError

TEXT = '''class Box:
    async def volume(self):
        """Text."""
        return await self.depth

    after = 1
'''
FUNCTION = vars(next(iter(find_functions(TEXT))))


@pytest.mark.parametrize(("body", "value", "reason"), [
    ("return await self.depth", 1.0, "compiles"), ("x = 1", 1.0, "compiles"), ("if x:\n    pass", 1.0, "compiles"),
    ("for i in x:\n    if i:\n        yield i\n\nself.a = 2", 1.0, "compiles"), ("raise NotImplementedError", 1.0, "compiles"),
    ("pass\nreturn 1", 1.0, "compiles"), ("", 0.0, "empty"), ("  \n\n", 0.0, "empty"), ("pass", 0.0, "does nothing"),
    ("...", 0.0, "does nothing"), ('"""More text."""', 0.0, "does nothing"), ("'''a\nb'''\npass\n...", 0.0, "does nothing"),
    ("# a remark", 0.0, "does nothing"), ("return (", 0.0, "SyntaxError"), ("x = 'abc", 0.0, "SyntaxError"),
    (" x = 1", 0.0, "IndentationError"), ("if x:", 0.0, "IndentationError"), ("yield 1\nreturn 2", 0.0, "SyntaxError"),
    ("await x\n  y", 0.0, "IndentationError"), ("def f(:\n    pass", 0.0, "SyntaxError"), ("x = '\0'", 0.0, "SyntaxError"),
    ("break", 0.0, "SyntaxError"), ("(" * 5000, 0.0, ""),
])
def test_python_parses(body: str, value: float, reason: str) -> None:
    found = python_parses.score("", body, FUNCTION)
    assert found[0] == value and found[1].startswith(reason), found


def test_only_the_body_counts_not_what_stands_around_it() -> None:
    """A file that does much around a function that does nothing."""
    assert python_parses.score("", "pass", FUNCTION)[0] == 0.0
    assert python_parses.score("", FUNCTION["body"], FUNCTION)[0] == 1.0


def test_every_original_body_compiles_in_its_place() -> None:
    """Real files: what the reference itself could not pass would be the task's mistake, not the model's."""
    functions = [vars(function) for module in (textwrap, argparse) for function in find_functions(inspect.getsource(module))]
    results = python_parses.score_all([function["body"] for function in functions], functions)
    assert len(results) > 10 and {reason for _, reason in results} == {"compiles in place"}


def test_reasons_are_counted_by_kind() -> None:
    results = python_parses.score_all(["pass", "x = 1", "x =", "y = ="], [FUNCTION] * 4)
    assert python_parses.reasons(results) == {"SyntaxError": 2, "does nothing": 1, "compiles in place": 1}


@pytest.mark.parametrize(("answer", "value"), [
    ("width", 1.0), ("width)", 1.0), ("width.x", 1.0), ("widths", 0.0), ("width_", 0.0), ("width2", 0.0), ("widt", 0.0),
    (" width", 0.0), ("", 0.0), ("Width", 0.0), ("width\u00e9", 0.0)])
def test_exact(answer: str, value: float) -> None:
    assert exact.score("", answer, "width")[0] == value


@pytest.mark.parametrize("kind", ["tasks", "scorers"])
def test_everything_in_the_folder_is_one_of_its_kind(kind: str) -> None:
    found = names(kind)  # type: ignore[arg-type]
    assert len(found) >= 2
    for name in found:
        module = load(kind, name)  # type: ignore[arg-type]
        assert module.__doc__ and len(module.__doc__.split()) > 8
    if kind == "scorers":
        for name in found:
            value, reason = load("scorers", name).score("", "", FUNCTION if name == "python_parses" else "x")
            assert value == 0.0 and reason


def test_names_from_outside_and_unknown_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").write_text("")
    (tmp_path / "my_package" / "mine.py").write_text("def score(prompt, answer, reference):\n    return 1.0, 'always'\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert load("scorers", "my_package.mine").score("", "", "") == (1.0, "always")
    with pytest.raises(UserError, match="it has no function 'run'"):
        load("tasks", "my_package.mine")
    with pytest.raises(UserError, match="no task 'bits_per_bite'; did you mean 'bits_per_byte'"):
        load("tasks", "bits_per_bite")
    with pytest.raises(UserError, match="cannot be imported"):
        load("tasks", "my_package.other")
