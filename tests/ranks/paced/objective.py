"""Pretraining that takes its time, so that a small stage lasts long enough to be disturbed, on a fast machine too.

While the folder of the runs has a file `hold`, a process goes no further than FREE micro-batches: on a busy machine, too, what
is to happen until then does.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from athanor.objectives.zoo import pretrain
from athanor.objectives.zoo.pretrain import METRICS, NEEDS, collate, count

__all__ = ["METRICS", "NEEDS", "collate", "count", "loss"]
SECONDS = 0.05  # from one micro-batch to the next, at least
FREE = 24
HOLD = Path(os.environ.get("ATHANOR_RUNS", ""), "hold")
_last, _count = 0.0, 0


def loss(*given: Any) -> Any:
    global _last, _count
    _count += 1
    while _count > FREE and HOLD.exists():
        time.sleep(0.01)
    time.sleep(max(0.0, _last + SECONDS - time.monotonic()))
    _last = time.monotonic()
    return pretrain.loss(*given)
