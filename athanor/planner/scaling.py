"""What loss a shape reaches after so many tokens, and how batch and learning rate follow from size and tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

from athanor.planner.coefficients import load


def effective_tokens(tokens: float, unique_tokens: float) -> float:
    """Tokens that count: repeated ones lose value with each epoch (Muennighoff et al. 2023, equation 5).

    D' = U + U R* (1 - exp(-R / R*)) with U unique tokens, R repetitions after the first epoch.
    """
    if tokens <= unique_tokens:
        return tokens
    half_life = float(load()["law"]["repeat_half_life"])
    repeats = tokens / unique_tokens - 1.0
    return unique_tokens * (1.0 + half_life * (1.0 - math.exp(-repeats / half_life)))


def critical_batch_tokens(tokens: float) -> float:
    """Tokens of a step at which half of them are wasted: c sqrt(tokens), 10 M for fifteen trillion, a few k for millions."""
    return float(load()["law"]["batch_coefficient"]) * math.sqrt(tokens)


@dataclass(frozen=True)
class Law:
    """Nats per held-out token: E + A / N^alpha + B / D^beta (the form of Hoffmann et al. 2022), N in decoder blocks."""

    name: str
    irreducible: float
    a: float
    alpha: float
    b: float
    beta: float

    def loss(self, block_parameters: float, tokens: float, unique_tokens: float, batch_tokens: float) -> float:
        """Repeated tokens count less, and so do those of large batches: D / (1 + batch / critical batch).

        That is the trade-off between steps and examples of McCandlish et al. 2018.
        """
        counted = effective_tokens(tokens, unique_tokens) / (1.0 + batch_tokens / critical_batch_tokens(tokens))
        return float(self.irreducible + self.a / block_parameters**self.alpha + self.b / counted**self.beta)


def law_for(flops: float) -> Law:
    """The law for a budget of so many training FLOPs: fitted to our own small models, or the published one for large ones."""
    constants = load()["law"]
    name = "small" if flops <= constants["small_until_flops"] else "large"
    return Law(name, **constants[name])


def learning_rate(hidden_size: int, optimizer: str, is_start: bool) -> float:
    """Peak rate at width 128, falling with the square root of the width; lower when training goes on from a model."""
    rates = load()["learning_rate"]
    rate = min(rates["most"], rates[optimizer] * math.sqrt(128 / hidden_size))
    return float(f"{rate * (1.0 if is_start else rates['continued']):.2g}")
