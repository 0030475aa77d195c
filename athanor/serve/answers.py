"""The JSON of answers: OpenAI's objects for completions and chats, whole or chunk by chunk."""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from athanor.serve.text import Piece, Token


@dataclass
class Choice:
    """One answer so far; `echo` is the prompt's text when the client wants it before the answer."""

    echo: str = ""
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None
    completion_tokens: int = 0

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.finish_reason = piece.finish_reason
        self.completion_tokens = piece.completion_tokens


class Answer(ABC):
    """The object of one request: its identity, its choices, and how pieces and the whole are written.

    `logprobs` is None when none are wanted, else the number of alternatives: 1 is the written token itself.
    """

    def __init__(self, model: str, fingerprint: str, choices: list[Choice], prompt_tokens: int, logprobs: int | None) -> None:
        self.choices, self.prompt_tokens, self.logprobs = choices, prompt_tokens, logprobs
        self.common = {"created": int(time.time()), "model": model, "system_fingerprint": fingerprint}

    def usage(self) -> dict[str, int]:
        prompt, completion = self.prompt_tokens, sum(choice.completion_tokens for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def begin(self) -> Iterator[dict[str, Any]]:
        """Chunks that come before any token."""
        return iter(())

    @abstractmethod
    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """A piece of choice `index`."""

    @abstractmethod
    def whole(self) -> dict[str, Any]:
        """Everything at once."""

    def last(self) -> dict[str, Any]:
        """The chunk with the usage, when the client asked for it."""
        return {**self.chunk(0, Piece()), "choices": [], "usage": self.usage()}


class ChatAnswer(Answer):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.common = {"id": f"chatcmpl-{secrets.token_hex(12)}", **self.common}

    def begin(self) -> Iterator[dict[str, Any]]:
        for index in range(len(self.choices)):
            yield self._chunk(index, {"role": "assistant", "content": ""}, None, None)

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text or piece.tokens else {}
        return self._chunk(index, delta, self._logprobs(piece.tokens), piece.finish_reason)

    def whole(self) -> dict[str, Any]:
        choices = [{"index": index, "message": {"role": "assistant", "content": choice.text, "refusal": None},
                    "logprobs": self._logprobs(choice.tokens), "finish_reason": choice.finish_reason}
                   for index, choice in enumerate(self.choices)]
        return {**self.common, "object": "chat.completion", "choices": choices, "usage": self.usage()}

    def _chunk(self, index: int, delta: dict[str, Any], logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        return {**self.common, "object": "chat.completion.chunk",
                "choices": [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}]}

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        return {"refusal": None, "content": [{"token": token.text, "logprob": token.logprob, "bytes": list(token.raw),
                                              "top_logprobs": []} for token in tokens]}


class CompletionAnswer(Answer):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.common = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", **self.common}

    def begin(self) -> Iterator[dict[str, Any]]:
        for index, choice in enumerate(self.choices):
            if choice.echo:
                yield {**self.common, "choices": [{"index": index, "text": choice.echo, "logprobs": None, "finish_reason": None}]}

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        logprobs = self._logprobs(piece.tokens, len(self.choices[index].echo))
        return {**self.common, "choices": [{"index": index, "text": piece.text, "logprobs": logprobs,
                                            "finish_reason": piece.finish_reason}]}

    def whole(self) -> dict[str, Any]:
        choices = [{"index": index, "text": choice.echo + choice.text, "finish_reason": choice.finish_reason,
                    "logprobs": self._logprobs(choice.tokens, len(choice.echo))} for index, choice in enumerate(self.choices)]
        return {**self.common, "choices": choices, "usage": self.usage()}

    def _logprobs(self, tokens: list[Token], begin: int) -> dict[str, Any] | None:
        if self.logprobs is None:
            return None
        alternatives = [{token.text: token.logprob} for token in tokens] if self.logprobs else None
        return {"tokens": [token.text for token in tokens], "token_logprobs": [token.logprob for token in tokens],
                "top_logprobs": alternatives, "text_offset": [begin + token.offset for token in tokens]}


def event(value: dict[str, Any] | str) -> bytes:
    """One server-sent event."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()
