"""BLOOM: a GPT with ALiBi in place of learned positions, and a norm after the embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from athanor.models.shapes import gpt2


@dataclass(frozen=True)
class Shape(gpt2.Shape):
    """Sizes of a BLOOM."""

    MODEL_TYPE: ClassVar = "bloom"
    ARCHITECTURE: ClassVar = "BloomForCausalLM"
    KEYS: ClassVar = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "rms_norm_eps": "layer_norm_epsilon",
                      "intermediate_size": "n_inner", "max_position_embeddings": "seq_length", "num_key_value_heads": None,
                      "head_dim": None, "rope_theta": None}
    ONLY: ClassVar = {}

    def embedding_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    def vectors(self) -> int:
        return super().vectors() + self.NORM_VECTORS * self.hidden_size
