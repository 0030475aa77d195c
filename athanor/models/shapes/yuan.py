"""Yuan 2.0: two convolutions over neighbouring tokens before queries and keys (LFA); with experts, a router that attends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from athanor.foundation.errors import ModelError
from athanor.models.shapes.mixture import MixtureShape
from athanor.models.shapes.products import Product

KERNEL = 2  # tokens that a convolution reads: this one and the one before


@dataclass(frozen=True)
class Shape(MixtureShape):
    """Sizes of a Yuan 2.0, dense unless it has experts; of a Yuan 2.0-M32 the heads fill `attention_projection_size`.

    LFA: y = conv(H -> H/2), z = conv(H/2 -> H), queries and keys from the norm of z + x, values from x. The router makes a
    query, a key and a value for each expert.
    """

    MODEL_TYPE: ClassVar = "yuan"
    ARCHITECTURE: ClassVar = "YuanForCausalLM"
    KEYS: ClassVar = {"num_key_value_heads": None, "head_dim": None}
    ONLY: ClassVar = {"hidden_act": "silu", "use_shareqk": False}
    LEAST_EXPERTS: ClassVar = 0
    ROUTER_ROWS: ClassVar = 3

    tie_word_embeddings: bool = True
    num_experts: int = 0  # 0: dense
    num_experts_per_tok: int = 0
    attention_projection_size: int = 0  # 0: hidden_size

    def __post_init__(self) -> None:
        width = self.attention_projection_size or self.hidden_size
        if self.num_attention_heads > 0 and width % self.num_attention_heads:
            raise ModelError(f"num_attention_heads = {self.num_attention_heads} does not divide "
                             f"attention_projection_size = {width}")
        if self.hidden_size % 2:
            raise ModelError(f"hidden_size = {self.hidden_size} is odd; the convolutions halve it")
        object.__setattr__(self, "attention_projection_size", width)
        object.__setattr__(self, "head_dim", width // max(1, self.num_attention_heads))
        super().__post_init__()

    def attention_products(self) -> list[Product]:
        hidden, half = self.hidden_size, self.hidden_size // 2
        return [Product("lfa_in", hidden, half, "", times=KERNEL, copies=KERNEL),
                Product("lfa_out", half, hidden, "", times=KERNEL, copies=KERNEL),
                Product("qk", hidden, 2 * self.query_size, "outputs"), Product("v", hidden, self.query_size, "outputs"),
                Product("attention_out", self.query_size, hidden, "inputs")]

    def block_vectors(self, layer: int) -> int:
        biases = self.hidden_size // 2 + self.hidden_size
        return super().block_vectors(layer) + biases + self.NORM_VECTORS * self.hidden_size

    @classmethod
    def from_config(cls, config: dict[str, Any], where: str = "config.json", for_training: bool = True) -> Self:
        experts = config.get("moe_config") or {}
        if not isinstance(experts, dict):
            raise ModelError(f"{where}: moe_config = {experts!r} is not a table")
        if experts and config.get("use_moe", True):
            renamed = {"moe_num_experts": "num_experts", "moe_top_k": "num_experts_per_tok",
                       "ffn_hidden_size": "moe_intermediate_size", "norm_topk_prob": "norm_topk_prob"}
            config = {**config, **{name: experts[key] for key, name in renamed.items() if key in experts}}
        return super().from_config(config, where, for_training)
