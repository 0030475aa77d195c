"""Mixtral: the decoder with a mixture of experts in every block."""

from __future__ import annotations

from athanor.models.decoder import Decoder
from athanor.models.shapes.mixture import MixtureShape
from athanor.models.zoo import llama

# of a stacked weight [experts, rows, columns] too; expert parallelism cuts its dim 0
TENSOR_DIMS: dict[str, int | None] = {
    **llama.TENSOR_DIMS, "mlp.gate.weight": None, "experts.gate_proj.weight": 1, "experts.up_proj.weight": 1,
    "experts.down_proj.weight": 2}

# how the end of a parameter's name is written on disk; with {} each expert's matrix is a tensor of its own
ON_DISK = {"mlp.gate.weight": "block_sparse_moe.gate.weight",
           "mlp.experts.gate_proj.weight": "block_sparse_moe.experts.{}.w1.weight",
           "mlp.experts.up_proj.weight": "block_sparse_moe.experts.{}.w3.weight",
           "mlp.experts.down_proj.weight": "block_sparse_moe.experts.{}.w2.weight"}


def build(shape: MixtureShape, layers: range | None = None, is_first: bool = True, is_last: bool = True) -> Decoder:
    """A stage of the model (all of it unless told otherwise), its weights not yet initialised."""
    return Decoder(shape, layers, is_first, is_last, ON_DISK)
