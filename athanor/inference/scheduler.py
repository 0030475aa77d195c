"""Who runs next: requests wait, are prefilled together within a budget, run until they end, and make room when pages run out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from athanor.inference.cache import PagePool, pages_of

PREFILL_TOKENS = 4096  # of one step, unless a single prompt is longer


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: temperature 0 takes the likeliest; top_k 0 and top_p 1 leave the distribution as it is.

    The same seed and prompt give the same tokens whatever else runs. A stop token ends the answer and is part of it.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()


@dataclass(eq=False)
class Request:
    """One prompt and what has been generated for it; finish_reason is None until it is stop, length or cancelled.

    `logprobs` are those of the unmodified distribution, whatever the sampling.
    """

    prompt: list[int]
    sampling: Sampling
    on_token: Callable[[int, float], None] | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    pages: list[int] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.sampling.seed)

    @property
    def length(self) -> int:
        """Tokens so far, prompt included; the last one's keys and values are not in the cache yet."""
        return len(self.prompt) + len(self.token_ids)


class Scheduler:
    """Requests that wait and those that run, oldest first; all pages of a request are given back when it leaves."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def admit(self) -> list[Request]:
        """Start as many waiting requests, in order, as fit the pages and this step's prefill budget."""
        admitted: list[Request] = []
        tokens = 0
        while self.waiting:
            request = self.waiting[0]
            pages = pages_of(request.length)
            if pages > self.pool.free or (admitted and tokens + request.length > PREFILL_TOKENS):
                break
            self.waiting.popleft()
            request.pages += self.pool.take(pages)
            tokens += request.length
            admitted.append(request)
        self.running += admitted
        return admitted

    def make_room(self) -> None:
        """Give every running request a page for its next token; when there is none, the youngest wait and begin anew."""
        for request in list(self.running):
            while request in self.running and len(request.pages) < pages_of(request.length):
                if self.pool.free:
                    request.pages += self.pool.take(1)
                else:
                    self.preempt(self.running[-1])

    def preempt(self, request: Request) -> None:
        """Take a running request's pages; it waits at the front, and its tokens are prefilled again later."""
        self.running.remove(request)
        self.pool.give_back(request.pages)
        self.waiting.appendleft(request)

    def leave(self, request: Request) -> None:
        """Forget a request, wherever it is."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self.pool.give_back(request.pages)
