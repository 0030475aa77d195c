"""The decoder: one class for every pipeline stage, with the parameter names of Hugging Face's Llama.

Activations are token-major [T, H]. Under tensor parallelism the residual stream holds this rank's part of the tokens, and
two visible collectives lead in and out of every sub-layer: x + scatter(sublayer(gather(norm(x)))).
Legend: T tokens, H hidden_size, V vocabulary, F intermediate_size (the last two: this rank's part).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from athanor.models.attention import attention
from athanor.models.collectives import all_gather, gather, rank, scatter, size
from athanor.models.context import Context, Packed, Rope, Scored
from athanor.models.experts import Mixture
from athanor.models.fused import rms_norm, rope_table, swiglu
from athanor.models.loss import score
from athanor.models.shapes.decoder import DecoderShape
from athanor.models.shapes.mixture import MixtureShape

Linear = Callable[[Tensor, Tensor], Tensor]  # how a block multiplies by its matrices; `fp8.convert` sets another


class Matrix(nn.Module):
    """A weight [rows, columns], not yet initialised: `initialize` or `load_weights` fill it."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))


class Norm(nn.Module):
    """RMSNorm over the last dim; each tensor-parallel rank normalises its own tokens."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(size)), eps

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; the three projections run as one matmul."""

    def __init__(self, shape: DecoderShape, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, shape.head_dim
        self.linear: Linear = F.linear
        self.group_heads = shape.num_attention_heads // shape.num_key_value_heads  # query heads of one key head
        self.q_proj = Matrix(shape.query_size, shape.hidden_size)
        self.k_proj = Matrix(shape.key_value_size, shape.hidden_size)
        self.v_proj = Matrix(shape.key_value_size, shape.hidden_size)
        self.o_proj = Matrix(shape.hidden_size, shape.query_size)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        qkv = self.linear(x, context.prepared(self, self.fuse)).unflatten(1, (-1, self.head_dim))
        kv_heads = qkv.shape[1] // (self.group_heads + 2)
        heads = self.group_heads * kv_heads
        return self.linear(attention(qkv, context, self.layer, heads, kv_heads), self.o_proj.weight)

    def fuse(self) -> Tensor:
        """One weight for queries, keys and values, with the two channels of a rotary pair side by side in q and k."""
        half = self.head_dim // 2
        query, key, value = self.q_proj.weight, self.k_proj.weight, self.v_proj.weight
        turned = [part.unflatten(0, (-1, 2, half)).transpose(1, 2) for part in (query, key)]
        return torch.cat([*turned, value.unflatten(0, (-1, half, 2))]).flatten(0, 2)


class MLP(nn.Module):
    """SwiGLU; gate and up run as one matmul."""

    is_one_graph = True

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.linear: Linear = F.linear
        self.gate_proj = Matrix(shape.intermediate_size, shape.hidden_size)
        self.up_proj = Matrix(shape.intermediate_size, shape.hidden_size)
        self.down_proj = Matrix(shape.hidden_size, shape.intermediate_size)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.linear(swiglu(self.linear(x, context.prepared(self, self.fuse))), self.down_proj.weight)

    def fuse(self) -> Tensor:
        return torch.cat([self.gate_proj.weight, self.up_proj.weight])


class Block(nn.Module):
    """One decoder block: [t, H] -> [t, H], t this tensor-parallel rank's tokens."""

    def __init__(self, shape: DecoderShape, layer: int) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape, layer)
        self.post_attention_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = Mixture(shape) if isinstance(shape, MixtureShape) else MLP(shape)

    @property
    def is_one_graph(self) -> bool:
        """Whether the block compiles with fullgraph=True; to be asked after tensor parallelism and before fully_shard."""
        return self.mlp.is_one_graph

    def forward(self, x: Tensor, context: Context) -> Tensor:
        tp, tokens = context.groups.tp, context.tokens
        x = x + scatter(self.self_attn(gather(self.input_layernorm(x, context), tp, tokens), context), tp)
        return x + scatter(self.mlp(gather(self.post_attention_layernorm(x, context), tp, tokens), context), tp)


class Decoder(nn.Module):
    """Blocks `layers` of a decoder (all of them unless given); the first stage embeds, the last one has norm and head.

    Only the root's forward touches embedding, final norm and head, so fully_shard takes them with the root. `on_disk` says
    which parameters go by other names in a folder (`huggingface.on_disk`).
    """

    def __init__(self, shape: DecoderShape, layers: range | None = None, is_first: bool = True, is_last: bool = True,
                 on_disk: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.shape, self.is_first, self.is_last = shape, is_first, is_last
        self.on_disk = on_disk or {}
        self.model = nn.Module()
        if is_first or (is_last and shape.tie_word_embeddings):
            self.model.embed_tokens = Matrix(shape.vocab_size, shape.hidden_size)
        numbers = range(shape.num_hidden_layers) if layers is None else layers
        self.model.layers = nn.ModuleDict({str(number): Block(shape, number) for number in numbers})
        if is_last:
            self.model.norm = Norm(shape.hidden_size, shape.rms_norm_eps)
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
        hidden = self._embed(x, context) if self.is_first else x
        rope = rope_table(context.positions, self.shape.head_dim, self.shape.rope_theta, hidden.dtype)
        context = replace(context, rope=Rope(rope))
        for block in self.blocks.values():
            hidden = block(hidden, context)
        if not self.is_last:
            return hidden
        tp = context.groups.tp
        hidden = gather(self.model.norm(hidden, context), tp, context.tokens)  # type: ignore[operator]
        head: Any = self.model.embed_tokens if self.shape.tie_word_embeddings else self.lm_head
        if targets is not None:
            z_loss = context.z_loss if isinstance(context, Packed) else 0.0
            return score(hidden, head.weight, targets, weights, tp, z_loss)
        if context.wanted is not None:
            hidden = hidden[context.wanted]
        logits = F.linear(hidden, head.weight)
        return logits if size(tp) == 1 else all_gather(logits.t(), tp).t()

    def _embed(self, tokens: Tensor, context: Context) -> Tensor:
        """Token ids [T] -> [t, H]; each tensor-parallel rank knows a part of the vocabulary."""
        weight: Tensor = self.model.embed_tokens.weight  # type: ignore[union-attr, assignment]
        tp = context.groups.tp
        if size(tp) == 1:
            return F.embedding(tokens, weight)
        row = tokens - rank(tp) * weight.shape[0]
        inside = (row >= 0) & (row < weight.shape[0])
        part = F.embedding(row.clamp(0, weight.shape[0] - 1), weight) * inside.unsqueeze(1)
        return scatter(part, tp)
