"""GPT: learned positions, LayerNorm, biases, a feed-forward layer without gate. GPT-3, Yuan 1.0 and MT-NLG are counted by it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from athanor.foundation.errors import ModelError
from athanor.models.shapes.decoder import DecoderShape

DROPOUTS = ("attn_pdrop", "embd_pdrop", "resid_pdrop")  # read whatever they are: nothing is dropped here


@dataclass(frozen=True)
class Shape(DecoderShape):
    """Sizes of a GPT; `n_inner` left out is four times the width."""

    MODEL_TYPE: ClassVar = "gpt2"
    ARCHITECTURE: ClassVar = "GPT2LMHeadModel"
    KEYS: ClassVar = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
                      "intermediate_size": "n_inner", "max_position_embeddings": "n_positions",
                      "rms_norm_eps": "layer_norm_epsilon", "num_key_value_heads": None, "head_dim": None, "rope_theta": None}
    LEFT_OUT: ClassVar = {}
    ONLY: ClassVar = {"activation_function": "gelu_new", "add_cross_attention": False, "scale_attn_weights": True,
                      "scale_attn_by_inverse_layer_idx": False}
    COUNTS_ALIKE: ClassVar = frozenset(ONLY) - {"add_cross_attention"}
    IS_GATED: ClassVar = False
    IS_ROTARY: ClassVar = False
    GROWTH: ClassVar = 4.0
    NORM_VECTORS: ClassVar = 2

    max_position_embeddings: int = 1024
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_key_value_heads != self.num_attention_heads or self.query_size != self.hidden_size:
            raise ModelError(f"num_key_value_heads = {self.num_key_value_heads}, head_dim = {self.head_dim}: the "
                             f"{self.num_attention_heads} heads of a {self.MODEL_TYPE} have a key head each and fill "
                             f"hidden_size = {self.hidden_size}; leave both out")

    @property
    def biased(self) -> frozenset[str]:
        return frozenset({"qkv", "attention_out", "up", "down"})

    def embedding_parameters(self) -> int:
        return (self.vocab_size + self.max_position_embeddings) * self.hidden_size

    @classmethod
    def from_config(cls, config: dict[str, Any], where: str = "config.json", for_training: bool = True) -> Self:
        width = config.get("n_embd", config.get("hidden_size"))
        if config.get("n_inner") is None and config.get("intermediate_size") is None and isinstance(width, int):
            config = {**config, "intermediate_size": int(cls.GROWTH * width)}
        return super().from_config(config, where, for_training)

    def to_config(self) -> dict[str, Any]:
        return {**super().to_config(), **dict.fromkeys(DROPOUTS, 0.0)}
