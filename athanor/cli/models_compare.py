"""`athanor models compare`: several models side by side, on the terminal and on one page."""

from __future__ import annotations

import json
from pathlib import Path

import click

from athanor.foundation.progress import console, say
from athanor.foundation.run_folder import registry_root


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="MODEL MODEL...")
@click.option("--scores", "file", type=click.Path(path_type=Path),
              help="A scores.json (or what `evaluate --json` printed) whose models go by the names given.")
@click.option("--task", "tasks", multiple=True, help="A task of the mean; every accuracy that all models have unless given.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("comparison.html"), show_default=True,
              help="Where to write the page.")
@click.option("--registry", type=click.Path(path_type=Path), default=None, help="The registry's folder.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def compare(names: tuple[str, ...], file: Path | None, tasks: tuple[str, ...], out: Path, registry: Path | None,
            as_json: bool) -> None:
    """Set models side by side: registered ones, model folders, run folders (all their stages), or published ones by name.

    Sizes, training in PD, scores with intervals, accuracy per PFLOP and per PD, and differences from the first model on the
    same items. Also writes one self-contained page.
    """
    from athanor.evaluate.scores import paired_difference
    from athanor.registry.contenders import find_contenders
    from athanor.registry.store import Registry
    from athanor.report import comparison

    contenders = find_contenders(list(names), Registry(registry or registry_root()), file)
    found = comparison.compare(contenders, paired_difference, tasks)
    comparison.write_comparison(found, out)
    if as_json:
        click.echo(json.dumps({**found, "page": str(out)}))
        return
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("", *(one["name"] for one in found["models"])):
        table.add_column(column, overflow="fold")
    for name, _, cells in comparison.rows(found):
        table.add_row(name, *cells)
    console.print(table)
    for row in found["differences"]:
        say(f"{row['second']} against {row['first']}, {row['task']}: {' '.join(comparison.difference_text(row, found))}")
    if found["mean_tasks"]:
        say(f"the mean takes {', '.join(found['mean_tasks'])}")
    for note in found["notes"]:
        say(note)
    say(f"page: {out}")
