"""Evaluates several models at once, one per rank or per group of ranks that share it, and puts the scores together."""

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
from athanor.foundation.run_folder import hash_file, hash_folder, hash_value, read_json


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


def made_from(candidates: Sequence[Candidate], tasks: Sequence[str], data: Path, *, limit: int | None = None,
              lm_eval_data: Path | None = None, tp: int = 1) -> dict[str, dict[str, str]]:
    """By model and task, the hash of all that decides its score: weights, how the model is asked, task, its data and limit."""
    manifest, found = data / "manifest.json", {}
    held_out = (read_json(manifest)["hash"] if manifest.exists() else  # a folder of held-out files alone will do
                hash_value([hash_file(file) for file in sorted(data.glob("*.jsonl"))]))
    shared = lm_eval_data or data / "lm_eval"
    places = {task: hash_folder(shared) if task.startswith(HARNESS) and shared.is_dir() else held_out for task in tasks}
    for each in candidates:
        model = [hash_folder(each.folder), each.is_chat, each.context_tokens, limit, tp]
        found[each.name] = {task: hash_value([*model, task, place]) for task, place in places.items()}
    return found


def evaluate(candidates: Sequence[Candidate], tasks: Sequence[str], data: Path, *, log_folder: Path, limit: int | None = None,
             on_progress: Callable[[dict[str, Any]], None] | None = None, lm_eval_data: Path | None = None,
             tp: int = 1) -> Evaluation:
    """Run all tasks on all models, on as many ranks as there are models and cores, or groups of `tp` ranks that share a model.

    Those of lm_eval have their data below `lm_eval_data`, or below data/lm_eval. `on_progress` gets {"model", "task", "done",
    "total"}. Raises UserError for an unknown task before anything starts, LayoutError for a model that tp does not divide.
    """
    from athanor.foundation.launch import run_ranks

    names = [candidate.name for candidate in candidates]
    if len(set(names)) < len(names) or not names:
        raise UserError(f"models to evaluate need different names, got {names}")
    for task in tasks:
        load("tasks", task)
    groups = min(len(candidates), max(1, len(os.sched_getaffinity(0)) // tp))
    places = [(task, (lm_eval_data or data / "lm_eval") if task.startswith(HARNESS) else data) for task in tasks]
    arguments = {"candidates": [asdict(candidate) for candidate in candidates], "tasks": places, "limit": limit,
                 "tp": tp}
    parts = run_ranks("athanor.evaluate.ranks:evaluate_models", arguments, groups * tp, log_folder=log_folder,
                      on_message=on_progress)
    scores: dict[str, dict[str, Score]] = {}
    seconds: dict[str, dict[str, float]] = {}
    for part in parts:
        for name, tasks_of_model in part.items():
            scores[name] = {task: Score(**fields) for task, (fields, _) in tasks_of_model.items()}
            seconds[name] = {task: taken for task, (_, taken) in tasks_of_model.items()}
    return Evaluation({name: scores[name] for name in names}, {name: seconds[name] for name in names})


def evaluate_models(channel: Callable[..., None], candidates: list[dict[str, Any]], tasks: list[tuple[str, Path]],
                    limit: int | None, tp: int = 1) -> dict[str, dict[str, tuple[dict[str, Any], float]]]:
    """Rank function: each task, with its data, on this rank's models; {model: {task: (a score's fields, seconds)}}.

    All ranks that share a model compute the same scores, of which the first one speaks.
    """
    from athanor.evaluate.subject import open_subject

    rank, world_size, mesh = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), None
    if tp > 1:
        from athanor.inference.shared import join

        mesh = join(tp)
    results: dict[str, dict[str, tuple[dict[str, Any], float]]] = {}
    for fields in candidates[rank // tp::world_size // tp]:
        candidate = Candidate(**fields)
        subject = open_subject(candidate.name, candidate.folder, candidate.is_chat, candidate.context_tokens, mesh)
        results[candidate.name] = {}
        for task, data in tasks:

            def progress(done: int, total: int, task: str = task, model: str = candidate.name) -> None:
                if rank % tp == 0:
                    channel(model=model, task=task, done=done, total=total)

            start = time.perf_counter()
            score = load("tasks", task).run(subject, data, limit, progress)
            results[candidate.name][task] = asdict(score), time.perf_counter() - start
    return results if rank % tp == 0 else {}
