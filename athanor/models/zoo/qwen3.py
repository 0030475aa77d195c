"""Qwen3: the decoder with a norm of each query and key head, and biases where they are asked for."""

from __future__ import annotations

from athanor.models.decoder import Decoder
from athanor.models.shapes.qwen3 import Shape
from athanor.models.zoo import qwen2

TENSOR_DIMS: dict[str, int | None] = {**qwen2.TENSOR_DIMS, "q_norm.weight": None, "k_norm.weight": None, "o_proj.bias": None}


def build(shape: Shape, layers: range | None = None, is_first: bool = True, is_last: bool = True) -> Decoder:
    """A stage of the model (all of it unless told otherwise), its weights not yet initialised."""
    return Decoder(shape, layers, is_first, is_last)
