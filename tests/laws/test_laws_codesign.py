from __future__ import annotations

import pytest

from athanor.foundation.errors import UserError
from athanor.foundation.units import PD_FLOP
from athanor.laws import scaling
from athanor.laws.codesign import COLUMNS, DAY, aspect_penalty, explain, family, rank_designs, table
from athanor.models.shapes.decoder import DecoderShape

SIZE, VOCABULARY = 8_030_261_248, 128_256  # Llama 3 8B


def sized(layers: int, width: int) -> DecoderShape:
    return DecoderShape(1000, width, 4 * width, layers, 1)


def evenly(shape: DecoderShape) -> float:
    """Device-seconds per token of a machine to which structure is nothing."""
    return shape.flops(1.0, 2048.5) / 4e14


def by_width(shape: DecoderShape) -> float:
    """Of a machine that is half as fast at width 2048, and pays for every layer."""
    return evenly(shape) * (1 + 2048 / shape.hidden_size) + shape.num_hidden_layers * 1e-7


def test_penalty_is_what_kaplan_measured() -> None:
    assert aspect_penalty(sized(6, 4288)) == pytest.approx(0.03, rel=1e-3)
    assert aspect_penalty(sized(48, 1600)) == aspect_penalty(sized(96, 12288)) == 0.0
    assert 0 < aspect_penalty(sized(76, 16384)) < 0.005, "Yuan 1.0"
    assert aspect_penalty(sized(100, 1000)) > aspect_penalty(sized(60, 1000)) > 0, "too deep"


@pytest.mark.parametrize("tp", [1, 4])
def test_family_has_one_size_and_can_be_cut(tp: int) -> None:
    shapes = family(SIZE, VOCABULARY, tp=tp)
    assert len(set(shapes)) == len(shapes) > 10
    for shape in shapes:
        assert shape.parameters() == pytest.approx(SIZE, rel=0.02)
        assert shape.num_key_value_heads % tp == shape.intermediate_size % tp == 0
    published = [s for s in shapes if (s.hidden_size, s.intermediate_size, s.num_hidden_layers, s.num_key_value_heads)
                 == (4096, 14336, 32, 8)]
    assert len(published) == 1 and published[0].parameters() == SIZE, "Llama 3 8B is one of them"
    assert len({s.num_hidden_layers for s in shapes}) >= 5 and len({s.num_key_value_heads for s in shapes}) >= 3
    with pytest.raises(UserError, match="comes within 2 % of 1 M parameters"):
        family(1e6, VOCABULARY)


def test_equal_budgets_are_spent_whole() -> None:
    shapes, refit = family(SIZE, VOCABULARY), scaling.law("refit")
    for one in rank_designs(shapes, by_width, pd=500):
        assert one.tokens * one.shape.flops(1.0, 2048.5) == pytest.approx(500 * PD_FLOP)
        assert one.device_days == pytest.approx(one.tokens * by_width(one.shape) / DAY)
        blocks = one.shape.num_hidden_layers * one.shape.block_parameters()
        assert one.losses["refit"] == pytest.approx(refit.loss(blocks, one.tokens) * (1 + aspect_penalty(one.shape)))
    ranked = rank_designs(shapes, by_width, device_days=1000)
    assert all(one.device_days == pytest.approx(1000) for one in ranked)
    losses = [one.losses["refit"] for one in ranked]
    assert losses == sorted(losses), "of equal device-days the lowest loss is best"
    assert ranked[0].cost == pytest.approx(1000) and ranked[-1].cost > ranked[0].cost


@pytest.mark.parametrize("budget", [{"pd": 500.0}, {"device_days": 1000.0}])
def test_hardware_that_likes_width_makes_the_best_shape_wider(budget: dict[str, float]) -> None:
    shapes = family(SIZE, VOCABULARY)
    plain, wide = (rank_designs(shapes, speed, **budget)[0].shape for speed in (evenly, by_width))  # type: ignore[arg-type]
    assert wide.hidden_size > plain.hidden_size and wide.num_hidden_layers <= plain.num_hidden_layers
    assert aspect_penalty(plain) == 0.0, "with nothing to gain, nothing is risked"


@pytest.mark.parametrize(("slower", "key_heads"), [(1.01, 8), (1.03, 5)])
def test_of_as_good_shapes_the_one_whose_heads_a_node_can_share_comes_first(slower: float, key_heads: int) -> None:
    odd, even = (DecoderShape(1000, 40 * 64, 4 * 2560, 24, 40, keys, head_dim=64) for keys in (5, 8))
    alike = rank_designs([odd, even], evenly, pd=10)
    assert alike[0].cost == pytest.approx(alike[1].cost, rel=0.005), "or speed would not decide"

    def first(per_node: int) -> DecoderShape:
        return rank_designs([odd, even], lambda shape: evenly(shape) * (slower if shape is even else 1.0), pd=10,
                            per_node=per_node)[0].shape

    assert first(1) is odd and first(8).num_key_value_heads == key_heads


def test_explanation_and_table_name_the_best_first() -> None:
    ranked = rank_designs(family(SIZE, VOCABULARY), by_width, pd=500)
    words, rows = explain(ranked), table(ranked)
    assert words.startswith(f"{ranked[0].shape.num_hidden_layers} layers of {ranked[0].shape.hidden_size} ")
    assert "the deepest, " in words and "slower per token" in words and "do not tell depth from width" in words
    assert len(rows) == len(ranked) and {len(row) for row in rows} == {len(COLUMNS) + len(ranked[0].losses)}
    for budget in ({}, {"pd": 1.0, "device_days": 1.0}):
        with pytest.raises(UserError, match="one budget"):
            rank_designs([], evenly, **budget)  # type: ignore[arg-type]
