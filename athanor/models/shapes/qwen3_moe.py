"""Qwen3-MoE: a Qwen3 with experts in all blocks, or in every so many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from athanor.models.shapes import qwen3
from athanor.models.shapes.mixture import MixtureShape


@dataclass(frozen=True)
class Shape(MixtureShape, qwen3.Shape):
    """Sizes of a Qwen3-MoE; `mlp_only_layers` are dense, and so are all but each `decoder_sparse_step`-th."""

    MODEL_TYPE: ClassVar = "qwen3_moe"
    ARCHITECTURE: ClassVar = "Qwen3MoeForCausalLM"

    num_experts: int = 128
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 768
    norm_topk_prob: bool = False
    max_window_layers: int = 0
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(1, "decoder_sparse_step")

    @classmethod
    def from_config(cls, config: dict[str, Any], where: str = "config.json", for_training: bool = True) -> Self:
        renamed = {"num_experts": config["num_local_experts"]} if "num_local_experts" in config else {}  # by transformers 5
        unread = {"max_window_layers": 0} if for_training else {}  # by transformers, which gives all blocks a window
        return super().from_config({**renamed, **config, **unread}, where, for_training)

    def is_dense(self, layer: int) -> bool:
        return layer in self.mlp_only_layers or (layer + 1) % self.decoder_sparse_step != 0
