"""Arithmetic of a Llama-type decoder: parameters, FLOPs and its Hugging Face configuration. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from athanor.foundation.errors import ModelError


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder under their Hugging Face keys. `num_key_value_heads` and `head_dim` 0 mean "as usual".

    An architecture's configuration: its MODEL_TYPE and ARCHITECTURE, KEYS where a field goes by another name there (None:
    by none), and ONLY the values that are computed here.
    """

    MODEL_TYPE: ClassVar[str] = "llama"
    ARCHITECTURE: ClassVar[str] = "LlamaForCausalLM"
    KEYS: ClassVar[dict[str, str | None]] = {}
    ONLY: ClassVar[dict[str, Any]] = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0}

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 0  # 0: as many as query heads
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int = 0
    eos_token_id: int = 1
    pad_token_id: int = 2

    def __post_init__(self) -> None:
        if not self.num_key_value_heads:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ModelError(f"{name} = {getattr(self, name)}; it must be at least 1")
        if not self.head_dim:
            if self.hidden_size % self.num_attention_heads:
                raise ModelError(f"num_attention_heads = {self.num_attention_heads} does not divide "
                                 f"hidden_size = {self.hidden_size}; set head_dim, or other heads")
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.head_dim % 2 or self.head_dim < 2:
            raise ModelError(f"head_dim = {self.head_dim} is odd or below 2; rotary positions turn pairs")
        for name in ("rope_theta", "rms_norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ModelError(f"{name} = {getattr(self, name)}; it must be above 0")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ModelError(f"num_key_value_heads = {self.num_key_value_heads} does not divide "
                             f"num_attention_heads = {self.num_attention_heads}")

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Width of all key heads together (and of all value heads)."""
        return self.num_key_value_heads * self.head_dim

    def attention_parameters(self) -> int:
        """Weights of one block's four projections around attention."""
        return self.hidden_size * (2 * self.query_size + 2 * self.key_value_size)

    def block_matrix_parameters(self) -> int:
        """Weights of one block's matrices that each token is multiplied with: all seven."""
        return self.attention_parameters() + 3 * self.hidden_size * self.intermediate_size

    def block_parameters(self) -> int:
        """Exact number of parameters of one block."""
        return self.block_matrix_parameters() + 2 * self.hidden_size

    def parameters(self) -> int:
        """Exact number of parameters; a tied head counts once."""
        ends = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * self.block_parameters() + ends + self.hidden_size

    def flops(self, tokens: float, mean_context: float) -> float:
        """Model FLOPs of forward and backward, attention causal, nothing recomputed.

        `mean_context` is the mean number of keys a query sees: (L + 1) / 2 in a document of L tokens. Every matrix weight
        costs 2 FLOP forward and 4 backward per token, the embedding none; scores and values cost 4 FLOP forward per query,
        key and channel, and twice that backward.
        """
        matrices = self.num_hidden_layers * self.block_matrix_parameters() + self.vocab_size * self.hidden_size
        attention = 2 * self.num_hidden_layers * self.query_size * mean_context
        return 6.0 * tokens * (matrices + attention)

    def block_costs(self, mean_context: float) -> list[float]:
        """FLOPs per token of each block, to balance pipeline stages; the head's are the last one's."""
        block = 6.0 * (self.block_matrix_parameters() + 2 * self.query_size * mean_context)
        return [block] * (self.num_hidden_layers - 1) + [block + 6.0 * self.vocab_size * self.hidden_size]

    def flops_full(self, tokens: float, seq_len: float) -> float:
        """The same with full-square attention, as PaLM (appendix B) counts: every query sees `seq_len` keys."""
        return self.flops(tokens, seq_len)

    @classmethod
    def from_config(cls, config: dict[str, Any], where: str = "config.json") -> Self:
        """Read a Hugging Face configuration. Raises ModelError for a missing key or a variant we do not compute."""
        for key, only in cls.ONLY.items():
            if config.get(key, only) != only:
                raise ModelError(f"{where}: {key} = {config[key]!r} is not supported; only {only!r} is")
        keys = cls._keys()
        values = {name: config[key] for name, key in keys.items() if config.get(key) is not None}
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise ModelError(f"{where}: rope_scaling = {rope!r} is not a table; leave it out, or give null")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ModelError(f"{where}: rope_type = {kind!r} is not supported; only 'default' is")
        for table, key, only in ((config, "partial_rotary_factor", 1), (rope, "partial_rotary_factor", 1),
                                 (config, "quantization_config", None)):  # refused, or the numbers would be others
            if table.get(key) not in (None, only):
                raise ModelError(f"{where}: {key} = {table[key]!r} is not supported; it must be left out")
        if "rope_theta" in rope:
            values["rope_theta"] = rope["rope_theta"]
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if key not in values:
                raise ModelError(f"{where} has no '{key}'")
        for f in fields(cls):
            value, kind = values.get(f.name), str(f.type)
            if isinstance(value, list) and f.name == "eos_token_id" and value:
                values[f.name] = value[0]
            elif value is not None and not _fits(value, kind):
                raise ModelError(f"{where}: {keys[f.name]} = {value!r} is not of type {kind}")
        return cls(**values)

    def to_config(self) -> dict[str, Any]:
        """A config.json that transformers loads as ARCHITECTURE."""
        sizes = {key: getattr(self, name) for name, key in self._keys().items()}
        return {"architectures": [self.ARCHITECTURE], "model_type": self.MODEL_TYPE, **sizes, **self.ONLY,
                "rope_scaling": None, "use_cache": True}

    @classmethod
    def _keys(cls) -> dict[str, str]:
        """The fields that a configuration holds, with their keys there."""
        keys = {f.name: cls.KEYS.get(f.name, f.name) for f in fields(cls)}
        return {name: key for name, key in keys.items() if key is not None}


def _fits(value: object, kind: str) -> bool:
    if kind == "bool":
        return isinstance(value, bool)
    return isinstance(value, int if kind == "int" else (int, float)) and not isinstance(value, bool)
