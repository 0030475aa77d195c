"""FLOPs of operators as they are dispatched: torch's formulas for matmuls, and attention as the model's arithmetic counts it.

A query and a key cost 4 FLOP per channel forward and 8 backward (`models/shapes`), whatever a kernel computes again; pairs
are causal and within documents. Element-wise work counts nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from athanor.models import attention, cpu_attention
from athanor.models.rehearsed import document_lengths

aten = torch.ops.aten
Formula = Callable[..., int]


def _pairs(length: int, window: int = 0) -> int:
    """Pairs of a query and a key that it sees, in a document of so many tokens."""
    seen = min(length, window or length)
    return seen * (seen + 1) // 2 + (length - seen) * seen


def _causal_pairs(cu_seqlens: Tensor, tokens: int, window: int) -> int:
    """Such pairs of `tokens` queries in all documents or in an average part of them."""
    lengths = document_lengths(cu_seqlens)
    return sum(_pairs(length, window) for length in lengths) * tokens // max(1, sum(lengths))


def _window(arguments: tuple[Any, ...], named: dict[str, Any]) -> int:
    """Keys that a query of variable-length attention sees, from the one list among its arguments; 0: all."""
    found = named.get("window_size") or next((each for each in arguments if isinstance(each, (list, tuple))), (-1, 0))
    return int(found[0]) + 1


def packed_flop(qkv: Tensor, rope: Tensor, cu_seqlens: Tensor, heads: int, kv_heads: int, window: int, **_: Any) -> int:
    return 4 * _causal_pairs(cu_seqlens, len(qkv), window) * heads * qkv.shape[-1]


def packed_backward_flop(gradient: Tensor, turned: Tensor, rope: Tensor, cu_seqlens: Tensor, out: Tensor, sums: Tensor,
                         *given: Any, **named: Any) -> int:
    return 2 * packed_flop(turned, rope, cu_seqlens, *given, **named)


def varlen_flop(query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, *rest: Any, **named: Any) -> int:
    return 4 * _causal_pairs(cu_seq_q, len(query), _window(rest, named)) * math.prod(query.shape[1:])


def varlen_backward_flop(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor,
                         *given: Any, **named: Any) -> int:
    return 2 * varlen_flop(query, key, value, *given, **named)


def part_flop(query: Tensor, both: Tensor, cu_seqlens: Tensor, begin: int, window: int, *_: Any, **__: Any) -> int:
    found = cpu_attention.pieces(cu_seqlens, begin, len(query), window)
    return 4 * sum(_pairs(piece.last, window) - _pairs(piece.first, window) for piece in found) * math.prod(query.shape[1:])


def sdpa_flop(query: Tensor, *_: Any, **__: Any) -> int:
    """Of documents [documents, heads, tokens, head_dim], all whole and causal, as `attend_by_runs` makes them."""
    return 4 * _pairs(query.shape[2]) * math.prod(query.shape[:2]) * query.shape[3]


def mm_flop(left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    return 2 * left.shape[0] * left.shape[1] * right.shape[1]


def addmm_flop(into: Tensor, left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    return mm_flop(left, right)


def _backward(forward: Formula) -> Formula:
    """Where the gradient is followed by what the forward pass was given."""
    return lambda gradient, *given, **named: 2 * forward(*given, **named)


def _formulas() -> dict[Any, Formula]:
    assert attention.varlen_attn is not None, "importing it defines its operators"
    ours, theirs = torch.ops.athanor, torch.ops.torch_attn
    found: dict[Any, Any] = {
        ours.packed_attention: packed_flop, ours.packed_attention_backward: packed_backward_flop,
        ours.part_attention: part_flop, ours.part_attention_backward: _backward(part_flop),
        theirs._varlen_attn: varlen_flop, theirs._varlen_attn_backward: varlen_backward_flop,
        aten.mm: mm_flop, aten.addmm: addmm_flop, aten.addmm_: addmm_flop}
    for kernel in ("flash_attention_for_cpu", "flash_attention", "cudnn_attention", "efficient_attention"):
        found[getattr(aten, f"_scaled_dot_product_{kernel}")] = sdpa_flop
        found[getattr(aten, f"_scaled_dot_product_{kernel}_backward")] = _backward(sdpa_flop)
    for formula in found.values():
        formula._get_raw = True  # torch's counter then hands over tensors, not shapes
    return found


FORMULAS = _formulas()  # what torch.utils.flop_counter lacks or counts otherwise; FlopCounterMode(custom_mapping=FORMULAS)


def count(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """FLOPs of one call of an operator that was not cut into smaller ones."""
    if (formula := FORMULAS.get(packet)) is None and (formula := flop_registry.get(packet)) is None:
        return 0
    return int(formula(*args, **kwargs, out_val=out))
