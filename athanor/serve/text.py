"""From token ids to the text of an answer: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from athanor.data.text.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0  # stands for minus infinity, which JSON cannot say


@dataclass(frozen=True)
class Token:
    """One token of an answer: bytes, text, log-probability, and where in the answer it begins (in characters)."""

    raw: bytes
    text: str
    logprob: float
    offset: int


@dataclass
class Piece:
    """What became certain of one answer: text, its tokens (when asked for) and, with the last piece, why it ended."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None
    completion_tokens: int = 0
    error: Exception | None = None


class AnswerText:
    """Decodes one answer; text that may yet turn out to be the beginning of a stop string is held back."""

    def __init__(self, tokenizer: Tokenizer, stop: list[str], stop_token_ids: tuple[int, ...], wants_tokens: bool) -> None:
        self._stream, self._bytes = tokenizer.stream(), tokenizer.token_bytes()
        self._stop, self._stop_token_ids, self._wants_tokens = stop, stop_token_ids, wants_tokens
        self._held = ""
        self._decoded = self._emitted = 0  # characters
        self._tokens: deque[Token] = deque()
        self.completion_tokens = 0
        self.is_stopped = False

    def push(self, token_id: int, logprob: float) -> Piece:
        """Take the next token; `is_stopped` is true from the moment a stop string is complete."""
        self.completion_tokens += 1
        if token_id in self._stop_token_ids:
            return Piece(completion_tokens=self.completion_tokens)
        new = self._stream.push(token_id)
        if self._wants_tokens:
            raw = self._bytes[token_id] if token_id < len(self._bytes) else b""
            text = raw.decode("utf-8", "replace")
            before = len(new) - len(text) if new.endswith(text) else 0  # the end of a character that began earlier
            self._tokens.append(Token(raw, text, max(logprob, LEAST_LOGPROB), self._decoded + before))
        return self._release(new, is_last=False)

    def finish(self) -> Piece:
        """What was held back, when no more tokens come."""
        return Piece(completion_tokens=self.completion_tokens) if self.is_stopped else self._release(self._stream.finish(), True)

    def _release(self, new: str, is_last: bool) -> Piece:
        self._decoded += len(new)
        self._held += new
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            text, self._held = self._held[:min(found)[1]], ""  # the one that is complete first, wherever tokens end
        else:
            keep = 0 if is_last else self._possible_stop()
            text, self._held = self._held[:len(self._held) - keep], self._held[len(self._held) - keep:]
        self._emitted += len(text)
        tokens = []
        while self._tokens and (self._tokens[0].offset < self._emitted or (is_last and not found)):
            tokens.append(self._tokens.popleft())
        return Piece(text, tokens, completion_tokens=self.completion_tokens)

    def _possible_stop(self) -> int:
        """The length of the longest end of the held text with which some stop string begins."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0
