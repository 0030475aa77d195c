"""Gemma (arXiv:2403.08295): embeddings grow by sqrt(hidden_size), norms multiply by 1 + weight, GELU gates."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from athanor.models.context import Context
from athanor.models.decoder import MLP, Block, Decoder
from athanor.models.fused import rms_norm
from athanor.models.pieces import Norm
from athanor.models.shapes.decoder import DecoderShape
from athanor.models.shapes.gemma import Shape
from athanor.models.zoo import llama

TENSOR_DIMS = llama.TENSOR_DIMS


class ShiftedNorm(Norm):
    """RMSNorm whose weight is kept as what it differs from 1 by."""

    initial = 0.0

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return rms_norm(x, 1.0 + self.weight, self.eps)


class GELUGated(MLP):
    """gelu(gate) x up, between two matrices."""

    def forward(self, x: Tensor, context: Context) -> Tensor:
        gate, up = self.linear(x, context.prepared(self, self.fuse)).chunk(2, -1)
        return self.linear(F.gelu(gate, approximate="tanh") * up, self.down_proj.weight)


class GemmaBlock(Block):
    """A block of these pieces."""

    def __init__(self, shape: DecoderShape, layer: int) -> None:
        super().__init__(shape, layer)
        self.input_layernorm = ShiftedNorm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = ShiftedNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = GELUGated(shape.hidden_size, shape.intermediate_size)


class Gemma(Decoder):
    """The decoder with such blocks."""

    def __init__(self, shape: DecoderShape, layers: range | None, is_first: bool, is_last: bool) -> None:
        super().__init__(shape, layers, is_first, is_last, block=GemmaBlock)
        if is_last:
            self.model.norm = ShiftedNorm(shape.hidden_size, shape.rms_norm_eps)

    def embed(self, tokens: Tensor, context: Context) -> Tensor:
        return super().embed(tokens, context) * math.sqrt(self.shape.hidden_size)


def build(shape: Shape, layers: range | None = None, is_first: bool = True, is_last: bool = True) -> Decoder:
    """A stage of the model (all of it unless told otherwise), its weights not yet initialised."""
    return Gemma(shape, layers, is_first, is_last)
