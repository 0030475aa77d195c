"""Tasks and scorers are found by name: a file in `tasks/` or `scorers/`, or a `package.module` from outside.

`lm_eval:<name>` is a task of lm-evaluation-harness.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Literal

from athanor.evaluate import harness
from athanor.evaluate.harness import HarnessTask
from athanor.foundation.errors import UserError, did_you_mean

Kind = Literal["tasks", "scorers"]
HARNESS = "lm_eval:"
OFFERS = {"tasks": "run", "scorers": "score"}  # the function that each must have


def names(kind: Kind) -> list[str]:
    """Everything in the folder."""
    return sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).with_name(kind))]))


def check_name(kind: Kind, name: str) -> None:
    """Refuse a name that is neither in the folder nor a package.module, with the nearest valid one."""
    if kind == "tasks" and name.startswith(HARNESS):
        harness.check(name.removeprefix(HARNESS))
    elif name not in names(kind) and ("." not in name or not all(part.isidentifier() for part in name.split("."))):
        raise UserError(f"there is no {kind[:-1]} '{name}'; {did_you_mean(name, names(kind))}, or package.module of your own"
                        + (f", or {HARNESS}<name>" if kind == "tasks" else ""))


def check_data(task: str, data: Path) -> None:
    """Refuse held-out data on which a task has nothing to score, as far as its `check(data)` can tell without a model."""
    check = None if task.startswith(HARNESS) else getattr(load("tasks", task), "check", None)
    if check is not None:
        check(data)


def load(kind: Kind, name: str) -> ModuleType | HarnessTask:
    """The module of a task (`run(subject, data, limit, progress)`, and `check(data)` if it likes) or of a scorer
    (`score(prompt, answer, reference)`).

    Raises UserError with the nearest valid name.
    """
    check_name(kind, name)
    if name.startswith(HARNESS):
        return harness.find(name.removeprefix(HARNESS))
    try:
        module = importlib.import_module(name if "." in name else f"athanor.evaluate.{kind}.{name}")
    except ModuleNotFoundError as error:
        raise UserError(f"{kind[:-1]} '{name}' cannot be imported: {error}") from None
    if not callable(getattr(module, OFFERS[kind], None)):
        raise UserError(f"{name} is no {kind[:-1]}: it has no function '{OFFERS[kind]}'")
    return module
