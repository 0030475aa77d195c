"""Qwen3: a Qwen2 with norms of each query and key head, and biases only when asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from athanor.models.shapes import qwen2
from athanor.models.shapes.decoder import DecoderShape


@dataclass(frozen=True)
class Shape(qwen2.Shape):
    """Sizes of a Qwen3."""

    MODEL_TYPE: ClassVar = "qwen3"
    ARCHITECTURE: ClassVar = "Qwen3ForCausalLM"

    head_dim: int = 128
    attention_bias: bool = False

    def block_vectors(self, layer: int) -> int:
        biases = sum(product.outputs for product in self.attention_products()) if self.attention_bias else 0
        return DecoderShape.block_vectors(self, layer) + 2 * self.head_dim + biases
