"""Finds the filters: every module of `athanor/data/filters/` with a function `judge(document) -> Decision`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

import athanor.data.filters
from athanor.data.documents import Decision, Document

Filter = Callable[[Document], Decision]


def load_filters() -> dict[str, Filter]:
    """All filters by name, in the order of their names; the first that objects gives the reason."""
    names = sorted(module.name for module in pkgutil.iter_modules(athanor.data.filters.__path__))
    return {name: importlib.import_module(f"athanor.data.filters.{name}").judge for name in names}
