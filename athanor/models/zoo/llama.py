"""Llama: the decoder as it is."""

from __future__ import annotations

from athanor.models.decoder import Decoder
from athanor.models.shapes.decoder import DecoderShape

# which dim of a parameter tensor parallelism splits, by the end of its name; None: every rank holds it in full
TENSOR_DIMS: dict[str, int | None] = {
    "embed_tokens.weight": 0, "lm_head.weight": 0, "q_proj.weight": 0, "k_proj.weight": 0, "v_proj.weight": 0,
    "gate_proj.weight": 0, "up_proj.weight": 0, "o_proj.weight": 1, "down_proj.weight": 1,
    "input_layernorm.weight": None, "post_attention_layernorm.weight": None, "norm.weight": None}


def build(shape: DecoderShape, layers: range | None = None, is_first: bool = True, is_last: bool = True) -> Decoder:
    """A stage of the model (all of it unless told otherwise), its weights not yet initialised."""
    return Decoder(shape, layers, is_first, is_last)
