"""Pretraining that takes its time, so that a small stage lasts long enough to be disturbed, on a fast machine too."""

from __future__ import annotations

import time
from typing import Any

from athanor.objectives.zoo import pretrain
from athanor.objectives.zoo.pretrain import METRICS, NEEDS, collate, count

__all__ = ["METRICS", "NEEDS", "collate", "count", "loss"]
SECONDS = 0.05  # from one micro-batch to the next, at least
_last = 0.0


def loss(*given: Any) -> Any:
    global _last
    time.sleep(max(0.0, _last + SECONDS - time.monotonic()))
    _last = time.monotonic()
    return pretrain.loss(*given)
