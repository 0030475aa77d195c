"""How many bits the model needs for a byte of held-out text, beside gzip and xz on exactly the same bytes.

The bits are those of all tokens of a document's text, given bos; the eos behind it is not counted (the compressors are
not told where documents end either). The bytes are those of the text in UTF-8. A document longer than the context is read
in windows that overlap by half: every token is scored exactly once, with at least half a context before it wherever the
document has that much.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import math
from pathlib import Path
from typing import Any

from athanor.data.text.tokenizer import Tokenizer
from athanor.evaluate.scores import Score, bootstrap_ratio, items
from athanor.evaluate.subject import Progress, Subject, held_out, spread
from athanor.foundation.errors import ModelError, UserError

WINDOWS_PER_CALL = 64


def check(data: Path) -> None:
    """Refuse data without a held-out document, before a model is trained."""
    held_out(data, "evaluation.jsonl", "text")


def run(subject: Subject, data: Path, limit: int | None, progress: Progress) -> Score:
    """Score every held-out document (or `limit` of them, evenly spaced)."""
    texts = [row["text"] for row in spread(held_out(data, "evaluation.jsonl", "text"), limit) if row["text"]]
    if not texts:
        raise UserError(f"{data / 'evaluation.jsonl'} holds no byte of text, so there is nothing to score")
    size = subject.context_tokens
    sequences = [encode(subject.tokenizer, text) for text in texts]
    work = [(number, begin, end, first) for number, ids in enumerate(sequences)
            for begin, end, first in windows(len(ids), size)]
    work.sort(key=lambda item: item[2] - item[1], reverse=True)  # equal lengths share a batch
    nats, end_nats = [0.0] * len(texts), [0.0] * len(texts)
    for start in range(0, len(work), WINDOWS_PER_CALL):
        batch = work[start:start + WINDOWS_PER_CALL]
        scored = subject.engine.score([sequences[number][begin:end] for number, begin, end, _ in batch])
        for (number, begin, end, first), logp in zip(batch, scored, strict=True):
            values = [-float(value) for value in logp[first - begin - 1:]]  # logp[i] is that of token begin + i + 1
            if end == len(sequences[number]):
                end_nats[number] = values.pop()
            nats[number] += math.fsum(values)
        progress(start + len(batch), len(work))
    raw = [text.encode() for text in texts]
    return _score(nats, end_nats, raw, {"tokens": sum(len(ids) - 2 for ids in sequences), "context_tokens": size,
                                        "stride_tokens": max(1, size // 2)})


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """bos, the text's tokens, eos. Raises ModelError when the tokens do not give back exactly this text."""
    ids = tokenizer.encode(text)
    if tokenizer.decode(ids, skip_special_tokens=False) != text:
        raise ModelError("the model's tokenizer does not give back the held-out text byte for byte, so bits per byte "
                         "would be those of another text")
    return [tokenizer.bos_id, *ids, tokenizer.eos_id]


def windows(length: int, size: int) -> list[tuple[int, int, int]]:
    """(begin, end, first scored) of windows of at most `size` tokens; each token but the first is scored exactly once."""
    stride = max(1, size // 2)
    found = [(0, min(length, size), 1)]
    while found[-1][1] < length:
        begin, previous_end = found[-1][0] + stride, found[-1][1]
        found.append((begin, min(begin + size, length), previous_end))
    return found


def _score(nats: list[float], end_nats: list[float], raw: list[bytes], details: dict[str, Any]) -> Score:
    if not all(map(math.isfinite, nats)):
        raise ModelError("the model gives held-out text no probability that is a number; its weights hold NaN or infinity")
    sizes = [len(content) for content in raw]
    total, whole = sum(sizes), b"".join(raw)
    bits = [value / math.log(2) for value in nats]
    low, high = bootstrap_ratio(bits, sizes)
    details |= {
        "bytes": total, "bytes_per_token": total / max(1, details["tokens"]),
        "with_end_of_document": (math.fsum(bits) + math.fsum(end_nats) / math.log(2)) / total,
        "gzip": 8 * len(gzip.compress(whole, 9, mtime=0)) / total,
        "xz": 8 * len(lzma.compress(whole, preset=9)) / total,
        "gzip_each": 8 * sum(len(gzip.compress(content, 9, mtime=0)) for content in raw) / total,
        "interval": "95 % bootstrap over documents", **items(hashlib.sha256(whole).hexdigest(), bits, sizes)}
    return Score(math.fsum(bits) / total, low, high, len(raw), "bits per byte", False, details)
