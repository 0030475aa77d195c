"""The ways of attention that accelerators take, run on a CPU against the CPU's operators."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from athanor.models import attention as attention_module
from athanor.models.attention import attend_by_pieces, attention, choose, part_ends
from athanor.models.context import Packed, Rope
from athanor.models.cpu_attention import part_attention
from athanor.models.fused import rope_table

HEADS, KV_HEADS, WIDTH = 4, 2, 16
RAGGED = [7, 7, 1, 20, 13]


def inputs(lengths: list[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Packed]:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(lengths), HEADS + 2 * KV_HEADS, WIDTH, dtype=dtype, generator=generator, requires_grad=True)
    flowing = torch.randn(sum(lengths), HEADS * WIDTH, dtype=dtype, generator=generator)
    context = Packed.of(lengths)
    return qkv, flowing, replace(context, rope=Rope(rope_table(context.positions, WIDTH, 100.0, dtype)))


class _Varlen(torch.autograd.Function):
    """What variable-length attention is documented to do, written plainly; other keys' gradients are left unset, as there."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, ends: Tensor, key_ends: Tensor, left: int) -> Tensor:
        ctx.save_for_backward(query, key, value, ends, key_ends)
        ctx.left = left
        return _documents(query, key, value, ends, key_ends, left)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        *inputs, ends, key_ends = ctx.saved_tensors
        leaves = [x.detach().requires_grad_() for x in inputs]
        with torch.enable_grad():
            found = torch.autograd.grad(_documents(*leaves, ends, key_ends, ctx.left), leaves, gradient)
        for part in found[1:]:
            part[:key_ends[0]] = part[key_ends[-1]:] = float("nan")
        return *found, None, None, None


def _documents(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, key_ends: Tensor, left: int) -> Tensor:
    """`left` keys before a query's own are seen, or all of them (-1); the last query sees the last key."""
    outs = []
    for (a, b), (c, d) in zip(ends.unfold(0, 2, 1).tolist(), key_ends.unfold(0, 2, 1).tolist(), strict=True):
        q, k, v = (x.transpose(0, 1) for x in (query[a:b], key[c:d], value[c:d]))
        mask = torch.ones(b - a, d - c, dtype=torch.bool).tril_((d - c) - (b - a))
        if left >= 0:
            mask.triu_((d - c) - (b - a) - left)
        outs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(0, 1))
    return torch.cat(outs)


def varlen(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, key_ends: Tensor, longest: int, key_longest: int,
           **how: Any) -> Tensor:
    left, right = how.pop("window_size")
    assert how == {"enable_gqa": True} and right == 0 and ends.dtype == key_ends.dtype == torch.int32
    assert ends.diff().max() <= longest and key_ends.diff().max() <= key_longest and len(ends) == len(key_ends)
    return _Varlen.apply(query, key, value, ends, key_ends, left)


@pytest.mark.parametrize(("device", "dtype", "is_even", "way"), [
    ("cpu", torch.float64, True, "operator"), ("cpu", torch.bfloat16, True, "operator"), ("cuda", torch.bfloat16, True, "even"),
    ("cuda", torch.bfloat16, False, "ragged"), ("cuda", torch.float32, True, "pieces"), ("cuda", torch.float16, True, "even")])
def test_the_way_is_chosen_by_what_the_host_knows(device: str, dtype: torch.dtype, is_even: bool, way: str) -> None:
    assert choose(device, dtype, is_even) == way


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("window", [0, 1, 6, 20])
@pytest.mark.parametrize(("way", "lengths"), [("even", [16, 16, 16]), ("even", [24]), ("ragged", RAGGED), ("ragged", [16, 16]),
                                              ("pieces", RAGGED)])
def test_every_way_attends_alike(monkeypatch: pytest.MonkeyPatch, way: str, lengths: list[int], dtype: torch.dtype,
                                 window: int) -> None:
    qkv, flowing, context = inputs(lengths, dtype)
    assert context.is_even == (len(set(lengths)) == 1)
    wanted = attention(qkv, context, 0, HEADS, KV_HEADS, window)
    (wanted_gradient,) = torch.autograd.grad(wanted, qkv, flowing)
    monkeypatch.setattr(attention_module, "choose", lambda *given: "ragged" if way == "even" and not given[2] else way)
    monkeypatch.setattr(attention_module, "varlen_attn", varlen)
    found = attention(qkv, context, 0, HEADS, KV_HEADS, window)
    (gradient,) = torch.autograd.grad(found, qkv, flowing)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    assert (found - wanted).abs().max() <= tolerance and (gradient - wanted_gradient).abs().max() <= tolerance


@pytest.mark.parametrize("lengths", [RAGGED, [600], [130, 5]])
@pytest.mark.parametrize("window", [1, 6, 100, 599, 600])
def test_a_window_is_a_mask_of_the_keys_before_it(lengths: list[int], window: int) -> None:
    """Against scores written out in full; documents long enough to be taken in several blocks of queries."""
    qkv, flowing, context = inputs(lengths)
    found = attention(qkv, replace(context, rope=None), 0, HEADS, KV_HEADS, window)
    (gradient,) = torch.autograd.grad(found, qkv, flowing)
    leaf, outs = qkv.detach().requires_grad_(), []
    for part in leaf.split(lengths):
        query, key, value = part.transpose(0, 1).split([HEADS, KV_HEADS, KV_HEADS])
        scores = query @ key.repeat_interleave(HEADS // KV_HEADS, 0).mT / WIDTH**0.5
        away = torch.arange(len(part))[:, None] - torch.arange(len(part))
        weights = scores.masked_fill((away < 0) | (away >= window), float("-inf")).softmax(-1)
        outs.append((weights @ value.repeat_interleave(HEADS // KV_HEADS, 0)).transpose(0, 1).flatten(1))
    wanted = torch.cat(outs)
    (wanted_gradient,) = torch.autograd.grad(wanted, leaf, flowing)
    assert (found - wanted).abs().max() <= 1e-12 and (gradient - wanted_gradient).abs().max() <= 1e-12


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize(("lengths", "begin", "tokens"), [
    (RAGGED, 0, 12), (RAGGED, 12, 12), (RAGGED, 24, 12), (RAGGED, 36, 12), (RAGGED, 14, 21), ([48], 16, 16), ([48], 0, 48)])
def test_a_rank_s_queries_see_the_keys_of_their_documents(monkeypatch: pytest.MonkeyPatch, lengths: list[int], begin: int,
                                                          tokens: int, window: int) -> None:
    qkv, flowing, context = inputs(lengths)
    cu_seqlens = torch.cat([context.cu_seqlens, context.cu_seqlens[-1:].expand(3)])  # padded, as in a batch
    leaf = qkv.detach().requires_grad_()
    query, both = leaf[:, :HEADS], leaf[:, HEADS:]
    whole = attention(leaf, replace(context, rope=None), 0, HEADS, KV_HEADS, window)
    whole = whole.unflatten(1, (HEADS, WIDTH))[begin:begin + tokens]
    flowing = flowing.unflatten(1, (HEADS, WIDTH))[begin:begin + tokens]
    (wanted_gradient,) = torch.autograd.grad(whole, leaf, flowing)
    mine = slice(begin, begin + tokens)

    def by_kernel() -> Tensor:
        *ends, is_seen = part_ends(cu_seqlens, begin, tokens, len(both))
        key, value = torch.where(is_seen[:, None, None], both, 0).split(KV_HEADS, 1)
        return varlen(query[mine], key, value, *ends, tokens, context.max_length, window_size=(window - 1, 0), enable_gqa=True)

    ways = (by_kernel, lambda: part_attention(query[mine], both, cu_seqlens, begin, window)[0],
            lambda: attend_by_pieces(query[mine], both, cu_seqlens, begin, window))
    for way in ways:
        found = way()
        (gradient,) = torch.autograd.grad(found, leaf, flowing)
        assert (found - whole).abs().max() <= 1e-12 and (gradient - wanted_gradient).abs().max() <= 1e-12
