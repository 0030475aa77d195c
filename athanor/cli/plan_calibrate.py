"""`athanor plan calibrate`: fit the planner's coefficients to measured runs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import click
import numpy as np

from athanor.foundation.progress import say
from athanor.foundation.units import format_share


@click.command()
@click.argument("runs", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="where to write the coefficients")
@click.option("--own", is_flag=True, help="RUNS are a few of your own: keep the coefficients, learn one factor of time from them")
@click.option("--json", "as_json", is_flag=True, help="print one JSON document to standard output")
def command(runs: Path, out: Path, own: bool, as_json: bool) -> None:
    """Fit the coefficients of time and memory to RUNS.csv, under their priors, and write them to a file.

    `athanor plan estimate`, `score`, `search` and `design` take the file with --coefficients.
    """
    from athanor.cost.calibrate import mappings, own_factor, rewritten
    from athanor.cost.runs import read_runs
    from athanor.cost.score import Fitting, predict
    from athanor.foundation.errors import UserError
    from athanor.foundation.run_folder import write_atomic

    rows = read_runs(runs)
    fitting = Fitting.of(rows)
    timed = fitting.take(fitting.is_timed())
    if not timed.runs:
        raise UserError(f"{runs}: no row has a step time and can be priced, so there is nothing to learn from")
    measured = np.array([run.step_seconds for run in timed.runs])
    if own:
        values = {"time": {"own": own_factor(predict(timed.runs).seconds, measured)}}
    else:
        values = {"time": fitting.time(), "memory": fitting.memory()}
    counts = Counter(timed.sources())
    said = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    write_atomic(out, rewritten(values, f"{len(timed.runs)} timed rows of {runs.name}: {said}"))
    error = float(np.abs(predict(timed.runs, time=mappings()[0] | values["time"]).seconds / measured - 1).mean())
    if as_json:
        click.echo(json.dumps({"file": str(out), "rows": len(timed.runs), "sources": dict(counts), "mean_error": error,
                               **values}))
    else:
        say(f"{len(timed.runs)} timed rows of {len(counts)} sources; mean error on them {format_share(error)}; written to {out}")

