"""Predict every next token: cross-entropy, averaged over all tokens of the global batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from athanor.objectives.batch import Batch, collate

__all__ = ["METRICS", "NEEDS", "collate", "count", "loss"]

NEEDS: tuple[str, ...] = ()
METRICS = ("loss",)


def count(batch: Batch) -> dict[str, float]:
    """The weight of this batch's tokens."""
    return {"tokens": float(batch["weight"].sum())}


def loss(scored: Any, batch: Batch, totals: Mapping[str, float]) -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, float]]]:
    """Weighted sum of negative log-probabilities / N, in nats per token."""
    summed = scored.weighted_sum
    return summed / totals["tokens"], {"loss": (summed.detach(), float(batch["weight"].sum()))}
