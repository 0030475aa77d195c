"""A law of loss fitted to one's own runs: robust, from many starts, with intervals by bootstrap."""

from __future__ import annotations

import csv
import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from athanor.foundation.errors import UserError
from athanor.foundation.units import MOST
from athanor.laws.scaling import NUMBERS, Law, effective_tokens

DELTA = 1e-3  # of the Huber loss in log loss, as Hoffmann et al. 2022 chose
LEAST_RUNS = 6  # one more than there are constants
COLUMNS = ("params", "tokens", "loss", "unique_tokens")
STARTS = tuple(itertools.product((-1.0, 0.0, 1.0), (-2.0, -1.0, 0.0), (-2.0, -1.0, 0.0), (0.2, 0.5, 1.0), (0.2, 0.5, 1.0)))
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Fit:
    """A law, its constants' intervals of 10 to 90 % (5 x 2), and the fit's typical and largest relative errors of loss."""

    law: Law
    intervals: dict[str, tuple[float, float]]
    runs: int
    median_error: float
    largest_error: float

    def to_toml(self) -> str:
        """The file that `read_laws` reads."""
        lines = [f"[law.{self.law.name}]", f'title = "{self.law.title}"', f'source = "{self.law.source}"']
        lines += [f"{name} = {getattr(self.law, name):.6g}" for name in NUMBERS]
        lines += ["", f"[law.{self.law.name}.interval]  # from the 10th to the 90th percentile of resampled fits"]
        return "\n".join(lines + [f"{name} = [{low:.4g}, {high:.4g}]" for name, (low, high) in self.intervals.items()]) + "\n"


def read_runs(path: Path) -> dict[str, Array]:
    """Columns params, tokens, loss and, where given, unique_tokens of a CSV of finished runs.

    Raises UserError naming row and column of what is missing, not a number, or not above 0.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            names, rows = list(reader.fieldnames or []), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV: {error}") from None
    for name in COLUMNS[:3]:
        if name not in names:
            raise UserError(f"{path} has no column '{name}'; it has {', '.join(names) or 'none'}, and must have "
                            + ", ".join(COLUMNS[:3]))
        if names.count(name) > 1:
            raise UserError(f"{path} has {names.count(name)} columns '{name}'; one is expected")
    out: dict[str, Array] = {}
    for name in (column for column in COLUMNS if column in names):
        values = []
        for number, row in enumerate(rows, 2):
            try:
                value = float(row[name] or (row["tokens"] if name == "unique_tokens" else ""))
            except (TypeError, ValueError):
                value = math.nan
            if not 1 / MOST < value < MOST:
                raise UserError(f"{path}, line {number}, column {name}: {row[name]!r} is not a number above 0 and below {MOST:g}")
            if None in row:
                raise UserError(f"{path}, line {number} has more values than there are columns")
            values.append(value)
        out[name] = np.array(values)
    return out


def fit_law(runs: dict[str, Array], name: str = "own", seed: int = 0, resamples: int = 200) -> Fit:
    """Fit E + A / N^alpha + B / D^beta to `runs` (arrays params, tokens, loss, and unique_tokens where given).

    The Huber loss of log loss is minimised from a grid of starts, as Hoffmann et al. 2022 do; intervals are those of fits to
    `resamples` draws of the runs with replacement. Raises UserError for runs that cannot tell the constants apart.
    """
    sizes, tokens = runs["params"], runs["tokens"]
    if "unique_tokens" in runs:
        tokens = np.array([effective_tokens(*pair) for pair in zip(tokens, runs["unique_tokens"], strict=True)])
    if len(sizes) < LEAST_RUNS:
        raise UserError(f"{len(sizes)} runs cannot tell the five constants of a law; at least {LEAST_RUNS} are needed")
    for what, values in (("params", sizes), ("tokens", tokens)):
        if len(set(values)) < 3:
            raise UserError(f"the runs have {len(set(values))} different {what}; an exponent needs at least 3")
    logs = np.stack([np.log(sizes), np.log(tokens)])
    centre = logs.mean(axis=1)
    x, y = logs - centre[:, None], np.log(runs["loss"])
    # around the mean of the logs, where the sizes of the terms and the exponents hardly depend on each other
    starts = np.array(STARTS) + np.array([*[y.mean() - 1.0] * 3, 0.0, 0.0])
    every = np.ones((1, len(y)))
    rough, value = _minimise(starts, x, y, every, 40)
    best, value = _minimise(rough[np.argsort(value)[:8]], x, y, every, 200)
    found = best[np.argmin(value)]
    drawn = np.random.default_rng(seed).multinomial(len(y), np.full(len(y), 1 / len(y)), size=resamples).astype(np.float64)
    again, _ = _minimise(np.repeat(found[None], resamples, axis=0), x, y, drawn, 100)
    low, high = np.percentile(_constants(again, centre), (10, 90), axis=0)
    errors = np.abs(np.expm1(_residuals(found[None], x, y)[0][0]))
    law = Law(name, **dict(zip(NUMBERS, map(float, _constants(found[None], centre)[0]), strict=True)), title=name,
              source=f"fit of {len(y)} runs", confidence="own")
    return Fit(law, {key: (float(a), float(b)) for key, a, b in zip(NUMBERS, low, high, strict=True)}, len(y),
               float(np.median(errors)), float(errors.max()))


def _constants(theta: Array, centre: Array) -> Array:
    """Rows of (E, A, alpha, B, beta) from rows of (log E, log A', log B', alpha, beta)."""
    e, a, b, alpha, beta = theta.T
    return np.stack([np.exp(e), np.exp(a + alpha * centre[0]), alpha, np.exp(b + beta * centre[1]), beta], axis=1)


def _residuals(theta: Array, x: Array, y: Array) -> tuple[Array, Array]:
    """Log of predicted over measured loss [S, n], and its derivatives [S, n, 5]."""
    e, a, b, alpha, beta = (column[:, None] for column in theta.T)
    terms = np.stack(np.broadcast_arrays(e, a - alpha * x[0], b - beta * x[1]), axis=-1)
    top = terms.max(axis=-1, keepdims=True)
    shares = np.exp(terms - top)
    total = shares.sum(axis=-1, keepdims=True)
    shares /= total
    slopes = np.concatenate([shares, -shares[..., 1:] * x.T], axis=-1)
    return (top + np.log(total))[..., 0] - y, slopes


def _minimise(theta: Array, x: Array, y: Array, counts: Array, steps: int) -> tuple[Array, Array]:
    """Levenberg-Marquardt on the Huber loss, weighted by how often each run was drawn, for all rows of `theta` at once."""

    def value(residuals: Array) -> Array:
        size = np.abs(residuals)
        each = np.where(size < DELTA, size**2 / 2, DELTA * (size - DELTA / 2))
        return np.asarray((counts * each).sum(axis=1), dtype=np.float64)

    theta, damping = theta.copy(), np.full(len(theta), 1e-2)
    residuals, slopes = _residuals(theta, x, y)
    least = value(residuals)
    for _ in range(steps):
        weights = counts * np.minimum(1.0, DELTA / np.maximum(np.abs(residuals), 1e-300))
        gradient = np.einsum("sni,sn->si", slopes, weights * residuals)
        curvature = np.einsum("sni,snj->sij", slopes * weights[..., None], slopes)
        diagonal = np.einsum("sii->si", curvature)
        ridge = damping[:, None] * diagonal + 1e-11 * diagonal.max(axis=1, keepdims=True)  # a term may have no say at all
        curvature += ridge[..., None] * np.eye(5)
        tried = theta - np.clip(np.linalg.solve(curvature, gradient[..., None])[..., 0], -1.0, 1.0)
        tried[:, 3:] = np.clip(tried[:, 3:], 1e-3, 3.0)
        tried[:, :3] = np.maximum(tried[:, :3], -30.0)
        new_residuals, new_slopes = _residuals(tried, x, y)
        new_value = value(new_residuals)
        better = new_value < least
        theta[better], residuals[better], slopes[better] = tried[better], new_residuals[better], new_slopes[better]
        least = np.where(better, new_value, least)
        damping = np.clip(np.where(better, damping / 4, damping * 4), 1e-12, 1e12)
        if damping.min() >= 1e10:  # nothing is found anywhere any more
            break
    return theta, least
