"""Qwen2 and Qwen2.5: the decoder with biases on queries, keys and values."""

from __future__ import annotations

from athanor.models.decoder import Decoder
from athanor.models.shapes.qwen2 import Shape
from athanor.models.zoo import llama

TENSOR_DIMS: dict[str, int | None] = {**llama.TENSOR_DIMS, "q_proj.bias": 0, "k_proj.bias": 0, "v_proj.bias": 0}


def build(shape: Shape, layers: range | None = None, is_first: bool = True, is_last: bool = True) -> Decoder:
    """A stage of the model (all of it unless told otherwise), its weights not yet initialised."""
    return Decoder(shape, layers, is_first, is_last)
