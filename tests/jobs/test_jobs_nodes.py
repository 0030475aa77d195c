"""Ranks on several nodes, each of them a process here: they meet, are told apart when they fail, and spares take over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import pytest

from athanor.foundation.errors import RankError, RecipeError
from athanor.foundation.launch import start_server
from athanor.jobs import nodes
from athanor.jobs.agent import Stopped
from athanor.jobs.nodes import Leader

FOLLOW = """
import sys
from pathlib import Path
from athanor.foundation.launch import start_server
from athanor.jobs.nodes import join
if __name__ == "__main__":
    start_server()
    sys.exit(join(Path(sys.argv[1]), int(sys.argv[2]), f"n{int(sys.argv[2]) + 1}"))
"""
Follower = subprocess.Popen[bytes]


@pytest.fixture
def team(tmp_path: Path) -> Iterator[Callable[..., tuple[Leader, list[Follower]]]]:
    """A leader of so many nodes, itself the first, and the processes of the others."""
    started: list[Follower] = []
    script = tmp_path / "follow.py"
    script.write_text(FOLLOW)
    leaders: list[Leader] = []

    def start(count: int, ranks_per_node: int = 1) -> tuple[Leader, list[Follower]]:
        start_server()
        file = tmp_path / "leader.json"
        started.extend(subprocess.Popen([sys.executable, str(script), str(file), str(number)]) for number in range(1, count))
        leaders.append(Leader(file, count, ranks_per_node, "n1").__enter__())
        deadline = time.monotonic() + 60
        while len(leaders[0].peers) < count:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return leaders[0], started

    yield start
    for leader in leaders:
        leader.__exit__()
    for process in started:
        process.kill()
        process.wait()


def run(leader: Leader, target: str, count: int, folder: Path, **arguments: Any) -> list[Any]:
    messages: list[dict[str, Any]] = []
    results = leader.launch(f"launch_ranks:{target}", arguments, count, log_folder=folder, on_message=messages.append)
    assert len(messages) == count
    return results


def test_ranks_of_several_nodes_meet_and_return_in_order(team: Any, tmp_path: Path) -> None:
    leader, others = team(2, ranks_per_node=2)
    results = run(leader, "add_up", 3, tmp_path, offset=10)  # the second node has room for more
    assert [result["rank"] for result in results] == [0, 1, 2] and {result["sum"] for result in results} == {13.0}
    with pytest.raises(RecipeError, match="not like this"):
        run(leader, "refuse", 3, tmp_path)
    with pytest.raises(Stopped, match=r"2 of 2 nodes answer, and 3 are needed"):
        run(leader, "add_up", 5, tmp_path, offset=0)
    assert [result["sum"] for result in run(leader, "add_up", 4, tmp_path, offset=0)] == [6.0] * 4
    assert nodes.current() is leader and oct((tmp_path / "leader.json").stat().st_mode)[-3:] == "600"
    leader.__exit__()
    assert others[0].wait(timeout=60) == 0 and nodes.current() is None


def test_a_killed_rank_is_named_and_all_others_are_gone(team: Any, tmp_path: Path) -> None:
    leader, _ = team(2)
    with pytest.raises(RankError, match=r"^rank 1 was killed by signal 9 \(SIGKILL\)") as caught:
        run(leader, "kill_rank_one", 2, tmp_path, pids=str(tmp_path))
    assert caught.value.number == 9 and caught.value.log == str(tmp_path / "rank-1.log")
    assert not Path(f"/proc/{(tmp_path / 'pid-0').read_text()}").exists()
    assert len(run(leader, "add_up", 2, tmp_path, offset=0)) == 2, "the same agents go on"
    files = [tmp_path / "pid-0", tmp_path / "pid-1"]
    for file in files:
        file.unlink(missing_ok=True)

    def patrol() -> None:
        if all(file.exists() and file.read_text() for file in files):
            raise RankError(1, "hangs")

    with pytest.raises(RankError, match="rank 1 hangs"):
        leader.launch("launch_ranks:wait_with_pid", {"pids": str(tmp_path)}, 2, log_folder=tmp_path, on_message=print,
                      patrol=patrol)
    assert not any(Path(f"/proc/{file.read_text()}").exists() for file in files)


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)], ids=["killed", "silent"])
def test_a_spare_takes_the_place_of_a_lost_node(team: Any, tmp_path: Path, how: signal.Signals,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "LOST_SECONDS", 4.0)
    leader, (second, third) = team(3)
    lost: list[float] = []

    def lose(message: dict[str, Any]) -> None:
        lost.append(time.monotonic())
        os.kill(second.pid, how)

    with pytest.raises(RankError, match=r"rank 1 ended with node n2, which does not answer any more"):
        leader.launch("launch_ranks:tell_and_wait", {}, 2, log_folder=tmp_path, on_message=lose)
    assert time.monotonic() - lost[0] < nodes.LOST_SECONDS + 10  # of a busy machine
    assert len(run(leader, "add_up", 2, tmp_path, offset=0)) == 2, "the spare does its part"
    third.kill()
    while not leader.peers[2].is_lost:
        time.sleep(0.02)
    with pytest.raises(Stopped, match="1 of 3 nodes answer, and 2 are needed"):
        run(leader, "add_up", 2, tmp_path, offset=0)


def test_a_node_that_is_given_up_makes_room_for_a_spare_and_is_told_by_account(team: Any, tmp_path: Path) -> None:
    leader, _ = team(3)
    assert leader.count == leader.room() == 3 and leader.idle(2) == {"spare": 1}
    run(leader, "add_up", 2, tmp_path, offset=0)
    assert leader.without(1) == 2 and leader.without(0) == 0, "the ranks meet where the leader is"
    assert leader.give_up(1) == "node n2" and leader.room() == 2
    assert leader.idle(2) == {"down": 1} and leader.idle(1) == {"spare": 1, "down": 1}
    assert len(run(leader, "add_up", 2, tmp_path, offset=0)) == 2, "the spare does its part"
    assert leader.without(1) == 1


def test_an_agent_without_a_leader_ends_its_ranks(team: Any, tmp_path: Path) -> None:
    """What the leader does not hear of any more does not go on behind its back."""
    code = FOLLOW.replace("start_server()", """start_server()
    import threading, time
    from athanor.jobs.nodes import Leader
    leader = Leader(Path(sys.argv[1]), 2, 1, "n1").__enter__()
    leader.launch("launch_ranks:wait_with_pid", {"pids": str(Path(sys.argv[1]).parent)}, 2,
                  log_folder=Path(sys.argv[1]).parent, on_message=print)""")
    script = tmp_path / "lead.py"
    script.write_text(code)
    leader = subprocess.Popen([sys.executable, str(script), str(tmp_path / "leader.json"), "0"])
    (tmp_path / "follow.py").write_text(FOLLOW)
    follower = subprocess.Popen([sys.executable, str(tmp_path / "follow.py"), str(tmp_path / "leader.json"), "1"])
    files = [tmp_path / "pid-0", tmp_path / "pid-1"]
    deadline = time.monotonic() + 60
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < deadline and leader.poll() is None and follower.poll() is None
        time.sleep(0.05)
    leader.kill()
    assert follower.wait(timeout=50) == 85, "this node's job is to be started again"
    leader.wait()
    assert not Path(f"/proc/{files[1].read_text()}").exists()


def test_a_stranger_is_not_let_in(team: Any, tmp_path: Path) -> None:
    leader, _ = team(1)
    found = json.loads((tmp_path / "leader.json").read_text())
    with pytest.raises((AuthenticationError, EOFError, OSError)):
        Client((found["host"], found["port"]), authkey=b"a guess").recv()
    assert list(leader.peers) == [0] and len(run(leader, "add_up", 1, tmp_path, offset=0)) == 1
