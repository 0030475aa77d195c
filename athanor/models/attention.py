"""Causal attention, and the only place that looks at the kind of context.

Packed on a CPU: operators over documents (`cpu_attention.py`). Packed on an accelerator: torch's fused kernels, without a
mask where every document is as long as the others, else variable-length attention. Paged: keys and values are read from the
cache's pages. Under context parallelism ranks exchange heads where they can share them, else they gather keys and values.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from athanor.models.collectives import all_to_all, gather, own, rank, size
from athanor.models.context import Context, Packed, Paged
from athanor.models.cpu_attention import attend, attend_within_documents, new_mask, of_documents, part_attention, pieces, runs
from athanor.models.fused import rotate
from athanor.models.rehearsed import device_type

# cuDNN's is the fastest for heads of 128 on Hopper; it must see no mask, and flash attention is what remains without it
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
# torch 2.11's kernel shares key heads between query heads without being told
SHARES_HEADS: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def attention(qkv: Tensor, context: Context, layer: int, heads: int, kv_heads: int, window: int = 0) -> Tensor:
    """Turn queries and keys by their positions, where these are rotary, and attend within documents.

    qkv [T, heads + 2 kv_heads, head_dim]: queries, keys and values of this rank's heads. `window`: keys that a query may see,
    its own included; 0: all before it. Returns [T, heads x head_dim].
    """
    if isinstance(context, Paged):
        return _paged(qkv, context, layer, heads, kv_heads, window)
    ranks = size(context.groups.cp)
    if ranks == 1:
        return _packed(qkv, context, heads, kv_heads, window).flatten(1)
    if heads % ranks or kv_heads % ranks:
        return _gathered(qkv, context, heads, kv_heads, window).flatten(1)
    # Ulysses: every rank takes the whole T for a part of the heads, and gives its tokens back (arXiv:2309.14509)
    parts = torch.cat([part.unflatten(1, (ranks, -1)) for part in qkv.split([heads, kv_heads, kv_heads], 1)], 2)
    whole = all_to_all(parts.transpose(0, 1), context.groups.cp, "context").flatten(0, 1)
    out = _packed(whole, context, heads // ranks, kv_heads // ranks, window)
    back = all_to_all(out.unflatten(0, (ranks, -1)), context.groups.cp, "context")
    return back.transpose(0, 1).flatten(1)


def choose(device_type: str, dtype: torch.dtype, is_even: bool) -> str:
    """How to attend within documents: `operator` (CPU), `even` or `ragged` (fused kernels), or `pieces` (any device and dtype).

    Nothing but `operator` and `pieces` may ask the device how long documents are.
    """
    if device_type == "cpu":
        return "operator"
    if dtype not in (torch.bfloat16, torch.float16):
        return "pieces"
    return "even" if is_even else "ragged"


def _table(context: Context) -> Tensor | None:
    """The angles of rotary positions; None where positions are learned."""
    return None if context.rope is None else context.rope.table


def _packed(qkv: Tensor, context: Packed, heads: int, kv_heads: int, window: int) -> Tensor:
    """[T, heads + 2 kv_heads, head_dim] -> [T, heads, head_dim]."""
    window = 0 if window >= context.max_length else window
    rope, way = _table(context), choose(device_type(qkv), qkv.dtype, context.is_even and not window)
    if way == "operator":
        return attend_within_documents(qkv, rope, context.cu_seqlens, heads, kv_heads, window)
    turned, value = qkv.split([heads + kv_heads, kv_heads], 1)
    query, key = rotate(turned, rope).split([heads, kv_heads], 1)
    if way == "pieces":
        return attend_by_runs(query, key, value, context.cu_seqlens, window)
    if way == "even":
        return attend_evenly(query, key, value, context.max_length)
    ends, longest = context.cu_seqlens, context.max_length
    return _varlen(query, key, value, (ends, ends), (longest, longest), window)


def attend_evenly(query: Tensor, key: Tensor, value: Tensor, length: int) -> Tensor:
    """Attention within documents of `length` tokens each, by a fused kernel and without a mask. All [T, heads, head_dim]."""
    count = query.shape[0] // length
    query, key, value = (of_documents(part, count) for part in (query, key, value))
    with sdpa_kernel(BACKENDS, set_priority=True):
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1])
    return out.transpose(1, 2).flatten(0, 1)


def attend_by_runs(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, window: int = 0) -> Tensor:
    """The same for any documents from differentiable pieces of torch, for dtypes that accelerators' kernels do not take."""
    outs, found = [], runs(cu_seqlens)
    sizes = [count * length for count, length in found]
    for (count, length), *parts in zip(found, *(x.split(sizes) for x in (query, key, value)), strict=True):
        q, k, v = (of_documents(part, count) for part in parts)
        mask = new_mask(0, length, query.dtype, window, query.device)
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=query.shape[1] != key.shape[1])
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)


def _varlen(query: Tensor, key: Tensor, value: Tensor, ends: tuple[Tensor, Tensor], longest: tuple[int, int],
            window: int) -> Tensor:
    """Variable-length attention: `ends` and `longest` of queries and of keys; a document's last query sees its last key."""
    shared = SHARES_HEADS if query.shape[1] != key.shape[1] else {}
    found = varlen_attn(query, key, value, *ends, *longest, window_size=(window - 1, 0), **shared)  # its own is not counted
    assert isinstance(found, Tensor)
    return found


def _gathered(qkv: Tensor, context: Packed, heads: int, kv_heads: int, window: int) -> Tensor:
    """Context parallelism for any number of heads: this rank's queries attend to the keys of all ranks.

    [t, heads + 2 kv_heads, head_dim] -> [t, heads, head_dim]. Only keys and values travel, before attention forward and
    after it backward.
    """
    cp, tokens = context.groups.cp, qkv.shape[0]
    rope = None if context.rope is None else own(context.rope.table, cp)
    begin, total = rank(cp) * tokens, size(cp) * tokens
    turned, value = qkv.split([heads + kv_heads, kv_heads], 1)
    query, key = rotate(turned, rope).split([heads, kv_heads], 1)
    both = gather(torch.cat([key, value], 1), cp, total, "context")
    way = choose(device_type(qkv), qkv.dtype, is_even=False)
    if way == "operator":
        out, _ = part_attention(query, both, context.cu_seqlens, begin, window)
        return out
    if way == "pieces":
        return attend_by_pieces(query, both, context.cu_seqlens, begin, window)
    *ends, is_seen = part_ends(context.cu_seqlens, begin, tokens, total)
    key, value = torch.where(is_seen[:, None, None], both, 0).split(kv_heads, 1)  # the kernel leaves other gradients unset
    return _varlen(query, key, value, (ends[0], ends[1]), (min(tokens, context.max_length), context.max_length), window)


def part_ends(cu_seqlens: Tensor, begin: int, tokens: int, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where documents begin among the queries begin..begin + tokens and among all keys, of which they see only `is_seen`.

    Computed on the device. Documents that no query belongs to get the length 0; of the first one, the keys before `begin`
    count too.
    """
    end = begin + tokens
    first = cu_seqlens.masked_fill(cu_seqlens > begin, 0).amax()
    place = torch.arange(total, device=cu_seqlens.device)
    keys = cu_seqlens.clamp(max=end).maximum(first)
    return cu_seqlens.clamp(begin, end) - begin, keys, (place >= first) & (place < end)


def attend_by_pieces(query: Tensor, both: Tensor, cu_seqlens: Tensor, begin: int, window: int = 0) -> Tensor:
    """Queries begin.. [t, heads, head_dim] on all keys beside values [T, 2 kv_heads, head_dim]; as `attend_by_runs`."""
    outs = []
    for piece in pieces(cu_seqlens, begin, query.shape[0], window):
        key, value = both[piece.keys].transpose(0, 1).chunk(2)
        mask = new_mask(piece.first, piece.last, query.dtype, window, query.device)
        out = F.scaled_dot_product_attention(query[piece.queries].transpose(0, 1), key, value, mask, is_causal=mask is None,
                                             enable_gqa=query.shape[1] != key.shape[0])
        outs.append(out.transpose(0, 1))
    return torch.cat(outs)


def _paged(qkv: Tensor, context: Paged, layer: int, heads: int, kv_heads: int, window: int) -> Tensor:
    """Write new keys and values into their pages and attend to all of the sequence; whole prompts are not read back."""
    rope = _table(context)
    is_packed = context.is_whole and qkv.device.type == "cpu"
    if is_packed:
        out, turned, _ = attend(qkv, rope, context.cu_seqlens, heads, kv_heads, window)
    else:
        turned = torch.cat([rotate(qkv[:, :heads + kv_heads], rope), qkv[:, heads + kv_heads:]], 1)
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
    mask = context.mask(window)
    found = F.scaled_dot_product_attention(query, kept[0], kept[1], attn_mask=mask, enable_gqa=heads != kv_heads)
    if context.longest == 1:
        return found.flatten(1)
    return found.transpose(1, 2)[context.sequence, context.offset].flatten(1)
