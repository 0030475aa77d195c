"""Arithmetic of a decoder whose feed-forward layers are mixtures of experts. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from athanor.foundation.errors import ModelError
from athanor.models.shapes.decoder import DecoderShape


@dataclass(frozen=True)
class MixtureShape(DecoderShape):
    """Sizes of a decoder with `num_experts` experts of width `moe_intermediate_size` in every block."""

    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 0  # 0: intermediate_size
    norm_topk_prob: bool = True  # whether a token's gates are divided by their sum

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.moe_intermediate_size:
            object.__setattr__(self, "moe_intermediate_size", self.intermediate_size)
        for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
            if getattr(self, name) < 1:
                raise ModelError(f"{name} = {getattr(self, name)}; it must be at least 1")
        if self.num_experts_per_tok > self.num_experts:
            raise ModelError(f"num_experts_per_tok = {self.num_experts_per_tok} is more than num_experts = {self.num_experts}")

    def feed_forward_parameters(self, experts: int) -> int:
        """Weights of a block's router and of so many of its experts."""
        return self.hidden_size * (self.num_experts + 3 * experts * self.moe_intermediate_size)

    def block_matrix_parameters(self) -> int:
        """Weights of one block that each token is multiplied with: those of its own experts."""
        return self.attention_parameters() + self.feed_forward_parameters(self.num_experts_per_tok)

    def block_parameters(self) -> int:
        return self.attention_parameters() + self.feed_forward_parameters(self.num_experts) + 2 * self.hidden_size
