"""`athanor jobs`: work that goes on by itself, on this machine or on Slurm: submit, list, show, logs, cancel, resume."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from athanor.cli.chain import locked
from athanor.cli.jobs_show import describe, log_of, progress
from athanor.cli.plan import plan_run
from athanor.cli.preflight import planned, refuse_early, refuse_elsewhere
from athanor.cli.train import begins_anew, borrow, describe_machine, look_ahead
from athanor.foundation.errors import UserError
from athanor.foundation.launch import start_server
from athanor.foundation.progress import console, say
from athanor.foundation.recipe import Recipe, load_recipe, read_plan
from athanor.foundation.run_folder import RunFolder, runs_root
from athanor.foundation.units import format_seconds
from athanor.jobs import local, slurm
from athanor.jobs.queue import Job, Queue


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")(function)


@click.group(help=__doc__)
def command() -> None:
    pass


@command.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--stage", help="Train this stage alone; the whole chain is walked when left out.")
@click.option("--run", type=click.Path(path_type=Path), help="The run folder of a stage; runs/<name> when left out.")
@click.option("--data", type=click.Path(path_type=Path), help="A data folder for a stage; the run's own when left out.")
@click.option("--fresh", "is_fresh", is_flag=True, help="Train anew, whatever the folder holds; what is done of a chain stays.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="Ask it to save and stop after so long.")
@click.option("--slurm", "on_slurm", is_flag=True, help="Give it to Slurm; the options below go with it.")
@click.option("--nodes", type=click.IntRange(min=1), help="Nodes that work; enough for cluster.devices when left out.")
@click.option("--ranks-per-node", type=click.IntRange(min=1), help="Ranks (devices) of each; cluster.per_node, or 1.")
@click.option("--spares", type=click.IntRange(min=0), default=0, help="Further nodes, held to take the place of lost ones.")
@click.option("--partition", help="Slurm's partition.")
@click.option("--time", "time_limit", help="The time limit of each start, as Slurm writes it; the job goes on after it.")
@click.option("--signal-seconds", type=click.IntRange(min=1), default=slurm.SIGNAL_SECONDS,
              help="How long before the time limit to finish a step and save.")
@click.option("--sbatch", "options", multiple=True, help="A further option of sbatch, such as --sbatch=--gpus-per-node=8.")
@json_option
def submit(recipe: Path, overrides: tuple[str, ...], stage: str | None, run: Path | None, data: Path | None, is_fresh: bool,
           minutes: float | None, as_json: bool, **wish: Any) -> None:
    """Start RECIPE in the background, as `athanor run` or `athanor train --stage` would.

    A run folder that has some of the work already goes on from there. What these verbs would refuse is refused at once, but for
    what shows only when data are read.
    """
    wanted = load_recipe(recipe, list(overrides))
    if stage is not None:
        wanted.get_stage(stage)
    elif run is not None:
        raise click.UsageError("--run goes with --stage; a whole chain is walked in runs/<name>")
    elif data is not None:
        raise click.UsageError("--data goes with --stage; a whole chain builds its own")
    if minutes is not None and not minutes <= local.MOST_MINUTES:  # nan is none
        raise click.UsageError(f"--minutes is {minutes:g}; at most {local.MOST_MINUTES:,} can be waited for")
    found = None
    if wish.pop("on_slurm"):
        if minutes is not None:
            raise click.UsageError("--minutes is for this machine; on Slurm, --time limits each start")
        found = slurm.settle(wanted, **wish)
        overrides = (*overrides, f"cluster.devices={found['nodes'] * found['ranks_per_node']}")
        if stage is None and found["nodes"] > 1 and wanted.cluster.file == "auto":
            raise click.UsageError("a whole chain measures one machine: give several nodes' cluster.toml as cluster.file, or one "
                                   "--stage")
    elif any(wish[name] for name in ("nodes", "ranks_per_node", "spares", "partition", "time_limit", "options")):
        raise click.UsageError("--nodes, --ranks-per-node, --spares, --partition, --time and --sbatch go with --slurm")
    queue, folder = _queue(), RunFolder(run or runs_root() / wanted.name)
    local.refuse_busy(queue, folder.root)
    _refuse(load_recipe(recipe, list(overrides)), folder, stage, data, is_fresh)
    job = local.submit(queue, name=wanted.name, recipe=recipe, overrides=list(overrides), stage=stage, run=folder.root,
                       minutes=minutes, slurm=found, is_fresh=is_fresh)
    where = "has started" if job.slurm is None else f"is Slurm's job {job.slurm['id']},"
    _tell(job, as_json, f"{job.id} {where} in {job.run}; `athanor jobs show {job.id}` says how far it is")


def _refuse(recipe: Recipe, run: RunFolder, stage: str | None, data: Path | None, is_fresh: bool) -> None:
    """Raise what the agent would refuse as it begins. Unless something is refused, `data` are the run's from now on."""
    with locked(run) if run.root.exists() else contextlib.nullcontext():  # one that is not there yet is left as it is
        if stage is None:
            from athanor.data.sources import scan

            scan(recipe)
            refuse_early(recipe)
            refuse_elsewhere(recipe)
            if not run.plan.exists() and (recipe.cluster.file != "auto" or run.cluster.exists()):  # else it is measured first
                plan_run(recipe.with_plan(read_plan(Path(recipe.plan.file)) if recipe.plan.file != "auto" else {}), run)
            return
        recipe = planned(recipe, run)
        is_new = data is not None and borrow(data, run)
        try:
            look_ahead(recipe, run, stage, describe_machine(recipe, run, stage), is_fresh)
        except UserError:
            if is_new:
                run.data.unlink()
                with contextlib.suppress(OSError):  # there is more in it
                    run.root.rmdir()
            raise


def _refuse_again(job: Job) -> None:
    """Raise what the agent of a job would refuse as it begins once more."""
    run = RunFolder(Path(job.run))
    is_fresh = job.is_fresh and begins_anew(run.stage(job.stage or ""), job.submitted)
    with contextlib.chdir(job.folder):
        _refuse(load_recipe(Path(job.recipe), job.overrides), run, job.stage, None, is_fresh)


@command.command("list")
@json_option
def list_jobs(as_json: bool) -> None:
    """All jobs, newest first."""
    found = local.jobs(_queue())
    rows = [describe(job, job.starts()) for job in found]
    if as_json:
        click.echo(json.dumps({"jobs": rows}))
        return
    from rich.table import Table

    table = Table("job", "state", "stage", "took", "", box=None, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(row["id"], row["state"], row["stage"] or "all", format_seconds(row["took_seconds"]), row["sentence"])
    console.print(table) if found else say(f"nothing was submitted to {runs_root()} yet")


@command.command()
@click.argument("job")
@json_option
def show(job: str, as_json: bool) -> None:
    """One JOB: its state, how far it is, how long it ran, and what went wrong on the way."""
    found = local.find(_queue(), job)
    known = progress(found)
    attempts = found.starts() if found.slurm is None else slurm.attempts(found)
    described = describe(found, attempts)
    if as_json:
        click.echo(json.dumps({**described, **{key: known[key] for key in known if key != "stage"}, "at_stage": known["stage"],
                               "attempts": attempts}))
        return
    where = f"at step {known['step']} of stage {known['stage']}" if known["stage"] else "before its first stage"
    on = f" on {known['ranks']} rank{'s' if known['ranks'] > 1 else ''}" if known["ranks"] else ""
    say(f"{found.id} is {found.state}, {where}{on}, in {found.run}" + (f": {found.sentence}" if found.sentence else ""))
    for sentence in known["told"]:
        say(f"  {sentence}")
    if attempts:
        paid = sum(attempt.get("device_seconds", 0.0) for attempt in attempts)
        say(f"  it took {format_seconds(described['took_seconds'])} in {len(attempts)} start{'s' if len(attempts) > 1 else ''}"
            + (f", {format_seconds(paid)} of devices" if paid else ""))


@command.command()
@click.argument("job")
@click.option("--rank", type=click.IntRange(min=0), help="What this rank wrote; the agent's words when left out.")
@json_option
def logs(job: str, rank: int | None, as_json: bool) -> None:
    """What the agent of JOB said, or one of its ranks."""
    found = local.find(_queue(), job)
    file = log_of(found, rank)
    text = file.read_text(encoding="utf-8", errors="replace")
    click.echo(json.dumps({"job": found.id, "file": str(file), "lines": text.splitlines()}) if as_json else text, nl=as_json)
    if not text:
        say(f"{file} is empty")


@command.command()
@click.argument("job")
@json_option
def cancel(job: str, as_json: bool) -> None:
    """Ask JOB to finish its step, save and end; it can go on later."""
    found = local.cancel(_queue(), job)
    _tell(found, as_json, f"{found.id} was asked to stop; it finishes its step and saves")


@command.command()
@click.argument("job")
@json_option
def resume(job: str, as_json: bool) -> None:
    """Go on with a JOB that was stopped, cancelled, held or lost, from its newest checkpoint."""
    found = local.resume(_queue(), job, _refuse_again)
    _tell(found, as_json, f"{found.id} goes on in {found.run}")


@command.command(hidden=True)
@click.argument("job")
@click.option("--lock", type=int, help="The descriptor that holds the lock on the job's log; none on Slurm.")
@json_option
def agent(job: str, lock: int | None, as_json: bool) -> None:
    """Do the work of JOB in this process (what the other verbs start)."""
    if lock is None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # until there is something to stop
    else:
        os.set_inheritable(lock, False)  # ranks must not keep the lock of an agent that was killed
    queue = _queue()
    found = queue.get(job)
    if found.slurm is not None:
        start_server("athanor.train.loop")  # while the nodes find each other
    arguments = [found.recipe, *found.overrides, *(["--fresh-before", str(found.submitted)] if found.is_fresh else [])]
    if found.stage is not None:
        arguments += ["--stage", found.stage, "--run", found.run]
    verb: click.Command = importlib.import_module(f"athanor.cli.{'train' if found.stage else 'run'}").command

    def work() -> int:
        return local.work(queue, found, lambda: verb.main(arguments, standalone_mode=False))

    code = work() if found.slurm is None else slurm.serve(queue, found, work)
    if as_json:
        _tell(queue.get(job), as_json)
    sys.exit(code)


def _queue() -> Queue:
    return Queue(runs_root())


def _tell(job: Job, as_json: bool, sentence: str = "") -> None:
    if as_json:
        click.echo(json.dumps(describe(job, job.starts())))
    if sentence:
        say(sentence)
