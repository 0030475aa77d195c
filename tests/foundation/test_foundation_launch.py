from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

from athanor.foundation import launch
from athanor.foundation.errors import DiskError, RankError, RecipeError
from athanor.foundation.launch import Node, cause, free_port, is_consequence, run_ranks


def test_ranks_meet_report_and_return_in_order(tmp_path: Path) -> None:
    messages: list[dict[str, object]] = []
    results = run_ranks("launch_ranks:add_up", {"offset": 10}, 2, log_folder=tmp_path, on_message=messages.append)
    assert results == [{"rank": 0, "sum": 11.0, "threads": 1}, {"rank": 1, "sum": 11.0, "threads": 1}]
    assert sorted(m["rank"] for m in messages) == [0, 1]
    assert "hello from 1" in (tmp_path / "rank-1.log").read_text()


def test_a_killed_rank_is_named_and_the_others_do_not_stay(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"rank 1 was killed by signal 9 \(SIGKILL\)") as caught:
        run_ranks("launch_ranks:kill_rank_one", {"pids": str(tmp_path)}, 2, log_folder=tmp_path)
    assert caught.value.rank == 1 and caught.value.log == str(tmp_path / "rank-1.log")
    assert not _alive(int((tmp_path / "pid-0").read_text()))


def test_ranks_can_be_told_apart_and_have_the_devices_that_are_chosen(tmp_path: Path) -> None:
    shown = run_ranks("launch_ranks:tell_names", {}, 2, log_folder=tmp_path / "blue" / "chat" / "logs",
                      node=Node(0, 2, "127.0.0.1", free_port(), [3, 1]))
    assert [found["device"] for found in shown] == ["3", "1"]
    assert [found["name"] for found in shown] == ["rank-0:blue", "rank-1:blue"]
    for rank, found in enumerate(shown):
        assert f"athanor rank {rank} of 2 in {tmp_path / 'blue' / 'chat'}".startswith(found["title"]) and len(found["title"]) > 20


def test_an_exception_is_told_with_its_log_and_a_refusal_as_itself(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="rank 1 failed: ZeroDivisionError"):
        run_ranks("launch_ranks:divide", {}, 2, log_folder=tmp_path)
    assert "ZeroDivisionError" in (tmp_path / "rank-1.log").read_text()
    for target in ("refuse", "wrap"):
        with pytest.raises(RecipeError, match="not like this"):
            run_ranks(f"launch_ranks:{target}", {}, 2, log_folder=tmp_path)


def test_a_rank_whose_log_cannot_be_opened_works_all_the_same(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rank-1.log").mkdir()
    assert len(run_ranks("launch_ranks:add_up", {"offset": 10}, 2, log_folder=tmp_path)) == 2
    assert "Traceback" not in capfd.readouterr().err, "not a word on the terminal"


def test_a_log_on_a_full_disk_hides_nothing(tmp_path: Path) -> None:
    for rank in (0, 1):
        (tmp_path / f"rank-{rank}.log").symlink_to("/dev/full")
    with pytest.raises(RecipeError, match="not like this"):
        run_ranks("launch_ranks:refuse", {}, 2, log_folder=tmp_path)
    with pytest.raises(RankError, match="rank 1 failed: ZeroDivisionError"):
        run_ranks("launch_ranks:divide", {}, 2, log_folder=tmp_path)


def test_a_time_limit_ends_ranks_that_hang(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match="did not finish within 1 s"):
        run_ranks("launch_ranks:hang", {}, 2, log_folder=tmp_path, timeout=1.0)
    assert time.monotonic() - start < 40, "of the minute that they would sleep; the fork server may have to import torch first"


def test_kill_9_of_the_parent_leaves_no_ranks(tmp_path: Path) -> None:
    code = ("from athanor.foundation.launch import run_ranks; from pathlib import Path\n"
            "if __name__ == '__main__':\n"
            f"    run_ranks('launch_ranks:wait_with_pid', {{'pids': {str(tmp_path)!r}}}, 2, log_folder=Path({str(tmp_path)!r}))")
    script = tmp_path / "script.py"
    script.write_text(code)
    parent = subprocess.Popen([sys.executable, str(script)])
    files = [tmp_path / "pid-0", tmp_path / "pid-1"]
    deadline = time.monotonic() + 120  # it imports torch
    while not all(f.exists() and f.read_text() for f in files):
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.05)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 20  # of the minute that they would sleep
    while any(_alive(int(f.read_text())) for f in files):
        assert time.monotonic() < deadline, "ranks outlived the parent"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_rank_that_died_explains_the_broken_connections(order: tuple[int, int]) -> None:
    failures = {0: RankError(0, "failed: RuntimeError: Connection closed by peer"), 1: RankError(1, "was killed by signal 9")}
    assert cause({rank: failures[rank] for rank in order}, 2) is failures[1]


def test_a_fault_of_a_run_that_is_called_like_a_connection_is_its_own() -> None:
    own = [RankError(1, "failed: ValueError: no such row", log="/runs/gloo/pretrain/logs/rank-1.log"),
           RankError(1, "failed: FileNotFoundError: [Errno 2] No such file or directory: '/runs/NCCL/Connection'"),
           DiskError("cannot write /runs/gloo/pretrain: No space left on device")]
    assert not any(map(is_consequence, own))
    broken = RankError(0, "failed: RuntimeError: [gloo/transport/tcp/pair.cc:534] Connection closed by peer", log="rank-0.log")
    assert is_consequence(broken) and all(cause({0: broken, 1: error}, 2) is error for error in own)


def test_ranks_that_were_killed_together_are_named_together() -> None:
    def killed(rank: int) -> RankError:
        return RankError(rank, "was killed by signal 9 (SIGKILL)", number=9)

    assert str(cause({1: killed(1), 0: killed(0)}, 2)) == "all 2 ranks were killed by signal 9 (SIGKILL)"
    some = {2: killed(2), 1: RankError(1, "failed: Connection reset"), 0: killed(0)}
    assert str(cause(some, 4)) == "ranks 0, 2 were killed by signal 9 (SIGKILL)"


def test_a_stopped_server_is_woken_and_one_that_stays_silent_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def add_up() -> list[object]:
        return run_ranks("launch_ranks:add_up", {"offset": 10}, 2, log_folder=tmp_path)

    begin = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1 was killed by signal 9"):
        run_ranks("launch_ranks:stop_the_server_and_die", {}, 2, log_folder=tmp_path)
    server: Any = forkserver._forkserver
    os.kill(server._forkserver_pid, signal.SIGSTOP)
    assert len(add_up()) == 2
    os.kill(old := server._forkserver_pid, signal.SIGSTOP)
    monkeypatch.setattr(launch, "SERVER_SECONDS", 0.0)
    with pytest.raises(RankError, match=r"the fork server did not start rank 0 \(unexpected EOF\)"):
        add_up()
    monkeypatch.undo()
    assert len(add_up()) == 2 and server._forkserver_pid != old
    assert time.monotonic() - begin < 120, "it takes some 15 s, most of them imports, on an idle machine"
