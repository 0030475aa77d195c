"""Functions of Python files as questions and answers: signature and docstring -> body."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

LONGEST_PROMPT, LONGEST_BODY = 4_000, 4_000  # characters; packing drops what is longer than a row


@dataclass(frozen=True)
class Function:
    """A function with a docstring and a body that does something.

    The file is `before` + body as it stands there + `after`. `header` (def line and docstring, without indentation) is
    the prompt; `body` has the function's indentation removed, so that its statements begin at the margin.
    """

    name: str
    line: int
    header: str
    body: str
    raw_body: str
    indent: str
    before: str
    after: str

    @property
    def is_regular(self) -> bool:
        """Whether taking the indentation off and putting it back changes nothing (strings may hang out of a body)."""
        return _indented(self.body, self.indent) == self.raw_body and "\t" not in self.indent

    @property
    def messages(self) -> list[dict[str, str]]:
        """The function as a conversation, for training and, without the answer, for evaluation."""
        return [{"role": "user", "content": self.header}, {"role": "assistant", "content": self.body}]


def place(before: str, indent: str, body: str, after: str) -> str:
    """A whole file with `body` (its statements at the margin) in the place of a function's own."""
    return before + _indented(body, indent) + "\n" + after


def does_nothing(statements: list[ast.stmt]) -> bool:
    """Whether statements are only `pass`, constants (a docstring, an ellipsis) or `raise NotImplementedError`."""
    return all(isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
               or _is_not_implemented(node) for node in statements)


def find_functions(text: str) -> Iterator[Function]:
    """Every function of a Python file with a docstring and a body, in order; none when the file cannot be parsed."""
    if "\r" in text or "\f" in text:  # line numbers of the parser would not be ours
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes that a newer Python frowns on are not our business
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    lines = text.split("\n")
    for name, node in _walk(tree, ""):
        function = _function(lines, name, node)
        if function is not None:
            yield function


def make_pair(function: Function) -> list[dict[str, str]] | None:
    """The messages to learn from; None when the function is too long or oddly indented."""
    fits = len(function.header) <= LONGEST_PROMPT and len(function.body) <= LONGEST_BODY
    return function.messages if fits and function.is_regular else None


FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def _walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, FunctionNode]]:
    """Functions in statements only: expressions are most of a tree and hold none."""
    for field in ("body", "handlers", "orelse", "finalbody", "cases"):
        for child in getattr(node, field, ()):
            if isinstance(child, FunctionNode):
                yield prefix + child.name, child
            inner = f"{prefix}{child.name}." if isinstance(child, (FunctionNode, ast.ClassDef)) else prefix
            yield from _walk(child, inner)


def _function(lines: list[str], name: str, node: FunctionNode) -> Function | None:
    first = node.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    statements = node.body[1:]
    if not is_docstring or not statements or does_nothing(statements):
        return None
    last_of_docstring, end = first.end_lineno or 0, node.end_lineno or 0
    first_statement = statements[0]
    begin_line = min([first_statement.lineno, *(d.lineno for d in getattr(first_statement, "decorator_list", []))])
    if begin_line <= last_of_docstring:
        return None
    begin = last_of_docstring
    while not lines[begin].strip():  # empty lines after the docstring belong to neither
        begin += 1
    statement_line = lines[begin_line - 1]
    indent = statement_line[:len(statement_line) - len(statement_line.lstrip())]
    header_lines = lines[node.lineno - 1:last_of_docstring]
    margin = header_lines[0][:len(header_lines[0]) - len(header_lines[0].lstrip())]
    body_lines = lines[begin:end]
    return Function(
        name=name, line=node.lineno, header="\n".join(_dedent(header_lines, margin)).rstrip(),
        body="\n".join(_dedent(body_lines, indent)).rstrip(), indent=indent,
        before="\n".join(lines[:begin]) + "\n", after="\n".join(lines[end:]), raw_body="\n".join(body_lines))


def _indented(body: str, indent: str) -> str:
    return "\n".join(indent + line if line.strip() else "" for line in body.split("\n")).rstrip()


def _dedent(lines: list[str], margin: str) -> list[str]:
    return [line.removeprefix(margin) for line in lines]


def _is_not_implemented(node: ast.stmt) -> bool:
    if not isinstance(node, ast.Raise) or node.exc is None:
        return False
    raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
    return isinstance(raised, ast.Name) and raised.id == "NotImplementedError"
