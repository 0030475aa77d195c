"""The planner's report card on published runs: errors on models and sources that it was not fitted to, beside its peers'.

    python benchmarks/planner.py [--folds 5] [--json] [--quick]

Whole models (each with all its rows), then whole sources, are left out of the fit and predicted; never random rows, since rows
of one table resemble each other. Peers: SimuMax 1.2 with the right network, as recorded in data/peer_predictions.csv.gz;
calculon and llm-analysis as they were measured once on these rows (calculon was tuned on KOR; the row sets differ slightly).
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from athanor.cost.calibrate import coefficients
from athanor.cost.runs import Run, read_runs
from athanor.cost.score import Fitting, Predictions, predict, score

DATA = Path(__file__).parent / "data"
RUNS = DATA / "published_runs.csv.gz"
SPLITS = ("fitted", "models_left_out", "sources_left_out")
CALCULON = {"KOR": 0.038, "SC21": 0.103, "HAG": 0.221, "BLM": 0.274, "DGX": 0.358}
LLM_ANALYSIS = {"KOR": 0.105, "SC21": 0.73, "HAG": 0.209, "BLM": 0.247, "DGX": 0.61, "MOS": 0.126}


def left_out(fitting: Fitting, runs: list[Run], whole: Predictions, key: Callable[[Run], str], folds: int) -> Predictions:
    """Predictions of every covered row by coefficients fitted without the rows that share its fold; keys are never split."""
    names = sorted({key(run) for run in fitting.runs})
    fold = {name: number % folds for number, name in enumerate(names)}
    out = replace(whole, seconds=whole.seconds.copy(), memory_bytes=whole.memory_bytes.copy(),
                  out_of_memory=whole.out_of_memory.copy())
    at = {run.id: index for index, run in enumerate(runs)}
    for number in range(folds):
        held = np.array([fold[key(run)] == number for run in fitting.runs])
        rest, own = fitting.take(~held), fitting.take(held)
        if not own.runs or not rest.is_timed().any():
            continue
        found = predict(own.runs, rest.time(), rest.memory())
        index = [at[run.id] for run in own.runs]
        out.seconds[index], out.memory_bytes[index], out.out_of_memory[index] = (
            found.seconds, found.memory_bytes, found.out_of_memory)
    return out


def simumax(runs: list[Run], own: Predictions) -> dict[str, dict[str, float]]:
    """Its mean error per source, on the rows that it can express; and ours on the same rows."""
    with gzip.open(DATA / "peer_predictions.csv.gz", "rt", encoding="utf-8", newline="") as file:
        said = {row["id"]: float(row["step_s_nvlink_edit"]) for row in csv.DictReader(file) if row["step_s_nvlink_edit"]}
    errors: dict[str, list[tuple[float, float]]] = {}
    for run, ours in zip(runs, own.seconds, strict=True):
        if run.id in said and run.status == "ok" and run.step_seconds > 0:
            both = abs(said[run.id] / run.step_seconds - 1), abs(ours / run.step_seconds - 1)
            errors.setdefault(run.source, []).append(both)
    return {title: {name: float(np.mean(values, axis=0)[column]) for name, values in errors.items()}
            for column, title in enumerate(("SimuMax", "ours, its rows"))}


def report(runs: list[Run], folds: int) -> dict[str, Any]:
    """The whole card: fitted to everything, models left out, sources left out, and peers."""
    fitting = Fitting.of(runs)
    whole = predict(runs, coefficients("time").mapping(), coefficients("memory").mapping())
    models = left_out(fitting, runs, whole, lambda run: f"{run.source} {run.words['model']}", folds)
    sources = left_out(fitting, runs, whole, lambda run: run.source, len({run.source for run in fitting.runs}))
    return {"fitted": score(runs, whole), "models_left_out": score(runs, models), "sources_left_out": score(runs, sources),
            "peers": {**simumax(runs, models), "calculon": CALCULON, "llm-analysis": LLM_ANALYSIS}}


def show(card: dict[str, Any]) -> None:
    """The card as text."""
    def cell(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.1f}"

    print(f"{'step time, mean error in %':28}{'rows':>6}{'fitted':>8}{'models':>8}{'sources':>8}"
          f"{'SimuMax':>9}{'ours, its':>10}{'calculon':>9}{'llm-an.':>9}\n{'':42}{'left out':>8}{'left out':>9}{'rows':>18}")
    for name, entry in card["models_left_out"]["sources"].items():
        own = "".join(f"{cell(card[split]['sources'][name]['mean_error']):>8}" for split in SPLITS)
        peers = "".join(f"{cell(errors.get(name)):>{9 + title.startswith('ours')}}" for title, errors in card["peers"].items())
        print(f"{name:28}{entry['rows']:6}{own}{peers}")
    for title, key in {"mean of the sources": "macro_error", "median of all rows": "median_error"}.items():
        print(f"{title:34}" + "".join(f"{cell(card[split][key]):>8}" for split in SPLITS))
    left = card["models_left_out"]
    rank, lost = left["ranking"], left["out_of_memory"]
    print(f"\na constant MFU errs {cell(left['constant_mfu_error'])} %")
    print(f"models left out: {rank['groups']} groups of 7 or more layouts, tau {rank['tau']:.2f}, the chosen one is "
          f"{cell(rank['regret'])} % slower than the best on average, {cell(rank['regret_median'])} % in the median")
    print(f"out of memory, {lost['rows']} rows: right in {cell(lost['accuracy'])} %, precision {cell(lost['precision'])} %, "
          f"recall {cell(lost['recall'])} %; memory off by {cell(left['memory']['mean_error'])} % on {left['memory']['rows']} "
          "rows")
    print(f"covered: {cell(left['coverage']['dense'])} % of dense rows, {cell(left['coverage']['mixture'])} % of mixtures")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="every tenth row")
    options = parser.parse_args()
    runs = read_runs(RUNS)[:: 10 if options.quick else 1]
    start = time.perf_counter()
    card = report(runs, 2 if options.quick else options.folds)
    if options.json:
        print(json.dumps(card))
    else:
        show(card)
        print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
