"""Duplicates: exact ones by a hash of the content, near ones by MinHash over five-word shingles."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from athanor.data.order import make_key, mix

SHINGLE_WORDS = 5
PERMUTATIONS = 111  # 37 bands of 3: two documents of Jaccard similarity 0.5 meet in a band with 99 %
BAND_ROWS = 3
EVALUATION_SIMILARITY = 0.5  # a training document this similar to one of the evaluation is left out
TRAINING_SIMILARITY = 0.8  # pairs of training documents this similar are counted
WORD = re.compile(r"\w+|[^\w\s]+")
CHUNK = 2048  # shingles at a time, so that the table of hashes stays in the cache
MEMO_WORDS = 1_000_000

Signatures = NDArray[np.uint32]


class Match(NamedTuple):
    """The most similar other document, by its row, and the estimated Jaccard similarity; -1 when there is none."""

    other: NDArray[np.int64]
    similarity: NDArray[np.float64]


def content_hash(text: str) -> bytes:
    """128 bits of BLAKE2b of the text's UTF-8."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


class MinHasher:
    """Makes signatures: `PERMUTATIONS` minima over multiply-shift hashes of the shingles (Dietzfelbinger et al. 1997)."""

    def __init__(self) -> None:
        numbers = np.arange(PERMUTATIONS, dtype=np.int64)
        self._factor = make_key(0, 1, numbers) | np.uint64(1)
        self._summand = make_key(0, 2, numbers)
        self._words: dict[str, int] = {}

    def signature(self, text: str) -> Signatures:
        """uint32 [PERMUTATIONS]"""
        shingles = self._shingles(text)
        least = np.full(PERMUTATIONS, 0xFFFFFFFF, dtype=np.uint64)
        for begin in range(0, len(shingles), CHUNK):
            hashes = shingles[begin:begin + CHUNK, None] * self._factor
            hashes += self._summand
            np.minimum(least, hashes.min(axis=0) >> np.uint64(32), out=least)
        return least.astype(np.uint32)

    def _shingles(self, text: str) -> NDArray[np.uint64]:
        words = WORD.findall(text)
        memo = self._words
        if len(memo) > MEMO_WORDS:
            memo.clear()
        for word in set(words).difference(memo):
            memo[word] = zlib.crc32(word.encode())
        codes = np.fromiter((memo[word] for word in words), dtype=np.uint64, count=len(words))
        width = min(SHINGLE_WORDS, len(codes))
        if width == 0:
            return np.zeros(0, dtype=np.uint64)
        count = len(codes) - width + 1
        joined = np.zeros(count, dtype=np.uint64)
        for place in range(width):
            joined = mix(joined ^ codes[place:place + count])
        return np.unique(joined)


def most_similar(left: Signatures, right: Signatures) -> Match:
    """For each row of `left` the row of `right` that is most like it, among those that share a band with it."""
    best = Match(np.full(len(left), -1, dtype=np.int64), np.zeros(len(left)))
    if len(left) == 0 or len(right) == 0:
        return best
    found: list[NDArray[np.int64]] = []
    for left_keys, right_keys in zip(_bands(left), _bands(right), strict=True):
        order = np.argsort(right_keys, kind="stable")
        first = np.searchsorted(right_keys[order], left_keys, side="left")
        count = np.searchsorted(right_keys[order], left_keys, side="right") - first
        rows = np.repeat(np.arange(len(left)), count)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(count) - count, count)
        found.append(np.stack([rows, order[np.repeat(first, count) + within]], axis=1))
    pairs = np.unique(np.concatenate(found), axis=0)
    similarity = _similarity(left[pairs[:, 0]], right[pairs[:, 1]])
    ascending = np.argsort(similarity, kind="stable")
    best.other[pairs[ascending, 0]] = pairs[ascending, 1]  # the last, most similar one stays
    best.similarity[pairs[ascending, 0]] = similarity[ascending]
    return best


def repeated(signatures: Signatures, threshold: float) -> NDArray[np.bool_]:
    """Which rows are at least `threshold` similar to an earlier row, compared with the first of each shared band."""
    result = np.zeros(len(signatures), dtype=bool)
    for keys in _bands(signatures):
        order = np.argsort(keys, kind="stable")
        sorted_keys = keys[order]
        first = order[np.searchsorted(sorted_keys, sorted_keys, side="left")]
        later = first != order
        alike = _similarity(signatures[first[later]], signatures[order[later]]) >= threshold
        result[order[later][alike]] = True
    return result


def _bands(signatures: Signatures) -> Iterator[NDArray[np.uint64]]:
    for begin in range(0, PERMUTATIONS, BAND_ROWS):
        key = np.zeros(len(signatures), dtype=np.uint64)
        for column in range(begin, begin + BAND_ROWS):
            key = mix(key ^ signatures[:, column].astype(np.uint64))
        yield key


def _similarity(left: Signatures, right: Signatures) -> NDArray[np.float64]:
    return np.asarray((left == right).mean(axis=1), dtype=np.float64) if len(left) else np.zeros(0)
