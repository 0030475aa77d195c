"""`athanor run`: the whole chain from one recipe: check, plan, data, train, evaluate, register, serve, report."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from athanor.cli.chain import Chain, hash_output, locked
from athanor.cli.preflight import check_starts, devices_of, plan_inputs, refuse_early, refuse_elsewhere
from athanor.foundation.errors import UserError
from athanor.foundation.identity import differences, read_identity
from athanor.foundation.progress import say
from athanor.foundation.recipe import Recipe, Stage, load_recipe, read_plan
from athanor.foundation.run_folder import RunFolder, hash_value, read_json, read_jsonl, runs_root, write_atomic
from athanor.ledger.book import Book, read_book, total

QUESTION_TOKENS = 40  # at most, of the question that the served model is asked first
STEP_ACCOUNTS = {"check": "check", "plan": "check", "data": "data", "evaluate": "evaluation", "registry": "publish",
                 "serve": "publish", "report": "publish"}


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--fresh", "is_fresh", is_flag=True, help="train anew the stages that are not done, whatever their folders hold")
@click.option("--fresh-before", "before", type=float, default=0.0, hidden=True, help="--fresh, for what was begun earlier alone")
@click.option("--json", "as_json", is_flag=True, help="print one JSON document to standard output")
def command(recipe: Path, overrides: tuple[str, ...], is_fresh: bool, before: float, as_json: bool) -> None:
    """Walk the whole chain of RECIPE; steps whose inputs have not changed are skipped, a killed run goes on."""
    started = time.time()
    loaded = load_recipe(recipe, list(overrides))
    run = RunFolder(runs_root() / loaded.name)
    with locked(run, [] if loaded.cluster.file == "auto" else [run.cluster.name]):  # which was only copied
        chain = walk(loaded, run, started, math.inf if is_fresh else before)
    _tell(run, loaded)
    if as_json:
        click.echo(json.dumps({"run": str(run.root), "report": str(run.report), "wall_seconds": chain.wall_seconds(),
                               "steps": [line for line in chain.lines if line["event"] == "done"]}))


def walk(recipe: Recipe, run: RunFolder, started: float, before: float = 0.0) -> Chain:
    """Do every step that is not done yet, in order; training that is not done and was begun earlier than `before` begins anew."""
    from athanor.cli.train import begins_anew
    from athanor.data.sources import inputs_of, scan
    from athanor.foundation.launch import start_server
    from athanor.jobs.nodes import current

    sources = scan(recipe)
    refuse_early(recipe)
    nodes = current()  # of a job on Slurm, spare ones included
    chain = Chain(run, devices_of(recipe) if nodes is None else nodes.count, started)
    start_server("athanor.train.loop")
    _check(chain, recipe, run)
    planned = _plan(chain, recipe, run, sources, before > 0)
    write_atomic(run.recipe, recipe.annotated())
    data_inputs = inputs_of(planned)
    chain.step("data", data_inputs, [run.data / "manifest.json"], lambda: _build_data(planned, run, data_inputs))
    for stage in planned.stage:
        is_anew = begins_anew(run.stage(stage.name), before)
        chain.step(f"train {stage.name}", _stage_inputs(planned, stage, run), [run.stage(stage.name).model],
                   _training(planned, stage, run, is_anew))
    models = {stage.name: str(hash_output(run.stage(stage.name).model)) for stage in planned.stage}
    facts = {**models, "data": _data_hash(run)}
    if planned.evaluate.lm_eval_data is not None:
        facts["lm_eval_data"] = str(hash_output(Path(planned.evaluate.lm_eval_data)))
    chain.step("evaluate", {**facts, "tasks": hash_value(planned.evaluate.model_dump())}, [run.scores],
               lambda: _evaluate(planned, run))
    chain.step("registry", {**models, "scores": str(hash_output(run.scores))}, [], lambda: _register(planned, run))
    chain.step("serve", {"model": list(models.values())[-1]}, [], lambda: _serve(run.stage(planned.stage[-1].name).model, run))
    chain.step("report", {"scores": str(hash_output(run.scores)), "plan": str(hash_output(run.plan)), **models}, [run.report],
               lambda: _report(chain, planned, run))
    chain.end()
    return chain


def _check(chain: Chain, recipe: Recipe, run: RunFolder) -> None:
    from athanor.cli.check import check

    if recipe.cluster.file != "auto":
        given = Path(recipe.cluster.file)
        chain.step("check", {"file": str(hash_output(given))}, [run.cluster],
                   lambda: write_atomic(run.cluster, given.read_bytes()))
        return
    refuse_elsewhere(recipe)
    machine = [platform.node(), os.cpu_count(), platform.machine(), version("torch"), recipe.cluster.devices]

    was_measured = run.cluster.exists() and chain.last_inputs("check") is None

    def measure() -> dict[str, Any]:
        if was_measured:
            say(f"{run.cluster} was measured before")
        else:
            check(run.cluster, recipe.cluster.devices)
        return {"was_measured": was_measured}

    chain.step("check", {"machine": hash_value(machine)}, [run.cluster], measure)


def _plan(chain: Chain, recipe: Recipe, run: RunFolder, sources: dict[str, Any], is_fresh: bool) -> Recipe:
    """Plan, or take the plan that the recipe names; the recipe with everything filled in."""
    from athanor.cli.plan import plan_run, write_plan

    followed = Path(recipe.plan.file) if recipe.plan.file != "auto" else None
    given = read_plan(followed) if followed else {}

    def make() -> dict[str, Any]:
        if was_planned:
            say(f"{run.plan} was made before" + ("" if made_from == inputs else ", and the stages are trained with it already"))
            return {"was_planned": True}
        measured = chain.last("check")
        measures = measured is not None and not measured["details"].get("was_measured")
        plan = plan_run(recipe.with_plan(given, recipe.plan.file), run, measures=measures)  # what a plan fixes is only forecast
        for sentence in (plan.reasons["model"], plan.reasons["parallel"], *plan.notes):
            say(sentence)
        if not is_fresh:
            _refuse_other_plan(recipe.with_plan(given or plan.values, str(run.plan)), run)
        write_plan(plan, run, run.plan, inputs)
        if followed:
            write_atomic(run.plan, followed.read_bytes())
        return {"forecast_seconds": plan.forecast.wall_seconds}

    inputs = plan_inputs(recipe, run, sources)
    outputs = [run.plan, run.forecast]
    made_from = read_plan(run.plan).get("inputs", {}) if run.plan.exists() and run.forecast.exists() else {}
    is_trained = any(run.stage(stage.name).metrics.exists() for stage in recipe.stage)
    was_planned = (made_from == inputs and chain.last_inputs("plan") is None) or (
        is_trained and not is_fresh and chain.is_untouched("plan", outputs)
        and made_from == {**inputs, "evaluate": made_from.get("evaluate")})  # then only how it is evaluated is another
    chain.step("plan", inputs, outputs, make)
    return recipe.with_plan(read_plan(run.plan), str(run.plan))


def _build_data(recipe: Recipe, run: RunFolder, inputs: dict[str, str]) -> dict[str, Any]:
    """Build the data unless `athanor data build` did from the same; see that every stage finds rows before any is trained."""
    from athanor.cli.data import build_with_bar
    from athanor.data.lineage import open_manifest
    from athanor.data.rows import open_rows
    from athanor.evaluate.find import check_data

    was_built = _was_built(run.data, inputs)
    if was_built:
        say(f"{run.data} was built before, from the same text in the same way")
    manifest = open_manifest(run.data) if was_built else build_with_bar(recipe, run.data)
    check_starts(recipe, manifest["vocab_size"], run.data / "tokenizer" / "tokenizer.json")
    for stage in recipe.stage:
        open_rows(run.data, stage.data, stage.seq_len or 256, recipe.seed)
    for task in recipe.evaluate.tasks:
        check_data(task, run.data)
    return {"hash": manifest["hash"], "seconds": manifest["seconds"], "was_built": was_built}


def _was_built(folder: Path, inputs: dict[str, str]) -> bool:
    """Whether a data folder is whole and comes from these inputs."""
    from athanor.data.lineage import damaged_files, open_manifest

    try:
        return open_manifest(folder).get("inputs") == inputs and not damaged_files(folder)
    except UserError:  # it is none, or no more
        return False


def _data_hash(run: RunFolder) -> str:
    """Of all that is trained and evaluated on, so that another build of the same is the same."""
    manifest = run.data / "manifest.json"
    return str(read_json(manifest)["hash"]) if manifest.exists() else "None"


def _stage_inputs(recipe: Recipe, stage: Stage, run: RunFolder) -> dict[str, str]:
    """What the weights of a stage depend on."""
    inputs = {"config": hash_value([recipe.seed, recipe.model.model_dump(), recipe.parallel.model_dump(), stage.model_dump()]),
              "data": _data_hash(run)}
    if stage.start_from:
        is_stage = any(other.name == stage.start_from for other in recipe.stage)
        inputs["start_from"] = str(hash_output(run.stage(stage.start_from).model if is_stage else Path(stage.start_from)))
    if stage.data not in ("documents", "pairs"):
        inputs["conversations"] = str(hash_output(Path(stage.data)))
    return inputs


def _refuse_other_plan(recipe: Recipe, run: RunFolder) -> None:
    """A plan that differs from what a stage was trained with is refused before it takes the place of the one that fits."""
    for stage in recipe.stage:
        folder = run.stage(stage.name)
        before = read_identity(folder) if folder.metrics.exists() else {}
        planned = {**stage.model_dump(), **{f"model.{key}": value for key, value in recipe.model.given().items()}}
        shared = [key for key, value in planned.items() if value is not None and key in before]
        differing = differences({key: before[key] for key in shared}, {key: planned[key] for key in shared})
        if differing:
            raise UserError(f"the plan would now be another one than stage '{stage.name}' of {run.root} was trained with: "
                            f"{differing}; train it anew with --fresh (`run`, `jobs submit`), or give the run another name=…")


def _training(recipe: Recipe, stage: Stage, run: RunFolder, is_fresh: bool) -> Callable[[], dict[str, Any]]:
    """Only `is_fresh` throws work away; without it, what was trained goes on, or is refused by what differs."""

    def work() -> dict[str, Any]:
        from athanor.cli.train import train

        result = train(recipe, run, stage.name, is_fresh=is_fresh)
        loss = result["loss"][-1] if result["loss"] else None
        return {"steps": result["steps"], "loss": loss, "tokens_per_second": result["tokens_per_second"]}

    return work


def _evaluate(recipe: Recipe, run: RunFolder) -> dict[str, Any]:
    from athanor.cli.evaluate import evaluate_run

    return {"seconds": evaluate_run(recipe, run, keeps_unchanged=True).seconds}


def _register(recipe: Recipe, run: RunFolder) -> dict[str, Any]:
    from athanor.registry.store import register

    return {"models": [register(run.root, stage.name).reference for stage in recipe.stage]}


def smoke(channel: Callable[..., None], folder: str) -> dict[str, Any]:
    """Rank function: serve a model, let it answer once whole and once streamed, stop."""
    from athanor.inference.engine import context_tokens
    from athanor.serve.server import smoke as first_answers

    room = context_tokens(Path(folder)) - QUESTION_TOKENS  # a short context leaves room for a short answer
    return first_answers(Path(folder), max_tokens=max(1, min(48, room)))


def _serve(model: Path, run: RunFolder) -> dict[str, Any]:
    from athanor.foundation.launch import run_ranks

    (answers,) = run_ranks("athanor.cli.run:smoke", {"folder": str(model)}, 1, log_folder=run.logs / "serve", timeout=300)
    return dict(answers)


def _report(chain: Chain, recipe: Recipe, run: RunFolder) -> dict[str, Any]:
    """Add up the run's book, then render the page that shows it; rendering is counted by doing it once before."""
    from athanor.report.page import write_report

    start = time.perf_counter()
    write_report(run)
    actual_book(chain, recipe, run, report_seconds=2 * (time.perf_counter() - start)).write(run.actual)
    write_report(run)
    return {}


def actual_book(chain: Chain, recipe: Recipe, run: RunFolder, report_seconds: float = 0.0) -> Book:
    """The book of the whole run: what each step of the chain spent, and the trainer's own books."""
    books: list[Book] = []
    for line in (*chain.lines, *chain.alone):
        if line["event"] in ("done", "alone") and (account := STEP_ACCOUNTS.get(line["step"]) or _idle_account(line, run)):
            books.append(_step_book(account, line["seconds"], line["devices"]))
    books.append(_step_book("publish", report_seconds, chain.devices))
    books += [read_book(run.stage(stage.name).actual) for stage in recipe.stage]
    book = total(books, "actual", wall_seconds=chain.wall_seconds(), devices=chain.devices, device_seconds=chain.device_seconds())
    if recipe.cluster.price_per_device_hour is not None:
        book.money = recipe.cluster.price_per_device_hour * book.device_seconds / 3600
    return book


def _idle_account(line: dict[str, Any], run: RunFolder) -> str | None:
    """Of a training step that found its stage trained already, by `athanor train` alone; such a step only starts."""
    verb, _, stage = line["step"].partition(" ")
    if verb != "train":
        return None
    begin = line["time"] - line["seconds"]
    is_idle = not any(begin <= row.get("time", 0.0) <= line["time"] for row in read_jsonl(run.stage(stage).ledger))
    return "startup" if is_idle else None


def _step_book(account: str, seconds: float, devices: int) -> Book:
    book = Book("actual", devices, "", None, wall_seconds=seconds, device_seconds=seconds * devices)
    book.add(account, seconds * devices)
    return book


def _tell(run: RunFolder, recipe: Recipe) -> None:
    """The ledger, how good the models are, and where to go from here."""
    from athanor.cli.evaluate import interval
    from athanor.evaluate.scores import read_scores
    from athanor.ledger.reconcile import WHOLE_CHAIN
    from athanor.report.run_record import read_run
    from athanor.report.terminal import print_ledger

    for found in read_run(run).books:
        if found.name == WHOLE_CHAIN:
            print_ledger(found)
    for model, scores in read_scores(run.scores).items():
        parts = [f"{task} {score['value']:.3g} ({interval(score)})"
                 + (f", xz {score['details']['xz']:.3g}" if "xz" in score["details"] else "") for task, score in scores.items()]
        say(f"{model}: {'; '.join(parts)}")
    say(f"report: {run.report}")
    say(f"chat:   athanor chat {run.stage(recipe.stage[-1].name).model}")
    say(f"serve:  athanor serve {run.stage(recipe.stage[-1].name).model}   (then open http://127.0.0.1:{recipe.serve.port})")
