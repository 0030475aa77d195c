"""Qwen3: a Qwen2 with norms of each query and key head, and biases only when asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from athanor.models.shapes import qwen2


@dataclass(frozen=True)
class Shape(qwen2.Shape):
    """Sizes of a Qwen3."""

    MODEL_TYPE: ClassVar = "qwen3"
    ARCHITECTURE: ClassVar = "Qwen3ForCausalLM"
    HAS_HEAD_NORMS: ClassVar = True

    head_dim: int = 128
    attention_bias: bool = False

    @property
    def biased(self) -> frozenset[str]:
        return frozenset({"qkv", "attention_out"} if self.attention_bias else ())
