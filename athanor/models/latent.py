"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values are projected up from a narrow latent vector.

Every head has channels of its own that are not turned by positions, and next to them channels that are; the turned ones of
keys are one vector for all heads. Here heads are made in full, so that the kernels and the cache of other models serve, and a
cache takes what theirs takes: the latent vectors alone would be smaller.
Legend: T tokens, H hidden_size, n heads (this rank's), d head_dim, v v_head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from athanor.foundation.errors import ModelError
from athanor.models.attention import attention
from athanor.models.context import Context
from athanor.models.pieces import Linear, Matrix, Norm
from athanor.models.shapes.deepseek_v3 import LATENT_EPS, Shape


class LatentAttention(nn.Module):
    """[T, H] -> [T, H], partial sums under tensor parallelism, which cuts heads; both latents are computed by every rank."""

    closing_bias = None

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        if shape.qk_nope_head_dim % 2 or shape.v_head_dim > shape.head_dim:
            raise ModelError(f"qk_nope_head_dim = {shape.qk_nope_head_dim} must be even, and v_head_dim = {shape.v_head_dim} at "
                             f"most the {shape.head_dim} channels of a key; others are counted and not computed here")
        if shape.num_key_value_heads != shape.num_attention_heads:
            raise ModelError(f"num_key_value_heads = {shape.num_key_value_heads}, but latent attention makes keys and values for "
                             f"each of num_attention_heads = {shape.num_attention_heads}")
        self.layer, self.head_dim, self.value_dim = layer, shape.head_dim, shape.v_head_dim
        self.latent_sizes = [shape.kv_lora_rank, shape.qk_rope_head_dim]
        self.up_sizes = [shape.qk_nope_head_dim, shape.v_head_dim]
        self.growth = shape.score_growth()
        self.linear: Linear = F.linear
        hidden, heads = shape.hidden_size, shape.num_attention_heads
        if shape.q_lora_rank:
            self.q_a_proj = Matrix(shape.q_lora_rank, hidden)
            self.q_a_layernorm = Norm(shape.q_lora_rank, LATENT_EPS)
            self.q_b_proj = Matrix(shape.query_size, shape.q_lora_rank)
        else:
            self.q_proj = Matrix(shape.query_size, hidden)
        self.kv_a_proj_with_mqa = Matrix(sum(self.latent_sizes), hidden)
        self.kv_a_layernorm = Norm(shape.kv_lora_rank, LATENT_EPS)
        self.kv_b_proj = Matrix(heads * sum(self.up_sizes), shape.kv_lora_rank)
        self.o_proj = Matrix(hidden, heads * shape.v_head_dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        query = self._queries(x, context).unflatten(1, (-1, self.head_dim))
        latent, turned = self.linear(x, self.kv_a_proj_with_mqa.weight).split(self.latent_sizes, 1)
        up = self.linear(self.kv_a_layernorm(latent.contiguous(), context), self.kv_b_proj.weight)
        own, value = up.unflatten(1, (-1, sum(self.up_sizes))).split(self.up_sizes, 2)
        heads = query.shape[1]
        key = torch.cat([own, turned.unsqueeze(1).expand(-1, heads, -1)], 2)
        value = F.pad(value, (0, self.head_dim - self.value_dim))  # kernels want values as wide as keys
        out = attention(torch.cat([query, key, value], 1), context, self.layer, heads, heads)
        return self.linear(out.unflatten(1, (heads, -1))[..., :self.value_dim].flatten(1), self.o_proj.weight)

    def _queries(self, x: Tensor, context: Context) -> Tensor:
        """[T, n d]"""
        if hasattr(self, "q_proj"):
            query = self.linear(x, self.q_proj.weight)
        else:
            query = self.linear(self.q_a_layernorm(self.linear(x, self.q_a_proj.weight), context), self.q_b_proj.weight)
        return query if self.growth == 1.0 else query * self.growth
