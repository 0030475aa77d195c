"""MinHash: estimates are unbiased, recall is what the bands promise, results do not depend on the process."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from athanor.data.deduplicate import BAND_ROWS, PERMUTATIONS, MinHasher, content_hash, most_similar, repeated


def words(first: int, last: int) -> str:
    return " ".join(f"w{i}" for i in range(first, last))


def overlapping(similarity: float, number: int, size: int = 400) -> tuple[str, str]:
    """Two texts whose five-word shingles have about this Jaccard similarity."""
    shared = round(2 * similarity * size / (1 + similarity))
    base = number * 10_000
    return words(base, base + size), words(base + size - shared, base + 2 * size - shared)


def exact_jaccard(left: str, right: str) -> float:
    a, b = ({tuple(t.split()[i:i + 5]) for i in range(len(t.split()) - 4)} for t in (left, right))
    return len(a & b) / len(a | b)


@pytest.mark.parametrize("similarity", [0.3, 0.5, 0.7, 0.9])
def test_similarity_is_estimated_without_bias_and_found(similarity: float) -> None:
    hasher = MinHasher()
    pairs = [overlapping(similarity, i) for i in range(60)]
    left = np.stack([hasher.signature(a) for a, _ in pairs])
    right = np.stack([hasher.signature(b) for _, b in pairs])
    true = np.mean([exact_jaccard(a, b) for a, b in pairs])
    estimated = (left == right).mean()
    assert abs(estimated - true) < 4 * np.sqrt(true * (1 - true) / (60 * PERMUTATIONS))
    match = most_similar(left, right)
    found = match.other == np.arange(60)
    assert found.mean() > 1 - (1 - true**BAND_ROWS) ** (PERMUTATIONS // BAND_ROWS) - 0.1
    assert np.allclose(match.similarity[found], (left == right).mean(axis=1)[found])


def test_unrelated_texts_do_not_match() -> None:
    hasher = MinHasher()
    signatures = np.stack([hasher.signature(words(i * 1000, i * 1000 + 300)) for i in range(20)])
    match = most_similar(signatures[:10], signatures[10:])
    assert match.similarity.max() < 0.2
    assert not repeated(signatures, 0.5).any()


def test_the_most_similar_one_wins_and_copies_are_counted_once() -> None:
    hasher = MinHasher()
    near, nearer = overlapping(0.6, 0)[1], words(0, 395)
    signatures = np.stack([hasher.signature(text) for text in (words(0, 400), near, nearer, words(0, 400))])
    match = most_similar(signatures[:1], signatures[1:])
    assert match.other[0] == 2 and match.similarity[0] == 1.0
    assert repeated(signatures, 0.9).tolist() == [False, False, True, True]


def test_nothing_is_like_nothing() -> None:
    empty = np.zeros((0, PERMUTATIONS), dtype=np.uint32)
    some = MinHasher().signature("a b c d e f")[None]
    assert most_similar(some, empty).other.tolist() == [-1]
    assert most_similar(empty, some).other.tolist() == []
    assert repeated(empty, 0.5).tolist() == []


def test_signatures_are_equal_in_every_process() -> None:
    program = ("import hashlib; from athanor.data.deduplicate import MinHasher\n"
               "print(hashlib.sha256(MinHasher().signature('def f(x): return x + 1  # é').tobytes()).hexdigest())")
    done = [subprocess.run([sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True,
                           timeout=60).stdout for seed in ("1", "2")]
    own = hashlib.sha256(MinHasher().signature("def f(x): return x + 1  # é").tobytes()).hexdigest()
    assert done[0] == done[1] == own.encode() + b"\n"
    assert content_hash("a") != content_hash("b") and content_hash("é") == content_hash("é")
