"""Real model folders with known probabilities: a Llama whose blocks add nothing is a bigram model, exactly."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from athanor.data.text.tokenizer import Tokenizer

HEADS, HEAD_DIM, INTERMEDIATE = 2, 32, 8
EMBEDDING_SCALE = 1000.0  # so large that RMSNorm's epsilon does not matter

def write_bigram(folder: Path, tokenizer: Tokenizer, logp: np.ndarray, context: int = 32) -> Path:
    """A Hugging Face Llama folder that predicts token j after token i with log-probability `logp[i, j]`.

    Embeddings are one-hot, attention and feed-forward write zeros, and the head holds the table.
    """
    folder.mkdir(parents=True)
    vocab = hidden = len(logp)
    rows = HEADS * HEAD_DIM
    layer = "model.layers.0."
    tensors = {
        "model.embed_tokens.weight": EMBEDDING_SCALE * np.eye(vocab), "model.norm.weight": np.ones(hidden),
        "lm_head.weight": logp.T / np.sqrt(hidden),
        layer + "input_layernorm.weight": np.ones(hidden), layer + "post_attention_layernorm.weight": np.ones(hidden),
        **{layer + f"self_attn.{name}_proj.weight": np.zeros((rows, hidden)) for name in "qkv"},
        layer + "self_attn.o_proj.weight": np.zeros((hidden, rows)),
        **{layer + f"mlp.{name}_proj.weight": np.zeros((INTERMEDIATE, hidden)) for name in ("gate", "up")},
        layer + "mlp.down_proj.weight": np.zeros((hidden, INTERMEDIATE))}
    save_file({name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": 1, "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS, "head_dim": HEAD_DIM, "max_position_embeddings": context, "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "initializer_range": 0.02, "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "torch_dtype": "float32", "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}))
    tokenizer.save(folder)
    return folder


def normalised(counts: np.ndarray) -> np.ndarray:
    """Log-probabilities, by row, of counts with a little added everywhere."""
    smoothed = counts + 1e-3
    return np.log(smoothed / smoothed.sum(axis=1, keepdims=True))


def follow(tokenizer: Tokenizer, *chains: list[int]) -> np.ndarray:
    """A table that goes on along the given chains of token ids (a token has one successor), and to eos elsewhere."""
    counts = np.zeros((tokenizer.vocab_size, tokenizer.vocab_size))
    counts[:, tokenizer.eos_id] = 1e-2
    for chain in chains:
        for token, successor in itertools.pairwise(chain):
            counts[token, successor] += 1.0
    return normalised(counts)
