from __future__ import annotations

import itertools
import re
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from athanor.foundation.errors import LayoutError
from athanor.foundation.layout import Layout, check_batch, check_model, resolve, split_evenly


def test_the_rest_goes_to_dp_shard_and_coordinates_are_outer_to_inner() -> None:
    layout = resolve(Layout(pp=2, tp=2, dp_shard=-1), 8)
    assert layout.dp_shard == 2 and layout.data_ranks == 2
    assert layout.coordinates(0) == dict.fromkeys(("pp", "dp_replicate", "dp_shard", "cp", "tp"), 0)
    assert layout.coordinates(5) == {"pp": 1, "dp_replicate": 0, "dp_shard": 0, "cp": 0, "tp": 1}


def test_degrees_that_do_not_multiply_are_refused_with_the_nearest() -> None:
    with pytest.raises(LayoutError, match=r"tp 3 = 3, but there are 4 ranks; nearest layouts: "):
        resolve(Layout(tp=3), 4)
    with pytest.raises(LayoutError, match="does not divide the 4 ranks"):
        resolve(Layout(tp=3, dp_shard=-1), 4)


def test_what_a_degree_splits_must_be_divisible() -> None:
    shape = SimpleNamespace(num_attention_heads=6, num_key_value_heads=2, intermediate_size=96, vocab_size=512,
                            num_hidden_layers=2)
    check_model(Layout(tp=2), shape, 64)
    with pytest.raises(LayoutError, match=r"tp = 3 does not divide num_key_value_heads = 2; tp may be 1, 2"):
        check_model(Layout(tp=3), shape, 64)
    shape.moe_intermediate_size = 7
    with pytest.raises(LayoutError, match=r"tp = 2 does not divide moe_intermediate_size = 7; tp may be 1$"):
        check_model(Layout(tp=2), shape, 64)
    with pytest.raises(LayoutError, match="more than the 2 blocks"):
        check_model(Layout(pp=3), shape, 64)
    with pytest.raises(LayoutError, match="more than the 1 blocks"):
        check_model(Layout(pp=2), shape, 64, num_hidden_layers=1)
    with pytest.raises(LayoutError, match="cp = 3"):
        check_model(Layout(cp=3), shape, 64)


def test_batches_divide_or_name_the_nearest() -> None:
    assert check_batch(global_batch_tokens=4096, seq_len=256, micro_batch_size=4, data_ranks=2) == (16, 2)
    with pytest.raises(LayoutError, match="nearest is 4096"):
        check_batch(global_batch_tokens=4097, seq_len=256, micro_batch_size=4, data_ranks=2)
    with pytest.raises(LayoutError, match="nearest global_batch_tokens is 4096"):
        check_batch(global_batch_tokens=256 * 17, seq_len=256, micro_batch_size=8, data_ranks=2)
    with pytest.raises(LayoutError, match=r"nearest global_batch_tokens is 3072, or with 2 data ranks \(.*\) they do$"):
        check_batch(global_batch_tokens=4096, seq_len=256, micro_batch_size=4, data_ranks=3)
    with pytest.raises(LayoutError, match=r"or with 1 data rank \(dp_replicate x dp_shard\) and micro_batch_size = 3 they do$"):
        check_batch(global_batch_tokens=3 * 256, seq_len=256, micro_batch_size=8, data_ranks=2)
    with pytest.raises(LayoutError, match=r"micro_batch_size may be any multiple of 2$"):
        check_batch(global_batch_tokens=6 * 8, seq_len=8, micro_batch_size=3, data_ranks=1, tp=16)


@settings(deadline=None)  # brute force takes what a busy machine leaves it
@given(st.integers(1, 96), st.integers(1, 12), st.integers(1, 12), st.sampled_from([1, 4, 16]))
def test_what_is_named_for_a_batch_that_does_not_split_is_the_nearest_that_does(rows: int, size: int, ranks: int,
                                                                                tp: int) -> None:
    def splits(other_ranks: int, other_size: int) -> bool:
        return rows % (other_ranks * other_size) == 0 and 8 * other_size % tp == 0

    if rows % (ranks * size) == 0:
        return
    with pytest.raises(LayoutError) as refused:
        check_batch(global_batch_tokens=8 * rows, seq_len=8, micro_batch_size=size, data_ranks=ranks, tp=tp)
    named = re.search(r", or with (?:(\d+) data ranks? \(dp_replicate x dp_shard\))?(?: and )?"
                      r"(?:micro_batch_size = (\d+))? they do$", str(refused.value))
    working = [(i, j) for i in range(1, ranks + 1) for j in range(1, rows + 1) if splits(i, j)]
    assert bool(named) == bool(working)
    if named:
        found = (int(named[1] or ranks), int(named[2] or size))
        assert splits(*found) and found[0] == max(i for i, _ in working)
        assert max(found[1] / size, size / found[1]) == min(max(j / size, size / j) for i, j in working if i == found[0])


@settings(deadline=None)  # brute force takes what a busy machine leaves it
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 4))
def test_splits_are_optimal(costs: list[int], stages: int) -> None:
    if stages > len(costs):
        with pytest.raises(LayoutError):
            split_evenly(costs, stages)
        return
    sizes = split_evenly(costs, stages)
    assert sum(sizes) == len(costs) and min(sizes) >= 1 and len(sizes) == stages

    def worst(cuts: tuple[int, ...]) -> int:
        edges = [0, *cuts, len(costs)]
        return max(sum(costs[a:b]) for a, b in itertools.pairwise(edges))

    best = min(worst(cuts) for cuts in itertools.combinations(range(1, len(costs)), stages - 1))
    assert worst(tuple(itertools.accumulate(sizes[:-1]))) == best
