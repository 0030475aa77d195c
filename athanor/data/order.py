"""The order of samples as a pure function: a keyed permutation of each source, and a mixture with exact shares.

Nothing is stored and nothing is drawn in sequence: sample 10^9 costs as much as sample 0, whatever came before.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.uint64]
BLOCK = 4096  # samples in which every source has its exact share
ROUNDS = 6


def permute(index: NDArray[np.int64], size: int, key: Array | int) -> NDArray[np.int64]:
    """Where a keyed bijection of range(size) sends each index (a Feistel network that walks its cycles).

    `key` is one number or one per index; indices outside range(size) are an error of the caller.
    """
    assert size > 0 and (len(index) == 0 or (int(index.min()) >= 0 and int(index.max()) < size)), "index out of range"
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask, shift = np.uint64((1 << half_bits) - 1), np.uint64(half_bits)
    keys = np.broadcast_to(np.asarray(key, dtype=np.uint64), index.shape)
    values = index.astype(np.uint64)
    left = np.arange(len(index))
    while len(left):
        value, its_key = values[left], keys[left]
        high, low = value >> shift, value & mask
        for number in range(ROUNDS):
            scrambled = mix(low ^ mix(its_key + np.full(1, number, dtype=np.uint64)))
            high, low = low, (high ^ scrambled) & mask
        values[left] = (high << shift) | low
        left = left[values[left] >= np.uint64(size)]
    return values.astype(np.int64)


def mix(values: Array) -> Array:
    """Scramble 64-bit numbers (the finaliser of SplitMix64, Steele et al. 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    scrambled: Array = values ^ (values >> np.uint64(31))
    return scrambled


def make_key(seed: int, *parts: NDArray[np.int64] | int) -> Array:
    """One key of (seed, parts…); parts may be arrays."""
    key = mix(np.asarray([seed], dtype=np.uint64))
    for part in parts:
        key = mix(key ^ mix(np.atleast_1d(np.asarray(part)).astype(np.uint64)))
    return key


def block_counts(weights: Sequence[float]) -> NDArray[np.int64]:
    """Samples of each source in a block: largest remainders, at least one each."""
    share = np.asarray(weights, dtype=np.float64)
    exact = share / share.sum() * BLOCK
    counts: NDArray[np.int64] = np.maximum(1, np.floor(exact)).astype(np.int64)
    by_remainder = np.argsort(-(exact - counts), kind="stable")
    for place in range(abs(BLOCK - int(counts.sum()))):
        if counts.sum() < BLOCK:
            counts[by_remainder[place % len(counts)]] += 1
        else:
            counts[np.argmax(counts)] -= 1
    return counts


def locate(samples: NDArray[np.int64], sizes: Sequence[int], weights: Sequence[float],
           seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which (source, row) each sample number is.

    `sizes` are the rows of each source. A source is used up in a fresh order before any row of it comes again.
    """
    if len(sizes) == 1:
        source, draw = np.zeros(len(samples), dtype=np.int64), samples
    else:
        counts = block_counts(weights)
        ends = np.cumsum(counts)
        block = samples // BLOCK
        slot = permute(samples % BLOCK, BLOCK, make_key(seed, 1, block))
        source = np.searchsorted(ends, slot, side="right").astype(np.int64)
        draw = block * counts[source] + slot - (ends - counts)[source]
    row = np.empty(len(samples), dtype=np.int64)
    for number, size in enumerate(sizes):
        mine = source == number
        row[mine] = permute(draw[mine] % size, size, make_key(seed, 2, number, draw[mine] // size))
    return source, row


def pass_over(samples: int, passed: Sequence[Sequence[int]]) -> int:
    """The sample to go on with after `samples` of them, when the ranges [first, end) of `passed` are left out."""
    while ends := [end for first, end in passed if first <= samples < end]:
        samples = max(ends)
    return samples
