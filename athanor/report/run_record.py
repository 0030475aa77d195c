"""Everything a report is made of, read from the files of a run folder; what is not there is said, not guessed."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from athanor.foundation.errors import UserError
from athanor.foundation.run_folder import RunFolder, StageFolder, read_json, read_jsonl
from athanor.ledger.reconcile import Reconciliation, reconcile_run
from athanor.report.faults import Fault, timeline

Row = dict[str, Any]
LIMITS = {"time": 1e11}  # seconds since 1970 that a calendar can write

# file of the run folder -> what the page would show from it
EXPECTED = {
    "forecast.json": "the forecast", "actual.json": "the measured book of the whole chain",
    "plan.toml": "the plan and its reasons", "cluster.toml": "the machine", "recipe.toml": "the recipe",
    "data/funnel.json": "the data funnel",
    "data/manifest.json": "tokens and bytes of the data", "scores.json": "the scores", "chain.jsonl": "the steps of the chain",
}


@dataclass(frozen=True)
class StageRecord:
    """One training stage: rows of its JSON-lines files, what interrupted it, and the seconds per step that the plan foresaw."""

    name: str
    metrics: Sequence[Row]
    events: Sequence[Row]
    samples: Sequence[Row]
    step_seconds: float | None
    faults: Sequence[Fault] = ()


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder tells it; tables are empty where a file is missing, and `missing` says which are."""

    name: str
    books: Sequence[Reconciliation]
    stages: Sequence[StageRecord]
    funnel: Row
    manifest: Row
    scores: dict[str, dict[str, Row]]
    plan: Row
    cluster: Row
    recipe: Row
    recipe_text: str
    chain: Sequence[Row]
    missing: dict[str, str]


def read_run(run: RunFolder) -> RunRecord:
    """Read what a run folder holds. Raises UserError when it is not a folder, holds nothing of a run, or a file is damaged."""
    if not run.root.is_dir():
        raise UserError(f"there is no run folder {run.root}")
    missing = {name: what for name, what in EXPECTED.items() if not (run.root / name).exists()}
    recipe, plan, cluster = (_read_toml(file) for file in (run.recipe, run.plan, run.cluster))
    stages = _stage_names(run, recipe, plan)
    if len(missing) == len(EXPECTED) and not stages:
        raise UserError(f"{run.root} holds nothing of a run: neither recipe.toml, plan.toml, chain.jsonl nor a stage's folder")
    scores = check_scores(_read_optional(run.scores).get("models", {}), str(run.scores))
    return RunRecord(
        name=str(recipe.get("name") or run.root.resolve().name), books=reconcile_run(run.root, stages),
        stages=[_read_stage(run.stage(name), plan) for name in stages], funnel=_read_optional(run.data / "funnel.json"),
        manifest=_read_optional(run.data / "manifest.json"), scores=scores, plan=plan, cluster=cluster, recipe=recipe,
        recipe_text=run.recipe.read_text(encoding="utf-8") if run.recipe.exists() else "",
        chain=_rows(run.chain, "time", "seconds"), missing=missing)


def _read_stage(stage: StageFolder, plan: Row) -> StageRecord:
    name = stage.root.name
    forecast = plan.get("forecast", {}).get(name, {})
    rows = _rows(stage.metrics, "step", "time", "tokens", "loss", "validation_loss", "step_seconds", "tokens_per_second")
    metrics = {row["step"]: row for row in rows if "step" in row}  # a step done again replaces its row
    events = _rows(stage.events, "time", "step")
    return StageRecord(name, [metrics[step] for step in sorted(metrics)], events, _rows(stage.samples, "step"),
                       forecast.get("step_seconds") if isinstance(forecast, dict) else None,
                       timeline(events, _ledger(stage.root / "ledger.jsonl")))


def _ledger(path: Path) -> list[Row]:
    """Lines of a ledger that are whole."""
    numbers = "first_step", "last_step"
    return [row for row in _rows(path, *numbers, "resumed_step", "device_seconds", "skipped_steps")
            if "resumed_step" in row or (all(name in row for name in numbers) and isinstance(row.get("accounts"), dict)
                                         and all(_is_number(seconds) for seconds in row["accounts"].values()))]


def _rows(path: Path, *numbers: str) -> list[Row]:
    """Rows of a JSON-lines file without what should be a number and is none, or not finite: a loss that diverged."""
    return [{key: value for key, value in row.items() if key not in numbers or _is_number(value, LIMITS.get(key, 1e18))}
            for row in read_jsonl(path)]


def _is_number(value: object, limit: float = math.inf) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < limit


def check_scores(models: Any, where: str) -> dict[str, dict[str, Row]]:
    """The scores by model and task. Raises UserError for what is none."""
    for model, tasks in models.items() if isinstance(models, dict) else [("", None)]:
        for task, score in tasks.items() if isinstance(tasks, dict) else [("", None)]:
            if not isinstance(score, dict) or not all(_is_number(score.get(key)) for key in ("value", "low", "high", "count")):
                raise UserError(f"{where}: models.{model}.{task} is no score with the numbers value, low, high and count")
    return dict(models)


def _stage_names(run: RunFolder, recipe: Row, plan: Row) -> list[str]:
    """Stages in the recipe's order that have a folder or a forecast, then folders that look like one."""
    named = [str(stage["name"]) for table in (recipe, plan) for stage in table.get("stage", []) if "name" in stage]
    marks = ("metrics.jsonl", "actual.json", "forecast.json")
    found = [path.name for path in sorted(run.root.iterdir()) if any((path / mark).is_file() for mark in marks)]
    return [name for name in dict.fromkeys([*named, *found]) if name in found]


def _read_optional(path: Path) -> Row:
    value = read_json(path) if path.exists() else {}
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value


def _read_toml(path: Path) -> Row:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None
