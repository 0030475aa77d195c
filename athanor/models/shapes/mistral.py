"""Mistral: a Llama whose queries may see a window only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from athanor.models.shapes.decoder import DecoderShape


@dataclass(frozen=True)
class Shape(DecoderShape):
    """Sizes of a Mistral."""

    MODEL_TYPE: ClassVar = "mistral"
    ARCHITECTURE: ClassVar = "MistralForCausalLM"
    LEFT_OUT: ClassVar = {"rms_norm_eps": 1e-6, "sliding_window": 4096}
    ONLY: ClassVar = {"hidden_act": "silu", "attention_dropout": 0.0}

    sliding_window: int = 0  # keys that a query may see; 0: all before it

    def to_config(self) -> dict[str, Any]:
        return {**super().to_config(), "sliding_window": self.sliding_window or None}

    def window(self, layer: int) -> int:
        return self.sliding_window
