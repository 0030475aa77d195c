"""The constants of published and fitted laws, from `laws.toml`, where each stands with its source."""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path
from typing import Any


@functools.cache
def constants() -> dict[str, Any]:
    """All of the file."""
    parsed: dict[str, Any] = tomllib.loads((Path(__file__).parent / "laws.toml").read_text(encoding="utf-8"))
    return parsed
