"""Fitting the datasheet's coefficients to runs: the most likely values under their priors, in logarithms."""

from __future__ import annotations

import datetime
import functools
import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from athanor.cost.case import Array, Case
from athanor.cost.datasheet import Datasheet, Machine
from athanor.cost.memory import Footprint
from athanor.cost.own import shrunk
from athanor.cost.step import price
from athanor.foundation.errors import UserError
from athanor.foundation.toml import toml_value
from athanor.foundation.units import MOST

FILE = Path(__file__).with_name("datasheet.toml")
SPREAD = 0.1  # relative error that a row is expected to have; larger ones count less than by their squares (soft L1)
LIKE = 8.0  # rows of a source that say as much as all others of it together: they share a machine, a program, a shape
LIKE_MEMORY = 40.0  # the same for memory, where rows of a source differ in what counts
LEAST_GROUP = 7  # layouts of one model and size from which on their order counts too
STEP = 1e-4  # of a difference quotient


@dataclass(frozen=True)
class Coefficients:
    """Some coefficients side by side, in logarithms: values, priors, widths of the priors, and the most each may be."""

    names: tuple[str, ...]
    values: Array
    priors: Array
    widths: Array
    most: Array

    def mapping(self, values: Array | None = None) -> dict[str, float]:
        return dict(zip(self.names, np.exp(self.values if values is None else values).tolist(), strict=True))


@functools.cache
def tables(file: Path = FILE) -> dict[str, Any]:
    """The parsed file. Raises UserError when it is none."""
    try:
        parsed: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{file} is no file of coefficients, as `athanor plan calibrate --out` writes them: {error}") from None
    if missing := [name for name in ("time", "memory") if name not in parsed]:
        raise UserError(f"{file} has no table [{missing[0]}]; `athanor plan calibrate --out` writes such a file")
    return parsed


def coefficients(table: str, file: Path = FILE) -> Coefficients:
    """The coefficients "time" or "memory" of the file. Raises UserError for one that is missing or not a number above 0."""
    rows: dict[str, dict[str, float]] = tables(file)[table]
    for name in tables()[table]:
        row = rows.get(name) if isinstance(rows, dict) else None
        for key in ("value", "prior", "width"):
            number = row.get(key) if isinstance(row, dict) else None
            if not isinstance(number, (int, float)) or not 1 / MOST < number < MOST:
                raise UserError(f"{file}: [{table}] \"{name}\", {key} = {number!r}; it must be a number above 0, as "
                                "`athanor plan calibrate --out` writes")
    columns = ([row.get(key, default) for row in rows.values()] for key, default in (
        ("value", None), ("prior", None), ("width", None), ("most", np.inf)))
    value, prior, width, most = (np.array(column, dtype=np.float64) for column in columns)
    return Coefficients(tuple(rows), np.log(value), np.log(prior), width, np.log(most))


def mappings(file: Path | None = None) -> tuple[dict[str, float], dict[str, float]]:
    """The coefficients of time and of memory; ours unless a file is given."""
    return coefficients("time", file or FILE).mapping(), coefficients("memory", file or FILE).mapping()


def soften(errors: Array) -> Array:
    """Numbers whose squares are soft L1 losses of errors in units of their spread, so that a few bad rows do not rule a fit."""
    return np.asarray(np.sign(errors) * np.sqrt(2 * (np.sqrt(1 + errors**2) - 1)))


def source_weights(sources: Sequence[str], like: float = LIKE) -> Array:
    """A row's weight, so that a source counts like so many independent rows at most."""
    _, code, counts = np.unique(np.asarray(sources), return_inverse=True, return_counts=True)
    return np.asarray(np.sqrt(like / (like + counts[code])))


def most_likely(errors: Callable[[Array], Array], start: Coefficients, iterations: int = 40) -> Array:
    """Logarithms that minimise the squares of `errors` and of the distances from the priors (Levenberg-Marquardt)."""
    def residuals(x: Array) -> Array:
        return np.concatenate([errors(x), (x - start.priors) / start.widths])

    x, damping = start.priors.copy(), 1e-2
    found = residuals(x)
    for _ in range(iterations):
        slopes = np.stack([(residuals(x + STEP * unit) - found) / STEP for unit in np.eye(len(x))], axis=-1)
        curvature, gradient = slopes.T @ slopes, slopes.T @ found
        for _ in range(8):
            move = np.linalg.solve(curvature + damping * np.diag(np.diag(curvature) + 1e-9), -gradient)
            near = np.minimum(x + np.clip(move, -0.7, 0.7), start.most)
            after = residuals(near)
            if after @ after < found @ found:
                break
            damping *= 4
        else:
            return x
        gained = found @ found - after @ after
        x, found, damping = near, after, max(damping / 3, 1e-6)
        if gained < 1e-4 * (found @ found):
            break
    return x


def fit_time(case: Case, machine: Machine, seconds: Array, weights: Array, groups: Sequence[str],
             start: Coefficients) -> Array:
    """Logarithms of the time's coefficients, from measured steps. In groups of many layouts their order counts as well."""
    _, code, counts = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    is_large, wanted = counts[code] >= LEAST_GROUP, np.log(seconds)

    def errors(x: Array) -> Array:
        off = np.log(price(case, Datasheet(machine, start.mapping(x))).seconds) - wanted
        beside = np.where(is_large, off - (np.bincount(code, off) / counts)[code], 0.0)
        return soften(np.concatenate([off, beside]) / SPREAD) * np.tile(weights, 2)

    return most_likely(errors, start)


def fit_memory(case: Case, machine: Machine, peaks: Array, is_out: Array, weights: Array, start: Coefficients) -> Array:
    """Logarithms of the memory's coefficients: peaks in bytes where known (NaN: not), and whether a run ran out of memory."""
    known, sign = ~np.isnan(peaks), np.where(is_out, -1.0, 1.0)

    def errors(x: Array) -> Array:
        footprint = Footprint(machine, start.mapping(x))
        found = footprint.peak(case)
        missed = np.log1p(np.exp(np.clip(sign * footprint.log_odds(found), -60, 60)))
        return np.concatenate([soften(np.log(found / peaks)[known] / SPREAD) * weights[known], np.sqrt(2 * missed) * weights])

    return most_likely(errors, start)


def own_factor(predicted: Array, measured: Array) -> float:
    """Measured over predicted time of runs of one's own, shrunk; 1 without any."""
    return shrunk(np.log(measured / predicted).tolist())


def rewritten(values: dict[str, dict[str, float]], sources: str, file: Path = FILE) -> str:
    """The text of the file with other values, and with the rows that they came from."""
    out, table = [], ""
    for line in file.read_text(encoding="utf-8").splitlines():
        table = line[1:-1] if line.startswith("[") else table
        name = re.match(r'"([^"]+)" = ', line)
        if name and name[1] in values.get(table, {}):
            line = re.sub(r"value = [^,}]+?(?=,| })", f"value = {values[table][name[1]]:.4g}", line)
        line = f'date = "{datetime.date.today()}"' if line.startswith("date = ") else line
        out.append(f"fitted_to = {toml_value(sources)}" if line.startswith("fitted_to = ") else line)
    return "\n".join(out) + "\n"
