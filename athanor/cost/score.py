"""The planner against runs: what it says of each row of a table, and how far that is from what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from athanor.cost.calibrate import (
    LEAST_GROUP,
    LIKE_MEMORY,
    coefficients,
    fit_memory,
    fit_time,
    source_weights,
)
from athanor.cost.case import Array, Case
from athanor.cost.datasheet import Datasheet, Machine
from athanor.cost.memory import GIB, Footprint
from athanor.cost.runs import NoneCovered, Run, describe
from athanor.cost.step import price

CONSTANT_MFU = 0.35  # of the baseline that knows a model's FLOPs and the peak, and nothing else
MISSING_ERROR = 0.52  # of a row that is not covered: what a constant MFU errs on published runs


@dataclass(frozen=True)
class Predictions:
    """What is predicted of each row, NaN where it is not covered (then `why_not` says why)."""

    seconds: Array
    memory_bytes: Array
    out_of_memory: Array
    baseline_seconds: Array  # by a constant MFU
    why_not: Sequence[str]


def predict(runs: Sequence[Run], time: Mapping[str, float] | None = None,
            memory: Mapping[str, float] | None = None) -> Predictions:
    """Step time and peak memory of each row, by the fitted coefficients unless others are given."""
    def column(values: Array | float = math.nan) -> Array:
        out = np.full(len(runs), np.nan)
        if len(best):
            out[rows[best]] = np.broadcast_to(values, rows.shape)[best]
        return out

    rows: Any = ()
    best: Any = ()
    try:
        case, machine, rows, why_not = describe(runs)
    except NoneCovered as error:
        return Predictions(column(), column(), column(), column(), error.reasons)
    footprint = Footprint(machine, memory or coefficients("memory").mapping())
    seconds = price(case, Datasheet(machine, time or coefficients("time").mapping())).seconds
    odds = footprint.out_of_memory(case)
    best = choose(rows, seconds, odds)
    baseline = case.model_flops() / (CONSTANT_MFU * machine.product_flops * case.devices)
    return Predictions(column(seconds), column(footprint.peak(case)), column(odds), column(baseline), why_not)


def choose(rows: Array, seconds: Array, odds: Array) -> Array:
    """Of the cases that a row may have been, the index of the fastest that likely fits; one for each row."""
    order = np.lexsort((seconds, np.broadcast_to(odds, rows.shape).round(), rows))
    return np.asarray(order[np.unique(rows[order], return_index=True)[1]])


@dataclass(frozen=True)
class Fitting:
    """The rows that coefficients can be fitted to: one case each, by the coefficients that are there."""

    runs: Sequence[Run]
    case: Case
    machine: Machine

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Fitting:
        case, machine, rows, _ = describe(runs)
        odds = Footprint(machine, coefficients("memory").mapping()).out_of_memory(case)
        best = choose(rows, price(case, Datasheet(machine, coefficients("time").mapping())).seconds, odds)
        return cls([runs[int(i)] for i in rows[best]], case.take(best), machine.take(best))

    def take(self, chosen: Array) -> Fitting:
        """Those of the rows at which `chosen` is true."""
        index = np.flatnonzero(chosen)
        return Fitting([self.runs[int(i)] for i in index], self.case.take(index), self.machine.take(index))

    def sources(self) -> list[str]:
        return [run.source for run in self.runs]

    def is_timed(self) -> Array:
        return np.array([run.status == "ok" and run.step_seconds > 0 for run in self.runs], bool)

    def time(self) -> dict[str, float]:
        """Coefficients of time, fitted to the timed rows."""
        rows, start = self.take(self.is_timed()), coefficients("time")
        fitted = fit_time(rows.case, rows.machine, np.array([run.step_seconds for run in rows.runs]),
                          source_weights(rows.sources()), [run.group or run.id for run in rows.runs], start)
        return start.mapping(fitted)

    def memory(self) -> dict[str, float]:
        """Coefficients of memory, fitted to measured peaks and, in sources where some run did not fit, to what fitted."""
        limited = {run.source for run in self.runs if run.status == "oom"}
        rows = self.take(np.array([run.memory_gib > 0 or run.source in limited for run in self.runs], bool))
        start = coefficients("memory")
        if not rows.runs:
            return start.mapping()
        fitted = fit_memory(rows.case, rows.machine, np.array([run.memory_gib * GIB for run in rows.runs]),
                            np.array([run.status == "oom" for run in rows.runs], bool),
                            source_weights(rows.sources(), LIKE_MEMORY), start)
        return start.mapping(fitted)


def score(runs: Sequence[Run], found: Predictions) -> dict[str, Any]:
    """The report card: step time per source and altogether, ranking, memory, running out of memory, coverage."""
    timed = np.array([run.status == "ok" and run.step_seconds > 0 for run in runs], bool)
    measured = np.where(timed, np.array([run.step_seconds for run in runs]), np.nan)
    covered = np.array([not why for why in found.why_not], bool)
    errors = np.where(covered, found.seconds / measured - 1, MISSING_ERROR)
    sources = np.array([run.source for run in runs])
    by_source = {str(name): _errors(errors[timed & (sources == name)]) for name in np.unique(sources[timed])}
    constant = np.abs(found.baseline_seconds / measured - 1)[timed & covered]
    is_mixture = np.array([run.is_mixture for run in runs], bool)
    return {
        "rows": int(timed.sum()), "sources": by_source, "all": _errors(errors[timed]),
        "macro_error": _mean([entry["mean_error"] for entry in by_source.values()]),
        "median_error": _median(np.abs(errors[timed])), "constant_mfu_error": _mean(constant),
        "ranking": ranking(runs, np.where(covered, found.seconds, np.inf), timed),
        "memory": _memory(runs, found.memory_bytes / GIB), "out_of_memory": _out_of_memory(runs, found.out_of_memory),
        "coverage": {"dense": _mean(covered[timed & ~is_mixture]), "mixture": _mean(covered[timed & is_mixture])}}


def ranking(runs: Sequence[Run], predicted: Array, timed: Array) -> dict[str, Any]:
    """Kendall's tau and top-1 regret (how much slower the chosen layout is than the best) in groups of many layouts."""
    groups: dict[str, list[int]] = {}
    for index in map(int, np.flatnonzero(timed)):
        groups.setdefault(runs[index].group or runs[index].id, []).append(index)
    taus, regrets = [], []
    for rows in (np.array(rows) for rows in groups.values() if len(rows) >= LEAST_GROUP):
        real, said = np.array([runs[i].step_seconds for i in rows]), predicted[rows]
        fastest = said <= said.min() * 1.0001  # runs of one layout are predicted alike
        regrets.append((real[fastest].mean() if np.isfinite(said).any() else real.max()) / real.min() - 1)
        above = np.triu_indices(len(rows), 1)
        said = np.where(np.isfinite(said), said, 1e30)
        taus.append(float(np.mean(np.sign(real[above[0]] - real[above[1]]) * np.sign(said[above[0]] - said[above[1]]))))
    return {"groups": len(taus), "tau": _mean(taus), "regret": _mean(regrets), "regret_median": _median(regrets)}


def _memory(runs: Sequence[Run], predicted_gib: Array) -> dict[str, Any]:
    known = np.array([run.status == "ok" and run.memory_gib > 0 for run in runs], bool) & ~np.isnan(predicted_gib)
    return _errors(predicted_gib[known] / np.array([run.memory_gib for run in runs])[known] - 1)


def _out_of_memory(runs: Sequence[Run], odds: Array) -> dict[str, Any]:
    """Over the sources in which some run did not fit."""
    sources = {run.source for run in runs if run.status == "oom"}
    asked = np.array([run.source in sources and run.status in ("ok", "oom") for run in runs], bool) & ~np.isnan(odds)
    real, said = np.array([run.status == "oom" for run in runs], bool)[asked], odds[asked] > 0.5
    both = int((real & said).sum())
    return {"rows": len(real), "accuracy": _mean(real == said), "precision": both / max(1, int(said.sum())),
            "recall": both / max(1, int(real.sum()))}


def _errors(errors: Array) -> dict[str, Any]:
    """Of relative errors: how many, mean and median of their sizes, and their mean (above 0: too slow was said)."""
    return {"rows": len(errors), "mean_error": _mean(np.abs(errors)), "median_error": _median(np.abs(errors)),
            "bias": _mean(errors)}


def _mean(values: Any) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _median(values: Any) -> float | None:
    return float(np.median(values)) if len(values) else None


def describe_rows(runs: Sequence[Run], found: Predictions) -> list[dict[str, Any]]:
    """One entry per row, in the order of the table."""
    return [{"id": run.id, "covered": not why, "why_not": why or None, "predicted_step_seconds": _number(seconds),
             "predicted_memory_gib": _number(peak / GIB), "out_of_memory_probability": _number(odds)}
            for run, why, seconds, peak, odds in zip(runs, found.why_not, found.seconds, found.memory_bytes,
                                                     found.out_of_memory, strict=True)]


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
