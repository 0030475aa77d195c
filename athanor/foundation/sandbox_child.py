"""The child of `foundation/sandbox.py`: gives up network and resources first, then looks at foreign code.

Started as a script by a fresh interpreter (`-I -S`), so it imports little and nothing of Athanor.
Arguments: mode, descriptor for the status byte, CPU seconds, memory bytes, file bytes. The work comes on standard input.
"""

from __future__ import annotations

import ast
import ctypes
import gc
import json
import os
import resource
import signal
import sys

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
REFUSALS = (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError, SystemError)


def leave_network() -> bool:
    """Move into a network namespace of its own, which has no interface that is up; False where the system forbids it."""
    if sys.platform != "linux":
        return False
    return bool(ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0)


def limit(kind: int, amount: int, grace: int = 0) -> None:
    """Lower a limit for good (the hard one `grace` above the soft one); one that is lower already stays as it is."""
    hard = resource.getrlimit(kind)[1]
    ceiling = amount + grace if hard == resource.RLIM_INFINITY else min(amount + grace, hard)
    resource.setrlimit(kind, (min(amount, ceiling), ceiling))


def substance(tree: ast.Module, first_line: int, last_line: int) -> int:
    """Statements that begin on these lines (from 1, inclusive) and are more than `pass`, `...` or a bare constant."""
    count = 0
    stack: list[ast.AST] = [*tree.body]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.stmt) and first_line <= node.lineno <= last_line:
            empty = isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
            count += not empty
        stack.extend(child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr))
    return count


def compile_each(cpu_seconds: float) -> None:
    """For each [source, first line, last line] print one line: [error or null, statements].

    A source that takes too long ends this process (SIGPROF), as does one that crashes the compiler: the parent counts
    the lines, blames the source that is next, and starts another child behind it.
    """
    gc.disable()  # trees have no cycles, and their many nodes would set it off again and again
    verdict: tuple[str | None, int]
    for source, first_line, last_line in json.load(sys.stdin):
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        try:
            compile(source, "<generated>", "exec", dont_inherit=True)
            verdict = (None, substance(ast.parse(source), first_line, last_line))
        except REFUSALS as error:
            verdict = (f"{type(error).__name__}: {error}"[:200], 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(verdict) + "\n")
        sys.stdout.flush()


def main() -> None:
    mode, status, cpu_seconds, memory_bytes, file_bytes = sys.argv[1], *map(int, sys.argv[2:6])
    os.write(status, b"1" if leave_network() else b"0")
    os.close(status)
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_AS, memory_bytes)
    limit(resource.RLIMIT_FSIZE, file_bytes)
    if mode == "compile":
        compile_each(cpu_seconds)
    else:
        limit(resource.RLIMIT_CPU, cpu_seconds, grace=1)  # SIGXCPU, then SIGKILL
        source = sys.stdin.read()
        exec(compile(source, "<generated>", "exec", dont_inherit=True), {"__name__": "__main__"})


if __name__ == "__main__":
    main()
