"""Ranks on several nodes: an agent on each, of which the first leads.

The leader writes where it listens, and a secret, into a file of the run folder that only its owner can read. The other agents
connect, start their part of the ranks when told, pass on what those say, and kill them when told. A connection that breaks or
is silent means a lost node to the leader, and to an agent that its ranks must end: so nobody works on behind a cut cable.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any, Self

from athanor.foundation.errors import AthanorError, RankError, UserError
from athanor.foundation.events import EXIT_DONE, EXIT_REQUEUE
from athanor.foundation.launch import Node, cause, free_port, patience, run_ranks
from athanor.foundation.run_folder import disk_errors, read_json
from athanor.jobs.agent import Devices, Stopped

BEAT_SECONDS = 1.0
LOOK_SECONDS = 0.25
LOST_SECONDS = 15.0  # of silence
GATHER_SECONDS = 120.0  # for agents to arrive: imports from a slow shared disk
STOP_SECONDS = 15.0  # for killed ranks to be gone
Message = tuple[Any, ...]


class Wire:
    """A connection on which several threads send; to one that is broken nothing is sent."""

    def __init__(self, connection: Connection) -> None:
        self.connection, self.lock = connection, threading.Lock()

    def send(self, *message: Any) -> None:
        with self.lock, contextlib.suppress(OSError):
            self.connection.send(message)


class Part:
    """This node's ranks in one attempt, waited for in a thread; how they end goes to the leader."""

    def __init__(self, wire: Wire, attempt: int, node: Node, age: float | None, arguments: dict[str, Any],
                 **choices: Any) -> None:
        self.wire, self.attempt, self.node = wire, attempt, node
        if age is not None:
            arguments = {**arguments, "launched": time.perf_counter() - age}  # on the clock of this host
        self.thread = threading.Thread(target=self._run, args=(arguments, choices), daemon=True)
        self.thread.start()

    def _run(self, arguments: dict[str, Any], choices: dict[str, Any]) -> None:
        def on_message(message: dict[str, Any]) -> None:
            self.wire.send("message", self.attempt, message)

        try:
            results = run_ranks(arguments=arguments, node=self.node, on_message=on_message, **choices)
            self.wire.send("ended", self.attempt, results)
        except AthanorError as error:
            self.wire.send("ended", self.attempt, error)
        except Exception as error:  # nothing else would tell the leader
            self.wire.send("ended", self.attempt, RankError(self.node.first, f"could not be started: {error}"))

    def ask(self) -> None:
        """Ask the ranks to stop after their step."""
        for process in self.node.processes:
            process.terminate()

    def end(self) -> None:
        """Kill the ranks and wait until they are gone."""
        while self.thread.is_alive():
            for process in self.node.processes:
                process.kill()
            self.thread.join(0.02)


def follow(wire: Wire, number: int, name: str) -> int:
    """Start the ranks that the leader asks for, until it ends the job. Returns an exit code: 85 when it fell silent."""
    part: Part | None = None
    heard = time.monotonic()
    wire.send("here", number, name)
    try:
        while time.monotonic() - heard < LOST_SECONDS:
            if wire.connection.poll(BEAT_SECONDS):
                kind, *content = wire.connection.recv()
                heard = time.monotonic()
                if part is not None and kind in ("start", "stop"):
                    part.end()
                if kind == "start":
                    part = Part(wire, **content[0])
                elif kind == "ask" and part is not None:
                    part.ask()
                elif kind == "end":
                    return EXIT_DONE
            wire.send("beat")
    except (EOFError, OSError):
        pass
    finally:
        if part is not None:
            part.end()
    return EXIT_REQUEUE


def join(file: Path, number: int, name: str) -> int:
    """Find the leader by the file that it writes, and follow it. Returns an exit code: 85 when there is none."""
    deadline = time.monotonic() + GATHER_SECONDS
    while time.monotonic() < deadline:
        try:
            found = read_json(file)
            connection = Client((found["host"], found["port"]), authkey=bytes.fromhex(found["key"]))
        except (UserError, OSError, EOFError, multiprocessing.AuthenticationError):
            time.sleep(0.1)
            continue
        return follow(Wire(connection), number, name)  # type: ignore[arg-type]
    return EXIT_REQUEUE


@dataclass(eq=False)
class Peer:
    """An agent as the leader knows it."""

    number: int
    name: str
    wire: Wire
    heard: float = field(default_factory=time.monotonic)
    is_lost: bool = False


class Leader(Devices):
    """`with Leader(file, nodes, ranks_per_node) as leader: leader.launch(...)` runs ranks as `run_ranks` does, on all nodes.

    Of `nodes` agents only as many get ranks as these need; the others are spares, and take the places of lost ones in the
    next attempt. Rank 0 is on the leader's own node. `count` are all devices that are paid for.
    """

    def __init__(self, file: Path, nodes: int, ranks_per_node: int, name: str) -> None:
        self.file, self.nodes, self.ranks_per_node, self.name = file, nodes, ranks_per_node, name
        self.count = nodes * ranks_per_node
        self.host, self.key = socket.gethostname(), secrets.token_bytes(32)
        self.peers: dict[int, Peer] = {}
        self.team: dict[Peer, range] = {}  # the ranks of the newest attempt
        self.inbox: queue.Queue[tuple[Peer, Message]] = queue.Queue()
        self.attempt, self.is_asked, self.closed = 0, False, threading.Event()
        self.listener = Listener(("", 0), backlog=64)

    def __enter__(self) -> Self:
        global _current
        ours, theirs = multiprocessing.Pipe()
        for target, arguments in ((self._accept, ()), (self._beat, ()), (self._attend, (ours,)),
                                  (follow, (Wire(theirs), 0, self.name))):  # type: ignore[arg-type]
            threading.Thread(target=target, args=arguments, daemon=True).start()
        content = {"host": self.host, "port": self.listener.address[1], "key": self.key.hex()}
        with disk_errors(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            building = self.file.with_name(f".{self.file.name}")
            building.unlink(missing_ok=True)
            with os.fdopen(os.open(building, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                json.dump(content, file)
            building.replace(self.file)
        _current = self
        return self

    def __exit__(self, *_: object) -> None:
        global _current
        _current = None
        self.closed.set()
        for peer in self.peers.values():
            peer.wire.send("end")
        self.listener.close()

    def room(self) -> int:
        return self.ranks_per_node * (self.nodes - sum(peer.is_lost for peer in list(self.peers.values())))

    def without(self, rank: int) -> int:
        return 0 if self._peer(rank).number == 0 else self.room() - self.ranks_per_node  # there the ranks meet

    def give_up(self, rank: int) -> str:
        peer = self._peer(rank)
        self._lose(peer)
        return f"node {peer.name}"

    def _peer(self, rank: int) -> Peer:
        return next(peer for peer, ranks in self.team.items() if rank in ranks)

    def launch(self, target: str, arguments: dict[str, Any], world_size: int, *, log_folder: Path,
               on_message: Callable[[dict[str, Any]], None], threads: int | None = None,
               patrol: Callable[[], None] = lambda: None) -> list[Any]:
        """`run_ranks` over the nodes; what `patrol`, called a few times a second, raises ends the ranks. Raises Stopped when too
        few nodes are left."""
        team = self._gather(-(-world_size // self.ranks_per_node))
        self.attempt += 1
        port, age = free_port(), time.perf_counter() - arguments["launched"] if "launched" in arguments else None
        size = self.ranks_per_node
        parts = [range(first, min(first + size, world_size)) for first in range(0, world_size, size)]
        self.team = dict(zip(team, parts, strict=True))
        for peer, ranks in self.team.items():
            peer.wire.send("start", {"attempt": self.attempt, "node": Node(ranks[0], len(ranks), self.host, port), "age": age,
                                     "target": target, "arguments": arguments, "world_size": world_size,
                                     "log_folder": log_folder, "threads": threads})
        ended: dict[Peer, Any] = {}
        try:
            return self._collect(self.team, ended, on_message, patrol)
        finally:
            self._stop([peer for peer in team if peer not in ended])

    def ask(self) -> None:
        """Ask the ranks to stop after their step; safe in a signal's handler."""
        self.is_asked = True

    def _collect(self, team: dict[Peer, range], ended: dict[Peer, Any],
                 on_message: Callable[[dict[str, Any]], None], patrol: Callable[[], None]) -> list[Any]:
        """Wait for all nodes' results into `ended`; after a failure a moment longer, for the one that caused it."""
        failures: dict[int, AthanorError] = {}
        deadline, asked = math.inf, -math.inf
        while len(ended) < len(team) and time.monotonic() < deadline:
            if not failures:
                patrol()
            if self.is_asked and time.monotonic() - asked > BEAT_SECONDS:
                asked = time.monotonic()
                for peer in team:
                    peer.wire.send("ask")
            for peer, kind, content in self._hear(min(LOOK_SECONDS, max(0.0, deadline - time.monotonic()))):
                if kind == "message":
                    on_message(content)
                elif peer in team:
                    ended[peer] = content
            for peer, ranks in team.items():
                if peer.is_lost and peer not in ended:
                    who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
                    ended[peer] = RankError(ranks[0], f"ended with node {peer.name}, which does not answer any more", who=who)
                if isinstance(error := ended.get(peer), AthanorError) and ranks[0] not in failures:
                    failures[ranks[0]] = error
                    deadline = min(deadline, time.monotonic() + patience(failures))
        if failures:
            raise cause(failures, sum(map(len, team.values())))
        return [result for peer in team for result in ended[peer]]

    def _stop(self, team: Sequence[Peer]) -> None:
        """Kill the ranks of these nodes; one that does not say that they are gone is lost."""
        left = {peer for peer in team if not peer.is_lost}
        for peer in left:
            peer.wire.send("stop")
        deadline = time.monotonic() + STOP_SECONDS
        while left and time.monotonic() < deadline:
            left -= {peer for peer, kind, _ in self._hear(0.1) if kind == "ended"} | {peer for peer in left if peer.is_lost}
        for peer in left:
            self._lose(peer)

    def _hear(self, seconds: float) -> list[tuple[Peer, str, Any]]:
        """What one message says about this attempt, if one comes in time."""
        try:
            peer, message = self.inbox.get(timeout=seconds)
        except queue.Empty:
            return []
        return [(peer, message[0], message[2])] if len(message) == 3 and message[1] == self.attempt else []

    def _gather(self, count: int) -> list[Peer]:
        deadline = time.monotonic() + GATHER_SECONDS
        while True:
            living = sorted((peer for peer in self.peers.values() if not peer.is_lost), key=lambda peer: peer.number)
            if len(living) >= count:
                return living[:count]
            can_come = self.nodes - sum(peer.is_lost for peer in self.peers.values())
            if can_come < count or time.monotonic() > deadline or self.is_asked:
                raise Stopped(f"{len(living)} of {self.nodes} nodes answer, and {count} are needed; it goes on from the newest "
                              "checkpoint when started again")
            time.sleep(0.02)

    def _accept(self) -> None:
        while not self.closed.is_set():
            with contextlib.suppress(OSError):
                threading.Thread(target=self._welcome, args=(self.listener.accept(),), daemon=True).start()

    def _welcome(self, connection: Connection) -> None:
        with contextlib.suppress(EOFError, OSError, multiprocessing.AuthenticationError):
            deliver_challenge(connection, self.key)
            answer_challenge(connection, self.key)
            self._attend(connection)

    def _attend(self, connection: Any) -> None:
        """Read what an agent says until its connection breaks."""
        peer = None
        try:
            _, number, name = connection.recv()
            peer = self.peers[number] = Peer(number, name, Wire(connection))
            while True:
                message = connection.recv()
                peer.heard = time.monotonic()
                if message[0] != "beat":
                    self.inbox.put((peer, message))
        except (EOFError, OSError):
            if peer is not None:
                self._lose(peer)

    def _beat(self) -> None:
        while not self.closed.wait(BEAT_SECONDS):
            for peer in [peer for peer in self.peers.values() if not peer.is_lost]:
                if time.monotonic() - peer.heard > LOST_SECONDS:
                    self._lose(peer)
                else:
                    peer.wire.send("beat")

    def _lose(self, peer: Peer) -> None:
        """From now on it hears nothing, and ends its ranks by itself if it still lives."""
        peer.is_lost = True
        self.inbox.put((peer, ("lost",)))


_current: Leader | None = None


def current() -> Leader | None:
    """The leader in this process; None where ranks run on this machine alone."""
    return _current
