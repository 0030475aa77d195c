"""Tasks of lm-evaluation-harness, unmodified, on local files: nothing is fetched from anywhere.

A task's data lie where its repository has them: `<data>/<dataset_path>/<dataset_name>/` holds, for each split,
`<split>.jsonl`, `<split>.parquet` or the parts `<split>-00000-of-00002.parquet` (no folder of its own for a name that is
missing or `default`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from athanor.evaluate.scores import Z_95, Score, bootstrap, items, wilson
from athanor.evaluate.subject import Progress, Subject
from athanor.foundation.errors import UserError, did_you_mean
from athanor.foundation.run_folder import hash_file, hash_value

YAML = ".yaml"
BUILDERS = ("json", "csv", "text", "parquet", "arrow", "pandas")  # of `datasets`: they read files that the task itself names
WHAT_BAD_DATA_RAISES = (KeyError, IndexError, TypeError, ValueError, AttributeError)


@dataclass(frozen=True)
class HarnessTask:
    """One of the harness's tasks or groups, by its name or as a YAML file of the user's own."""

    name: str

    def run(self, subject: Subject, data: Path, limit: int | None, progress: Progress) -> Score:
        """The task's first metric, with all of them in the details. Raises UserError when its data are not there."""
        from athanor.evaluate.harness_model import EngineModel

        model = EngineModel(subject, progress)
        loaded, read = load_tasks(self.name, data)
        found = ask(model, loaded, limit, subject.is_chat)
        return self._score(found, loaded, {
            "asked": "chat template" if subject.is_chat else "plain text", "context_tokens": subject.context_tokens,
            "cut_contexts": model.cut_contexts, "new_tokens": model.new_tokens,
            "data": {"files": len(read), "hash": hash_value(read)}})

    def _score(self, found: dict[str, Any], loaded: dict[str, Any], details: dict[str, Any]) -> Score:
        name = next(iter(loaded["groups"] or loaded["tasks"]))
        results = found["results"].get(name, {}) | found.get("groups", {}).get(name, {})
        metrics = {key: float(value) for key, value in results.items()
                   if "," in key and "_stderr" not in key and isinstance(value, (int, float))}
        if not metrics:
            raise UserError(f"lm_eval's '{name}' has no score of its own; name one of its tasks: {', '.join(loaded['tasks'])}")
        first = next(iter(metrics))
        metric, _, filtered = first.partition(",")
        details |= {"metrics": metrics, "shots": found["n-shot"].get(name), "version": found["versions"].get(name)}
        if loaded["groups"]:
            half = Z_95 * float(results[f"{metric}_stderr,{filtered}"])
            interval = metrics[first] - half, metrics[first] + half
            details |= {"interval": "1.96 standard errors", "tasks": {task: found["results"][task].get(first)
                                                                     for task in loaded["tasks"]}}
        else:
            rows = sorted((row for row in found["samples"][name] if row["filter"] == filtered), key=lambda row: row["doc_id"])
            values = [row[metric] for row in rows]
            is_share = all(isinstance(value, (int, float)) and value in (0, 1) for value in values)
            aggregate = loaded["tasks"][name].aggregation()[metric]
            interval = wilson(sum(values), len(values)) if is_share else bootstrap(values, aggregate)
            if is_share:
                details |= items([first, *((row["doc_hash"], row["target_hash"]) for row in rows)], values)
            details["interval"] = "95 % Wilson" if is_share else "95 % bootstrap over documents"
        is_better = bool(found["higher_is_better"].get(name, {}).get(metric, True))
        count = sum(found["n-samples"][task]["effective"] for task in loaded["tasks"])
        return Score(metrics[first], *interval, count, first.removesuffix(",none"), is_better, details)


def load_tasks(name: str, root: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The harness's tasks behind a name, on the files below `root`, and the hashes of those files."""
    from lm_eval import defaults

    random.seed(defaults.DEFAULT_RANDOM_SEED)
    np.random.seed(defaults.DEFAULT_OTHER_SEED)
    with local_datasets(root) as read:
        try:
            loaded: dict[str, Any] = task_manager(name).load([name])
        except WHAT_BAD_DATA_RAISES as error:
            raise UserError(f"lm_eval's task '{name}' cannot use the data in {root}: {type(error).__name__}: {error}") from error
    for task_name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"lm_eval's task '{task_name}' runs code that the model writes, outside any sandbox; it is refused")
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(defaults.DEFAULT_OTHER_SEED)
    return loaded, read


def ask(model: Any, loaded: dict[str, Any], limit: int | None = None, is_chat: bool = False) -> dict[str, Any]:
    """The harness's results of its tasks on one of its models."""
    from lm_eval.evaluator import evaluate

    found: dict[str, Any] = evaluate(model, loaded, limit=limit, bootstrap_iters=1000 if loaded["groups"] else 0,
                                     apply_chat_template=is_chat, fewshot_as_multiturn=is_chat)
    return found


def check(name: str) -> None:
    """Refuse what cannot be asked because the package is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"task 'lm_eval:{name}' needs lm-evaluation-harness; install it with: pip install 'athanor-llm[lm-eval]'")


def find(name: str) -> HarnessTask:
    """The task of this name. Raises UserError with the nearest one."""
    check(name)
    from lm_eval.tasks._index import TaskIndex

    manager = task_manager(name)
    entry = manager.task_index.get(name) or (TaskIndex.entry_from_path(Path(name)) if name.endswith(YAML) else None)
    if entry is None:
        raise UserError(f"lm_eval has no task '{name}'; {did_you_mean(name, manager.all_tasks)}")
    if entry.kind.name == "TAG" or (name.endswith(YAML) and entry.kind.name == "GROUP"):
        tasks = ", ".join(sorted(entry.tags)) or "its tasks"
        raise UserError(f"lm_eval's '{name}' is several tasks without a score of their own together; name one of {tasks}")
    return HarnessTask(name)


@functools.cache
def task_manager(name: str) -> Any:
    """A task manager that knows a task; of the folders that mention it where that is enough, since all 14,000 take 10 s."""
    import lm_eval.tasks

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if name.endswith(YAML):
        return lm_eval.tasks.TaskManager(include_defaults=False)
    root = Path(lm_eval.tasks.__file__).parent
    near = {root / path.relative_to(root).parts[0] for path in root.rglob("*.yaml") if name.encode() in path.read_bytes()}
    if near:
        found = lm_eval.tasks.TaskManager(include_path=sorted(near), include_defaults=False)
        entry = found.task_index.get(name)
        if entry is not None and entry.kind.name.endswith("TASK"):
            return found
    return _all_tasks()


@functools.cache
def _all_tasks() -> Any:
    import lm_eval.tasks

    return lm_eval.tasks.TaskManager()


@contextlib.contextmanager
def local_datasets(root: Path) -> Iterator[dict[str, str]]:
    """Within, `datasets.load_dataset` reads the files below `root` in place of the hub's; gives the hashes of those it read."""
    import datasets

    read: dict[str, str] = {}
    original = datasets.load_dataset

    def load(path: str, name: str | None = None, *arguments: Any, **options: Any) -> Any:
        if path in BUILDERS:
            return original(path, name, *arguments, **options)
        folder = root / path if name in (None, "default") else root / path / str(name)
        splits: dict[str, list[Path]] = {}
        for file in sorted([*folder.glob("*.jsonl"), *folder.glob("*.parquet")]):
            splits.setdefault(file.name.split(".")[0].split("-")[0], []).append(file)
        if not splits:
            raise UserError(f"{folder} has no <split>.jsonl or <split>.parquet; put the data of '{path}' there, as its "
                            "repository has them")
        tables = {split: datasets.concatenate_datasets([_read(file) for file in files]) for split, files in splits.items()}
        read.update({str(file.relative_to(root)): hash_file(file) for files in splits.values() for file in files})
        found = datasets.DatasetDict(tables)
        return found[options["split"]] if options.get("split") else found

    datasets.load_dataset = load
    try:
        yield read
    finally:
        datasets.load_dataset = original


def _read(file: Path) -> Any:
    import datasets
    import pyarrow
    import pyarrow.parquet

    try:
        if file.suffix == ".parquet":
            return datasets.Dataset(pyarrow.parquet.read_table(file))
        return datasets.Dataset.from_list([json.loads(line) for line in file.read_bytes().splitlines() if line.strip()])
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, pyarrow.ArrowException) as error:
        raise UserError(f"{file} cannot be read as {file.suffix[1:]}: {error}") from error
