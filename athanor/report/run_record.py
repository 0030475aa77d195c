"""Everything a report is made of, read from the files of a run folder; what is not there is said, not guessed."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from athanor.foundation.errors import UserError
from athanor.foundation.run_folder import RunFolder, StageFolder, read_json, read_jsonl
from athanor.ledger.reconcile import Reconciliation, reconcile_run

Row = dict[str, Any]

# file of the run folder -> what the page would show from it
EXPECTED = {
    "forecast.json": "the forecast", "actual.json": "the measured book of the whole chain",
    "plan.toml": "the plan and its reasons", "cluster.toml": "the machine", "recipe.toml": "the recipe",
    "data/funnel.json": "the data funnel",
    "data/manifest.json": "tokens and bytes of the data", "scores.json": "the scores", "chain.jsonl": "the steps of the chain",
}


@dataclass(frozen=True)
class StageRecord:
    """One training stage: rows of its JSON-lines files, and the seconds per step that the plan foresaw."""

    name: str
    metrics: Sequence[Row]
    events: Sequence[Row]
    samples: Sequence[Row]
    step_seconds: float | None


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
    scores = _read_optional(run.scores).get("models", {})
    return RunRecord(
        name=str(recipe.get("name") or run.root.resolve().name), books=reconcile_run(run.root, stages),
        stages=[_read_stage(run.stage(name), plan) for name in stages], funnel=_read_optional(run.data / "funnel.json"),
        manifest=_read_optional(run.data / "manifest.json"), scores=scores, plan=plan, cluster=cluster, recipe=recipe,
        recipe_text=run.recipe.read_text(encoding="utf-8") if run.recipe.exists() else "", chain=read_jsonl(run.chain),
        missing=missing)


def _read_stage(stage: StageFolder, plan: Row) -> StageRecord:
    name = stage.root.name
    forecast = plan.get("forecast", {}).get(name, {})
    metrics = {row["step"]: row for row in read_jsonl(stage.metrics) if "step" in row}  # a step done again replaces its row
    return StageRecord(name, [metrics[step] for step in sorted(metrics)], read_jsonl(stage.events),
                       read_jsonl(stage.samples), forecast.get("step_seconds") if isinstance(forecast, dict) else None)


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
