"""Peak memory of a rank, by kind, in bytes."""

from __future__ import annotations

import math

from athanor.foundation.layout import Layout, keeps_whole
from athanor.models.shapes.decoder import DecoderShape
from athanor.planner.measured import WIDTH_BYTES


def peak_memory(shape: DecoderShape, layout: Layout, *, rows: int, seq_len: int, dtype: str,
                recompute: str = "none") -> dict[str, float]:
    """Bytes of one rank at the end of a forward pass, when activations and logits are alive together.

    Parameters, gradients and both moments of AdamW are kept in fp32 (fp64 for fp64) and sharded over dp_shard x tp; one
    block is gathered at a time, or all weights and gradients are whole during a step. An eager block keeps, per token, 14
    vectors of hidden size and 4 of the inner size.
    """
    width = WIDTH_BYTES[dtype]
    stored = 8 if dtype == "fp64" else 4
    parameters = shape.parameters()
    shards = layout.dp_shard * layout.tp
    tokens = rows * seq_len / layout.cp
    ends = shape.vocab_size * shape.hidden_size * (1 if shape.tie_word_embeddings else 2)
    block = (parameters - ends) / shape.num_hidden_layers
    kept = shape.hidden_size * (2 + 12 / layout.tp) + 4 * shape.intermediate_size / layout.tp
    blocks = shape.num_hidden_layers / layout.pp
    if recompute == "full":
        activations = tokens * width * (blocks * shape.hidden_size / layout.tp + kept)
    else:
        activations = tokens * width * blocks * kept
    gathered = stored * (block + ends) / layout.tp
    if keeps_whole(layout, parameters) and layout.data_ranks > 1:
        gathered = 2 * stored * parameters / layout.tp / layout.pp
    return {"parameters": stored * parameters / shards, "gradients": stored * parameters / shards,
            "optimizer": 2 * stored * parameters / shards, "gathered": gathered,
            "activations": activations, "logits": 2 * max(width, 4) * tokens * shape.vocab_size / layout.tp}


def fits(memory: dict[str, float], available_bytes: float, share: float = 0.8) -> bool:
    """Whether a peak fits with room for allocator and runtime."""
    return math.fsum(memory.values()) <= share * available_bytes
