"""Arithmetic of a Llama-type decoder: parameters, FLOPs and its Hugging Face configuration. No torch."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Self

from athanor.foundation.errors import ModelError
from athanor.models.shapes.products import Attended, Counted, Product, feed_forward
from athanor.models.shapes.rope import RopeScaling

WINDOWS = ("full_attention", "sliding_attention")  # without and with a window, in `layer_types`


@dataclass(frozen=True)
class DecoderShape(Counted):
    """Sizes of a decoder under their Hugging Face keys. `num_key_value_heads` and `head_dim` 0 mean "as usual".

    An architecture's configuration: its MODEL_TYPE and ARCHITECTURE, KEYS where a field goes by another name there (None:
    by none), LEFT_OUT what transformers takes where it does not say, ONLY the values that are computed here, and COUNTS_ALIKE
    those of them that no count depends on.
    """

    MODEL_TYPE: ClassVar[str] = "llama"
    ARCHITECTURE: ClassVar[str] = "LlamaForCausalLM"
    KEYS: ClassVar[dict[str, str | None]] = {}
    LEFT_OUT: ClassVar[dict[str, Any]] = {"rms_norm_eps": 1e-6}
    ONLY: ClassVar[dict[str, Any]] = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0}
    COUNTS_ALIKE: ClassVar[frozenset[str]] = frozenset({"hidden_act", "attention_dropout", "router_jitter_noise"})
    IS_GATED: ClassVar[bool] = True
    IS_ROTARY: ClassVar[bool] = True  # else positions are learned
    GROWTH: ClassVar[float] = 8 / 3  # of the width in the feed-forward layer, as is usual
    HAS_HEAD_NORMS: ClassVar[bool] = False  # of each query and key head

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
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        if not self.num_key_value_heads:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        self._require(1, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                      "num_key_value_heads", "max_position_embeddings")
        self._require(0, *(f.name for f in fields(self) if f.type == "int"))
        if not self.head_dim:
            if self.hidden_size % self.num_attention_heads:
                raise ModelError(f"num_attention_heads = {self.num_attention_heads} does not divide "
                                 f"hidden_size = {self.hidden_size}; set head_dim, or other heads")
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.IS_ROTARY and (self.head_dim % 2 or self.head_dim < 2):
            raise ModelError(f"head_dim = {self.head_dim} is odd or below 2; rotary positions turn pairs")
        for name in ("rope_theta", "rms_norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ModelError(f"{name} = {getattr(self, name)}; it must be above 0")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ModelError(f"num_key_value_heads = {self.num_key_value_heads} does not divide "
                             f"num_attention_heads = {self.num_attention_heads}")

    def _require(self, least: int, *names: str) -> None:
        for name in names:
            if getattr(self, name) < least:
                raise ModelError(f"{name} = {getattr(self, name)}; it must be at least {least}")

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def is_bounded(self) -> bool:
        """Whether nothing is known of positions from max_position_embeddings on."""
        return not self.IS_ROTARY or (self.rope_scaling is not None and self.rope_scaling.rope_type == "dynamic")

    @property
    def rotary_dim(self) -> int:
        """Channels at the end of each head that positions turn."""
        return self.head_dim

    @property
    def filter_size(self) -> int:
        """Numbers that each block keeps of the last token of a sequence, beside its key and value."""
        return 0

    def kept_beside(self, layer: int, tp: int) -> float:
        """Numbers of a token that a block keeps for its backward pass, beside what its products read and make."""
        return 0.0

    @property
    def key_value_size(self) -> int:
        """Width of all key heads together (and of all value heads)."""
        return self.num_key_value_heads * self.head_dim

    def block_products(self, layer: int) -> list[Product]:
        return [*self.attention_products(), *self.feed_forward_products(layer)]

    def attention_products(self) -> list[Product]:
        """The projections around one block's attention."""
        return [Product("qkv", self.hidden_size, self.query_size + 2 * self.key_value_size, "outputs"),
                Product("attention_out", self.query_size, self.hidden_size, "inputs")]

    def feed_forward_products(self, layer: int) -> list[Product]:
        """What one block does after its attention."""
        return feed_forward(self.hidden_size, self.intermediate_size, self.IS_GATED)

    def block_attended(self, layer: int) -> Attended:
        return Attended(1, self.num_attention_heads, self.num_key_value_heads, self.head_dim, self.head_dim, self.window(layer))

    def answering(self) -> Self:
        """The same model without blocks that only training computes."""
        return self

    def window(self, layer: int) -> int:
        """Keys that a query of this block may see; 0: all before it."""
        return 0

    @property
    def biased(self) -> frozenset[str]:
        """Names of the products that a bias is added to."""
        return frozenset()

    def block_vectors(self, layer: int) -> int:
        biases = sum(product.outputs for product in self.block_products(layer) if product.name in self.biased)
        return 2 * self.NORM_VECTORS * self.hidden_size + biases + (2 * self.head_dim if self.HAS_HEAD_NORMS else 0)

    def embedding_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    @classmethod
    def from_config(cls, config: dict[str, Any], where: str = "config.json", for_training: bool = True) -> Self:
        """Read a Hugging Face configuration; a key may also go by the field's name.

        Raises ModelError for a missing key or a variant that is not computed here; when only counts are wanted
        (`for_training` False), variants that change none of them are read.
        """
        config = {**cls.LEFT_OUT, **config} if for_training else config
        for key, only in cls.ONLY.items():
            if config.get(key, only) != only and (for_training or key not in cls.COUNTS_ALIKE):
                raise ModelError(f"{where}: {key} = {config[key]!r} is not supported; only {only!r} is")
        keys = cls._keys()
        values: dict[str, Any] = {name: config[key] for name, field_key in keys.items() for key in (name, field_key)
                                  if config.get(key) is not None}
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise ModelError(f"{where}: rope_scaling = {rope!r} is not a table; leave it out, or give null")
        if for_training:
            _refuse_variants({key: value for key, value in config.items() if key not in keys.values()}, rope, where)
        if "rope_theta" in rope:
            values["rope_theta"] = rope["rope_theta"]
        for f in fields(cls):
            value, key = values.get(f.name), keys.get(f.name, f.name)
            if value is None:
                if f.default is MISSING:
                    raise ModelError(f"{where} has no '{key}'")
                continue
            if isinstance(value, list):
                values[f.name] = value = value[0] if f.name == "eos_token_id" and value else tuple(value)
            if not fits(value, str(f.type)):
                raise ModelError(f"{where}: {key} = {value!r} is not of type {f.type}")
        if for_training:
            longest = values.get("max_position_embeddings", cls.max_position_embeddings)
            values["rope_scaling"] = RopeScaling.from_config(rope, longest, where)
        made = cls(**values)
        kinds, count = config.get("layer_types"), made.num_hidden_layers
        if for_training and isinstance(kinds, list) and len(kinds) != count:
            raise ModelError(f"{where}: layer_types has {len(kinds)} entries, but num_hidden_layers is {count}")
        if for_training and kinds is not None and kinds != [WINDOWS[made.window(layer) > 0] for layer in range(count)]:
            raise ModelError(f"{where}: layer_types = {kinds!r} are not the blocks that its other keys give a window to")
        return made

    def to_config(self) -> dict[str, Any]:
        """A config.json that transformers loads as ARCHITECTURE."""
        sizes = {key: getattr(self, name) for name, key in self._keys().items()}
        if self.IS_ROTARY:
            sizes["rope_scaling"] = None if self.rope_scaling is None else self.rope_scaling.to_config()
        return {"architectures": [self.ARCHITECTURE], "model_type": self.MODEL_TYPE, **sizes, **self.ONLY, "use_cache": True}

    @classmethod
    def _keys(cls) -> dict[str, str]:
        """The fields that a configuration holds as they are, with their keys there."""
        keys = {f.name: cls.KEYS.get(f.name, f.name) for f in fields(cls) if f.name != "rope_scaling"}
        return {name: key for name, key in keys.items() if key is not None}


def _refuse_variants(config: dict[str, Any], rope: dict[str, Any], where: str) -> None:
    """What would give other numbers in training, while it changes no count."""
    for table, key, only in ((config, "partial_rotary_factor", 1), (rope, "partial_rotary_factor", 1),
                             (config, "quantization_config", None)):
        if table.get(key) not in (None, only):
            raise ModelError(f"{where}: {key} = {table[key]!r} is not supported; it must be left out")


def fits(value: object, kind: str) -> bool:
    """Whether a value of a configuration is of a field's type."""
    if kind in ("bool", "str"):
        return isinstance(value, bool if kind == "bool" else str)
    if kind.startswith("tuple"):
        return isinstance(value, tuple) and all(fits(entry, "int") for entry in value)
    return isinstance(value, int if kind.startswith("int") else (int, float)) and not isinstance(value, bool)
