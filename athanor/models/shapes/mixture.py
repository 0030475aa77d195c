"""Arithmetic of a decoder whose feed-forward layers are mixtures of experts. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from athanor.foundation.errors import ModelError
from athanor.models.shapes.decoder import DecoderShape
from athanor.models.shapes.products import Product, feed_forward


@dataclass(frozen=True)
class MixtureShape(DecoderShape):
    """Sizes of a decoder with `num_experts` experts of width `moe_intermediate_size` in every block that is not dense."""

    LEAST_EXPERTS: ClassVar[int] = 1
    ROUTER_ROWS: ClassVar[int] = 1  # numbers that the router makes for each expert

    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 0  # 0: intermediate_size
    norm_topk_prob: bool = True  # whether a token's gates are divided by their sum

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.moe_intermediate_size:
            object.__setattr__(self, "moe_intermediate_size", self.intermediate_size)
        self._require(self.LEAST_EXPERTS, "num_experts", "num_experts_per_tok")
        if self.num_experts_per_tok > self.num_experts:
            raise ModelError(f"num_experts_per_tok = {self.num_experts_per_tok} is more than num_experts = {self.num_experts}")

    def is_dense(self, layer: int) -> bool:
        """Whether this block has an ordinary feed-forward layer."""
        return not self.num_experts

    def shared_intermediate_size(self) -> int:
        """Width of the experts that every token is sent to, together."""
        return 0

    def feed_forward_products(self, layer: int) -> list[Product]:
        if self.is_dense(layer):
            return super().feed_forward_products(layer)
        shared = self.shared_intermediate_size()
        return [Product("router", self.hidden_size, self.ROUTER_ROWS * self.num_experts, ""),
                *feed_forward(self.hidden_size, self.moe_intermediate_size, prefix="experts_", times=self.num_experts_per_tok,
                              copies=self.num_experts),
                *(feed_forward(self.hidden_size, shared, prefix="shared_") if shared else [])]
