"""DeepSeek-V3: latent attention, dense blocks first, then routed and shared experts, and blocks that predict further tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from athanor.foundation.errors import ModelError
from athanor.models.shapes.decoder import DecoderShape
from athanor.models.shapes.mixture import MixtureShape
from athanor.models.shapes.products import Attended, Product
from athanor.models.shapes.rope import growth

LATENT_EPS = 1e-6  # of the norms between two projections, whatever rms_norm_eps is
MTP_WEIGHT = 0.3  # DeepSeek-V3's for its first 10T tokens; 0.1 for the 4.8T after them


@dataclass(frozen=True)
class Shape(MixtureShape):
    """Sizes of a DeepSeek-V3. The biases that balance its router follow no gradient and are not counted."""

    MODEL_TYPE: ClassVar = "deepseek_v3"
    ARCHITECTURE: ClassVar = "DeepseekV3ForCausalLM"
    KEYS: ClassVar = {"num_experts": "n_routed_experts", "head_dim": None}
    LEFT_OUT: ClassVar = {"rms_norm_eps": 1e-6, "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4}
    ONLY: ClassVar = {"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "moe_layer_freq": 1,
                      "rope_interleave": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    COUNTS_ALIKE: ClassVar = MixtureShape.COUNTS_ALIKE | {"rope_interleave", "scoring_func", "topk_method"}

    num_experts: int = 256
    num_experts_per_tok: int = 8
    q_lora_rank: int = 0  # 0: queries are projected at once
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    n_shared_experts: int = 1
    first_k_dense_replace: int = 3
    num_nextn_predict_layers: int = 0
    n_group: int = 1  # of experts, of which the best topk_group are chosen from
    topk_group: int = 1
    routed_scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "head_dim", self.qk_nope_head_dim + self.qk_rope_head_dim)
        super().__post_init__()
        self._require(1, "kv_lora_rank", "v_head_dim", "n_group", "topk_group")
        if not 0 < self.routed_scaling_factor < math.inf:
            raise ModelError(f"routed_scaling_factor = {self.routed_scaling_factor}; it must be above 0")
        if self.num_experts % self.n_group or self.topk_group > self.n_group:
            raise ModelError(f"n_group = {self.n_group} must divide n_routed_experts = {self.num_experts}, and be at least "
                             f"topk_group = {self.topk_group}")
        if self.num_experts_per_tok > self.topk_group * self.num_experts // self.n_group:
            raise ModelError(f"num_experts_per_tok = {self.num_experts_per_tok} is more than the experts of topk_group = "
                             f"{self.topk_group} groups")

    @property
    def rotary_dim(self) -> int:
        return self.qk_rope_head_dim

    def score_growth(self) -> float:
        """What scores are multiplied with beside 1 / sqrt(head_dim)."""
        scaling = self.rope_scaling
        return growth(scaling.factor, scaling.mscale_all_dim)**2 if scaling and scaling.mscale_all_dim else 1.0

    def to_config(self) -> dict[str, Any]:
        return {**super().to_config(), "q_lora_rank": self.q_lora_rank or None}

    def attention_products(self) -> list[Product]:
        hidden, heads = self.hidden_size, self.num_attention_heads
        queries = [Product("q", hidden, self.query_size, "outputs")]
        if self.q_lora_rank:
            queries = [Product("q_down", hidden, self.q_lora_rank, ""),
                       Product("q_up", self.q_lora_rank, self.query_size, "outputs")]
        return [*queries, Product("kv_down", hidden, self.kv_lora_rank + self.qk_rope_head_dim, ""),
                Product("kv_up", self.kv_lora_rank, heads * (self.qk_nope_head_dim + self.v_head_dim), "outputs"),
                Product("attention_out", heads * self.v_head_dim, hidden, "inputs")]

    def block_products(self, layer: int) -> list[Product]:
        joined = [Product("predict_in", 2 * self.hidden_size, self.hidden_size, "")] if layer >= self.num_hidden_layers else []
        return [*joined, *super().block_products(layer)]

    def block_attended(self, layer: int) -> Attended:
        return Attended(1, self.num_attention_heads, self.num_attention_heads, self.head_dim, self.v_head_dim)

    def block_vectors(self, layer: int) -> int:
        of_prediction = 3 * self.hidden_size if layer >= self.num_hidden_layers else 0  # norms of both inputs and of the output
        return super().block_vectors(layer) + self.q_lora_rank + self.kv_lora_rank + of_prediction

    def is_dense(self, layer: int) -> bool:
        return layer < self.first_k_dense_replace

    def shared_intermediate_size(self) -> int:
        return self.n_shared_experts * self.moe_intermediate_size

    def prediction_blocks(self) -> int:
        return self.num_nextn_predict_layers

    def answering(self) -> Self:
        return replace(self, num_nextn_predict_layers=0)


def mtp_weight(given: float | None, shape: DecoderShape, where: str) -> float | None:
    """The coefficient of these blocks' mean loss, `given` or the usual one; None for a model that has none of them.

    Raises ModelError, naming the key `where`, for a coefficient without blocks.
    """
    if shape.prediction_blocks():
        return MTP_WEIGHT if given is None else given
    if given is not None:
        raise ModelError(f"{where} = {given}, but the model has no blocks that predict further tokens; leave it out, or train a "
                         "deepseek_v3 with model.sizes.num_nextn_predict_layers = 1")
    return None
