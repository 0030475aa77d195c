"""Causal attention, and the only place that looks at the kind of context.

Packed on a CPU: one operator that turns queries and keys and runs torch's flash kernel over runs of equally long documents
(no mask, nothing beyond the document). Packed on an accelerator: variable-length attention. Paged: keys and values are
read from the cache's pages.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from athanor.models.collectives import all_to_all, size
from athanor.models.context import Context, Packed, Paged
from athanor.models.fused import rotate

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
QUERY_BLOCK, MOST_BLOCKS = 128, 8


def attention(qkv: Tensor, context: Context, layer: int, heads: int, kv_heads: int) -> Tensor:
    """Turn queries and keys by their positions and attend within documents.

    qkv [T, heads + 2 kv_heads, head_dim]: queries, keys and values of this rank's heads. Returns [T, heads x head_dim].
    """
    if isinstance(context, Paged):
        return _paged(qkv, context, layer, heads, kv_heads)
    ranks = size(context.groups.cp)
    if ranks == 1:
        return _packed(qkv, context, heads, kv_heads).flatten(1)
    # Ulysses: every rank takes the whole T for a part of the heads, and gives its tokens back (arXiv:2309.14509)
    parts = torch.cat([part.unflatten(1, (ranks, -1)) for part in qkv.split([heads, kv_heads, kv_heads], 1)], 2)
    whole = all_to_all(parts.transpose(0, 1), context.groups.cp, "context").flatten(0, 1)
    out = _packed(whole, context, heads // ranks, kv_heads // ranks)
    back = all_to_all(out.unflatten(0, (ranks, -1)), context.groups.cp, "context")
    return back.transpose(0, 1).flatten(1)


def _packed(qkv: Tensor, context: Packed, heads: int, kv_heads: int) -> Tensor:
    """[T, heads + 2 kv_heads, head_dim] -> [T, heads, head_dim]."""
    assert context.rope is not None, "the model fills rope before its first block"
    if qkv.device.type == "cpu":
        how = packed_attention if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() else _PackedAttention.apply
        out, _, _ = how(qkv, context.rope.table, context.cu_seqlens, heads, kv_heads)
        return out
    turned = torch.cat([rotate(qkv[:, :heads + kv_heads], context.rope.table), qkv[:, heads + kv_heads:]], 1)
    if qkv.dtype not in (torch.bfloat16, torch.float16):
        return attend_by_runs(turned, context.cu_seqlens, heads, kv_heads)
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = turned.split([heads, kv_heads, kv_heads], 1)
    found = varlen_attn(query, key, value, context.cu_seqlens, context.cu_seqlens, context.max_length, context.max_length,
                        window_size=(-1, 0), enable_gqa=heads != kv_heads)
    assert isinstance(found, Tensor)
    return found


def attend_by_runs(turned: Tensor, cu_seqlens: Tensor, heads: int, kv_heads: int) -> Tensor:
    """The same from differentiable pieces of torch, for dtypes that accelerators' variable-length kernels do not take."""
    outs, found = [], runs(cu_seqlens)
    for part, (count, _) in zip(turned.split([count * length for count, length in found]), found, strict=True):
        query, key, value = _of_documents(part, count).split([heads, kv_heads, kv_heads], 1)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=heads != kv_heads)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)


def runs(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    """(documents, tokens of each) of neighbouring documents of one length; the padding of cu_seqlens is left out."""
    lengths = [length for length in cu_seqlens.diff().tolist() if length]
    return [(len(list(same)), length) for length, same in groupby(lengths)]


def query_blocks(length: int, dtype: torch.dtype) -> list[tuple[int, int]]:
    """Beginnings and ends of the queries that are taken together, each with the keys up to its end.

    The kernel skips keys beyond the diagonal only in whole blocks of 512, so that short documents would cost a full square.
    In half precision a single call is faster (measured), and the sums over blocks would be rounded.
    """
    count = min(max(1, round(length / QUERY_BLOCK)), MOST_BLOCKS) if dtype.itemsize >= 4 else 1
    step = -(-length // count)
    return [(begin, min(begin + step, length)) for begin in range(0, length, step)]


@lru_cache(maxsize=64)
def causal_mask(begin: int, end: int, dtype: torch.dtype) -> Tensor | None:
    """[end - begin, end], to be added to the scores of queries begin..end; None where the kernel's own causal mask fits."""
    return torch.full((end - begin, end), float("-inf"), dtype=dtype).triu_(begin + 1) if begin else None


def attend(qkv: Tensor, rope: Tensor, cu_seqlens: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Attention within documents: (out [T, heads, head_dim], turned qkv, logsumexp of the scores, block by block)."""
    turned = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    rotate(qkv[:, :heads + kv_heads], rope, out=turned[:, :heads + kv_heads])
    turned[:, heads + kv_heads:] = qkv[:, heads + kv_heads:]
    out = qkv.new_empty(qkv.shape[0], heads, qkv.shape[2])
    sums, start = [], 0
    for count, length in runs(cu_seqlens):
        query, key, value = _documents(turned, start, count, length, heads, kv_heads)
        into = _of_documents(out[start:start + count * length], count)
        for begin, end in query_blocks(length, qkv.dtype):
            found, logsumexp = flash(query[:, :, begin:end], key[:, :, :end], value[:, :, :end], 0.0, begin == 0,
                                     attn_mask=causal_mask(begin, end, qkv.dtype))
            into[:, :, begin:end] = found
            sums.append(logsumexp.flatten())
        start += count * length
    return out, turned, torch.cat(sums)


def attend_backward(gradient: Tensor, turned: Tensor, rope: Tensor, cu_seqlens: Tensor, out: Tensor, sums: Tensor, heads: int,
                    kv_heads: int) -> Tensor:
    """The gradient of qkv [T, heads + 2 kv_heads, head_dim]."""
    result, start = torch.empty_like(turned), 0
    for count, length in runs(cu_seqlens):
        query, key, value = _documents(turned, start, count, length, heads, kv_heads)
        to_query, to_key, to_value = _documents(result, start, count, length, heads, kv_heads)
        tokens = slice(start, start + count * length)
        flowing, outs = _of_documents(gradient[tokens], count), _of_documents(out[tokens], count)
        for begin, end in reversed(query_blocks(length, turned.dtype)):
            first = (start + count * begin) * heads
            logsumexp = sums[first:first + count * (end - begin) * heads].view(count, heads, end - begin)
            parts = flash_backward(flowing[:, :, begin:end], query[:, :, begin:end], key[:, :, :end], value[:, :, :end],
                                   outs[:, :, begin:end], logsumexp, 0.0, begin == 0,
                                   attn_mask=causal_mask(begin, end, turned.dtype))
            to_query[:, :, begin:end] = parts[0]
            for part, target in zip(parts[1:], (to_key, to_value), strict=True):
                if end == length:
                    target.copy_(part)
                else:
                    target[:, :, :end] += part
        start = tokens.stop
    rotate(result[:, :heads + kv_heads], rope, backwards=True, out=result[:, :heads + kv_heads])
    return result


def _of_documents(x: Tensor, count: int) -> Tensor:
    """[tokens, heads, head_dim] -> [documents, heads, tokens, head_dim], without a copy."""
    return x.unflatten(0, (count, -1)).transpose(1, 2)


def _documents(qkv: Tensor, start: int, count: int, length: int, heads: int, kv_heads: int) -> list[Tensor]:
    """Queries, keys and values of one run as views [documents, heads, tokens, head_dim]."""
    run = _of_documents(qkv[start:start + count * length], count)
    return list(run.split([heads, kv_heads, kv_heads], 1))


# as operators for compilers and for modes that look at operators: tracing, counting, choosing what is kept
packed_attention = torch.library.custom_op("athanor::packed_attention", attend, mutates_args=(), device_types="cpu")
packed_attention_backward = torch.library.custom_op("athanor::packed_attention_backward", attend_backward, mutates_args=(),
                                                    device_types="cpu")


@packed_attention.register_fake
def _(qkv: Tensor, rope: Tensor, cu_seqlens: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(qkv.dtype, torch.float32)
    tokens, _, head_dim = qkv.shape
    return (qkv.new_empty(tokens, heads, head_dim), qkv.new_empty(qkv.shape), qkv.new_empty(tokens * heads, dtype=wide))


@packed_attention_backward.register_fake
def _(gradient: Tensor, turned: Tensor, rope: Tensor, cu_seqlens: Tensor, out: Tensor, sums: Tensor, heads: int,
      kv_heads: int) -> Tensor:
    return torch.empty_like(turned)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, rope, cu_seqlens, ctx.heads, ctx.kv_heads = inputs
    out, turned, sums = output
    ctx.mark_non_differentiable(turned, sums)
    ctx.save_for_backward(turned, rope, cu_seqlens, out, sums)


def _differentiate(ctx: Any, gradient: Tensor, *unused: Tensor) -> Any:
    turned, rope, cu_seqlens, out, sums = ctx.saved_tensors
    found = packed_attention_backward(gradient, turned, rope, cu_seqlens, out, sums, ctx.heads, ctx.kv_heads)
    return found, None, None, None, None


packed_attention.register_autograd(_differentiate, setup_context=_save)


class _PackedAttention(torch.autograd.Function):
    """The same without an operator's dispatch, which takes as long as the attention of a few short documents."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = attend(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *unused: Tensor) -> Any:
        turned, rope, cu_seqlens, out, sums = ctx.saved_tensors
        return attend_backward(gradient, turned, rope, cu_seqlens, out, sums, ctx.heads, ctx.kv_heads), None, None, None, None


def _paged(qkv: Tensor, context: Paged, layer: int, heads: int, kv_heads: int) -> Tensor:
    """Write new keys and values into their pages and attend to all of the sequence; whole prompts are not read back."""
    assert context.rope is not None, "the model fills rope before its first block"
    is_packed = context.is_whole and qkv.device.type == "cpu"
    if is_packed:
        out, turned, _ = attend(qkv, context.rope.table, context.cu_seqlens, heads, kv_heads)
    else:
        turned = torch.cat([rotate(qkv[:, :heads + kv_heads], context.rope.table), qkv[:, heads + kv_heads:]], 1)
    (keys, values), (page, slot) = context.cache.layers[layer], context.places
    keys[page, slot], values[page, slot] = turned[:, heads:heads + kv_heads], turned[:, heads + kv_heads:]
    if is_packed:
        return out.flatten(1)
    shape = (len(context.lengths), -1, kv_heads, qkv.shape[-1])
    kept = [part.index_select(0, context.block_table.flatten()).view(shape).transpose(1, 2) for part in (keys, values)]
    if context.longest == 1:
        query = turned[:, :heads].unsqueeze(2)
    else:
        padded = turned.new_zeros(len(context.lengths), context.longest, heads, qkv.shape[-1])
        padded[context.sequence, context.offset] = turned[:, :heads]
        query = padded.transpose(1, 2)
    found = F.scaled_dot_product_attention(query, kept[0], kept[1], attn_mask=context.mask, enable_gqa=heads != kv_heads)
    if context.longest == 1:
        return found.flatten(1)
    return found.transpose(1, 2)[context.sequence, context.offset].flatten(1)
