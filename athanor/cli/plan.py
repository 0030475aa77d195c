"""`athanor plan`: choose shape, tokens and layout for a budget, say why, and write the forecast; or answer one question."""

from __future__ import annotations

import contextlib
import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from athanor.foundation.errors import did_you_mean, nearest
from athanor.foundation.progress import console, say
from athanor.foundation.units import format_bytes, format_count, format_rate, format_seconds, format_share

if TYPE_CHECKING:
    from athanor.foundation.recipe import Recipe
    from athanor.foundation.run_folder import RunFolder
    from athanor.planner.plan import Plan


class Questions(click.Group):
    """Each `plan_<name>.py` beside this file is a subcommand, imported on demand; what names none of them is a recipe."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        files = Path(__file__).parent.glob("plan_*.py")
        return [*self.commands, *sorted(file.stem.removeprefix("plan_") for file in files)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self.commands or cmd_name not in self.list_commands(ctx):
            return self.commands.get(cmd_name)
        found: click.Command = importlib.import_module(f"athanor.cli.plan_{cmd_name}").command
        return found

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        names = self.list_commands(ctx)
        if args and args[0] not in (*names, *self.get_help_option_names(ctx)):
            if nearest(args[0], names) and "." not in args[0] and not Path(args[0]).exists():
                ctx.fail(f"'{args[0]}' is neither a recipe nor a subcommand; {did_you_mean(args[0], names)}")
            args = ["recipe", *args]
        return super().parse_args(ctx, args)


@click.group(cls=Questions)
def command() -> None:
    """Plan a recipe (`athanor plan RECIPE`), or answer one question about a model and a cluster."""


@command.command("recipe")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--cluster", "cluster_file", type=click.Path(path_type=Path),
              help="a cluster.toml; else the recipe's, the run folder's, or this machine is measured")
@click.option("--out", type=click.Path(path_type=Path), help="where to write the plan; the run folder when left out")
@click.option("--json", "as_json", is_flag=True, help="print one JSON document to standard output")
def plan_recipe(recipe: Path, overrides: tuple[str, ...], cluster_file: Path | None, out: Path | None, as_json: bool) -> None:
    """Choose shape, tokens and layout for RECIPE's budget, say why, and write the forecast.

    The word `recipe` may be left out.
    """
    from athanor.cli.chain import alone
    from athanor.cli.preflight import plan_inputs, refuse_early, refuse_replacing_forecast
    from athanor.data.sources import scan
    from athanor.foundation.recipe import load_recipe
    from athanor.foundation.run_folder import RunFolder, runs_root, write_atomic

    loaded = load_recipe(recipe, list(overrides))
    refuse_early(loaded)
    run = RunFolder(runs_root() / loaded.name)
    file = out or run.plan
    with contextlib.nullcontext() if out else alone(run, "plan", loaded):
        plan = plan_run(loaded, run, cluster_file)  # which tells mistakes, before what the run's folder holds
        if out is None:
            refuse_replacing_forecast(run, loaded)
            write_plan(plan, run, file, {} if cluster_file else plan_inputs(loaded, run, scan(loaded)))
        else:
            write_atomic(file, plan.to_toml())
    if as_json:
        click.echo(json.dumps(describe(plan, file)))
    else:
        show(plan)
        say(f"written to {file}")


def plan_run(recipe: Recipe, run: RunFolder, cluster_file: Path | None = None, measures: bool = False) -> Plan:
    """Plan a recipe on its cluster; measures this machine into the run folder when nothing else is given. A chain that has
    measured it as a step of its own `measures`."""
    from athanor.cli.check import check
    from athanor.cli.preflight import refuse_unsettled
    from athanor.cluster.spec import read_cluster
    from athanor.cost.own import factors
    from athanor.data.sources import scan
    from athanor.foundation.run_folder import runs_root
    from athanor.planner.named import named_cluster
    from athanor.planner.plan import make_plan

    named = None if recipe.cluster.file == "auto" else Path(recipe.cluster.file)
    file = cluster_file or named or run.cluster
    sources = scan(recipe)
    if recipe.cluster.accelerator and not (cluster_file or named):
        plan = make_plan(recipe, named_cluster(recipe.cluster), sources)
    else:
        if file == run.cluster and not file.exists():
            say(f"measuring this machine into {file}")
            check(file, recipe.cluster.devices)
        cluster = read_cluster(file)
        plan = make_plan(recipe, cluster, sources, factors(runs_root(), cluster), measures)
    refuse_unsettled(recipe.with_plan(plan.values), plan.forecast.devices)
    return plan


def write_plan(plan: Plan, run: RunFolder, file: Path, inputs: dict[str, str]) -> None:
    """`plan.toml` with the hashes of what it was made from, `forecast.json` of the run and of each stage."""
    from athanor.foundation.run_folder import write_atomic
    from athanor.foundation.toml import toml_value

    made_from = "".join(f"{key} = {toml_value(value)}\n" for key, value in inputs.items())
    write_atomic(file, f"{plan.to_toml()}\n[inputs]\n{made_from}")
    plan.forecast.write(run.forecast)
    for name, book in plan.books.items():
        book.write(run.stage(name).forecast)


def describe(plan: Plan, file: Path) -> dict[str, Any]:
    """The plan as one JSON document."""
    return {"file": str(file), **plan.values, "reason": plan.reasons, "scan": plan.scan, "chain_seconds": plan.chain,
            "forecast": {name: {"step_seconds": step.seconds, "accounts": step.accounts} for name, step in plan.steps.items()},
            "wall_seconds": plan.forecast.wall_seconds, "runner_ups": plan.runner_ups, "notes": plan.notes}


def show(plan: Plan) -> None:
    """What was chosen, why, what came next, and where the time will go."""
    from rich.table import Table

    say("The plan")
    for key, sentence in plan.reasons.items():
        value = _value(plan.values, key)
        say(f"  {key}{' = ' + value if value else ''}: {sentence}")
    if plan.runner_ups:
        table = Table(title="Next best shapes", box=None, title_justify="left")
        for column in ("width", "depth", "parameters", "tokens", "tokens/s", "loss", "layout"):
            table.add_column(column, justify="right")
        for row in plan.runner_ups:
            table.add_row(str(row["hidden_size"]), str(row["num_hidden_layers"]), format_count(row["parameters"]),
                          format_count(row["tokens"]), f"{row['tokens_per_second']:,.0f}", f"{row['predicted_loss']:.3f}",
                          row["layout"])
        console.print(table)
    forecast = plan.forecast
    say(f"Forecast: {format_seconds(forecast.wall_seconds)} on {forecast.devices} devices, laid out as {forecast.layout}")
    table = Table(box=None)
    for column in ("account", *plan.books, "whole chain", "share"):
        table.add_column(column, justify="left" if column == "account" else "right")
    for name in sorted(forecast.accounts, key=forecast.accounts.__getitem__, reverse=True):
        seconds = [book.accounts.get(name, 0.0) for book in (*plan.books.values(), forecast)]
        if abs(seconds[-1]) > 1e-9 * forecast.device_seconds:
            cells = [format_seconds(value / forecast.devices) if value else "" for value in seconds]
            table.add_row(name, *cells, format_share(seconds[-1] / forecast.device_seconds))
    console.print(table)
    for name, step in plan.steps.items():
        book = plan.books[name]
        say(f"{name}: {format_seconds(step.seconds)} a step, {format_count(book.tokens)} tokens, MFU "
            f"{format_share(book.derived()['mfu'])} of {format_rate(book.peak_flops or 0.0)}, "
            f"peak memory {format_bytes(max(map(sum, zip(*book.memory_bytes.values(), strict=True))))} a rank")
    for note in plan.notes:
        say(note)


def _value(values: dict[str, Any], key: str) -> str:
    head, _, rest = key.partition(".")
    if head != "stage":
        return ""
    name, _, last = rest.rpartition(".")
    stage = next(s for s in values["stage"] if s["name"] == name)
    return str(stage.get(last, ""))
