"""The agent of a training stage: owns its ranks, and starts them again where they are when some of them fail or hang.

The ranks are this machine's, unless `devices` are those of several nodes (`jobs/nodes.py`). A sentence of events.jsonl says what
happened, and it writes into ledger.jsonl what the ranks no longer could: the time since their last line is `lost`, the time until
new ranks are started is `down`. The ranks go on from the newest intact checkpoint by themselves, and there are fewer of them when
a device cannot be used any more.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from athanor.foundation.errors import AthanorError, RankError, UserError
from athanor.foundation.events import EXIT_HOLD, EXIT_REQUEUE, log_event
from athanor.foundation.launch import Node, free_port, is_consequence, run_ranks
from athanor.foundation.progress import say
from athanor.foundation.recipe import Recipe
from athanor.foundation.run_folder import StageFolder, read_jsonl
from athanor.jobs.watch import Watch
from athanor.ledger.attempts import Attempt, note

MOST_FAULTS = 5  # in a row, without a step further than the ranks had come before
MOST_STARTS = 3  # of a rank in a row that end before a step is done; then its device is given up, if the stage can do without
GONE = ("invalid device ordinal", "no CUDA-capable device", "No CUDA GPUs", "busy or unavailable", "uncorrectable ECC",
        "uncorrectable NVLink", "GPU is lost")  # what CUDA says of a device that is lost; twice is enough then
FIRST_WAIT_SECONDS = 1.0  # before the second restart in a row; then twice as long each time
LONGEST_WAIT_SECONDS = 60.0


class Stopped(AthanorError):
    """Somebody asked us to end; what was done is saved, and the same command goes on from there."""

    exit_code = EXIT_REQUEUE


class Held(AthanorError):
    """Trying again unchanged cannot help; somebody must look."""

    exit_code = EXIT_HOLD


class Devices:
    """This machine's devices, as many as there are ranks at first; `jobs/nodes.Leader` has those of several nodes."""

    def __init__(self, count: int) -> None:
        self.count, self.usable = count, list(range(count))

    def launch(self, target: str, arguments: dict[str, Any], world_size: int, *, log_folder: Path,
               on_message: Callable[[dict[str, Any]], None], threads: int | None = None,
               patrol: Callable[[], None] = lambda: None) -> list[Any]:
        """Run ranks, as `run_ranks` does."""
        node = Node(0, world_size, "127.0.0.1", free_port(), self.usable[:world_size])
        return run_ranks(target, arguments, world_size, log_folder=log_folder, on_message=on_message, threads=threads,
                         patrol=patrol, node=node)

    def ask(self) -> None:
        """Ask the ranks to stop after their step."""
        for process in multiprocessing.active_children():
            process.terminate()

    def room(self) -> int:
        """Ranks that there are devices for."""
        return len(self.usable)

    def without(self, rank: int) -> int:
        """The same without what this rank was started on last; 0 when that cannot be done without."""
        return self.room() - 1

    def give_up(self, rank: int) -> str:
        """Start no rank there any more. Returns its name."""
        return f"device {self.usable.pop(rank)} of this machine"

    def idle(self, world_size: int) -> dict[str, int]:
        """Devices by account that have no rank while so many have one: `down` are those given up or lost, `spare` the others."""
        counts = {"spare": self.room() - world_size, "down": self.count - self.room()}
        return {name: count for name, count in counts.items() if count > 0}


@dataclass
class Agent:
    """`Agent(stage folder, ranks).run("package.module:rank_function", arguments)`. `on_message` gets what ranks send.

    `fewer(most)`: the largest number of ranks below the present one and up to `most` on which the stage goes on, and its recipe
    for them; None when there is none.
    """

    folder: StageFolder
    world_size: int
    threads: int | None = None
    on_message: Callable[[dict[str, Any]], None] = lambda message: None
    fewer: Callable[[int], tuple[int, Recipe] | None] = lambda most: None
    devices: Devices = field(init=False)  # this machine's, unless set
    is_asked_to_stop: bool = False
    faults_in_a_row: int = 0
    furthest_step: int = -1
    seen: set[tuple[str, int | None]] = field(default_factory=set)  # exceptions, and at which step
    stuck: list[int] = field(default_factory=list)  # a rank, as often as it ended before a step was done, in a row
    idle: dict[str, int] = field(default_factory=dict)  # devices without a rank since the last launch, by account

    def __post_init__(self) -> None:
        self.devices = Devices(self.world_size)

    def run(self, target: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Rank 0's result of a rank function with the arguments of `train_stage`, restarted until it is done.

        On SIGTERM, Ctrl-C and a closed terminal the ranks finish their step and save; "is_asked_to_stop" in the result says so.
        Raises KeyboardInterrupt at a second Ctrl-C, which ends them at once; Stopped when they failed after that, Held with the
        traceback in events.jsonl when trying again cannot help, and what a rank refuses with an AthanorError as it is.
        """
        begun = arguments.get("launched", time.perf_counter())  # imports of ours are start-up, too
        hang_seconds = arguments["recipe"].get_stage(arguments["stage"]).hang_seconds
        with self._listening():
            while True:
                arguments = self._fit(arguments)
                known, self.idle = [(len(rows), rows[-1:]) for rows in self._records()], self.devices.idle(self.world_size)
                try:
                    results = self.devices.launch(
                        target, {**arguments, "launched": begun, "idle": self.idle}, self.world_size,
                        log_folder=self.folder.logs, on_message=self._hear, threads=self.threads,
                        patrol=Watch(self.folder, self.world_size, hang_seconds).check)
                    return {**results[0], "is_asked_to_stop": self.is_asked_to_stop or results[0]["is_asked_to_stop"]}
                except (UserError, Stopped):
                    raise  # about a folder that may be another's; no ranks were started
                except AthanorError as error:
                    attempt = self._attempt(time.perf_counter() - begun, known)
                    self._settle(attempt, error)
                if attempt.step is not None:
                    arguments = {**arguments, "is_fresh": False}  # begun anew once is enough
                self._wait()
                failed, begun = begun + attempt.seconds, time.perf_counter()
                self._note(attempt, {"down": begun - failed}, time.time())

    def _settle(self, attempt: Attempt, error: AthanorError) -> None:
        """Tell a fault and what it cost. Raises what ends the stage, if it is not to be tried again."""
        self._note(attempt, attempt.accounts(), attempt.failed)
        self.folder.actual.unlink(missing_ok=True)  # what ends after its book was written is in the next one
        when = "before the first step" if not attempt.step else f"after step {attempt.step}"
        details: dict[str, Any] = {"attempt": attempt.number, "step": attempt.step}
        if not isinstance(error, RankError):
            log_event(self.folder.events, "held", f"{when}: {error}", **details)
            raise error
        told = f"{when}, {error.who} {error.reason}"
        log_event(self.folder.events, "fault", told, rank=error.rank, signal=error.number, exception=error.place, **details)
        if self.is_asked_to_stop:
            raise Stopped(f"{told}; it was asked to stop, and goes on from the newest checkpoint when started again")
        reason = None if self._gives_up(error, attempt) else self._why_not_again(error, attempt.step)
        if reason is not None:
            log_event(self.folder.events, "held", f"{told}; {reason}", rank=error.rank, traceback=error.trace, **details)
            raise Held(f"{told}; {reason}; its log is {error.log}")
        say(f"{told}; its log is {error.log}; the ranks start again")

    def _gives_up(self, error: RankError, attempt: Attempt) -> bool:
        """Give up the device of a rank that cannot be started there any more, where the stage can do without it."""
        is_alone = error.who.startswith("rank ") and not is_consequence(error)
        earlier = self.stuck if error.rank in self.stuck else []
        self.stuck = [*earlier, error.rank] if is_alone and not attempt.has_stepped else []
        if len(self.stuck) < (2 if any(word in error.reason for word in GONE) else MOST_STARTS):
            return False
        room = self.devices.without(error.rank)
        if room < self.world_size and self.fewer(room) is None:
            return False
        told = (f"{error.who} has ended {len(self.stuck)} times in a row before it did a step, so "
                f"{self.devices.give_up(error.rank)} is given up")
        log_event(self.folder.events, "given up", told, attempt=attempt.number, step=attempt.step, rank=error.rank)
        say(told)
        self.stuck, self.seen, self.faults_in_a_row = [], set(), 1  # what comes now is another matter
        return True

    def _fit(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments for as many ranks as there are devices for. Too few for any are told by who starts the ranks."""
        room, before = self.devices.room(), self.world_size
        found = self.fewer(room) if room < before else None
        if found is None:
            return arguments
        self.world_size, recipe = found
        told = (f"there are devices for {room} of {before} ranks, so it goes on with {self.world_size} and the same batches, "
                "and with all again when it is started anew")
        log_event(self.folder.events, "fewer", told, ranks=self.world_size)
        say(told)
        return {**arguments, "recipe": recipe}

    def _why_not_again(self, error: RankError, step: int | None) -> str | None:
        """Why trying again cannot help: a fault that repeats itself, or too many without a step further; None when it may."""
        fault = None if error.place is None or is_consequence(error) else (error.place, step)
        if fault in self.seen:
            return "the same exception at the same step as before, so it is not tried again"
        if fault is not None:
            self.seen.add(fault)
        has_progressed = step is not None and step > self.furthest_step
        self.faults_in_a_row = 1 if has_progressed else self.faults_in_a_row + 1
        self.furthest_step = max(self.furthest_step, step or 0)
        if self.faults_in_a_row == MOST_FAULTS:
            return f"the {MOST_FAULTS}th fault in a row without a step further, so it is not tried again"
        return None

    def _wait(self) -> None:
        """Wait before the next restart: not at all after progress, else longer each time. Raises Stopped when asked to stop."""
        seconds = 0.0 if self.faults_in_a_row == 1 else FIRST_WAIT_SECONDS * 2 ** (self.faults_in_a_row - 2)
        until = time.monotonic() + min(seconds, LONGEST_WAIT_SECONDS)
        while time.monotonic() < until and not self.is_asked_to_stop:
            time.sleep(0.05)
        if self.is_asked_to_stop:
            raise Stopped("stopped between two tries, as asked; it goes on from the newest checkpoint when started again")

    def _records(self) -> list[list[dict[str, Any]]]:
        return [read_jsonl(file) for file in (self.folder.events, self.folder.ledger, self.folder.metrics)]

    def _attempt(self, seconds: float, known: list[tuple[int, list[dict[str, Any]]]]) -> Attempt:
        """What the life of the ranks that has just ended left in the stage's folder, beside the `known` numbers of rows and last
        ones of them; a file without these was begun anew."""
        failed, records = time.time(), self._records()
        events, ledger, metrics = (rows[count if rows[count - 1:count] == last else 0:]
                                   for rows, (count, last) in zip(records, known, strict=True))
        number = sum(row["kind"] == "start" for row in records[0][:len(records[0]) - len(events)])
        steps = [row["step"] for row in [*events, *metrics] if isinstance(row.get("step"), int)]
        return Attempt(number, seconds, failed, max(steps, default=None), events, ledger, bool(metrics))

    def _note(self, attempt: Attempt, accounts: dict[str, float], until: float) -> None:
        note(self.folder.root / "ledger.jsonl", accounts, until=until, attempt=attempt.number, step=attempt.step or 0,
             devices=self.world_size, idle=self.idle)

    def _hear(self, message: dict[str, Any]) -> None:
        self.on_message(message)
        if self.is_asked_to_stop:
            self._ask()

    def _ask(self, *_: object) -> None:
        """Ask the ranks to stop. One that is still starting ignores the wish, so it is passed on again when a step is done."""
        self.is_asked_to_stop = True
        self.devices.ask()

    def _hang_up(self, *_: object) -> None:
        """The terminal is closed: what would be shown there has nowhere to go, which is no reason to fail."""
        with open(os.devnull, "w") as nowhere:
            for stream in (1, 2):
                if stat.S_ISCHR(os.fstat(stream).st_mode) and not os.isatty(stream):
                    os.dup2(nowhere.fileno(), stream)
        self._ask()

    def _interrupt(self, *_: object) -> None:
        if self.is_asked_to_stop:
            raise KeyboardInterrupt
        say("finishing the step and saving; Ctrl-C once more ends at once")
        self._ask()

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        acts = {signal.SIGTERM: self._ask, signal.SIGINT: self._interrupt, signal.SIGHUP: self._hang_up}
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # as nohup has it
            del acts[signal.SIGHUP]
        previous = {number: signal.signal(number, act) for number, act in acts.items()}
        try:
            yield
        finally:
            for number, act in previous.items():
                signal.signal(number, act)
