"""The order of samples: a bijection, exact shares, and the same answer for any way of asking."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from athanor.data.order import BLOCK, block_counts, locate, make_key, permute
from athanor.data.packing import pack


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
def test_permutation_is_a_bijection(size: int, key: int) -> None:
    image = permute(np.arange(size), size, key)
    assert np.array_equal(np.sort(image), np.arange(size))


def test_permutation_depends_on_its_key_and_mixes() -> None:
    image = permute(np.arange(10_000), 10_000, make_key(7, 1))
    other = permute(np.arange(10_000), 10_000, make_key(7, 2))
    assert (image == other).mean() < 0.01
    assert abs(np.corrcoef(np.arange(10_000), image)[0, 1]) < 0.05
    assert (np.diff(image) == 1).mean() < 0.01


def test_each_row_comes_once_per_epoch_and_in_another_order() -> None:
    _, first = locate(np.arange(1000), [1000], [1.0], seed=3)
    _, second = locate(np.arange(1000, 2000), [1000], [1.0], seed=3)
    assert np.array_equal(np.sort(first), np.arange(1000))
    assert np.array_equal(np.sort(second), np.arange(1000))
    assert not np.array_equal(first, second)


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 900), min_size=1, max_size=4), seed=st.integers(0, 2**40), begin=st.integers(0, 10**12))
def test_order_is_the_same_for_any_way_of_asking(sizes: list[int], seed: int, begin: int) -> None:
    samples = np.arange(begin, begin + 50)
    weights = [float(i + 1) for i in range(len(sizes))]
    together = np.stack(locate(samples, sizes, weights, seed), axis=1)
    one_by_one = np.concatenate([np.stack(locate(np.array([s]), sizes, weights, seed), axis=1) for s in samples])
    assert np.array_equal(together, one_by_one)
    assert all(row < sizes[source] for source, row in together)


def test_mixture_has_exact_shares_and_uses_each_source_up() -> None:
    sizes, weights = [2 * 3072, 500], [3.0, 1.0]
    source, row = locate(np.arange(2 * BLOCK), sizes, weights, seed=5)
    assert (source == 0).sum() == 2 * 3072 and (source == 1).sum() == 2 * 1024
    assert np.array_equal(np.sort(row[source == 0]), np.arange(2 * 3072))
    assert np.bincount(row[source == 1], minlength=500).min() == 4
    assert 0.65 < (source[:400] == 0).mean() < 0.85


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1e-9], [1.0, 2.0, 4.0], [0.3, 0.3, 0.4]])
def test_block_counts_add_up(weights: list[float]) -> None:
    counts = block_counts(weights)
    assert counts.sum() == BLOCK and counts.min() >= 1
    assert np.abs(counts - np.array(weights) / sum(weights) * BLOCK).max() <= 1


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 120), max_size=80))
def test_packing_splits_and_loses_nothing(lengths: list[int]) -> None:
    rows, too_long = pack(lengths, 100)
    assert sorted([i for row in rows for i in row] + too_long) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= 100 for row in rows)
    assert all(lengths[i] > 100 for i in too_long)
    half_empty = [row for row in rows if sum(lengths[i] for i in row) <= 50]
    assert len(half_empty) <= 1  # two of them would have been put together


def test_packing_fills_rows() -> None:
    lengths = np.random.default_rng(0).integers(10, 200, 5000).tolist()
    rows, _ = pack(lengths, 256)
    assert sum(lengths) / (256 * len(rows)) > 0.99
