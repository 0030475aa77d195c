"""`athanor evaluate`: scores of a recipe's stages, which its run keeps, or of any model, with confidence intervals."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from athanor.cli.chain import alone
from athanor.cli.counts import POSITIVE
from athanor.cli.preflight import planned
from athanor.foundation.errors import ModelError, UserError
from athanor.foundation.layout import Layout, check_model
from athanor.foundation.progress import Bar, console, say
from athanor.foundation.recipe import Recipe, load_recipe
from athanor.foundation.run_folder import RunFolder, runs_root
from athanor.foundation.units import format_seconds

if TYPE_CHECKING:
    from athanor.evaluate.ranks import Candidate, Evaluation


@click.command()
@click.argument("subject", metavar="RECIPE_OR_MODEL")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--data", type=click.Path(path_type=Path), help="A data folder; the run's own unless given.")
@click.option("--task", "tasks", multiple=True, help="A name, package.module or lm_eval:<name>; the recipe's unless given.")
@click.option("--stage", "stages", multiple=True, help="A stage of the recipe; all that have a model unless given.")
@click.option("--ask", type=click.Choice(["chat", "text"]), help="How a model is asked; as its stage was trained, unless given.")
@click.option("--limit", type=POSITIVE, help="Items per task at most; the run's own scores stay then.")
@click.option("--tp", type=POSITIVE, help="Ranks that share each model; 1, or the recipe's evaluate.tp.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(subject: str, overrides: tuple[str, ...], data: Path | None, tasks: tuple[str, ...], stages: tuple[str, ...],
            ask: str | None, limit: int | None, tp: int | None, as_json: bool) -> None:
    """Score a recipe's stages, which its run keeps, or a model: its folder, a stage's or run's, or its name in the registry.

    A run folder stands for its newest stage.
    """
    path = None
    if subject.endswith(".toml") or Path(subject).is_file():
        recipe = load_recipe(subject, [*overrides, *([] if tp is None else [f"evaluate.tp={tp}"])])
        run = RunFolder(runs_root() / recipe.name)
        recipe = planned(recipe, run)
        with alone(run, "evaluate", recipe):
            result = evaluate_run(recipe, run, stages=stages, tasks=tasks, data=data, limit=limit)
        path = run.scores if limit is None else None
    else:
        if overrides or stages:
            raise UserError(f"{subject} is no recipe; overrides and --stage go with one")
        result = evaluate_model(subject, ask, tasks, data, limit, tp)
    if as_json:
        models = {model: {task: asdict(score) for task, score in scores.items()} for model, scores in result.scores.items()}
        click.echo(json.dumps({"scores": str(path) if path else None, "models": models, "seconds": result.seconds}))
    _print_scores(result)
    if path:
        say(f"written to {path}")


def evaluate_model(subject: str, ask: str | None, tasks: tuple[str, ...], data: Path | None, limit: int | None,
                   tp: int | None = None) -> Evaluation:
    """Evaluate one model, as its run would where there is one; its scores are kept nowhere."""
    from athanor.evaluate.ranks import Candidate
    from athanor.serve.target import find_target

    target = find_target(subject)
    run = target.run if target.run is not None and target.run.recipe.is_file() else None
    recipe = None if run is None else planned(load_recipe(run.recipe, ["plan.file=auto"]), run)
    data = data or (run.data if run is not None and run.data.is_dir() else None)
    if data is None:
        raise UserError(f"{subject} has no run here with data of its own; a data folder to score it on goes with --data")
    is_chat, context_tokens = (target.folder / "chat_template.jinja").is_file(), None
    if recipe is not None and any(stage.name == target.stage for stage in recipe.stage):
        is_chat, context_tokens = _asked(recipe)[target.stage]
    candidate = Candidate(target.name, target.folder, is_chat if ask is None else ask == "chat", context_tokens)
    shared = None if recipe is None else recipe.evaluate.lm_eval_data
    tasks = tasks or (("bits_per_byte",) if recipe is None else tuple(recipe.evaluate.tasks))
    logs = Path(tempfile.mkdtemp(prefix="athanor-evaluate-"))  # stays when a rank fails, to be read
    result = evaluate_with_bar([candidate], tasks, data, logs, limit=limit or (recipe.evaluate.limit if recipe else None),
                               lm_eval_data=None if shared is None else Path(shared),
                               tp=tp or (recipe.evaluate.tp if recipe else 1))
    shutil.rmtree(logs)
    return result


def evaluate_run(recipe: Recipe, run: RunFolder, *, stages: tuple[str, ...] = (), tasks: tuple[str, ...] = (),
                 data: Path | None = None, limit: int | None = None, keeps_unchanged: bool = False) -> Evaluation:
    """Evaluate a run's stages and merge the scores into its scores.json; what it has of the same may be kept."""
    from athanor.evaluate.ranks import Evaluation, made_from
    from athanor.evaluate.scores import merge_scores, unchanged

    candidates, tasks, data = run_candidates(recipe, run, stages), tasks or tuple(recipe.evaluate.tasks), data or run.data
    shared = recipe.evaluate.lm_eval_data
    settings: dict[str, Any] = {"limit": limit or recipe.evaluate.limit, "tp": recipe.evaluate.tp,
                                "lm_eval_data": None if shared is None else Path(shared)}
    hashes = made_from(candidates, tasks, data, **settings) if limit is None else {}
    if keeps_unchanged and (kept := unchanged(run.scores, hashes)):
        say(f"scored before, of the same model and data: {', '.join(f'{model} {task}' for model, task in sorted(kept))}")
        candidates = [each for each in candidates if not all((each.name, task) in kept for task in tasks)]
        tasks = tuple(task for task in tasks if not all((each.name, task) in kept for each in candidates))
        if not candidates:
            return Evaluation({}, {})
    result = evaluate_with_bar(candidates, tasks, data, run.logs / "evaluate", **settings)
    if limit is None:  # a look at a few items replaces no score
        merge_scores(run.scores, result.scores, hashes)
    return result


def run_candidates(recipe: Recipe, run: RunFolder, stages: tuple[str, ...] = ()) -> list[Candidate]:
    """The stages (all that have a model, or those named) as models to evaluate; pretraining is asked by plain text."""
    from athanor.evaluate.ranks import Candidate

    named, asked = [recipe.get_stage(name) for name in stages], _asked(recipe)
    found = [Candidate(stage.name, run.stage(stage.name).model, *asked[stage.name])
             for stage in named or recipe.stage if named or run.stage(stage.name).model.is_dir()]
    for candidate in found:
        if not candidate.folder.is_dir():
            raise ModelError(f"{candidate.folder} does not exist; train stage '{candidate.name}' first")
    if not found:
        raise ModelError(f"no stage of {run.root} has a model yet; train one first")
    return found


def evaluate_with_bar(candidates: list[Candidate], tasks: tuple[str, ...], data: Path, logs: Path,
                      **settings: Any) -> Evaluation:
    """Evaluate while one bar shows how far all models and tasks together are."""
    from athanor.evaluate.ranks import evaluate
    from athanor.models.shapes.find import load_shape

    for candidate in candidates:  # before so many ranks are started
        check_model(Layout(tp=settings["tp"]), load_shape(candidate.folder), 1)
    done: dict[tuple[str, str], float] = {}
    with Bar("evaluate", len(candidates) * len(tasks)) as bar:

        def on_progress(message: dict[str, Any]) -> None:
            key = message["model"], message["task"]
            share = message["done"] / message["total"]
            bar.advance(share - done.get(key, 0.0), f"{message['model']} {message['task']}")
            done[key] = share

        return evaluate(candidates, tasks, data, log_folder=logs, on_progress=on_progress, **settings)


def _asked(recipe: Recipe) -> dict[str, tuple[bool, int | None]]:
    """Of each stage: whether it is asked as a chat, and the longest context that it or one before it was trained on."""
    longest, out = 0, {}
    for stage in recipe.stage:
        longest = max(stage.seq_len or 0, longest)
        out[stage.name] = stage.objective != "pretrain", longest or None
    return out


def _print_scores(result: Evaluation) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("model", "task", "value", "95 % interval", "unit", "items", "time", "beside"):
        table.add_column(column)
    for model, scores in result.scores.items():
        for task, score in scores.items():
            beside = ", ".join(f"{name} {score.details[name]:.4g}" for name in ("xz", "gzip") if name in score.details)
            table.add_row(model, task, f"{score.value:.4g}", interval(asdict(score), 4), score.unit, str(score.count),
                          format_seconds(result.seconds[model][task]), beside)
    console.print(table)


def interval(score: dict[str, Any], digits: int = 3) -> str:
    """How sure a score is, which a single item cannot tell."""
    return "of one item" if score["count"] == 1 else f"{score['low']:.{digits}g} to {score['high']:.{digits}g}"
