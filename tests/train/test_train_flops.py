"""The model's arithmetic is what operators really compute: MFU in both conventions rests on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from athanor.models.context import Packed
from athanor.models.decoder import Decoder
from athanor.models.initialize import initialize
from athanor.models.shapes.decoder import DecoderShape
from athanor.models.shapes.deepseek_v3 import Shape
from athanor.models.zoo import deepseek_v3
from athanor.train import flops

SHAPE = DecoderShape(vocab_size=384, hidden_size=48, intermediate_size=112, num_hidden_layers=3, num_attention_heads=6,
                     num_key_value_heads=2, tie_word_embeddings=False)


def counted(lengths: Sequence[int], model: Decoder | None = None) -> float:
    """FLOPs of forward and backward over documents of these lengths, as torch's counter sees them."""
    model = Decoder(SHAPE) if model is None else model
    initialize(model, 0)
    total = sum(lengths)
    tokens = torch.arange(total) % SHAPE.vocab_size
    with FlopCounterMode(display=False, custom_mapping=flops.FORMULAS) as counter:
        scored = model(tokens, replace(Packed.of(lengths), mtp_weight=0.3), tokens, torch.ones(total))
        scored.weighted_sum.backward()
    return float(counter.get_total_flops())


@pytest.mark.parametrize("lengths", [[64], [64, 64, 64], [7, 1, 50, 3, 90, 41]], ids=str)
def test_flops_of_the_shape_are_those_of_the_operators(lengths: list[int]) -> None:
    total = sum(lengths)
    keys_seen = sum(length * (length + 1) // 2 for length in lengths)
    assert counted(lengths) == pytest.approx(SHAPE.flops(total, keys_seen / total), rel=1e-3)
    assert counted(lengths) != pytest.approx(SHAPE.flops(total, keys_seen / total + 4), rel=1e-3), "attention counts"


@pytest.mark.parametrize("depths", [0, 1, 2])
def test_blocks_that_predict_further_tokens_cost_what_their_shape_says(depths: int) -> None:
    """Dense blocks, and values as wide as keys: experts go through an operator that is not counted, and values are padded."""
    shape = Shape(vocab_size=384, hidden_size=48, intermediate_size=112, num_hidden_layers=2, num_attention_heads=3,
                  kv_lora_rank=20, q_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=24,
                  first_k_dense_replace=9, num_nextn_predict_layers=depths)
    lengths = [7, 1, 50, 3, 90, 41]
    total, keys_seen = sum(lengths), sum(length * (length + 1) // 2 for length in lengths)
    assert counted(lengths, deepseek_v3.build(shape)) == pytest.approx(shape.flops(total, keys_seen / total), rel=1e-3)
    other = replace(shape, num_nextn_predict_layers=1 - depths // 2)
    assert (shape == other) or shape.flops(total, 9) != pytest.approx(other.flops(total, 9), rel=0.1), "each of them counts"


def test_full_squares_are_those_of_full_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def square(cu_seqlens: torch.Tensor, tokens: int, window: int) -> int:
        return int(cu_seqlens.diff().square().sum())

    monkeypatch.setattr(flops, "_causal_pairs", square)
    assert counted([64, 64, 64]) == pytest.approx(SHAPE.flops_full(192, 64), rel=1e-3)


def test_every_way_of_attending_counts_the_same() -> None:
    """torch's kernels for whole documents, and parts of them on a context-parallel rank, against the pairs by hand."""
    query = torch.randn(2, 3, 16, 8, requires_grad=True)
    with FlopCounterMode(display=False, custom_mapping=flops.FORMULAS) as counter:
        torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()
    assert counter.get_total_flops() == 12 * 2 * (16 * 17 // 2) * 3 * 8
    ends: Any = torch.tensor([0, 5, 12, 12], dtype=torch.int32)
    parts = sum(flops.part_flop(torch.empty(6, 3, 8), torch.empty(12, 6, 8), ends, begin, 0) for begin in (0, 6))
    assert parts == 4 * (5 * 6 // 2 + 7 * 8 // 2) * 3 * 8 == flops.packed_flop(torch.empty(12, 9, 8), ends, ends, 3, 3, 0)


@pytest.mark.parametrize("window", [1, 3, 6, 7, 50])
def test_a_window_counts_the_pairs_that_it_leaves(window: int) -> None:
    ends: Any = torch.tensor([0, 5, 12, 12], dtype=torch.int32)
    pairs = sum(min(i + 1, window) for length in (5, 7) for i in range(length))
    parts = sum(flops.part_flop(torch.empty(6, 3, 8), torch.empty(12, 6, 8), ends, begin, window) for begin in (0, 6))
    assert parts == 4 * pairs * 3 * 8 == flops.packed_flop(torch.empty(12, 9, 8), ends, ends, 3, 3, window)
    query = torch.empty(12, 3, 8)
    left = [window - 1, 0]
    for found in (flops.varlen_flop(query, query, query, ends, ends, 7, 7, False, None, left),
                  flops.varlen_flop(query, query, query, ends, ends, 7, 7, window_size=left)):
        assert found == 4 * pairs * 3 * 8
    shape = DecoderShape(96, 32, 48, 1, 4)
    windowed = replace(shape.block_attended(0), window=window)
    assert windowed.keys((7 + 1) / 2) * 7 == pytest.approx(sum(min(i + 1, window) for i in range(7)))
