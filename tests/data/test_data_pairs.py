"""Functions as questions and answers: what is cut out can be put back, and what does nothing is left out."""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path

import pytest

from athanor.data.pairs import does_nothing, find_functions, make_pair, place

FILE = '''\
import os


class A:
    @property
    def one(self) -> int:
        """The first."""

        # a comment of the body
        if self.x:

            return 1
        return 2

    async def two(self,
                  y):
        """Two
        lines."""
        def inner():
            """Inside."""
            return y
        return inner

    def nothing(self):
        """Docstring alone."""

    def later(self):
        """Not yet."""
        raise NotImplementedError("soon")

    def empty(self):
        """Dots."""
        ...
        pass


def undocumented():
    return 3


def short(): "doc"; return 1


def hanging():
    """Has a string that hangs out."""
    return """
at the margin
"""
'''


def test_functions_are_found_and_cut_at_the_right_places() -> None:
    functions = {function.name: function for function in find_functions(FILE)}
    assert list(functions) == ["A.one", "A.two", "A.two.inner", "hanging"]
    one = functions["A.one"]
    assert one.header == 'def one(self) -> int:\n    """The first."""'
    assert one.body == "# a comment of the body\nif self.x:\n\n    return 1\nreturn 2"
    assert (one.line, one.indent) == (6, "        ")
    assert functions["A.two"].header == 'async def two(self,\n              y):\n    """Two\n    lines."""'
    assert functions["A.two.inner"].body == "return y"
    assert make_pair(one) == [{"role": "user", "content": one.header}, {"role": "assistant", "content": one.body}]
    assert make_pair(functions["hanging"]) is None  # its string would change


def test_body_can_be_put_back_in_place() -> None:
    one = next(find_functions(FILE))
    assert place(one.before, one.indent, one.body, one.after) == FILE
    other = place(one.before, one.indent, "for i in x:\n    yield i", one.after)
    compile(other, "f.py", "exec")
    assert "        for i in x:\n            yield i\n\n    async def two" in other


def test_every_pair_of_the_standard_library_fits_its_file() -> None:
    pairs = 0
    for file in sorted((Path(sysconfig.get_path("stdlib")) / "email").glob("*.py")):
        text = file.read_text(encoding="utf-8")
        for function in find_functions(text):
            if make_pair(function) is None:
                continue
            pairs += 1
            assert place(function.before, function.indent, function.body, function.after) == text
            whole = function.header + "\n" + "".join(f"    {line}\n" for line in function.body.split("\n"))
            node = ast.parse(whole).body[0]
            assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and len(node.body) > 1
    assert pairs > 150


@pytest.mark.parametrize(("body", "expected"), [
    ("pass", True), ('"doc"', True), ("...", True), ("raise NotImplementedError", True), ("raise NotImplementedError('x')", True),
    ("", True), ("return", False), ("pass\nx = 1", False), ("raise ValueError", False), ("raise", False)])
def test_what_does_nothing(body: str, expected: bool) -> None:
    assert does_nothing(ast.parse(body).body) is expected


@pytest.mark.parametrize("text", ["def f(:\n", "\0", "def f():\r\n    'd'\r\n    return 1\r\n", "(" * 5000])
def test_what_cannot_be_parsed_has_no_functions(text: str) -> None:
    assert list(find_functions(text)) == []
