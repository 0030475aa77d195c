"""`athanor plan score`: how far the planner is from measured runs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import click

from athanor.foundation.progress import console, say
from athanor.foundation.units import format_share


@click.command()
@click.argument("runs", type=click.Path(path_type=Path))
@click.option("--coefficients", "file", type=click.Path(path_type=Path), help="what `athanor plan calibrate` wrote; else ours")
@click.option("--json", "as_json", is_flag=True, help="print one JSON document to standard output")
def command(runs: Path, file: Path | None, as_json: bool) -> None:
    """Predict every row of RUNS.csv and compare with what was measured.

    Columns are those of benchmarks/data/published_runs.csv.gz; a cell may be blank. Sources are the ids up to their first dash.
    No prediction looks at measured columns, notes, ids or order.
    """
    from athanor.cost.calibrate import mappings
    from athanor.cost.runs import read_runs
    from athanor.cost.score import describe_rows, predict, score

    rows = read_runs(runs)
    found = predict(rows, *mappings(file))
    summary = score(rows, found)
    if as_json:
        click.echo(json.dumps({"rows": describe_rows(rows, found), "summary": summary}))
        return
    from rich.table import Table

    table = Table(box=None)
    for column in ("source", "rows", "mean error", "median", "bias"):
        table.add_column(column, justify="left" if column == "source" else "right")
    for name, entry in [*summary["sources"].items(), ("all", summary["all"])]:
        cells = (f"{100 * entry[key]:.1f} %" if entry[key] is not None else "" for key in ("mean_error", "median_error", "bias"))
        table.add_row(name, str(entry["rows"]), *cells)
    console.print(table)
    timed = sum(run.status == "ok" and run.step_seconds > 0 for run in rows)
    say(f"{timed} of {len(rows)} rows have status ok and a step time")
    for why, count in Counter(why for why in found.why_not if why).most_common(3):
        say(f"not priced, and counted with the error of a constant MFU: {count} rows: {why}")
    coverage, rank = summary["coverage"], summary["ranking"]
    figures = {"mean of the sources' errors": summary["macro_error"], "a constant MFU errs": summary["constant_mfu_error"],
               "slower than the best layout by": rank["regret"], "memory": summary["memory"]["mean_error"],
               "out of memory, right in": summary["out_of_memory"]["accuracy"], "covered, dense": coverage["dense"],
               "covered, mixtures": coverage["mixture"]}
    for name, value in figures.items():
        if value is not None:
            say(f"{name}: {format_share(value)}")
