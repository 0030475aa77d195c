"""How rotary positions reach beyond the context that a model was first trained on. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from athanor.foundation.errors import ModelError, did_you_mean

MSCALES = ("mscale", "mscale_all_dim")  # from which yarn's attention_factor follows where it is not given


@dataclass(frozen=True)
class RopeScaling:
    """A kind of scaling and its numbers, under their Hugging Face keys. KINDS says which numbers a kind has.

    `linear`: all angles are divided by `factor`. `llama3`: only long wavelengths are, between original_max_position_embeddings
    / high_freq_factor and / low_freq_factor gradually. `dynamic`: none within max_position_embeddings, and nothing is computed
    beyond. `yarn` (arXiv:2309.00071): those pairs of channels that turn less than
    beta_slow times in the original context, up to beta_fast times gradually, and all vectors grow by `attention_factor`.
    """

    KINDS: ClassVar[dict[str, tuple[str, ...]]] = {
        "linear": ("factor",), "dynamic": ("factor",),
        "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
        "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "truncate",
                 "mscale_all_dim")}

    rope_type: str
    factor: float
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    mscale_all_dim: float = 0.0  # from which scores grow too, where attention is latent
    truncate: bool = True  # whether yarn's boundaries are whole pairs of channels

    @classmethod
    def from_config(cls, rope: dict[str, Any], max_position_embeddings: int, where: str) -> RopeScaling | None:
        """Read `rope_parameters`, or `rope_scaling`; None for the plain kind. Raises ModelError for what is not computed here."""
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "default":
            return None
        if not isinstance(kind, str) or kind not in cls.KINDS:
            known = did_you_mean(str(kind), ["default", *cls.KINDS])
            raise ModelError(f"{where}: rope_type = {kind!r} is not supported; {known}")
        given = {key: rope[key] for key in (*cls.KINDS[kind], *MSCALES) if rope.get(key) is not None}
        for key, value in given.items():
            if key == "truncate" and not isinstance(value, bool):
                raise ModelError(f"{where}: truncate = {value!r} of rope_type '{kind}' is neither true nor false")
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if key != "truncate" and not (is_number and (value > 0 or key in MSCALES)):
                raise ModelError(f"{where}: {key} = {value!r} of rope_type '{kind}' is not a number above 0")
        if kind == "yarn" and "original_max_position_embeddings" in given:
            given.setdefault("factor", max_position_embeddings / given["original_max_position_embeddings"])
        given.setdefault("original_max_position_embeddings", max_position_embeddings)
        if kind == "yarn" and "factor" in given:
            scales = [given.get(key, 0.0) for key in MSCALES]
            above, below = scales if all(scales) else (1.0, 0.0)
            given.setdefault("attention_factor", growth(given["factor"], above) / growth(given["factor"], below))
        missing = [key for key in cls.KINDS[kind][:4 if kind == "llama3" else 1] if key not in given]
        if missing:
            raise ModelError(f"{where}: rope_type '{kind}' has no '{missing[0]}'")
        found = cls(kind, **{key: value for key, value in given.items() if key in cls.KINDS[kind]})
        is_ordered = found.low_freq_factor < found.high_freq_factor and found.beta_slow <= found.beta_fast
        if found.factor < 1 or not is_ordered:
            raise ModelError(f"{where}: rope_type '{kind}' with {found.to_config()}: factor must be at least 1, low_freq_factor "
                             "below high_freq_factor, beta_slow at most beta_fast")
        return found

    def to_config(self) -> dict[str, Any]:
        """The table that `from_config` reads."""
        numbers = {key: getattr(self, key) for key in self.KINDS[self.rope_type]}
        return {"rope_type": self.rope_type, **{key: value for key, value in numbers.items() if key not in MSCALES or value}}


def growth(factor: float, scale: float) -> float:
    """By how much yarn lets vectors grow whose positions are stretched by a factor."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
