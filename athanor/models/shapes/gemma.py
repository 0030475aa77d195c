"""Gemma: a Llama whose feed-forward layer is gated by GELU, and whose head is the embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from athanor.models.shapes.decoder import DecoderShape


@dataclass(frozen=True)
class Shape(DecoderShape):
    """Sizes of a Gemma."""

    MODEL_TYPE: ClassVar = "gemma"
    ARCHITECTURE: ClassVar = "GemmaForCausalLM"
    ONLY: ClassVar = {"hidden_act": "gelu_pytorch_tanh", "attention_bias": False, "attention_dropout": 0.0}
    GROWTH: ClassVar = 8.0

    head_dim: int = 256
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 2
    eos_token_id: int | None = 1
    pad_token_id: int | None = 0

    def kept_beside(self, layer: int, tp: int) -> float:
        return self.intermediate_size / tp  # gelu(gate), which is multiplied with another projection

    @classmethod
    def from_config(cls, config: dict[str, Any], where: str = "config.json", for_training: bool = True) -> Self:
        if config.get("hidden_act") == "gelu":  # the first folders say so and mean its form by tanh
            config = {**config, "hidden_act": cls.ONLY["hidden_act"]}
        return super().from_config(config, where, for_training)
