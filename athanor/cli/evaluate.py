"""`athanor evaluate`: scores of a run's stages, or of any model folder, with confidence intervals."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from athanor.foundation.errors import ModelError, UserError, did_you_mean
from athanor.foundation.progress import Bar, console, say
from athanor.foundation.recipe import Recipe, load_recipe, read_plan
from athanor.foundation.run_folder import RunFolder, runs_root
from athanor.foundation.units import format_seconds

if TYPE_CHECKING:
    from athanor.evaluate.ranks import Candidate, Evaluation


@click.command(help=__doc__)
@click.argument("subject", metavar="RECIPE_OR_MODEL_FOLDER", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--data", type=click.Path(path_type=Path), help="A data folder; the run's own unless given.")
@click.option("--task", "tasks", multiple=True, help="A name, package.module or lm_eval:<name>; the recipe's unless given.")
@click.option("--stage", "stages", multiple=True, help="A stage of the recipe; all that have a model unless given.")
@click.option("--ask", type=click.Choice(["chat", "text"]), help="How a model folder is asked; by its template if it has one.")
@click.option("--limit", type=click.IntRange(min=1), help="Items per task at most; the run's own scores stay then.")
@click.option("--tp", type=click.IntRange(min=1), help="Ranks that share each model; 1, or the recipe's evaluate.tp.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(subject: Path, overrides: tuple[str, ...], data: Path | None, tasks: tuple[str, ...], stages: tuple[str, ...],
            ask: str | None, limit: int | None, tp: int | None, as_json: bool) -> None:
    path = None
    if subject.is_dir():
        if overrides or stages:
            raise UserError(f"{subject} is a model folder; overrides and --stage go with a recipe")
        if data is None:
            raise UserError("a model folder is evaluated on a data folder; give it with --data")
        candidates = [_folder_candidate(subject, ask)]
        tasks = tasks or ("bits_per_byte",)
        logs = Path(tempfile.mkdtemp(prefix="athanor-evaluate-"))  # stays when a rank fails, to be read
        result = evaluate_with_bar(candidates, tasks, data, logs, limit, tp=tp or 1)
        shutil.rmtree(logs)
    else:
        recipe = load_recipe(subject, [*overrides, *([] if tp is None else [f"evaluate.tp={tp}"])])
        run = RunFolder(runs_root() / recipe.name)
        if run.plan.exists():
            recipe = recipe.with_plan(read_plan(run.plan), str(run.plan))
        result = evaluate_run(recipe, run, stages=stages, tasks=tasks, data=data, limit=limit)
        path = run.scores if limit is None else None
    if as_json:
        models = {model: {task: asdict(score) for task, score in scores.items()} for model, scores in result.scores.items()}
        click.echo(json.dumps({"scores": str(path) if path else None, "models": models, "seconds": result.seconds}))
    _print_scores(result)
    if path:
        say(f"written to {path}")


def evaluate_run(recipe: Recipe, run: RunFolder, *, stages: tuple[str, ...] = (), tasks: tuple[str, ...] = (),
                 data: Path | None = None, limit: int | None = None) -> Evaluation:
    """Evaluate a run's stages and merge the scores into its scores.json."""
    from athanor.evaluate.scores import merge_scores

    candidates = run_candidates(recipe, run, stages)
    shared = recipe.evaluate.lm_eval_data
    result = evaluate_with_bar(candidates, tasks or tuple(recipe.evaluate.tasks), data or run.data, run.logs / "evaluate",
                               limit or recipe.evaluate.limit, Path(shared) if shared is not None else None,
                               recipe.evaluate.tp)
    if limit is None:  # a look at a few items replaces no score
        merge_scores(run.scores, result.scores)
    return result


def run_candidates(recipe: Recipe, run: RunFolder, stages: tuple[str, ...] = ()) -> list[Candidate]:
    """The stages (all that have a model, or those named) as models to evaluate; pretraining is asked by plain text."""
    from athanor.evaluate.ranks import Candidate

    named = [recipe.get_stage(name) for name in stages]
    trained_on: dict[str, int | None] = {}  # the longest context of a stage and those before it
    for stage in recipe.stage:
        trained_on[stage.name] = max(stage.seq_len or 0, *(length or 0 for length in trained_on.values()), 0) or None
    found = [Candidate(stage.name, run.stage(stage.name).model, stage.objective != "pretrain", trained_on[stage.name])
             for stage in named or recipe.stage if named or run.stage(stage.name).model.is_dir()]
    for candidate in found:
        if not candidate.folder.is_dir():
            raise ModelError(f"{candidate.folder} does not exist; train stage '{candidate.name}' first")
    if not found:
        raise ModelError(f"no stage of {run.root} has a model yet; train one first")
    return found


def evaluate_with_bar(candidates: list[Candidate], tasks: tuple[str, ...], data: Path, logs: Path,
                      limit: int | None, lm_eval_data: Path | None = None, tp: int = 1) -> Evaluation:
    """Evaluate while one bar shows how far all models and tasks together are."""
    from athanor.evaluate.ranks import evaluate

    done: dict[tuple[str, str], float] = {}
    with Bar("evaluate", len(candidates) * len(tasks)) as bar:

        def on_progress(message: dict[str, Any]) -> None:
            key = message["model"], message["task"]
            share = message["done"] / message["total"]
            bar.advance(share - done.get(key, 0.0), f"{message['model']} {message['task']}")
            done[key] = share

        return evaluate(candidates, tasks, data, log_folder=logs, limit=limit, on_progress=on_progress,
                        lm_eval_data=lm_eval_data, tp=tp)


def _folder_candidate(folder: Path, ask: str | None) -> Candidate:
    from athanor.evaluate.ranks import Candidate

    if not (folder / "config.json").is_file():
        inside = [path.name for path in folder.iterdir() if (path / "config.json").is_file()]
        hint = f"; {did_you_mean('model', inside)}" if inside else ""
        raise ModelError(f"{folder} is not a model folder: it has no config.json{hint}")
    has_template = (folder / "chat_template.jinja").is_file()
    return Candidate(folder.resolve().name, folder, ask == "chat" or (ask is None and has_template))


def _print_scores(result: Evaluation) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("model", "task", "value", "95 % interval", "unit", "items", "time", "beside"):
        table.add_column(column)
    for model, scores in result.scores.items():
        for task, score in scores.items():
            beside = ", ".join(f"{name} {score.details[name]:.4g}" for name in ("xz", "gzip") if name in score.details)
            table.add_row(model, task, f"{score.value:.4g}", f"{score.low:.4g} to {score.high:.4g}", score.unit, str(score.count),
                          format_seconds(result.seconds[model][task]), beside)
    console.print(table)
