"""Attention on filtered tokens (Yuan 2.0, arXiv:2311.15786): queries and keys see what two short convolutions make of them.

A convolution's matrix for the token before is applied before its rows move on by one, so that what moves, what a cache keeps
and what context-parallel ranks exchange is H/2 wide in both. All tensor-parallel ranks filter alike.
Legend: T tokens, H hidden_size, C the width of what is moved.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from athanor.models.attention import attention
from athanor.models.collectives import gather, own, rank, size
from athanor.models.context import Context, Packed, Paged
from athanor.models.pieces import Linear, Matrix, Norm
from athanor.models.shapes.yuan import KERNEL, Shape

EPSILON = 1e-6  # of the filter's norm, whatever that of the others is


class Filter(nn.Module):
    """y = conv(x), z = conv(y), both over a token and the one before: [T, H] -> RMSNorm(z + x) [T, H].

    A convolution's weight holds the columns of the token before, then those of the token itself.
    """

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.layer, self.crosses_documents = layer, shape.filter_crosses_documents
        hidden, half = shape.hidden_size, shape.hidden_size // 2
        self.conv1 = Matrix(half, KERNEL * hidden, has_bias=True)
        self.conv2 = Matrix(hidden, KERNEL * half, has_bias=True)
        self.output_layernorm = Norm(hidden, EPSILON)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        assert self.conv1.bias is not None, "both convolutions have one"
        to_next, to_own = F.linear(x, context.prepared(self.conv1, self.fuse)).chunk(KERNEL, 1)
        inner = to_own + self.moved(to_next, context, 0) + self.conv1.bias
        both = torch.cat([self.moved(inner, context, 1), inner], 1)
        return self.output_layernorm(F.linear(both, self.conv2.weight, self.conv2.bias) + x, context)  # type: ignore[no-any-return]

    def fuse(self) -> Tensor:
        """The first convolution as one matrix [H, H]: the rows of the token before, then those of the token itself."""
        return torch.cat(self.conv1.weight.chunk(KERNEL, 1))

    def moved(self, x: Tensor, context: Context, convolution: int) -> Tensor:
        """Each token's row of x [T, C] at the token after it; zeros where a document begins."""
        if isinstance(context, Paged):
            return remembered(x, context, context.cache.filters[self.layer][convolution])
        cp = context.groups.cp
        if size(cp) == 1:
            rows = x.roll(1, 0)
        else:  # the first of all ranks gets a row, too, but there a document begins
            rows = torch.cat([gather(x[-1:], cp, size(cp), "context")[rank(cp) - 1].unsqueeze(0), x[:-1]])
        return rows.masked_fill(own(begins(context, self.crosses_documents), cp).unsqueeze(1), 0)


def begins(context: Packed, crosses_documents: bool) -> Tensor:
    """[T] where a document begins; where only the beginnings of rows count, those."""
    if crosses_documents and context.row_tokens:
        return torch.arange(len(context.positions), device=context.positions.device) % context.row_tokens == 0
    return context.positions == 0


def remembered(x: Tensor, context: Paged, kept: Tensor) -> Tensor:
    """The rows of x [T, C] moved on by one within each sequence, the first from `kept` [pages, C], which then keeps the last."""
    (pages, is_there), (tokens, their_pages) = context.before, context.tails
    rows = x.roll(1, 0)
    rows[context.starts[:-1]] = kept[pages] * is_there
    kept[their_pages] = x[tokens]
    return rows


class FilteredAttention(nn.Module):
    """Attention of as many key heads as query heads, whose queries and keys come from filtered tokens, and values from those
    as they are; else as the decoder's."""

    closing_bias = None

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.rotary_dim = layer, shape.head_dim, shape.rotary_dim
        self.linear: Linear = F.linear
        self.q_proj, self.k_proj, self.v_proj = (Matrix(shape.query_size, shape.hidden_size) for _ in "qkv")
        self.o_proj = Matrix(shape.hidden_size, shape.query_size)
        self.lf_gate = Filter(shape, layer)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        query_key = self.linear(self.lf_gate(x, context), context.prepared(self, self.fuse))
        qkv = torch.cat([query_key, self.linear(x, self.v_proj.weight)], 1).unflatten(1, (-1, self.head_dim))
        heads = qkv.shape[1] // 3
        return self.linear(attention(qkv, context, self.layer, heads, heads), self.o_proj.weight)

    def fuse(self) -> Tensor:
        """One weight for queries and keys: of each head the channels that are not turned, then those that are, in pairs."""
        heads = torch.cat([self.q_proj.weight, self.k_proj.weight]).unflatten(0, (-1, self.head_dim))
        turned, still = heads.split([self.rotary_dim, self.head_dim - self.rotary_dim], 1)
        pairs = turned.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return torch.cat([still, pairs], 1).flatten(0, 1)
