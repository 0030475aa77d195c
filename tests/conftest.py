"""Rank functions of tests live in tests/ranks; the fork server and its ranks find them through PYTHONPATH."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

RANKS = str(Path(__file__).parent / "ranks")
sys.path.insert(0, RANKS)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [RANKS, os.environ.get("PYTHONPATH", "")]))

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # however busy
settings.load_profile("any machine")
