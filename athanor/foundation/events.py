"""What happened in a stage, one line each, and the exit codes by which ranks and agents tell what to do next."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from athanor.foundation.run_folder import append_when_possible

EXIT_DONE = 0
EXIT_REQUEUE = 85  # go on from the last checkpoint, here or elsewhere
EXIT_HOLD = 86  # the recipe is at fault; trying again cannot help


def log_event(path: Path, kind: str, sentence: str, *, attempt: int = 0, **details: object) -> None:
    """Append to `events.jsonl`: time (seconds since 1970), rank, host, attempt, kind, a sentence and details.

    While the disk is full or read-only the line waits; what is told is no reason to fail.
    """
    append_when_possible(path, {"time": time.time(), "rank": int(os.environ.get("RANK", "0")), "host": socket.gethostname(),
                        "attempt": attempt, "kind": kind, "sentence": sentence, **details})
