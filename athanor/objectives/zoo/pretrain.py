"""Predict every next token: cross-entropy, averaged over all tokens of the global batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from athanor.objectives.batch import Batch, collate

__all__ = ["METRICS", "NEEDS", "collate", "count", "loss"]

NEEDS: tuple[str, ...] = ()
METRICS = ("loss", "z_loss", "mtp_loss")


def count(batch: Batch) -> dict[str, float]:
    """The weight of this batch's tokens."""
    return {"tokens": float(batch["weight"].sum())}


def loss(scored: Any, batch: Batch, totals: Mapping[str, float]) -> tuple[torch.Tensor, dict[str, tuple[Any, Any]]]:
    """Weighted sum of negative log-probabilities / N, in nats per token.

    The metric `loss` is of next tokens alone; `mtp_loss` is the mean over all labels of blocks that predict further ones.
    """
    weight = torch.as_tensor(batch["weight"])
    count = weight.sum(dtype=torch.float64)
    found = {"loss": (-(scored.logp.detach() * weight).sum(), count)}
    if scored.z_sum is not None:
        found["z_loss"] = scored.z_sum, count
    if scored.mtp is not None:
        found["mtp_loss"] = scored.mtp
    return scored.weighted_sum / totals["tokens"], found
