"""A score, the interval that says how sure it is, and the file `scores.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from athanor.foundation.errors import UserError
from athanor.foundation.run_folder import hash_value, read_json, write_json

Z_95 = 1.959963984540054  # standard normal quantile of a two-sided 95 % interval
MOST_ITEMS = 20_000  # of which a score keeps the values


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
Hashes = dict[str, dict[str, str]]  # model -> task -> the hash of what decides its score


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
    if len(numerators) != len(denominators) or len(numerators) < 1:
        raise ValueError(f"{len(numerators)} numerators and {len(denominators)} denominators")
    above, below = _sums_of_resamples(np.array([numerators, denominators], float), resamples, seed)
    low, high = np.quantile(above / below, [0.025, 0.975])
    return float(low), float(high)


def _sums_of_resamples(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Sums of each row of values [rows, items] over items drawn again, the same ones for all rows: [rows, resamples]."""
    generator, count = np.random.default_rng(seed), values.shape[1]
    return np.stack([values[:, generator.integers(0, count, count)].sum(1) for _ in range(resamples)], 1)


def items(identity: Any, numerators: Sequence[float], denominators: Sequence[float] | None = None) -> dict[str, Any]:
    """What a score's details keep of each item, for comparisons on the same ones: a hash that says which they are, and the
    numbers whose sums the value is the ratio of (denominators 1 unless given). Nothing where there are too many."""
    if len(numerators) > MOST_ITEMS:
        return {}
    lists = {"above": numerators} if denominators is None else {"above": numerators, "below": denominators}
    return {"items": {"hash": hash_value(identity), **{name: " ".join(f"{v:.7g}" for v in each) for name, each in lists.items()}}}


def paired_difference(first: dict[str, Any], second: dict[str, Any], resamples: int = 2000,
                      seed: int = 0) -> tuple[float, float, float] | None:
    """Value of the second score minus that of the first, and its 95 % percentile interval when the same items are drawn again
    for both (paired bootstrap, Efron and Tibshirani 1993); None unless both scores have kept the same items."""
    kept = [(score.get("details") or {}).get("items") or {} for score in (first, second)]
    if not kept[0].get("hash") or kept[0]["hash"] != kept[1].get("hash"):
        return None
    rows = []
    for each in kept:
        above = np.array(each["above"].split(), float)
        rows += [above, np.array(each["below"].split(), float) if "below" in each else np.ones_like(above)]
    if len({len(row) for row in rows}) > 1:
        return None
    sums = _sums_of_resamples(np.stack(rows), resamples, seed)
    low, high = np.quantile(sums[2] / sums[3] - sums[0] / sums[1], [0.025, 0.975])
    return float(second["value"] - first["value"]), float(low), float(high)


def bootstrap(items: Sequence[Any], aggregate: Callable[[list[Any]], float], resamples: int = 500,
              seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of whatever `aggregate` makes of the items when whole items are drawn again."""
    generator = np.random.default_rng(seed)
    found = [aggregate([items[i] for i in generator.integers(0, len(items), len(items))]) for _ in range(resamples)]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def share(values: Sequence[float], details: dict[str, Any] | None = None, identity: Any = None) -> Score:
    """The share of items that are right (values 0 or 1), with its Wilson interval; `identity` says which items they are."""
    right = float(sum(values))
    low, high = wilson(right, len(values))
    kept = {} if identity is None else items(identity, values)
    return Score(right / len(values), low, high, len(values), "share", True, (details or {}) | kept)


def read_scores(path: Path) -> Scores:
    """The models of a scores.json (none when the file does not exist). Raises UserError when it is something else."""
    return _read(path)[0]


def unchanged(path: Path, made_from: Hashes) -> set[tuple[str, str]]:
    """Of which model and task the scores.json has just the score that was made from the same."""
    models, seals = _read(path)
    return {(model, task) for model, tasks in made_from.items() for task, hashed in tasks.items()
            if seals.get(model, {}).get(task) == _seal(hashed, models.get(model, {}).get(task))}


def merge_scores(path: Path, new: dict[str, dict[str, Score]], made_from: Hashes | None = None) -> Scores:
    """Write the new scores over those of the same model and task in `path`, keep the others, and return all."""
    models, seals = _read(path)
    for model, tasks in new.items():
        models[model] = models.get(model, {}) | {task: asdict(score) for task, score in tasks.items()}
        known = (made_from or {}).get(model, {})
        seals[model] = seals.get(model, {}) | {task: _seal(known.get(task), models[model][task]) for task in tasks}
    write_json(path, {"schema": 1, "models": models, "made_from": seals})
    return models


def _seal(hashed: str | None, score: dict[str, Any] | None) -> str:
    """The hash of a score as a file has it, and of what it was made from."""
    return hash_value([hashed, json.loads(json.dumps(score))])


def _read(path: Path) -> tuple[Scores, Hashes]:
    """The scores in a file, and the hash of each together with what it was made from."""
    raw = read_json(path) if path.exists() else {"models": {}}
    if not isinstance(raw, dict) or not isinstance(raw.get("models"), dict):
        raise UserError(f"{path} is not a scores.json: it has no table 'models'")
    return dict(raw["models"]), dict(raw.get("made_from", {}))
