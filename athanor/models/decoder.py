"""The decoder: one class for every pipeline stage, with the parameter names of Hugging Face's Llama; a shape chooses its pieces.

Activations are token-major [T, H]. Under tensor parallelism the residual stream holds this rank's part of the tokens, and
two visible collectives lead in and out of every sub-layer: x + scatter(sublayer(gather(norm(x)))).
Legend: T tokens, H hidden_size, V vocabulary, F intermediate_size (the last two: this rank's part).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from athanor.foundation.errors import ModelError
from athanor.models.attention import attention
from athanor.models.collectives import all_gather, gather, own, rank, scatter, size
from athanor.models.context import Context, Packed, Rope, Scored
from athanor.models.experts import Mixture
from athanor.models.filtered import FilteredAttention
from athanor.models.fused import beside_still, rms_norm, rope_table, swiglu
from athanor.models.latent import LatentAttention
from athanor.models.loss import score
from athanor.models.pieces import LayerNorm, Linear, Matrix, Norm
from athanor.models.shapes.decoder import DecoderShape
from athanor.models.shapes.deepseek_v3 import Shape as LatentShape
from athanor.models.shapes.mixture import MixtureShape
from athanor.models.shapes.yuan import Shape as FilteredShape


def new_norm(shape: DecoderShape) -> Norm | LayerNorm:
    """The norm of a shape over its residual stream."""
    return (Norm if shape.NORM_VECTORS == 1 else LayerNorm)(shape.hidden_size, shape.rms_norm_eps)


class Attention(nn.Module):
    """Grouped-query attention; the three projections run as one matmul.

    Like the feed-forward layers it returns partial sums under tensor parallelism, to which `closing_bias` is not added yet.
    """

    def __init__(self, shape: DecoderShape, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.is_rotary, self.window = layer, shape.head_dim, shape.IS_ROTARY, shape.window(layer)
        self.linear: Linear = F.linear
        self.group_heads = shape.num_attention_heads // shape.num_key_value_heads  # query heads of one key head
        has_bias = "qkv" in shape.biased
        self.q_proj = Matrix(shape.query_size, shape.hidden_size, has_bias)
        self.k_proj = Matrix(shape.key_value_size, shape.hidden_size, has_bias)
        self.v_proj = Matrix(shape.key_value_size, shape.hidden_size, has_bias)
        self.o_proj = Matrix(shape.hidden_size, shape.query_size, "attention_out" in shape.biased)
        self.q_norm, self.k_norm = (Norm(shape.head_dim, shape.rms_norm_eps) if shape.HAS_HEAD_NORMS else None for _ in "qk")

    def forward(self, x: Tensor, context: Context) -> Tensor:
        bias = None if self.q_proj.bias is None else context.prepared(self.q_proj, self.fuse_biases)
        qkv = self.linear(x, context.prepared(self, self.fuse), bias).unflatten(1, (-1, self.head_dim))
        kv_heads = qkv.shape[1] // (self.group_heads + 2)
        heads = self.group_heads * kv_heads
        if self.q_norm is not None and self.k_norm is not None:
            query, key, value = qkv.split([heads, kv_heads, kv_heads], 1)
            qkv = torch.cat([self._normed(query, self.q_norm), self._normed(key, self.k_norm), value], 1)
        return self.linear(attention(qkv, context, self.layer, heads, kv_heads, self.window), self.o_proj.weight)

    @property
    def closing_bias(self) -> Tensor | None:
        return self.o_proj.bias

    def fuse(self) -> Tensor:
        """One weight for queries, keys and values."""
        return self._fused(self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)

    def fuse_biases(self) -> Tensor:
        """Their biases in the same order."""
        query, key, value = self.q_proj.bias, self.k_proj.bias, self.v_proj.bias
        assert query is not None and key is not None and value is not None, "all three have one, or none has"
        return self._fused(query, key, value)

    def _fused(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Rows of all three one after another, with the two channels of a rotary pair side by side in q and k."""
        if not self.is_rotary:
            return torch.cat([query, key, value])
        half = self.head_dim // 2
        turned = [part.unflatten(0, (-1, 2, half)).transpose(1, 2) for part in (query, key)]
        return torch.cat([*turned, value.unflatten(0, (-1, half, 2))]).flatten(0, 2)

    def _normed(self, x: Tensor, norm: Norm) -> Tensor:
        """Each head [head_dim] of x [T, heads, head_dim] normalised; its channels stand as `_fused` has put them."""
        weight = norm.weight.unflatten(0, (2, -1)).t().flatten() if self.is_rotary else norm.weight
        return rms_norm(x.flatten(0, 1), weight, norm.eps).view(x.shape)


def new_attention(shape: DecoderShape, layer: int) -> Attention | LatentAttention | FilteredAttention:
    """The attention of a block of a shape."""
    if isinstance(shape, LatentShape):
        return LatentAttention(shape, layer)
    return FilteredAttention(shape, layer) if isinstance(shape, FilteredShape) else Attention(shape, layer)


class MLP(nn.Module):
    """SwiGLU; gate and up run as one matmul."""

    is_one_graph = True

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.linear: Linear = F.linear
        self.gate_proj = Matrix(width, hidden_size)
        self.up_proj = Matrix(width, hidden_size)
        self.down_proj = Matrix(hidden_size, width)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.linear(swiglu(self.linear(x, context.prepared(self, self.fuse))), self.down_proj.weight)

    closing_bias = None

    def fuse(self) -> Tensor:
        return torch.cat([self.gate_proj.weight, self.up_proj.weight])


class PlainMLP(nn.Module):
    """GELU, in its form by tanh, between two matrices with biases or without."""

    is_one_graph = True

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.linear: Linear = F.linear
        self.up_proj = Matrix(shape.intermediate_size, shape.hidden_size, "up" in shape.biased)
        self.down_proj = Matrix(shape.hidden_size, shape.intermediate_size, "down" in shape.biased)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        inner = F.gelu(self.linear(x, self.up_proj.weight, self.up_proj.bias), approximate="tanh")
        return self.linear(inner, self.down_proj.weight)

    @property
    def closing_bias(self) -> Tensor | None:
        return self.down_proj.bias


def new_feed_forward(shape: DecoderShape, layer: int) -> MLP | PlainMLP | Mixture:
    """What a block of a shape does after its attention."""
    if isinstance(shape, MixtureShape) and not shape.is_dense(layer):
        shared = shape.shared_intermediate_size()
        return Mixture(shape, MLP(shape.hidden_size, shared) if shared else None)
    return MLP(shape.hidden_size, shape.intermediate_size) if shape.IS_GATED else PlainMLP(shape)


class Block(nn.Module):
    """One decoder block: [t, H] -> [t, H], t this tensor-parallel rank's tokens."""

    def __init__(self, shape: DecoderShape, layer: int) -> None:
        super().__init__()
        self.input_layernorm = new_norm(shape)
        self.self_attn = new_attention(shape, layer)
        self.post_attention_layernorm = new_norm(shape)
        self.mlp = new_feed_forward(shape, layer)

    @property
    def is_one_graph(self) -> bool:
        """Whether the block compiles with fullgraph=True; to be asked after tensor parallelism and before fully_shard."""
        return self.mlp.is_one_graph

    def forward(self, x: Tensor, context: Context) -> Tensor:
        tp, tokens = context.groups.tp, context.tokens
        for norm, part in ((self.input_layernorm, self.self_attn), (self.post_attention_layernorm, self.mlp)):
            x = x + scatter(part(gather(norm(x, context), tp, tokens), context), tp)
            if part.closing_bias is not None:
                x = x + part.closing_bias  # by the rank that has the sums, so that it is added once
        return x


class Decoder(nn.Module):
    """Blocks `layers` of a decoder (all of them unless given); the first stage embeds, the last one has norm and head.

    Only the root's forward touches embedding, final norm and head, so fully_shard takes them with the root. `on_disk` says
    which parameters go by other names in a folder (`stored.written`), `copies` under which names it holds one once more;
    `block` is the class of blocks.
    """

    def __init__(self, shape: DecoderShape, layers: range | None = None, is_first: bool = True, is_last: bool = True,
                 on_disk: Mapping[str, str] | None = None, block: type[Block] = Block) -> None:
        super().__init__()
        self.shape, self.is_first, self.is_last = shape, is_first, is_last
        self.on_disk = on_disk or {}
        self.copies: Mapping[str, Sequence[str]] = {}
        self.model = nn.Module()
        if is_first or (is_last and shape.tie_word_embeddings):
            self.model.embed_tokens = Matrix(shape.vocab_size, shape.hidden_size)
        if is_first and not shape.IS_ROTARY:
            self.model.embed_positions = Matrix(shape.max_position_embeddings, shape.hidden_size)
        numbers = range(shape.num_hidden_layers) if layers is None else layers
        self.model.layers = nn.ModuleDict({str(number): block(shape, number) for number in numbers})
        if is_last:
            self.model.norm = new_norm(shape)
            if not shape.tie_word_embeddings:
                self.lm_head = Matrix(shape.vocab_size, shape.hidden_size)

    @property
    def blocks(self) -> dict[str, Block]:
        """The blocks by their global number, in order."""
        return dict(self.model.layers.items())  # type: ignore[union-attr, operator, arg-type]

    def forward(self, x: Tensor, context: Context, targets: Tensor | None = None,
                weights: Tensor | None = None) -> Tensor | Scored:
        """x: token ids [T], or hidden [t, H] of the stage before.

        Returns hidden [t, H] on a stage that is not the last; with targets [T] their Scored (`models/loss.py`); else logits
        [wanted, V] of the whole vocabulary (not differentiable under tensor parallelism).
        """
        hidden = self.embed(x, context) if self.is_first else x
        if self.shape.is_bounded and isinstance(context, Packed) and context.max_length > self.shape.max_position_embeddings:
            raise ModelError(f"a document of up to {context.max_length} tokens is longer than max_position_embeddings = "
                             f"{self.shape.max_position_embeddings}, and the model knows of no positions beyond")
        if self.is_first and not self.shape.IS_ROTARY:
            positions = own(own(context.positions, context.groups.cp), context.groups.tp)
            hidden = hidden + F.embedding(positions, self.model.embed_positions.weight)  # type: ignore[union-attr, arg-type]
        if self.shape.IS_ROTARY:
            rope = rope_table(context.positions, self.shape.rotary_dim, self.shape.rope_theta, hidden.dtype,
                              self.shape.rope_scaling)
            context = replace(context, rope=Rope(beside_still(rope, self.shape.head_dim - self.shape.rotary_dim)))
        for block in self.blocks.values():
            hidden = block(hidden, context)
        if not self.is_last:
            return hidden
        hidden = self.model.norm(hidden, context)  # type: ignore[operator]
        if targets is not None:
            return self.score(hidden, context, targets, weights)
        tp = context.groups.tp
        hidden = gather(hidden, tp, context.tokens)
        if context.wanted is not None:
            hidden = hidden[context.wanted]
        logits = F.linear(hidden, self.head)
        return logits if size(tp) == 1 else all_gather(logits.t(), tp).t()

    @property
    def head(self) -> Tensor:
        """The weight [V, H] that makes logits."""
        head: Any = self.model.embed_tokens if self.shape.tie_word_embeddings else self.lm_head
        return head.weight  # type: ignore[no-any-return]

    def score(self, hidden: Tensor, context: Context, targets: Tensor, weights: Tensor | None) -> Scored:
        """What the last stage says of targets [T], given hidden [t, H] after the last norm."""
        tp, z_loss = context.groups.tp, context.z_loss if isinstance(context, Packed) else 0.0
        return score(gather(hidden, tp, context.tokens), self.head, targets, weights, tp, z_loss)

    def embed(self, tokens: Tensor, context: Context) -> Tensor:
        """Token ids [T] -> [t, H]; each tensor-parallel rank knows a part of the vocabulary."""
        weight: Tensor = self.model.embed_tokens.weight  # type: ignore[union-attr, assignment]
        tp = context.groups.tp
        if size(tp) == 1:
            return F.embedding(tokens, weight)
        row = tokens - rank(tp) * weight.shape[0]
        inside = (row >= 0) & (row < weight.shape[0])
        part = F.embedding(row.clamp(0, weight.shape[0] - 1), weight) * inside.unsqueeze(1)
        return scatter(part, tp)
