"""`athanor report`: forecast and actual side by side, on the terminal and on one page."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("report")
@click.argument("run_or_recipe")
@click.argument("overrides", nargs=-1)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path),
              help="Where to write the page; report.html of the run unless given.")
@click.option("--json", "as_json", is_flag=True, help="Print the books and the error of each account as one JSON document.")
def command(run_or_recipe: str, overrides: tuple[str, ...], out: Path | None, as_json: bool) -> None:
    """Set forecast and actual of RUN_OR_RECIPE (a run folder, or the recipe it was made from) side by side.

    Prints the ledger and writes one self-contained page.
    """
    import json

    from athanor.foundation.progress import say
    from athanor.foundation.run_folder import RunFolder
    from athanor.ledger.reconcile import WHOLE_CHAIN
    from athanor.report.page import write_report
    from athanor.report.run_record import read_run
    from athanor.report.terminal import print_faults, print_ledger

    run = RunFolder(find_run(run_or_recipe, list(overrides)))
    record = read_run(run)
    path = write_report(run, out)
    if as_json:
        books = {found.name: found.to_json() for found in record.books}
        chain = books.pop(WHOLE_CHAIN, None)
        faults = {stage.name: [fault.to_json() for fault in stage.faults] for stage in record.stages}
        click.echo(json.dumps({"run": str(run.root), "report": str(path), "chain": chain, "stages": books, "faults": faults}))
        return
    for found in record.books:
        print_ledger(found)
    paid = {found.name: found.actual.device_seconds for found in record.books if found.actual}
    for stage in record.stages:
        print_faults(stage, paid.get(stage.name, 0.0))
    if not record.books:
        say("there is no book in this run folder yet")
    say(f"report: {path}")


def find_run(run_or_recipe: str, overrides: list[str]) -> Path:
    """The run folder itself, or the one that a recipe writes to. Raises UserError when there is none."""
    from athanor.foundation.errors import UserError, did_you_mean
    from athanor.foundation.recipe import load_recipe
    from athanor.foundation.run_folder import runs_root

    path = Path(run_or_recipe)
    if path.is_dir():
        if overrides:
            raise UserError(f"{path} is a run folder; overrides such as {overrides[0]} go with a recipe")
        return path
    if not path.exists():
        made = [str(folder) for folder in runs_root().iterdir() if folder.is_dir()] if runs_root().is_dir() else []
        hint = did_you_mean(str(path), made) if made else "no run is here yet"
        raise UserError(f"there is no run folder or recipe {path}; {hint}")
    root = runs_root() / load_recipe(path, overrides).name
    if not root.is_dir():
        raise UserError(f"{path} has not been run: there is no folder {root}; `athanor run {path}` makes it")
    return root
