"""Supervised fine-tuning: next-token prediction of answers. Prompts and padding have weight 0 in the rows already."""

from __future__ import annotations

from athanor.objectives.zoo.pretrain import NEEDS, collate, count, loss

__all__ = ["NEEDS", "collate", "count", "loss"]
