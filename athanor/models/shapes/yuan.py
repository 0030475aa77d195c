"""Yuan 2.0: two convolutions over neighbouring tokens before queries and keys (LFA); with experts, a router that attends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from athanor.foundation.errors import ModelError
from athanor.models.shapes.mixture import MixtureShape
from athanor.models.shapes.products import Product

KERNEL = 2  # tokens that a convolution reads: this one and the one before
MIXTURE = {"moe_num_experts": "num_experts", "moe_top_k": "num_experts_per_tok", "ffn_hidden_size": "moe_intermediate_size",
           "norm_topk_prob": "norm_topk_prob"}  # keys of `moe_config`
MIXTURE_ROPE_THETA = 40890.0  # of the published M32, whose configuration has no key for it: 10,000 stretched from 4,096 tokens to
#                               16,384 (`NTK`: 10,000 x 4^(128 / 126))


@dataclass(frozen=True)
class Shape(MixtureShape):
    """Sizes of a Yuan 2.0, dense unless it has experts; of a Yuan 2.0-M32 the heads fill `attention_projection_size`.

    LFA: y = conv(H -> H/2), z = conv(H/2 -> H), queries and keys from the norm of z + x, values from x. The router makes a
    query, a key and a value for each expert. Positions turn all channels of a head; with experts the first half of them.
    """

    MODEL_TYPE: ClassVar = "yuan"
    ARCHITECTURE: ClassVar = "YuanForCausalLM"
    KEYS: ClassVar = {"num_key_value_heads": None}
    ONLY: ClassVar = {"hidden_act": "silu", "use_shareqk": False}
    GROWTH: ClassVar = 4.0
    LEAST_EXPERTS: ClassVar = 0
    ROUTER_ROWS: ClassVar = 3

    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    num_experts: int = 0  # 0: dense
    num_experts_per_tok: int = 0
    attention_projection_size: int = 0  # 0: num_attention_heads x head_dim, or hidden_size
    partial_rotary_factor: float = 0.0  # share of a head's channels that positions turn; 0: all, with experts half of them
    filter_crosses_documents: bool = False  # whether LFA reads the document before in a packed row, as where it was published

    def __post_init__(self) -> None:
        width = self.attention_projection_size or self.num_attention_heads * self.head_dim or self.hidden_size
        if self.num_attention_heads > 0 and width % self.num_attention_heads:
            raise ModelError(f"num_attention_heads = {self.num_attention_heads} does not divide "
                             f"attention_projection_size = {width}")
        if self.hidden_size % 2:
            raise ModelError(f"hidden_size = {self.hidden_size} is odd; the convolutions halve it")
        object.__setattr__(self, "attention_projection_size", width)
        object.__setattr__(self, "head_dim", width // max(1, self.num_attention_heads))
        if self.num_experts and not self.num_experts_per_tok:
            object.__setattr__(self, "num_experts_per_tok", min(2, self.num_experts))
        if not self.partial_rotary_factor:
            object.__setattr__(self, "partial_rotary_factor", 0.5 if self.num_experts else 1.0)
        super().__post_init__()
        if self.num_key_value_heads != self.num_attention_heads:
            raise ModelError(f"num_key_value_heads = {self.num_key_value_heads}: each of the {self.num_attention_heads} heads of "
                             "a yuan has a key head; leave it out")
        if self.rotary_dim not in range(2, self.head_dim + 1, 2) or self.rotary_dim != self.head_dim * self.partial_rotary_factor:
            raise ModelError(f"partial_rotary_factor = {self.partial_rotary_factor} of head_dim = {self.head_dim} is no even "
                             "number of channels from 2 to head_dim")

    @property
    def rotary_dim(self) -> int:
        return round(self.head_dim * self.partial_rotary_factor)

    @property
    def filter_size(self) -> int:
        return self.hidden_size

    def attention_products(self) -> list[Product]:
        hidden = self.hidden_size
        return [Product("lfa_in", hidden, hidden, ""), Product("lfa_out", hidden, hidden, ""),  # both tokens' matrices as one
                Product("qk", hidden, 2 * self.query_size, "outputs"), Product("v", hidden, self.query_size, "outputs"),
                Product("attention_out", self.query_size, hidden, "inputs")]

    def kept_beside(self, layer: int, tp: int) -> float:
        return float(self.num_experts**2)  # how experts attend to each other; every rank routes alike

    def block_vectors(self, layer: int) -> int:
        biases = self.hidden_size // 2 + self.hidden_size
        return super().block_vectors(layer) + biases + self.NORM_VECTORS * self.hidden_size

    @classmethod
    def from_config(cls, config: dict[str, Any], where: str = "config.json", for_training: bool = True) -> Self:
        experts = config.get("moe_config") or {}
        if not isinstance(experts, dict):
            raise ModelError(f"{where}: moe_config = {experts!r} is not a table")
        if experts and config.get("use_moe", True):
            if experts.get("gated_linear_unit", True) is not True:
                raise ModelError(f"{where}: gated_linear_unit = {experts['gated_linear_unit']!r} of moe_config is not supported; "
                                 "only True is")
            config = {"rope_theta": MIXTURE_ROPE_THETA, **config,
                      **{name: experts[key] for key, name in MIXTURE.items() if key in experts}}
        return super().from_config(config, where, for_training)

    def to_config(self) -> dict[str, Any]:
        config = super().to_config()
        mixture = {key: config.pop(name) for key, name in MIXTURE.items()}
        table = {"moe_config": {**mixture, "gated_linear_unit": True}} if self.num_experts else {}
        return {**config, "use_moe": bool(self.num_experts), **table}
