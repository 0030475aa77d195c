"""Mistral: the decoder as it is, up to a context that fits its window."""

from __future__ import annotations

from athanor.models.decoder import Decoder
from athanor.models.shapes.mistral import Shape
from athanor.models.zoo import llama

TENSOR_DIMS = llama.TENSOR_DIMS


def build(shape: Shape, layers: range | None = None, is_first: bool = True, is_last: bool = True) -> Decoder:
    """A stage of the model (all of it unless told otherwise), its weights not yet initialised."""
    return Decoder(shape, layers, is_first, is_last)
