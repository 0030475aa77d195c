"""The share of the wanted processor time: from the scheduler's account, and on a core that two processes want."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from athanor.foundation import processor
from athanor.foundation.processor import Share

TWO_ON_ONE_CORE = """
import os, time
from athanor.foundation.processor import Share
os.sched_setaffinity(0, {core})
other = os.fork()
if not other:
    while True:
        pass
share = Share()
try:
    with share.counted():
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            pass
finally:
    os.kill(other, 9)
    os.waitpid(other, 0)
print(share.value)
"""


def test_it_is_what_the_scheduler_says_of_all_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "THREADS", tmp_path)

    def account(*threads: tuple[int, int]) -> None:
        for number, (ran, waited) in enumerate(threads):
            (tmp_path / str(number)).mkdir(exist_ok=True)
            (tmp_path / str(number) / "schedstat").write_text(f"{ran} {waited} 17\n")

    account((5 * 10**9, 10**9))
    share = Share()
    with share.counted():
        account((6 * 10**9, 10**9), (10**9, 3 * 10**9))
    assert (share.ran, share.waited) == (2.0, 3.0) and share.value == 0.4
    account((9 * 10**9, 10**12))  # what lies between two parts does not count
    with share.counted():
        account((11 * 10**9, 10**12))
    assert share.value == pytest.approx(4 / 7)


def test_without_the_scheduler_all_other_time_counts_as_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "THREADS", tmp_path)
    clock = iter([(2.0, 3.0), (3.0, 7.0)])
    monkeypatch.setattr(processor.time, "process_time", lambda: 0.0)
    monkeypatch.setattr(processor.time, "perf_counter", lambda: 0.0)
    assert processor.ran_and_waited() == (0.0, 0.0) and Share().value == 1.0
    now = {}
    monkeypatch.setattr(processor.time, "process_time", lambda: now["ran"])
    monkeypatch.setattr(processor.time, "perf_counter", lambda: now["at"])
    share = Share()
    now["ran"], now["at"] = next(clock)
    with share.counted():
        now["ran"], now["at"] = next(clock)
    assert share.value == pytest.approx(1 / 4)


@pytest.mark.skipif(not list(Path("/proc/self/task").glob("*/schedstat")), reason="this kernel keeps no account of waiting")
def test_a_core_that_two_processes_want_is_half_ours() -> None:
    core = min(os.sched_getaffinity(0))
    done = subprocess.run([sys.executable, "-c", TWO_ON_ONE_CORE.replace("{core}", f"{{{core}}}")], capture_output=True,
                          text=True, timeout=120, check=True)
    assert 0.0 < float(done.stdout) < 0.7  # less where others want it too
