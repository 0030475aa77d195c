"""Rank functions of tests live in tests/ranks; the fork server and its ranks find them through PYTHONPATH."""

from __future__ import annotations

import os
import sys
from pathlib import Path

RANKS = str(Path(__file__).parent / "ranks")
sys.path.insert(0, RANKS)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [RANKS, os.environ.get("PYTHONPATH", "")]))
