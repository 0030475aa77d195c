"""Foreign code is compiled and run within limits, and cannot hurt us or its neighbours."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from athanor.foundation.sandbox import Limits, compile_sources, run_code

MIB = 2**20


def test_verdicts_are_those_of_the_compiler() -> None:
    sources = ["x = 1\n", "x = \n", "return 1\n", "def f():\n    return 1\n", "x = '\0'\n", "async def f():\n  await g()\n",
               "s = '\ud800'\n"]
    verdicts = compile_sources(sources)
    assert [v.error is None for v in verdicts] == [True, False, False, True, False, True, False]
    assert "SyntaxError" in str(verdicts[1].error)
    assert "'return' outside function" in str(verdicts[2].error)


def test_statements_in_the_lines_asked_about() -> None:
    head = "def f(x):\n"  # line 1
    bodies = ["    pass\n", "    ...\n", '    "text"\n', "    return x\n", "    if x:\n        pass\n",
              "    # nothing\n    pass\n    y = 1\n    return y\n"]
    sources = [head + body + "z = 1\n" for body in bodies]
    lines = [(2, 1 + body.count("\n")) for body in bodies]
    assert [v.statements for v in compile_sources(sources, lines)] == [0, 0, 0, 1, 1, 2]
    assert compile_sources([sources[0]])[0].statements == 2, "without lines the whole source counts"


def test_many_sources_in_a_second() -> None:
    source = "\n".join(f"def f{i}(a, b):\n    return a + b * {i}\n" for i in range(60))
    start = time.perf_counter()
    verdicts = compile_sources([source] * 300)
    assert all(v.error is None and v.statements == 120 for v in verdicts)
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("hostile", [
    "(" * 100_000 + ")" * 100_000, "-" * 1_000_000 + "1", "x" + ".x" * 500_000, "not " * 400_000 + "1",
    "lambda: " * 300_000 + "1", "x = " + "+".join(["1"] * 400_000), "[" * 90 + "1" + "]" * 90 + " if " * 5,
])
def test_hostile_sources_end_in_a_verdict_and_harm_no_neighbour(hostile: str) -> None:
    limits = Limits(cpu_seconds=1, memory_bytes=300 * MIB)
    verdicts = compile_sources(["x = 1", hostile, "y = 2", hostile, "z ="], limits=limits)
    assert [v.error is None for v in (verdicts[0], verdicts[2], verdicts[4])] == [True, True, False]
    assert verdicts[1] == verdicts[3] or (verdicts[1].error and verdicts[3].error)


def test_a_source_that_takes_long_is_stopped_by_itself() -> None:
    slow = "x = [" + "a if b else c, " * 3_000_000 + "]"
    verdicts = compile_sources(["x = 1", slow, "y = 2"], limits=Limits(cpu_seconds=1, memory_bytes=8192 * MIB))
    assert [v.error for v in (verdicts[0], verdicts[2])] == [None, None]
    assert verdicts[1].error == "the compiler took too long"


def test_memory_is_limited() -> None:
    outcome = run_code("x = bytearray(400 * 2**20)\nprint('had it')", Limits(memory_bytes=200 * MIB))
    assert outcome.exit_code == 1 and "MemoryError" in outcome.errors and not outcome.output


def test_cpu_time_is_limited() -> None:
    start = time.perf_counter()
    outcome = run_code("while True: pass", Limits(cpu_seconds=1, wall_seconds=30))
    assert outcome.describe() == "took too long" and time.perf_counter() - start < 20


def test_wall_time_is_limited_also_for_what_the_code_started() -> None:
    code = ("import subprocess, sys, time\n"
            "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
            "print(child.pid, flush=True)\ntime.sleep(60)")
    outcome = run_code(code, Limits(wall_seconds=5))  # in which it starts both
    assert outcome.timed_out and outcome.exit_code == -signal.SIGKILL
    grandchild = int(outcome.output)
    for _ in range(200):
        stat = Path(f"/proc/{grandchild}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail(f"process {grandchild} outlived its sandbox")


def test_files_and_output_are_limited() -> None:
    outcome = run_code("import sys\nwhile True: sys.stdout.write('x' * 65536)", Limits(file_bytes=MIB))
    assert outcome.exit_code != 0 and len(outcome.output) <= MIB
    outcome = run_code("open('big', 'wb').write(b'x' * 2**22)", Limits(file_bytes=MIB))
    assert "File too large" in outcome.errors


def test_the_network_is_cut_where_it_says_so() -> None:
    code = ("import socket\nserver = socket.socket()\nserver.bind(('127.0.0.1', 0))\nserver.listen()\n"
            "try:\n    socket.create_connection(server.getsockname(), timeout=2)\n    print('reached')\n"
            "except OSError as error:\n    print('cut', error.errno)")
    outcome = run_code(code)
    assert outcome.exit_code == 0, outcome.errors
    assert outcome.output.startswith("cut" if outcome.network_cut else "reached")
    unshare = shutil.which("unshare")
    if unshare and subprocess.run([unshare, "-rn", "true"], capture_output=True).returncode == 0:
        assert outcome.network_cut


def test_results_come_back() -> None:
    outcome = run_code("import os\nprint(6 * 7, os.listdir(), dict(os.environ).keys() - {'LC_CTYPE'})")
    assert (outcome.exit_code, outcome.output) == (0, "42 [] set()\n")
    assert run_code("raise SystemExit(3)").describe() == "ended with code 3"
