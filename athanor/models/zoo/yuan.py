"""Yuan 2.0, and with experts Yuan 2.0-M32: attention on filtered tokens, and a router that attends to experts."""

from __future__ import annotations

from athanor.models.decoder import Decoder
from athanor.models.shapes.yuan import Shape
from athanor.models.zoo import mixtral

TENSOR_DIMS: dict[str, int | None] = {
    **mixtral.TENSOR_DIMS, "conv1.weight": None, "conv1.bias": None, "conv2.weight": None, "conv2.bias": None,
    "mlp.gate.query.weight": None, "mlp.gate.key.weight": None, "mlp.gate.value.weight": None}

# the activation is that of `up_proj` there, and of the first half of `w1`
ON_DISK = {"mlp.gate_proj.weight": "mlp.up_proj.weight", "mlp.up_proj.weight": "mlp.gate_proj.weight",
           "experts.gate_proj.weight": "experts.{}.w1.weight", "experts.up_proj.weight": "experts.{}.w1.weight",
           "experts.down_proj.weight": "experts.{}.w2.weight",
           "conv1.weight": "conv1.weight.TAPS", "conv2.weight": "conv2.weight.TAPS"}


def build(shape: Shape, layers: range | None = None, is_first: bool = True, is_last: bool = True) -> Decoder:
    """A stage of the model (all of it unless told otherwise), its weights not yet initialised."""
    turns = f"self_attn.[q,k]_proj.weight.TURNS{shape.head_dim}"  # a head's queries, its keys, the next head's queries, …
    on_disk = {**ON_DISK, "self_attn.q_proj.weight": turns, "self_attn.k_proj.weight": turns}
    return Decoder(shape, layers, is_first, is_last, on_disk)
