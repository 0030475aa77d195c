"""A score, the interval that says how sure it is, and the file `scores.json`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from athanor.foundation.errors import UserError
from athanor.foundation.run_folder import read_json, write_json

Z_95 = 1.959963984540054  # standard normal quantile of a two-sided 95 % interval


@dataclass(frozen=True)
class Score:
    """A task's value with its 95 % interval [low, high], over `count` items in `unit`."""

    value: float
    low: float
    high: float
    count: int
    unit: str
    higher_is_better: bool
    details: dict[str, Any] = field(default_factory=dict)


Scores = dict[str, dict[str, dict[str, Any]]]  # model -> task -> a score's fields


def wilson(successes: float, count: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927); it stays inside [0, 1] and is honest at 0 and at all of them."""
    if not 0 <= successes <= count or count < 1:
        raise ValueError(f"{successes} of {count} is not a share")
    share, square = successes / count, Z_95**2
    centre = (share + square / (2 * count)) / (1 + square / count)
    half = Z_95 / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_ratio(numerators: Sequence[float], denominators: Sequence[float], resamples: int = 2000,
                    seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of sum(numerators) / sum(denominators) when whole items are drawn again."""
    above, below = np.asarray(numerators, float), np.asarray(denominators, float)
    if len(above) != len(below) or len(above) < 1:
        raise ValueError(f"{len(above)} numerators and {len(below)} denominators")
    generator = np.random.default_rng(seed)
    ratios = np.empty(resamples)
    for i in range(resamples):
        drawn = generator.integers(0, len(above), len(above))
        ratios[i] = above[drawn].sum() / below[drawn].sum()
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def bootstrap(items: Sequence[Any], aggregate: Callable[[list[Any]], float], resamples: int = 500,
              seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of whatever `aggregate` makes of the items when whole items are drawn again."""
    generator = np.random.default_rng(seed)
    found = [aggregate([items[i] for i in generator.integers(0, len(items), len(items))]) for _ in range(resamples)]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def share(values: Sequence[float], details: dict[str, Any] | None = None) -> Score:
    """The share of items that are right (values 0 or 1), with its Wilson interval."""
    right = float(sum(values))
    low, high = wilson(right, len(values))
    return Score(right / len(values), low, high, len(values), "share", True, details or {})


def read_scores(path: Path) -> Scores:
    """The models of a scores.json (none when the file does not exist). Raises UserError when it is something else."""
    if not path.exists():
        return {}
    raw = read_json(path)
    if not isinstance(raw, dict) or not isinstance(raw.get("models"), dict):
        raise UserError(f"{path} is not a scores.json: it has no table 'models'")
    return dict(raw["models"])


def merge_scores(path: Path, new: dict[str, dict[str, Score]]) -> Scores:
    """Write the new scores over those of the same model and task in `path`, keep the others, and return all."""
    models = read_scores(path)
    for model, tasks in new.items():
        models[model] = models.get(model, {}) | {task: asdict(score) for task, score in tasks.items()}
    write_json(path, {"schema": 1, "models": models})
    return models
