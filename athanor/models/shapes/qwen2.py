"""Qwen2 and Qwen2.5: a Llama with biases on queries, keys and values; later blocks may see a window only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from athanor.models.shapes.decoder import DecoderShape


@dataclass(frozen=True)
class Shape(DecoderShape):
    """Sizes of a Qwen2."""

    MODEL_TYPE: ClassVar = "qwen2"
    ARCHITECTURE: ClassVar = "Qwen2ForCausalLM"
    ONLY: ClassVar = {"hidden_act": "silu", "attention_dropout": 0.0}

    use_sliding_window: bool = False
    sliding_window: int = 4096  # keys that a query may see
    max_window_layers: int = 28  # the first so many blocks see all

    def window(self, layer: int) -> int:
        return self.sliding_window if self.use_sliding_window and layer >= self.max_window_layers else 0

    @property
    def biased(self) -> frozenset[str]:
        return frozenset({"qkv"})
