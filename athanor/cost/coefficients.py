"""The planner's fitted constants, from `coefficients.toml`."""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path
from typing import Any


@functools.cache
def load() -> dict[str, Any]:
    """All tables of the file; each constant stands there with its unit and meaning."""
    parsed: dict[str, Any] = tomllib.loads((Path(__file__).parent / "coefficients.toml").read_text(encoding="utf-8"))
    return parsed


def python_factor(python: dict[str, float]) -> float:
    """How much slower than the reference this machine runs Python."""
    return float(load()["reference"]["loops_per_second"]) / python["loops_per_second"] if python else 1.0


def text_factor(python: dict[str, float]) -> float:
    """How much slower than the reference this machine works on text."""
    return float(load()["reference"]["text_bytes_per_second"]) / python["text_bytes_per_second"] if python else 1.0
