from __future__ import annotations

import itertools

import pytest
from hypothesis import given
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
    shape = {"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 512,
             "num_hidden_layers": 2, "seq_len": 64}
    check_model(Layout(tp=2), **shape)
    with pytest.raises(LayoutError, match=r"tp = 3 does not divide num_key_value_heads = 2; tp may be 1, 2"):
        check_model(Layout(tp=3), **shape)
    with pytest.raises(LayoutError, match="more than the 2 blocks"):
        check_model(Layout(pp=3), **shape)
    with pytest.raises(LayoutError, match="cp = 3"):
        check_model(Layout(cp=3), **shape)


def test_batches_divide_or_name_the_nearest() -> None:
    assert check_batch(global_batch_tokens=4096, seq_len=256, micro_batch_size=4, data_ranks=2) == (16, 2)
    with pytest.raises(LayoutError, match="nearest is 4096"):
        check_batch(global_batch_tokens=4097, seq_len=256, micro_batch_size=4, data_ranks=2)
    with pytest.raises(LayoutError, match="nearest global_batch_tokens is 4096"):
        check_batch(global_batch_tokens=256 * 17, seq_len=256, micro_batch_size=8, data_ranks=2)
    with pytest.raises(LayoutError, match=r"nearest global_batch_tokens is 3072, or 1, 2, 4 data ranks$"):
        check_batch(global_batch_tokens=4096, seq_len=256, micro_batch_size=4, data_ranks=3)


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
