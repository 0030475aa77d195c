"""GPT: learned positions, LayerNorm, biases, a feed-forward layer without gate. GPT-3, Yuan 1.0 and MT-NLG are counted by it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from athanor.models.shapes.decoder import DecoderShape


@dataclass(frozen=True)
class Shape(DecoderShape):
    """Sizes of a GPT; `n_inner` left out is four times the width."""

    MODEL_TYPE: ClassVar = "gpt2"
    ARCHITECTURE: ClassVar = "GPT2LMHeadModel"
    KEYS: ClassVar = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
                      "intermediate_size": "n_inner", "max_position_embeddings": "n_positions",
                      "rms_norm_eps": "layer_norm_epsilon", "num_key_value_heads": None, "head_dim": None, "rope_theta": None}
    ONLY: ClassVar = {"add_cross_attention": False}
    IS_GATED: ClassVar = False
    IS_ROTARY: ClassVar = False
    NORM_VECTORS: ClassVar = 2

    max_position_embeddings: int = 1024
    tie_word_embeddings: bool = True

    def block_vectors(self, layer: int) -> int:
        return super().block_vectors(layer) + sum(product.outputs for product in self.block_products(layer))

    def embedding_parameters(self) -> int:
        return (self.vocab_size + self.max_position_embeddings) * self.hidden_size

    @classmethod
    def from_config(cls, config: dict[str, Any], where: str = "config.json", for_training: bool = True) -> Self:
        width = config.get("n_embd", config.get("hidden_size"))
        if config.get("n_inner") is None and config.get("intermediate_size") is None and isinstance(width, int):
            config = {**config, "intermediate_size": 4 * width}
        return super().from_config(config, where, for_training)
