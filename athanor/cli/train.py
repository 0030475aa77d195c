"""`athanor train`: train one stage of a recipe."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from athanor.cli.board import Board
from athanor.cli.chain import locked, note_training
from athanor.cli.fewer import fewer_ranks
from athanor.cli.live import View, format_loss
from athanor.cli.nearest import with_nearest
from athanor.cli.preflight import planned
from athanor.foundation.errors import LayoutError, UserError
from athanor.foundation.identity import check_same
from athanor.foundation.progress import say
from athanor.foundation.recipe import Recipe, load_recipe, read_plan
from athanor.foundation.run_folder import RunFolder, StageFolder, read_jsonl, runs_root
from athanor.foundation.units import format_count
from athanor.jobs.agent import Agent, Stopped
from athanor.jobs.local import GO_ON
from athanor.jobs.nodes import current

if TYPE_CHECKING:
    from athanor.train.stage import Job


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--stage", help="the stage to train; may be left out where there is one alone")
@click.option("--run", "run_folder", type=click.Path(path_type=Path), help="the run folder; runs/<name> when left out")
@click.option("--data", type=click.Path(path_type=Path), help="a data folder to train on; the run's own when left out")
@click.option("--fresh", "is_fresh", is_flag=True, help="begin anew, even where the folder holds another configuration's work")
@click.option("--fresh-before", "before", type=float, default=0.0, hidden=True, help="--fresh, for what was begun earlier alone")
@click.option("--json", "as_json", is_flag=True, help="print one JSON document to standard output")
def command(recipe: Path, overrides: tuple[str, ...], stage: str | None, run_folder: Path | None, data: Path | None,
            is_fresh: bool, before: float, as_json: bool) -> None:
    """Train one stage of RECIPE, from its newest checkpoint when there is one.

    KEY=VALUE overrides what recipe and plan say, such as stage.pretrain.steps=100. Under torchrun, srun or mpirun this
    process is one rank; otherwise the ranks are started here.
    """
    wanted = load_recipe(recipe, list(overrides))
    stage = choose_stage(wanted, stage)
    run = RunFolder(run_folder or runs_root() / wanted.name)
    is_first = os.environ.get("RANK", "0") == "0"  # of ranks that another launcher made, one holds the run for all
    if run.plan.exists() or wanted.plan.file != "auto":
        wanted = planned(wanted, run)
    elif wanted.budget.given and is_first:
        say(f"{run.root} has no plan: the budget does not count, and what the recipe leaves open is that of a small run; "
            f"`athanor run` would plan it otherwise, so `{shlex.join(['athanor', 'plan', str(recipe), *overrides])}` comes first")
    with locked(run) if is_first else contextlib.nullcontext():
        if data is not None and is_first:
            borrow(data, run)
        if run.chain.exists() and is_first:
            note_training(run)
        result = train(wanted, run, stage, is_fresh=begins_anew(run.stage(stage), math.inf if is_fresh else before))
    if as_json and result["rank"] == 0:
        click.echo(json.dumps(result))
    elif result["rank"] == 0:
        loss = format_loss(result["loss"][-1]) if result["loss"] else "not recorded"
        say(f"{stage}: {result['steps']} steps, loss {loss}, {format_count(result['tokens_per_second'])} "
            f"tokens/s; the model is in {run.stage(stage).model}")


def choose_stage(recipe: Recipe, name: str | None) -> str:
    """The stage of that name, or the only one. Raises UserError with the names there are."""
    if name is None and len(recipe.stage) > 1:
        raise UserError(f"which stage? Give --stage with one of {', '.join(stage.name for stage in recipe.stage)}")
    return recipe.get_stage(recipe.stage[0].name if name is None else name).name


def begins_anew(folder: StageFolder, before: float) -> bool:
    """Whether what a stage's folder holds is to go, since it was begun before that time (seconds since 1970)."""
    return before > max((row["time"] for row in read_jsonl(folder.events) if row["kind"] == "start"), default=0.0)


def borrow(data: Path, run: RunFolder) -> bool:
    """Let a run train on a data folder that lies elsewhere; whether it did not before.

    Raises UserError when it is none, or the run has data of its own.
    """
    if not (data / "manifest.json").is_file():
        raise UserError(f"--data {data} is not a data folder: it has no manifest.json; `athanor data build` makes one")
    if run.data.exists() and not run.data.samefile(data):
        raise UserError(f"{run.data} exists already, so --data {data} would not be used; give the run another name with --run")
    if is_new := not run.data.exists():
        run.root.mkdir(parents=True, exist_ok=True)
        run.data.symlink_to(data.resolve(strict=False), target_is_directory=True)
    return is_new


def look_ahead(recipe: Recipe, run: RunFolder, stage: str, machine: dict[str, Any], is_fresh: bool) -> Job:
    """A stage as its ranks will find it. Raises what they would refuse, but for damaged data."""
    from athanor.train.stage import resolve

    try:
        job = resolve(run, recipe, stage, machine["world_size"])
    except LayoutError as error:
        raise with_nearest(error, recipe, run, stage, machine["world_size"]) from None
    if not is_fresh:
        now = job.identity
        check_same(job.folder, {**now, "threads": machine["threads"]} if "threads" in now else now)  # of a rank, not of ours
    return job


def train(recipe: Recipe, run: RunFolder, stage: str, *, is_fresh: bool = False) -> dict[str, Any]:
    """Train a stage on this machine's ranks, or as the rank that another launcher made this process.

    Ranks that fail are started again. Returns what the rank function `train_stage` returns, and "rank": whose words these are.
    Raises Stopped when asked to stop (SIGTERM, Ctrl-C) before the last step, Held when trying again cannot help.
    """
    from athanor.foundation.launch import launched_from_outside, start_server

    machine = describe_machine(recipe, run, stage)
    arguments: dict[str, Any] = {"run_folder": str(run.root), "recipe": recipe, "stage": stage, "launched": time.perf_counter(),
                                 "is_fresh": is_fresh, **machine["arguments"]}
    board = None if recipe.metrics.tensorboard is None else Board(Path(recipe.metrics.tensorboard) / recipe.name / stage)
    with View(stage) as view, board or contextlib.nullcontext():

        def show(message: dict[str, Any]) -> None:
            view.show(message)
            if board is not None:
                board.add(message)

        if launched_from_outside():
            from athanor.train.loop import train_stage

            result = {**train_stage(lambda **message: show(message), **arguments), "rank": int(os.environ["RANK"])}
            return learned(result, recipe, run, stage)
        start_server("athanor.train.loop")
        job = look_ahead(recipe, run, stage, machine, is_fresh)  # what cannot be trained starts no rank
        if job.rows.left_out:
            say(f"{stage} leaves conversations out: {job.rows.left_out}")
        agent = Agent(run.stage(stage), machine["world_size"], machine["threads"], on_message=show, fewer=fewer_ranks(job))
        if (nodes := current()) is not None:
            agent.devices = nodes
        elif machine["world_size"] > machine["devices"]:
            say(f"{machine['world_size']} ranks share {machine['devices']} device(s) here, so a step takes longer than on "
                "as many devices")
        return learned({**agent.run("athanor.train.loop:train_stage", arguments), "rank": 0}, recipe, run, stage)


def learned(result: dict[str, Any], recipe: Recipe, run: RunFolder, stage: str) -> dict[str, Any]:
    """The result of training; what it says about its forecast is kept for the next ones on this machine. Raises Stopped."""
    from athanor.cluster.spec import read_cluster
    from athanor.cost.own import record
    from athanor.ledger.book import read_book

    if result["is_asked_to_stop"]:
        raise Stopped(f"stopped after step {result['step']} of {result['steps']} of {stage}, as asked; {GO_ON}")
    file = run.cluster if recipe.cluster.file == "auto" else Path(recipe.cluster.file)
    folder = run.stage(stage)
    if result["rank"] == 0 and file.exists() and folder.forecast.exists():
        used = read_plan(run.plan).get("own_runs", {}) if run.plan.exists() else {}
        record(runs_root(), read_cluster(file), read_book(folder.forecast), read_book(folder.actual), used,
               f"{recipe.name}/{stage}")
    return result


def describe_machine(recipe: Recipe, run: RunFolder, stage: str) -> dict[str, Any]:
    """World size, devices, threads per rank, and what a rank must know of its device: from cluster.toml where there is one."""
    from athanor.cluster.spec import read_cluster
    from athanor.train.settings import world_size_of

    file = run.cluster if recipe.cluster.file == "auto" else Path(recipe.cluster.file)
    if file.exists():
        spec = read_cluster(file)
        peak_flops = spec.peak_flops.get(recipe.get_stage(stage).precision or "fp32")
        devices: int = recipe.cluster.devices or spec.devices
        threads: int | None = spec.threads_per_device
        arguments = {"device_type": spec.device_type, "accelerator": spec.accelerator, "peak_flops": peak_flops}
    else:
        import torch

        device_type = "cuda" if torch.cuda.is_available() else "cpu"
        is_exact = recipe.get_stage(stage).reduction == "exact"
        threads = 1 if is_exact else None  # or fewer ranks would have more of them, and other bits
        found = torch.cuda.device_count() if device_type == "cuda" else len(os.sched_getaffinity(0))
        devices, arguments = recipe.cluster.devices or found, {"device_type": device_type, "accelerator": device_type}
    try:
        return {"world_size": world_size_of(recipe, devices), "devices": devices, "threads": threads, "arguments": arguments}
    except LayoutError as error:
        raise with_nearest(error, recipe, run, stage, devices) from None
