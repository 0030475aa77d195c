"""Objectives are found by name: a file in objectives/zoo, or a package.module from outside."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from athanor.foundation.errors import RecipeError, did_you_mean
from athanor.objectives import zoo
from athanor.objectives.batch import Batch, Row

if TYPE_CHECKING:
    import torch


class Objective(Protocol):
    """What a batch is, and its loss."""

    NEEDS: tuple[str, ...]  # columns to be filled before training, by name
    METRICS: tuple[str, ...]  # names of what `loss` reports; "loss" is among them

    def collate(self, rows: Sequence[Row], seq_len: int) -> Batch: ...

    def count(self, batch: Batch) -> dict[str, float]:
        """The batch's share of the global denominators N."""
        ...

    def loss(self, scored: Any, batch: Batch, totals: Mapping[str, float]) -> tuple[
            torch.Tensor, dict[str, tuple[torch.Tensor, float]]]:
        """The batch's share of the loss (its sum / N), and metrics as (sum, count)."""
        ...


MEMBERS = ("NEEDS", "METRICS", "collate", "count", "loss")


def names() -> list[str]:
    """Objectives of the zoo."""
    return sorted(module.name for module in pkgutil.iter_modules(zoo.__path__))


def check_objective(name: str) -> None:
    """Refuse a name that is neither in the zoo nor a package.module, with the nearest valid one."""
    if "." not in name and name not in names():
        raise RecipeError(f"objective '{name}' is unknown; {did_you_mean(name, names())}, or a package.module")


def load_objective(name: str) -> Objective:
    """The objective of that name. Raises RecipeError with the nearest name, or with what the module lacks."""
    path = name if "." in name else f"{zoo.__name__}.{name}"
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if not f"{path}.".startswith(f"{error.name}."):
            raise
        raise RecipeError(f"objective '{name}' is unknown; {did_you_mean(name, names())}, or a package.module") from None
    missing = [member for member in MEMBERS if not hasattr(module, member)]
    if missing:
        raise RecipeError(f"objective '{name}' lacks {', '.join(missing)}; an objective has {', '.join(MEMBERS)}")
    return cast(Objective, module)
