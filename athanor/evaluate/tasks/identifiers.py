"""Does the model go on with exactly the identifier that stands next in held-out Python code?

A fixed sample of all places where an identifier (no keyword) begins, chosen by hash, so that it is the same for every
model and seed. The prompt is the document's own tokens up to the token in which the identifier begins, as much as fits;
what that token holds before the identifier (a space, a dot, a bracket) has to be produced as well, since a prompt
that ends inside a word would be one the model never saw. Greedy; right when the identifier comes and then ends.
"""

from __future__ import annotations

import hashlib
import io
import keyword
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from athanor.data.text.tokenizer import Tokenizer
from athanor.evaluate.scorers import exact
from athanor.evaluate.scores import Score, share
from athanor.evaluate.subject import Progress, Subject, generate, held_out
from athanor.foundation.errors import ModelError, UserError

PLACES = 300
NEW_TOKENS = 10  # a longer identifier cannot be right, and counts as wrong


@dataclass(frozen=True)
class Place:
    """Where an identifier begins: the document's number, the offset in characters, and the identifier."""

    document: int
    offset: int
    identifier: str


def check(data: Path) -> None:
    """Refuse data that hold no Python file, before a model is trained."""
    if not any(row["uri"].endswith(".py") for row in held_out(data, "evaluation.jsonl", "uri")):
        raise UserError(f"{data / 'evaluation.jsonl'} holds no Python file; raise data.evaluation_share, or leave out the "
                        "task identifiers, if the text has none")


def run(subject: Subject, data: Path, limit: int | None, progress: Progress) -> Score:
    """Score `PLACES` identifiers (at most `limit`) of all held-out files that end in .py."""
    rows = [row for row in held_out(data, "evaluation.jsonl", "text", "uri", "doc_id") if row["uri"].endswith(".py")]
    texts = [row["text"] for row in rows]
    places = choose([row["doc_id"] for row in rows], texts, min(PLACES, limit or PLACES))
    if not places:
        raise UserError(f"{data / 'evaluation.jsonl'} holds no Python file with an identifier in it")
    room = subject.context_tokens - NEW_TOKENS
    if room < 1:
        raise ModelError(f"a context of {subject.context_tokens} tokens leaves no room for a prompt")
    coded = {number: encode(subject.tokenizer, texts[number]) for number in {place.document for place in places}}
    prompts, expected = [], []
    for place in places:
        ids, ends = coded[place.document]
        prompt, pending = cut(ids, ends, texts[place.document], place.offset)
        prompts.append([subject.tokenizer.bos_id, *prompt][-room:])
        expected.append(pending + place.identifier)
    answers = generate(subject, prompts, [NEW_TOKENS] * len(prompts), progress)
    values = [right(text, reason, wanted) for (text, reason), wanted in zip(answers, expected, strict=True)]
    plain = [value for value, wanted, place in zip(values, expected, places, strict=True)
             if wanted.strip() == place.identifier]
    return share(values, {
        "documents": len(texts), "context_tokens": room, "new_tokens": NEW_TOKENS, "interval": "95 % Wilson",
        "without_a_sign": {"right": int(sum(plain)), "count": len(plain)},
        "examples": [{"expected": wanted, "answer": text} for (text, _), wanted in zip(answers[:5], expected, strict=False)]},
        [(rows[place.document]["doc_id"], place.offset, place.identifier) for place in places])


def right(answer: str, finish_reason: str, expected: str) -> float:
    """1.0 when the answer is the expected text and then something else, or the end of the document; else 0.0."""
    if finish_reason != "stop" and len(answer) <= len(expected):
        return 0.0  # cut short: nobody knows whether the identifier would have gone on
    return exact.score("", answer, expected)[0]


def choose(doc_ids: list[str], texts: list[str], count: int) -> list[Place]:
    """The `count` places with the smallest hash of document and offset, over all documents."""
    ranked = []
    for number, (doc_id, text) in enumerate(zip(doc_ids, texts, strict=True)):
        for offset, identifier in identifiers(text):
            digest = hashlib.sha256(f"{doc_id}:{offset}".encode()).digest()
            ranked.append((digest, Place(number, offset, identifier)))
    ranked.sort(key=lambda pair: pair[0])
    return [place for _, place in ranked[:count]]


def identifiers(text: str) -> Iterator[tuple[int, str]]:
    """Offset in characters and text of every identifier; none when Python cannot read the file."""
    starts = [0]
    for line in io.StringIO(text):
        starts.append(starts[-1] + len(line))
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (tokenize.TokenError, SyntaxError, ValueError):
        return
    for token in tokens:
        if token.type == tokenize.NAME and not keyword.iskeyword(token.string):
            yield starts[token.start[0] - 1] + token.start[1], token.string


def encode(tokenizer: Tokenizer, text: str) -> tuple[list[int], np.ndarray]:
    """Token ids of a text, and the offset in bytes at which each ends. Raises ModelError unless they are its bytes."""
    ids, table = tokenizer.encode(text), tokenizer.token_bytes()
    if b"".join(table[index] for index in ids) != text.encode():
        raise ModelError("the model's tokenizer does not give back the held-out text byte for byte")
    return ids, np.cumsum([len(table[index]) for index in ids])


def cut(ids: list[int], ends: np.ndarray, text: str, offset: int) -> tuple[list[int], str]:
    """The tokens before the one in which character `offset` lies, and the text of that one before the character."""
    before = text[:offset].encode()
    index = int(np.searchsorted(ends, len(before), side="right"))
    start = int(ends[index - 1]) if index else 0
    while index and before[start:start + 1] and before[start] & 0xC0 == 0x80:  # tokens may end inside a character
        index -= 1
        start = int(ends[index - 1]) if index else 0
    return ids[:index], before[start:].decode()
