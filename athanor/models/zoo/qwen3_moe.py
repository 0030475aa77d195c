"""Qwen3-MoE: a Qwen3 with a mixture of experts in all blocks but those that its configuration names."""

from __future__ import annotations

from athanor.models.decoder import Decoder
from athanor.models.shapes.qwen3_moe import Shape
from athanor.models.zoo import mixtral, qwen3

TENSOR_DIMS: dict[str, int | None] = {**qwen3.TENSOR_DIMS, **mixtral.TENSOR_DIMS}

ON_DISK = {f"mlp.experts.{part}_proj.weight": f"mlp.experts.{{}}.{part}_proj.weight" for part in ("gate", "up", "down")}


def build(shape: Shape, layers: range | None = None, is_first: bool = True, is_last: bool = True) -> Decoder:
    """A stage of the model (all of it unless told otherwise), its weights not yet initialised."""
    return Decoder(shape, layers, is_first, is_last, ON_DISK)
