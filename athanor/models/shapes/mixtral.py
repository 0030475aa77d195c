"""Mixtral: every block is a mixture, and `intermediate_size` is the width of one expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from athanor.foundation.errors import ModelError
from athanor.models.shapes.mixture import MixtureShape


@dataclass(frozen=True)
class Shape(MixtureShape):
    """Sizes of a Mixtral. Its configuration calls the experts `num_local_experts`."""

    MODEL_TYPE: ClassVar = "mixtral"
    ARCHITECTURE: ClassVar = "MixtralForCausalLM"
    KEYS: ClassVar = {"num_experts": "num_local_experts", "moe_intermediate_size": None, "norm_topk_prob": None}
    LEFT_OUT: ClassVar = {}
    ONLY: ClassVar = {"hidden_act": "silu", "attention_dropout": 0.0, "sliding_window": None, "router_jitter_noise": 0.0}

    rope_theta: float = 1e6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.moe_intermediate_size != self.intermediate_size:
            raise ModelError(f"moe_intermediate_size = {self.moe_intermediate_size}; in a mixtral the width of an expert is "
                             f"intermediate_size = {self.intermediate_size}")
        if not self.norm_topk_prob:
            raise ModelError("norm_topk_prob = false; a mixtral always divides a token's gates by their sum")
