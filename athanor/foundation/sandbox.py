"""Runs foreign Python, or only compiles it, in a child with limits on CPU, memory, file size and time, and no network.

It limits what foreign code can use up, and cuts the network where the system permits (Linux with user namespaces;
`Outcome.network_cut` says whether). It is no jail: the child may still read what this user may read.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

CHILD = Path(__file__).with_name("sandbox_child.py")
STARTUP_SECONDS = 20.0  # for the child's interpreter to start, on a busy machine


@dataclass(frozen=True)
class Limits:
    """What one piece of foreign code may use: CPU and wall-clock seconds, address space and file size in bytes."""

    cpu_seconds: int = 2
    wall_seconds: float = 10.0
    memory_bytes: int = 512 * 2**20
    file_bytes: int = 4 * 2**20


@dataclass(frozen=True)
class Outcome:
    """How a child ended: its exit code (negative: the signal that killed it), what it printed, and how it was held."""

    exit_code: int
    output: str
    errors: str
    timed_out: bool
    network_cut: bool

    def describe(self) -> str:
        """`ended with code 1`, `was killed by SIGSEGV`, `took too long`."""
        if self.timed_out or -self.exit_code in (signal.SIGPROF, signal.SIGXCPU):
            return "took too long"
        if self.exit_code < 0:
            return f"was killed by {signal.Signals(-self.exit_code).name}"
        return f"ended with code {self.exit_code}"


@dataclass(frozen=True)
class Verdict:
    """What the compiler said: `error` is None when the source compiles.

    `statements` counts those in the lines asked about that are more than `pass`, `...` or a bare constant.
    """

    error: str | None
    statements: int


def run_code(source: str, limits: Limits = Limits()) -> Outcome:
    """Run a Python program on its own, in an empty folder that is removed afterwards."""
    return _child("run", source, limits, limits.wall_seconds)


def compile_sources(sources: list[str], lines: list[tuple[int, int]] | None = None,
                    limits: Limits = Limits()) -> list[Verdict]:
    """Compile each source (nothing is run), hundreds per second; the limits hold for each.

    `lines[i]` are the first and last line (from 1, inclusive) whose statements are counted in source i; all by default.
    A source that crashes the compiler, or exceeds a limit, gets that as its error and harms no other.
    """
    work = [[source, *(lines[i] if lines else (1, sys.maxsize))] for i, source in enumerate(sources)]
    verdicts: list[Verdict] = []
    while len(verdicts) < len(work):
        rest = work[len(verdicts):]
        wall_seconds = STARTUP_SECONDS + limits.wall_seconds * len(rest)
        outcome = _child("compile", json.dumps(rest), limits, wall_seconds)
        whole_lines = outcome.output[:outcome.output.rfind("\n") + 1].splitlines()
        verdicts += [Verdict(*json.loads(line)) for line in whole_lines]
        if len(verdicts) < len(work):
            verdicts.append(Verdict(f"the compiler {outcome.describe()}", 0))
    return verdicts


def _child(mode: str, work: str, limits: Limits, wall_seconds: float) -> Outcome:
    """Start `sandbox_child.py` on `work`; its output goes to files, so that the limit on file size holds for it."""
    status_read, status_write = os.pipe()
    with tempfile.TemporaryDirectory(prefix="athanor-sandbox-") as scratch, tempfile.TemporaryFile() as given, \
            tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        given.write(work.encode("utf-8", "surrogatepass"))
        given.seek(0)
        command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-W", "ignore", str(CHILD), mode, str(status_write),
                   str(limits.cpu_seconds), str(limits.memory_bytes), str(limits.file_bytes)]
        try:
            process = subprocess.Popen(command, stdin=given, stdout=output, stderr=errors, cwd=scratch, env={},
                                       pass_fds=(status_write,), start_new_session=True)
        finally:
            os.close(status_write)
        timed_out = False
        try:
            process.wait(wall_seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # whatever it started ends with it
            process.wait()
            network_cut = os.read(status_read, 1) == b"1"
            os.close(status_read)
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
        return Outcome(process.returncode, texts[0], texts[1], timed_out, network_cut)
