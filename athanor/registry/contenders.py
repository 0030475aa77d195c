"""Models to set side by side, wherever they are: in the registry, in a run, in a folder, or published under a name. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from athanor.foundation.errors import ModelError, UserError, did_you_mean
from athanor.foundation.recipe import Recipe, load_recipe
from athanor.foundation.run_folder import RunFolder, read_json
from athanor.ledger.book import read_book
from athanor.models.shapes.decoder import DecoderShape
from athanor.models.shapes.find import known_shapes, load_shape
from athanor.registry.store import Registry


@dataclass(frozen=True)
class Contender:
    """A model to compare. `tokens` and `ledger_flops` are what it and all that it started from took; None: nobody knows of one of
    them, as of a base from elsewhere. `known_tokens` and `known_flops` are those of the others."""

    name: str
    shape: DecoderShape
    tokens: float | None = None
    ledger_flops: float | None = None
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)  # task -> a score's fields
    known_tokens: float | None = None
    known_flops: float | None = None


def find_contenders(names: list[str], store: Registry, scores: Path | None = None) -> list[Contender]:
    """What the names mean: a version in the registry, a model folder, a run folder (all its stages that have a model), or a
    published model of `known.toml`. `scores` is a scores.json whose models go by the names given, and may have a table `tokens`.

    Raises UserError or ModelError for a name that means nothing, one that comes twice, and fewer than two models.
    """
    found = [contender for name in names for contender in _found(name, store)]
    twice = {one.name for one in found if sum(one.name == other.name for other in found) > 1}
    if twice:
        raise UserError(f"'{min(twice)}' is named twice; models to compare need different names")
    if len(found) < 2:
        raise UserError(f"{', '.join(one.name for one in found)} alone is no comparison; name two models or more")
    return found if scores is None else _with_scores(found, scores)


def _found(name: str, store: Registry) -> list[Contender]:
    path = Path(name)
    if path.is_dir() and (path / "config.json").is_file():
        stage = path.resolve().parent
        if path.resolve().name == "model" and RunFolder(stage.parent).recipe.is_file():
            return [_of_stage(RunFolder(stage.parent), stage.name, str(path))]
        return [Contender(str(path), load_shape(path, for_training=False))]
    if path.is_dir():
        return _of_run(RunFolder(path))
    known, models = known_shapes(), {row["model"] for row in store.rows()}
    if name.partition("@")[0] not in models:
        if name.lower() in known:
            return [Contender(name.lower(), load_shape(known[name.lower()], for_training=False))]
        raise ModelError(f"'{name}' is neither a folder, nor registered in {store.root}, nor published under that name; "
                         + did_you_mean(name, {*models, *known}))
    card = store.get(name)
    line = store.lineage(card.reference)
    tokens, known_tokens = _together(_tokens_of(line))
    return [Contender(card.reference, load_shape(store.folder(card), for_training=False), tokens, line["cost"]["model_flops"],
                      card.scores or {}, known_tokens, line["known_cost"]["model_flops"])]


def _tokens_of(node: dict[str, Any]) -> list[float | None]:
    """Tokens of a version and of each of its parents; None of one that does not know."""
    return [node.get("tokens"), *(tokens for parent in node.get("parents", []) for tokens in _tokens_of(parent))]


def _together(parts: Sequence[float | None]) -> tuple[float | None, float | None]:
    """The sum, None when one part is not known; and that of the parts that are, None when none is."""
    known = [part for part in parts if part is not None]
    total = math.fsum(known) if known else None
    return total if len(known) == len(parts) else None, total


def _of_run(run: RunFolder) -> list[Contender]:
    if not run.recipe.is_file():
        inside = [path.name for path in run.root.iterdir() if (path / "config.json").is_file()]
        hint = f"; {did_you_mean('model', inside)}" if inside else ""
        raise ModelError(f"{run.root} is neither a model folder (config.json) nor a run folder (recipe.toml){hint}")
    stages = [stage.name for stage in load_recipe(run.recipe).stage if (run.stage(stage.name).model / "config.json").is_file()]
    if not stages:
        raise ModelError(f"no stage of {run.root} has a model yet; train one first")
    return [_of_stage(run, stage, f"{run.root.resolve().name}/{stage}") for stage in stages]


def _of_stage(run: RunFolder, stage: str, name: str) -> Contender:
    recipe = load_recipe(run.recipe)
    models = read_json(run.scores).get("models", {}) if run.scores.is_file() else {}
    took = _took(run, recipe, stage)
    (tokens, known_tokens), (flops, known_flops) = (_together([each[i] for each in took]) for i in (0, 1))
    return Contender(name, load_shape(run.stage(stage).model, for_training=False), tokens, flops, models.get(stage, {}),
                     known_tokens, known_flops)


def _took(run: RunFolder, recipe: Recipe, stage: str) -> list[tuple[float | None, float | None]]:
    """Tokens and model FLOPs of a stage, and of each before it; None where a book is missing, and of a folder it started from."""
    folder, before = run.stage(stage), recipe.get_stage(stage).start_from
    book = read_book(folder.actual) if folder.actual.is_file() else None
    took: list[tuple[float | None, float | None]] = [(None, None) if book is None else (book.tokens, book.model_flops)]
    if before in {each.name for each in recipe.stage}:
        return took + _took(run, recipe, before)
    return [*took, (None, None)] if before else took


def _with_scores(found: list[Contender], path: Path) -> list[Contender]:
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("models"), dict):
        raise UserError(f"{path} is not a scores.json: it has no table 'models'")
    names = {key: one.name for one in found for key in (Path(one.name).name, one.name.partition("@")[0], one.name)}
    unknown = [name for name in content["models"] if name not in names]
    if len(unknown) == len(content["models"]):
        raise UserError(f"{path} has scores of {', '.join(unknown) or 'no model'}, and of none of {', '.join(names)}")
    tokens = content.get("tokens") or {}
    if not isinstance(tokens, dict) or not all(isinstance(count, (int, float)) and count > 0 for count in tokens.values()):
        raise UserError(f"{path}: 'tokens' must be a table of counts above 0 by model")
    own = {names[name]: (table, tokens.get(name)) for name, table in content["models"].items() if name in names}
    if not all(isinstance(table, dict) for table, _ in own.values()):
        raise UserError(f"{path}: 'models' must hold a table of scores for each model")
    return [replace(one, scores=one.scores | own[one.name][0], tokens=own[one.name][1] or one.tokens) if one.name in own else one
            for one in found]
