"""GPT-2, and with it GPT-3 and Yuan 1.0: the decoder with learned positions, LayerNorm, biases and a GELU."""

from __future__ import annotations

from athanor.models.decoder import Decoder
from athanor.models.shapes.gpt2 import Shape
from athanor.models.zoo import qwen2

TENSOR_DIMS: dict[str, int | None] = {
    **qwen2.TENSOR_DIMS, "up_proj.bias": 0, "embed_positions.weight": None, "o_proj.bias": None, "down_proj.bias": None,
    "norm.bias": None}

ON_DISK = {"model.layers.": "transformer.h.", "model.embed_tokens.": "transformer.wte.",
           "model.embed_positions.": "transformer.wpe.", "model.norm.": "transformer.ln_f.",
           "input_layernorm.weight": "ln_1.weight", "input_layernorm.bias": "ln_1.bias",
           "post_attention_layernorm.weight": "ln_2.weight", "post_attention_layernorm.bias": "ln_2.bias",
           **{f"self_attn.{part}_proj.weight": "attn.c_attn.weight.T" for part in "qkv"},
           **{f"self_attn.{part}_proj.bias": "attn.c_attn.bias" for part in "qkv"},
           "self_attn.o_proj.weight": "attn.c_proj.weight.T", "self_attn.o_proj.bias": "attn.c_proj.bias",
           "mlp.up_proj.weight": "mlp.c_fc.weight.T", "mlp.up_proj.bias": "mlp.c_fc.bias",
           "mlp.down_proj.weight": "mlp.c_proj.weight.T", "mlp.down_proj.bias": "mlp.c_proj.bias"}


def build(shape: Shape, layers: range | None = None, is_first: bool = True, is_last: bool = True) -> Decoder:
    """A stage of the model (all of it unless told otherwise), its weights not yet initialised."""
    return Decoder(shape, layers, is_first, is_last, ON_DISK)
