"""Supervised fine-tuning: next-token prediction of answers. Prompts and padding have weight 0 in the rows already."""

from __future__ import annotations

from athanor.objectives.zoo.pretrain import METRICS, NEEDS, collate, count, loss

__all__ = ["METRICS", "NEEDS", "collate", "count", "loss"]
