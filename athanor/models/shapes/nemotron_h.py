"""Nemotron-H: each block is one of Mamba-2, attention, a feed-forward layer or a mixture of experts, as a pattern says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from athanor.foundation.errors import ModelError
from athanor.models.shapes.mixture import MixtureShape
from athanor.models.shapes.products import Attended, Product, feed_forward

CHUNK = 128  # tokens within which Mamba-2 works like attention (Dao and Gu 2024)


@dataclass(frozen=True)
class Shape(MixtureShape):
    """Sizes of a Nemotron-H. `hybrid_override_pattern` has a letter for each block: M Mamba-2, * attention, - dense, E experts.

    Experts may work in a latent space of `moe_latent_size`. Feed-forward layers have no gate.
    """

    MODEL_TYPE: ClassVar = "nemotron_h"
    ARCHITECTURE: ClassVar = "NemotronHForCausalLM"
    KEYS: ClassVar = {"num_experts": "n_routed_experts", "rms_norm_eps": "layer_norm_epsilon", "rope_theta": None}
    ONLY: ClassVar = {"use_bias": False, "attention_bias": False, "mlp_bias": False}
    LEAST_EXPERTS: ClassVar = 0
    IS_GATED: ClassVar = False

    hybrid_override_pattern: str = ""
    num_experts: int = 0
    num_experts_per_tok: int = 0
    mamba_num_heads: int = 64
    mamba_head_dim: int = 64
    ssm_state_size: int = 128
    n_groups: int = 8
    conv_kernel: int = 4
    moe_shared_expert_intermediate_size: int = 0
    moe_latent_size: int = 0  # 0: experts read the block's input itself

    def __post_init__(self) -> None:
        super().__post_init__()
        pattern = self.hybrid_override_pattern
        if len(pattern) != self.num_hidden_layers or set(pattern) - set("M*-E"):
            raise ModelError(f"hybrid_override_pattern = {pattern!r} is not one of M, *, - and E for each of the "
                             f"{self.num_hidden_layers} blocks")

    def block_products(self, layer: int) -> list[Product]:
        hidden, kind = self.hidden_size, self.hybrid_override_pattern[layer]
        if kind == "*":
            return self.attention_products()
        if kind == "-":
            return feed_forward(hidden, self.intermediate_size, False)
        inner = self.mamba_num_heads * self.mamba_head_dim
        if kind == "M":
            made = 2 * inner + 2 * self.n_groups * self.ssm_state_size + self.mamba_num_heads
            return [Product("mamba_in", hidden, made, "outputs"), Product("mamba_out", inner, hidden, "inputs")]
        latent, shared = self.moe_latent_size or hidden, self.moe_shared_expert_intermediate_size
        squeeze = [Product("latent_in", hidden, latent, ""), Product("latent_out", latent, hidden, "")]
        return [Product("router", hidden, self.num_experts, ""), *(squeeze if self.moe_latent_size else []),
                *feed_forward(latent, self.moe_intermediate_size, False, "experts_", self.num_experts_per_tok, self.num_experts),
                *(feed_forward(hidden, shared, False, "shared_") if shared else [])]

    def block_attended(self, layer: int) -> Attended:
        """Mamba-2 counts as attention within a chunk; other blocks than these two have none."""
        kind = self.hybrid_override_pattern[layer]
        if kind == "M":
            return Attended(1, self.mamba_num_heads, self.n_groups, self.ssm_state_size, self.mamba_head_dim, CHUNK)
        return super().block_attended(layer) if kind == "*" else Attended(1, 0, 0, 0, 0)

    def block_vectors(self, layer: int) -> int:
        inner = self.mamba_num_heads * self.mamba_head_dim
        mixed = inner + 2 * self.n_groups * self.ssm_state_size
        own = mixed * (self.conv_kernel + 1) + 3 * self.mamba_num_heads + inner
        return self.hidden_size + (own if self.hybrid_override_pattern[layer] == "M" else 0)
