"""Predict every next token: cross-entropy, averaged over all tokens of the global batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from athanor.objectives.batch import Batch, collate

__all__ = ["METRICS", "NEEDS", "collate", "count", "loss"]

NEEDS: tuple[str, ...] = ()
METRICS = ("loss", "z_loss")


def count(batch: Batch) -> dict[str, float]:
    """The weight of this batch's tokens."""
    return {"tokens": float(batch["weight"].sum())}


def loss(scored: Any, batch: Batch, totals: Mapping[str, float]) -> tuple[torch.Tensor, dict[str, tuple[Any, Any]]]:
    """Weighted sum of negative log-probabilities / N, in nats per token; the metric `loss` is without `z_loss`."""
    summed, count = scored.weighted_sum, torch.as_tensor(batch["weight"]).sum(dtype=torch.float64)
    if scored.z_sum is None:
        return summed / totals["tokens"], {"loss": (summed.detach(), count)}
    found = {"loss": (summed.detach() - scored.z_sum, count), "z_loss": (scored.z_sum, count)}
    return summed / totals["tokens"], found
