"""DeepSeek-V3: latent attention, dense blocks first, then experts chosen by sigmoids beside shared ones, and blocks that
predict further tokens."""

from __future__ import annotations

from athanor.models.decoder import Decoder
from athanor.models.prediction import Predicting
from athanor.models.shapes.deepseek_v3 import Shape
from athanor.models.zoo import llama, mixtral, qwen3_moe

TENSOR_DIMS: dict[str, int | None] = {
    **llama.TENSOR_DIMS, **mixtral.TENSOR_DIMS, "gate.e_score_correction_bias": None,
    "shared_experts.gate_proj.weight": 0, "shared_experts.up_proj.weight": 0, "shared_experts.down_proj.weight": 1,
    "q_a_proj.weight": None, "q_a_layernorm.weight": None, "q_b_proj.weight": 0, "kv_a_proj_with_mqa.weight": None,
    "kv_a_layernorm.weight": None, "kv_b_proj.weight": 0, "eh_proj.weight": None}


def build(shape: Shape, layers: range | None = None, is_first: bool = True, is_last: bool = True) -> Decoder:
    """A stage of the model (all of it unless told otherwise), its weights not yet initialised."""
    return Predicting(shape, layers, is_first, is_last, qwen3_moe.ON_DISK)
