"""The one thread that owns the engine: requests come in through a bounded queue, pieces of text go out to the event loop."""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

from athanor.foundation.errors import AthanorError
from athanor.inference.engine import Engine, Request, Sampling
from athanor.serve.text import AnswerText, Piece

STOPPING = "the server is stopping"


class QueueFull(AthanorError):
    """As many answers are being written or waited for as this server allows."""


@dataclass(eq=False)
class Generation:
    """One answer: what the engine is asked, how its tokens become text, and who takes the pieces (in the event loop)."""

    token_ids: list[int]
    sampling: Sampling
    text: AnswerText
    deliver: Callable[[Piece], None]
    request: Request | None = field(default=None, init=False)


class Worker:
    """Steps the engine while there is work. `submit` and `cancel` may be called from any thread."""

    def __init__(self, engine: Engine, limit: int) -> None:
        self.engine, self.limit = engine, limit
        self._wake = threading.Condition()
        self._inbox: list[Generation] = []
        self._live: set[Generation] = set()  # shared, under _wake
        self._writing: list[Generation] = []  # the thread's own
        self._unwanted: set[Generation] = set()
        self._outbox: list[tuple[Generation, Piece]] = []
        self._is_stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.failure: str | None = None

    @property
    def live(self) -> int:
        """Answers that are being written or waited for."""
        return len(self._live)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread.start()

    def halt(self) -> None:
        """End what is being written, with an error that says so, and then the thread."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()

    def stop(self) -> None:
        """Halt, and wait for the thread to end."""
        self.halt()
        self._thread.join()

    def submit(self, generations: list[Generation]) -> None:
        """Take all of them or, with QueueFull, none."""
        with self._wake:
            if self.failure or self._is_stopping:
                raise AthanorError(self.failure or STOPPING)
            if len(self._live) + len(generations) > self.limit:
                raise QueueFull(f"{len(self._live)} of {self.limit} places are taken, and {len(generations)} are asked for; "
                                "try again in a moment")
            self._live.update(generations)
            self._inbox += generations
            self._wake.notify()

    def cancel(self, generations: list[Generation]) -> None:
        """Nobody wants these any more; those that are finished already are left alone."""
        with self._wake:
            self._unwanted.update(self._live.intersection(generations))
            self._wake.notify()

    def _run(self) -> None:
        try:
            while self._take_changes():
                for request in self.engine.step():
                    self._finish_request(request)
                self._flush()
        except Exception as error:  # whatever ends this thread, those who wait for it must hear
            traceback.print_exc()
            self.failure = f"the engine stopped: {type(error).__name__}: {error}"
            for generation in list(self._live):
                self._end(generation, Piece(error=AthanorError(self.failure)))
        self._flush()

    def _take_changes(self) -> bool:
        """Wait for work, then start what is new and drop what is unwanted; False when it is time to stop."""
        with self._wake:
            while not (self._live or self._is_stopping):
                self._wake.wait()
            new, self._inbox = self._inbox, []
            is_stopping = self._is_stopping
            unwanted = self._live & (self._live if is_stopping else self._unwanted)
            self._unwanted = set()
        for generation in new:
            if generation not in unwanted:
                self._start(generation)
        for generation in unwanted:
            if generation.request is not None:
                self.engine.cancel(generation.request)
            self._end(generation, Piece(finish_reason="cancelled", error=AthanorError(STOPPING) if is_stopping else None))
        return not is_stopping

    def _start(self, generation: Generation) -> None:
        def on_token(token_id: int, logprob: float) -> None:
            piece = generation.text.push(token_id, logprob)
            if piece.text or piece.tokens:
                self._outbox.append((generation, piece))
            if generation.text.is_stopped and generation.request is not None:
                self.engine.cancel(generation.request)

        try:
            generation.request = self.engine.submit(generation.token_ids, generation.sampling, on_token)
            self._writing.append(generation)
        except AthanorError as error:
            self._end(generation, Piece(error=error))

    def _finish_request(self, request: Request) -> None:
        generation = next((g for g in self._writing if g.request is request), None)
        if generation is not None:
            last = generation.text.finish()
            last.finish_reason = "stop" if generation.text.is_stopped else request.finish_reason
            self._end(generation, last)

    def _end(self, generation: Generation, last: Piece) -> None:
        if generation.request is not None:
            self._writing.remove(generation)
        with self._wake:
            self._live.discard(generation)
        self._outbox.append((generation, last))

    def _flush(self) -> None:
        """Hand a step's pieces to the event loop with one wake-up; a loop that has closed takes none."""
        outbox, self._outbox = self._outbox, []
        if outbox and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, outbox)


def _deliver(outbox: list[tuple[Generation, Piece]]) -> None:
    for generation, piece in outbox:
        generation.deliver(piece)
