"""What the tests of serving know about their tiny model."""

from __future__ import annotations

import random
from collections.abc import Iterator

CONTEXT_TOKENS = 160


def texts() -> Iterator[str]:
    """Words that look a little like a program, the same in every run."""
    draw = random.Random(0)
    words = ["def", "return", "self", "value", "line", "äöü", "数据", "path", "import", "(", ")", ":", "\n    "]
    for _ in range(60):
        yield " ".join(draw.choices(words, k=60))
