"""Packed attention on a CPU, as operators: torch's flash kernel over documents, no mask where none is needed.

Operators, because a compiler cannot look at how long documents are.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate, groupby, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from athanor.models.fused import rotate
from athanor.models.rehearsed import document_lengths

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
QUERY_BLOCK, MOST_BLOCKS = 128, 8


def of_documents(x: Tensor, count: int) -> Tensor:
    """[tokens, heads, head_dim] -> [documents, heads, tokens, head_dim], without a copy."""
    return x.unflatten(0, (count, -1)).transpose(1, 2)


def runs(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    """(documents, tokens of each) of neighbouring documents of one length; the padding of cu_seqlens is left out."""
    return [(len(list(same)), length) for length, same in groupby(document_lengths(cu_seqlens))]


def query_blocks(length: int, dtype: torch.dtype) -> list[tuple[int, int]]:
    """Beginnings and ends of the queries that are taken together, each with the keys up to its end.

    The kernel skips keys beyond the diagonal only in whole blocks of 512, so that short documents would cost a full square.
    In half precision a single call is faster (measured), and the sums over blocks would be rounded.
    """
    count = min(max(1, round(length / QUERY_BLOCK)), MOST_BLOCKS) if dtype.itemsize >= 4 else 1
    step = -(-length // count)
    return [(begin, min(begin + step, length)) for begin in range(0, length, step)]


def first_key(begin: int, window: int) -> int:
    """The first key that the query `begin` of a document sees."""
    return max(0, begin - window + 1) if window else 0


def new_mask(begin: int, end: int, dtype: torch.dtype, window: int = 0, device: torch.device | None = None) -> Tensor | None:
    """[end - begin, end - first key], to be added to the scores of queries begin..end; None where the kernel's own causal mask
    fits."""
    first = first_key(begin, window)
    if not begin and (not window or end <= window):
        return None
    hidden = torch.full((end - begin, end - first), float("-inf"), dtype=dtype, device=device)
    mask = hidden.triu(begin - first + 1)
    return mask + hidden.tril(begin - first - window) if window else mask


causal_mask = lru_cache(maxsize=64)(new_mask)


def attend(qkv: Tensor, rope: Tensor | None, cu_seqlens: Tensor, heads: int, kv_heads: int,
           window: int) -> tuple[Tensor, Tensor, Tensor]:
    """Attention within documents: (out [T, heads, head_dim], turned qkv, logsumexp of the scores, block by block)."""
    turned = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    rotate(qkv[:, :heads + kv_heads], rope, out=turned[:, :heads + kv_heads])
    turned[:, heads + kv_heads:] = qkv[:, heads + kv_heads:]
    outs, sums = [], []
    for count, length, rows in _by_run(cu_seqlens, turned):
        query, key, value = of_documents(rows, count).split([heads, kv_heads, kv_heads], 1)
        found = []
        for begin, end in query_blocks(length, qkv.dtype):
            mask, seen = causal_mask(begin, end, qkv.dtype, window), slice(first_key(begin, window), end)
            out, logsumexp = flash(query[:, :, begin:end], key[:, :, seen], value[:, :, seen], 0.0, mask is None, attn_mask=mask)
            found.append(out.transpose(1, 2))  # as it lies in memory
            sums.append(logsumexp.flatten())
        outs.append(_joined(found, 1).flatten(0, 1))
    return _joined(outs, 0), turned, _joined(sums, 0)


def attend_backward(gradient: Tensor, turned: Tensor, rope: Tensor | None, cu_seqlens: Tensor, out: Tensor, sums: Tensor,
                    heads: int, kv_heads: int, window: int) -> Tensor:
    """The gradient of qkv [T, heads + 2 kv_heads, head_dim]."""
    result, start = torch.empty_like(turned), 0
    for count, length, rows, *others, into in _by_run(cu_seqlens, turned, gradient, out, result):
        query, key, value = of_documents(rows, count).split([heads, kv_heads, kv_heads], 1)
        flowing, outs = (of_documents(x, count) for x in others)
        queries: list[Tensor] = []
        for begin, end in reversed(query_blocks(length, turned.dtype)):
            first = start + count * begin * heads
            logsumexp = sums[first:first + count * (end - begin) * heads].view(count, heads, end - begin)
            mask, seen = causal_mask(begin, end, turned.dtype, window), slice(first_key(begin, window), end)
            to_query, *parts = flash_backward(flowing[:, :, begin:end], query[:, :, begin:end], key[:, :, seen],
                                              value[:, :, seen], outs[:, :, begin:end], logsumexp, 0.0, mask is None,
                                              attn_mask=mask)
            queries.insert(0, to_query.transpose(1, 2))
            if end == length:  # the block that sees the last keys comes first; the others are added to its gradients
                to_key, to_value = (F.pad(part, (0, 0, seen.start, 0)) if seen.start else part for part in parts)
            else:
                to_key[:, :, seen] += parts[0]
                to_value[:, :, seen] += parts[1]
        torch.cat([_joined(queries, 1), to_key.transpose(1, 2), to_value.transpose(1, 2)], 2, out=into.unflatten(0, (count, -1)))
        start += count * length * heads
    if rope is not None:
        rotate(result[:, :heads + kv_heads], rope, backwards=True, out=result[:, :heads + kv_heads])
    return result


def _by_run(cu_seqlens: Tensor, *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
    """Of every run: its documents, the tokens of each, and its rows of each tensor."""
    found = runs(cu_seqlens)
    sizes = [count * length for count, length in found]
    parts = [x.split(sizes) if len(found) > 1 else [x] for x in tensors]
    return ((*run, *rows) for run, *rows in zip(found, *parts, strict=True))


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


# as operators for compilers and for modes that look at operators: tracing, counting, choosing what is kept
packed_attention = torch.library.custom_op("athanor::packed_attention", attend, mutates_args=(), device_types="cpu")
packed_attention_backward = torch.library.custom_op("athanor::packed_attention_backward", attend_backward, mutates_args=(),
                                                    device_types="cpu")


@packed_attention.register_fake
def _(qkv: Tensor, rope: Tensor | None, cu_seqlens: Tensor, heads: int, kv_heads: int,
      window: int) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(qkv.dtype, torch.float32)
    tokens, _, head_dim = qkv.shape
    return (qkv.new_empty(tokens, heads, head_dim), qkv.new_empty(qkv.shape), qkv.new_empty(tokens * heads, dtype=wide))


@packed_attention_backward.register_fake
def _(gradient: Tensor, turned: Tensor, rope: Tensor | None, cu_seqlens: Tensor, out: Tensor, sums: Tensor, heads: int,
      kv_heads: int, window: int) -> Tensor:
    return torch.empty_like(turned)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, rope, cu_seqlens, *ctx.sizes = inputs
    out, turned, sums = output
    ctx.mark_non_differentiable(turned, sums)
    ctx.save_for_backward(turned, rope, cu_seqlens, out, sums)


def _differentiate(ctx: Any, gradient: Tensor, *unused: Tensor) -> Any:
    turned, rope, cu_seqlens, out, sums = ctx.saved_tensors
    return packed_attention_backward(gradient, turned, rope, cu_seqlens, out, sums, *ctx.sizes), None, None, None, None, None


packed_attention.register_autograd(_differentiate, setup_context=_save)


class _Attend(torch.autograd.Function):
    """The same without an operator's dispatch, which takes as long as the attention of a few short documents."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = attend(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *unused: Tensor) -> Any:
        turned, rope, cu_seqlens, out, sums = ctx.saved_tensors
        return attend_backward(gradient, turned, rope, cu_seqlens, out, sums, *ctx.sizes), None, None, None, None, None


def attend_within_documents(qkv: Tensor, rope: Tensor | None, cu_seqlens: Tensor, heads: int, kv_heads: int,
                            window: int) -> Tensor:
    """qkv [T, heads + 2 kv_heads, head_dim] -> [T, heads, head_dim], by the operator where somebody looks at operators."""
    how = packed_attention if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() else _Attend.apply
    out, _, _ = how(qkv, rope, cu_seqlens, heads, kv_heads, window)
    return out  # type: ignore[no-any-return]


class Piece(NamedTuple):
    """The part of a document that a rank's queries belong to: its queries first..last, which see keys of it up to last.

    `queries` are rows among the rank's queries, `keys` rows among all keys.
    """

    queries: slice
    keys: slice
    first: int
    last: int


def pieces(cu_seqlens: Tensor, begin: int, tokens: int, window: int) -> list[Piece]:
    """The documents' parts among the queries begin..begin + tokens, in order."""
    found = []
    for start, end in pairwise(accumulate(document_lengths(cu_seqlens), initial=0)):
        low, high = max(start, begin), min(end, begin + tokens)
        if low < high:
            keys = slice(start + first_key(low - start, window), high)
            found.append(Piece(slice(low - begin, high - begin), keys, low - start, high - start))
    return found


def _of_piece(piece: Piece, query: Tensor, both: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a piece as views [1, heads, tokens, head_dim]."""
    key, value = of_documents(both[piece.keys], 1).chunk(2, 1)
    return of_documents(query[piece.queries], 1), key, value


@torch.library.custom_op("athanor::part_attention", mutates_args=(), device_types="cpu")
def part_attention(query: Tensor, both: Tensor, cu_seqlens: Tensor, begin: int, window: int) -> tuple[Tensor, Tensor]:
    """Queries begin.. [t, heads, head_dim] attend to all keys beside values [T, 2 kv_heads, head_dim], within documents.

    Both are turned already. Returns (out [t, heads, head_dim], logsumexp of the scores, piece by piece).
    """
    out, sums = torch.empty_like(query, memory_format=torch.contiguous_format), []
    for piece in pieces(cu_seqlens, begin, query.shape[0], window):
        mask = new_mask(piece.first, piece.last, query.dtype, window)  # not kept: ragged lengths are hardly met again
        found, logsumexp = flash(*_of_piece(piece, query, both), 0.0, mask is None, attn_mask=mask)
        of_documents(out[piece.queries], 1).copy_(found)
        sums.append(logsumexp.flatten())
    return out, torch.cat(sums)


@torch.library.custom_op("athanor::part_attention_backward", mutates_args=(), device_types="cpu")
def part_attention_backward(gradient: Tensor, query: Tensor, both: Tensor, cu_seqlens: Tensor, begin: int, window: int,
                            out: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `query` and of `both`: zero for keys that no query here sees."""
    to_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    to_both = torch.zeros_like(both, memory_format=torch.contiguous_format)
    heads = query.shape[1]
    for piece in pieces(cu_seqlens, begin, query.shape[0], window):
        logsumexp = sums[piece.queries.start * heads:piece.queries.stop * heads].view(1, heads, -1)
        flowing, outs = of_documents(gradient[piece.queries], 1), of_documents(out[piece.queries], 1)
        mask = new_mask(piece.first, piece.last, query.dtype, window)
        parts = flash_backward(flowing, *_of_piece(piece, query, both), outs, logsumexp, 0.0, mask is None, attn_mask=mask)
        for part, target in zip(parts, _of_piece(piece, to_query, to_both), strict=True):
            target.copy_(part)
    return to_query, to_both


@part_attention.register_fake
def _(query: Tensor, both: Tensor, cu_seqlens: Tensor, begin: int, window: int) -> tuple[Tensor, Tensor]:
    sums = query.new_empty(query.shape[0] * query.shape[1], dtype=torch.promote_types(query.dtype, torch.float32))
    return torch.empty_like(query, memory_format=torch.contiguous_format), sums


@part_attention_backward.register_fake
def _(gradient: Tensor, query: Tensor, both: Tensor, cu_seqlens: Tensor, begin: int, window: int, out: Tensor,
      sums: Tensor) -> tuple[Tensor, Tensor]:
    to_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    return to_query, torch.empty_like(both, memory_format=torch.contiguous_format)


def _save_part(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, both, cu_seqlens, *ctx.numbers = inputs
    out, sums = output
    ctx.mark_non_differentiable(sums)
    ctx.save_for_backward(query, both, cu_seqlens, out, sums)


def _differentiate_part(ctx: Any, gradient: Tensor, unused: Tensor) -> Any:
    query, both, cu_seqlens, out, sums = ctx.saved_tensors
    return *part_attention_backward(gradient, query, both, cu_seqlens, *ctx.numbers, out, sums), None, None, None


part_attention.register_autograd(_differentiate_part, setup_context=_save_part)
