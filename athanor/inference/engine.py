"""Token ids in, token ids out: continuous batching on a paged cache, with the same forward pass that trains.

Under tensor parallelism every rank owns an engine, all are asked the same in the same order, and since logits and random
numbers are the same on all ranks, so are the schedules and the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from athanor.foundation.errors import UserError
from athanor.inference.cache import PAGE_TOKENS, PagePool, pages_of
from athanor.inference.sampling import choose
from athanor.inference.scheduler import Request, Sampling, Scheduler
from athanor.models.context import Groups, Packed, Scored
from athanor.models.decoder import Decoder
from athanor.models.shapes.find import load_shape

SCORE_TOKENS = 4096  # of one packed forward pass
OnToken = Callable[[int, float], None]


class Engine:
    """Generates for any number of requests at once, and scores whole sequences. Not for several threads at a time."""

    def __init__(self, model: Decoder, cache_tokens: int, weights_version: int | str = 0, groups: Groups | None = None) -> None:
        self.model, self.weights_version, self.groups = model, weights_version, groups or Groups()
        self.pool = PagePool(model, cache_tokens, self.groups)
        self.scheduler = Scheduler(self.pool)

    def submit(self, token_ids: Sequence[int], sampling: Sampling, on_token: OnToken | None = None) -> Request:
        """Queue a prompt; `on_token(token id, log-probability)` is called with each new token, during `step`.

        Raises UserError when the prompt is empty or not of this vocabulary, when the sampling is out of range, and when
        prompt and answer do not fit the model's context or this engine's cache.
        """
        prompt = [int(token) for token in token_ids]
        self._check(prompt, sampling)
        request = Request(prompt, sampling, on_token)
        self.scheduler.waiting.append(request)
        return request

    @property
    def is_idle(self) -> bool:
        """Whether no request waits or runs."""
        return not (self.scheduler.waiting or self.scheduler.running)

    @torch.no_grad()
    def step(self) -> list[Request]:
        """Start what waits and fits, else give every running request its next token; returns those that finished."""
        admitted = self.scheduler.admit()
        if admitted:
            return self._advance(admitted, [0] * len(admitted))
        self.scheduler.make_room()
        running = list(self.scheduler.running)
        return self._advance(running, [request.length - 1 for request in running]) if running else []

    def cancel(self, request: Request) -> None:
        """End a request now; one that has finished already stays as it is."""
        if request.finish_reason is None:
            self._finish(request, "cancelled")

    def drain(self) -> list[Request]:
        """Step until nothing waits or runs; returns all that finished on the way."""
        finished: list[Request] = []
        while not self.is_idle:
            finished += self.step()
        return finished

    def load_weights(self, version: int | str) -> None:
        """The model's weights have changed: forget what was computed with the old ones. Running requests begin anew."""
        self.weights_version = version
        self.pool.cache.weights.clear()
        for request in reversed(list(self.scheduler.running)):
            self.scheduler.preempt(request)

    @torch.no_grad()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-probability of each token given those before it in its sequence: length - 1 numbers for each.

        Raises UserError for a sequence that is longer than the model's context or not of its vocabulary.
        """
        results: list[np.ndarray] = [np.zeros(0, dtype=np.float32)] * len(sequences)
        for batch, lengths, inputs, targets in self._packs(sequences):
            scored = self.model(inputs, Packed.of(lengths, self.pool.device, self.groups), targets)
            assert isinstance(scored, Scored)
            for i, logp in zip(batch, scored.logp.split(lengths), strict=True):
                results[i] = logp.cpu().numpy()
        return results

    @torch.no_grad()
    def score_ends(self, sequences: Sequence[Sequence[int]], counts: Sequence[int]) -> list[tuple[float, bool]]:
        """Summed log-probability of each sequence's last `counts[i]` tokens, and whether all of them are the likeliest.

        Only their logits are computed. Raises as `score` does.
        """
        results = [(0.0, True)] * len(sequences)
        for batch, lengths, inputs, targets in self._packs(sequences):
            own = [min(counts[i], length) for i, length in zip(batch, lengths, strict=True)]
            numbers = [t for end, n in zip(np.cumsum(lengths), own, strict=True) for t in range(end - n, end)]
            wanted = torch.tensor(numbers, device=self.pool.device)
            logits = self.model(inputs, Packed.of(lengths, self.pool.device, self.groups, wanted))
            logits, targets = logits.to(torch.promote_types(logits.dtype, torch.float32)), targets[wanted]
            logp = logits.gather(1, targets.unsqueeze(1)).squeeze(1) - logits.logsumexp(-1)
            for i, part, right in zip(batch, logp.split(own), (logits.argmax(-1) == targets).split(own), strict=True):
                results[i] = float(part.double().sum()), bool(right.all())
        return results

    def _packs(self, sequences: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], list[int], Tensor, Tensor]]:
        """What goes through the model together, the longest first: numbers of sequences, their lengths, inputs, targets."""
        for sequence in sequences:
            self._check(list(sequence), Sampling(max_new_tokens=0), is_scored=True)
        order = sorted((i for i in range(len(sequences)) if len(sequences[i]) > 1), key=lambda i: len(sequences[i]))
        while order:
            batch = [order.pop()]
            tokens = len(sequences[batch[0]])
            while order and tokens + len(sequences[order[-1]]) <= SCORE_TOKENS:
                tokens += len(sequences[order[-1]])
                batch.append(order.pop())
            inputs, targets = (torch.tensor([t for i in batch for t in part(sequences[i])], device=self.pool.device)
                               for part in (lambda s: s[:-1], lambda s: s[1:]))
            yield batch, [len(sequences[i]) - 1 for i in batch], inputs, targets

    def _advance(self, requests: list[Request], firsts: list[int]) -> list[Request]:
        """Run the requests' tokens from `firsts` on through the model and append one token to each."""
        lengths = [request.length - first for request, first in zip(requests, firsts, strict=True)]
        tokens = [t for r, first in zip(requests, firsts, strict=True) for t in _tokens_from(r, first)]
        context = self.pool.context([request.pages for request in requests], firsts, lengths)
        logits = self.model(torch.tensor(tokens, device=self.pool.device), context)
        assert isinstance(logits, Tensor)
        finished = []
        for request, token, logp in zip(requests, *choose(logits, requests), strict=True):
            if request.finish_reason is not None:  # another request's on_token cancelled it
                continue
            request.token_ids.append(token)
            request.logprobs.append(logp)
            if request.on_token is not None:
                request.on_token(token, logp)
            if request.finish_reason is None:
                if token in request.sampling.stop_token_ids:
                    self._finish(request, "stop")
                elif len(request.token_ids) >= request.sampling.max_new_tokens:
                    self._finish(request, "length")
                else:
                    continue
            finished.append(request)
        return finished

    def _finish(self, request: Request, reason: str) -> None:
        request.finish_reason = reason
        self.scheduler.leave(request)

    def _check(self, tokens: list[int], sampling: Sampling, is_scored: bool = False) -> None:
        shape = self.model.shape
        if not tokens and not is_scored:
            raise UserError("the prompt is empty; give at least one token")
        if tokens and not 0 <= min(tokens) <= max(tokens) < shape.vocab_size:
            raise UserError(f"a token id lies outside the vocabulary of {shape.vocab_size}")
        if not is_scored:
            _check_sampling(sampling)
        total = len(tokens) + sampling.max_new_tokens
        if total - is_scored > shape.max_position_embeddings:
            raise UserError(f"the context is too long: {len(tokens)} tokens and {sampling.max_new_tokens} to be generated, "
                            f"but the model's max_position_embeddings is {shape.max_position_embeddings}")
        if not is_scored and pages_of(total) > self.pool.count:
            raise UserError(f"the context is too long for this engine: {total} tokens, but its cache holds "
                            f"{self.pool.count * PAGE_TOKENS}")


def _tokens_from(request: Request, first: int) -> list[int]:
    if first >= len(request.prompt):
        return request.token_ids[first - len(request.prompt):]
    return [*request.prompt[first:], *request.token_ids]


def _check_sampling(sampling: Sampling) -> None:
    for name, is_right, allowed in (
            ("max_new_tokens", sampling.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= sampling.temperature < float("inf"), "0 or more"),
            ("top_p", 0 < sampling.top_p <= 1, "above 0 and at most 1"),
            ("top_k", sampling.top_k >= 0, "0 or more")):
        if not is_right:
            raise UserError(f"{name} = {getattr(sampling, name)}; it must be {allowed}")


def context_tokens(model_folder: Path) -> int:
    """The longest prompt and answer together that the model of a Hugging Face folder was made for."""
    return load_shape(Path(model_folder)).max_position_embeddings


def open_engine(model_folder: Path, cache_tokens: int = 16384, threads: int | None = None, dtype: str = "float32") -> Engine:
    """An engine on the model of a Hugging Face folder; `threads` of torch for this process, unless they stay as they are.

    Raises ModelError when the folder cannot be loaded.
    """
    from athanor.models.huggingface import load_model

    if threads is not None:
        torch.set_num_threads(threads)
    module = load_model(Path(model_folder), dtype)
    return Engine(module.cuda() if torch.cuda.is_available() else module, cache_tokens)


def generate(module: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int, groups: Groups | None = None,
             **choices: Any) -> list[list[int]]:
    """The new tokens of each prompt, all generated together, chosen as `Sampling` says; request i draws with seed + i."""
    sampling = Sampling(max_new_tokens, **choices)
    longest = max((len(prompt) for prompt in prompts), default=0) + max_new_tokens
    engine = Engine(module, len(prompts) * (longest + PAGE_TOKENS), groups=groups)
    requests = [engine.submit(prompt, replace(sampling, seed=sampling.seed + i)) for i, prompt in enumerate(prompts)]
    engine.drain()
    return [request.token_ids for request in requests]
