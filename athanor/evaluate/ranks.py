"""Evaluates several models at once, one per rank, and puts the scores together."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from athanor.evaluate.find import HARNESS, load
from athanor.evaluate.scores import Score
from athanor.foundation.errors import UserError


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate: its name in the scores, its folder, how it is asked, and the context it was trained on."""

    name: str
    folder: Path
    is_chat: bool
    context_tokens: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """Scores by model and task, and the seconds that each took on its rank."""

    scores: dict[str, dict[str, Score]]
    seconds: dict[str, dict[str, float]]


def evaluate(candidates: Sequence[Candidate], tasks: Sequence[str], data: Path, *, log_folder: Path, limit: int | None = None,
             on_progress: Callable[[dict[str, Any]], None] | None = None, lm_eval_data: Path | None = None) -> Evaluation:
    """Run all tasks on all models, on as many ranks as there are models and cores.

    Those of lm_eval have their data below `lm_eval_data`, or below data/lm_eval. `on_progress` gets {"model", "task", "done",
    "total"}. Raises UserError for an unknown task before anything starts.
    """
    from athanor.foundation.launch import run_ranks

    names = [candidate.name for candidate in candidates]
    if len(set(names)) < len(names) or not names:
        raise UserError(f"models to evaluate need different names, got {names}")
    for task in tasks:
        load("tasks", task)
    ranks = min(len(candidates), len(os.sched_getaffinity(0)))
    places = [(task, (lm_eval_data or data / "lm_eval") if task.startswith(HARNESS) else data) for task in tasks]
    arguments = {"candidates": [asdict(candidate) for candidate in candidates], "tasks": places, "limit": limit}
    parts = run_ranks("athanor.evaluate.ranks:evaluate_models", arguments, ranks, log_folder=log_folder,
                      on_message=on_progress)
    scores: dict[str, dict[str, Score]] = {}
    seconds: dict[str, dict[str, float]] = {}
    for part in parts:
        for name, tasks_of_model in part.items():
            scores[name] = {task: Score(**fields) for task, (fields, _) in tasks_of_model.items()}
            seconds[name] = {task: taken for task, (_, taken) in tasks_of_model.items()}
    return Evaluation({name: scores[name] for name in names}, {name: seconds[name] for name in names})


def evaluate_models(channel: Callable[..., None], candidates: list[dict[str, Any]], tasks: list[tuple[str, Path]],
                    limit: int | None) -> dict[str, dict[str, tuple[dict[str, Any], float]]]:
    """Rank function: each task, with its data, on this rank's models; {model: {task: (a score's fields, seconds)}}."""
    from athanor.evaluate.subject import open_subject

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    results: dict[str, dict[str, tuple[dict[str, Any], float]]] = {}
    for fields in candidates[rank::world_size]:
        candidate = Candidate(**fields)
        subject = open_subject(candidate.name, candidate.folder, candidate.is_chat, candidate.context_tokens)
        results[candidate.name] = {}
        for task, data in tasks:

            def progress(done: int, total: int, task: str = task, model: str = candidate.name) -> None:
                channel(model=model, task=task, done=done, total=total)

            start = time.perf_counter()
            score = load("tasks", task).run(subject, data, limit, progress)
            results[candidate.name][task] = asdict(score), time.perf_counter() - start
    return results
