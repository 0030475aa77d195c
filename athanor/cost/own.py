"""What finished runs on this machine say about its forecasts: a factor for each account, trusted more with every run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from athanor.cluster.spec import ClusterSpec
from athanor.foundation.errors import UserError
from athanor.foundation.run_folder import disk_errors
from athanor.ledger.accounts import STEPPING
from athanor.ledger.book import Book

NAME = "own_runs.jsonl"  # beside the run folders
SHRINKAGE = 2.0  # n runs are believed to n / (n + 2): one in three, nine in eleven
LEAST_SHARE = 0.02  # of a step; accounts below tell little, since something else always disturbs them
MOST = 3.0  # a larger factor is a mistake, or another machine
COMPUTING = "computing"  # useful + kernel: how long the FLOPs take, since the FLOPs themselves are known


def factors(folder: Path, cluster: ClusterSpec) -> dict[str, float]:
    """Actual / forecast device-seconds by account, from the rows of runs on an equal machine; `kernel` for all computing.

    Raises UserError naming the line that is damaged.
    """
    file, logs = folder / NAME, dict[str, list[float]]()
    if not file.exists():
        return {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            if row["machine"] == _machine(cluster):
                for name, ratio in row["ratios"].items():
                    logs.setdefault(name, []).append(math.log(ratio))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{file}, line {number}: not a row of a finished run; delete the line") from None
    return {name: shrunk(values) for name, values in logs.items()}


def shrunk(logs: Sequence[float]) -> float:
    """A factor from logarithms of measured / predicted: their mean, drawn towards none by n / (n + 2)."""
    return math.exp(sum(logs) / (len(logs) + SHRINKAGE))


def corrected(accounts: Mapping[str, float], by: Mapping[str, float]) -> dict[str, float]:
    """A step's accounts after `factors`; model FLOPs stay what they are, so the factor of computing falls on `kernel`."""
    out = {name: seconds * by.get(name, 1.0) for name, seconds in accounts.items()}
    useful = accounts.get("useful", 0.0)
    out["useful"] = useful
    out["kernel"] = (useful + accounts.get("kernel", 0.0)) * by.get(COMPUTING, 1.0) - useful
    return out


def record(folder: Path, cluster: ClusterSpec, forecast: Book, actual: Book, used: Mapping[str, float], title: str) -> None:
    """Append what a finished stage says about its forecast, which had been corrected by the factors `used`.

    Nothing is said where something else was trained than planned.
    """
    is_other = (forecast.devices, forecast.layout) != (actual.devices, actual.layout)
    if is_other or not math.isclose(forecast.model_flops * actual.tokens, actual.model_flops * forecast.tokens, rel_tol=0.1):
        return
    wanted, found = _of_a_token(forecast), _of_a_token(actual)
    whole = sum(found.values())
    ratios = {name: min(MOST, max(1 / MOST, found[name] / wanted[name] * used.get(name, 1.0))) for name in found
              if wanted.get(name, 0.0) > 0 and found[name] > LEAST_SHARE * whole}
    row: dict[str, Any] = {"machine": _machine(cluster), "run": title, "devices": actual.devices, "tokens": actual.tokens,
                           "ratios": ratios}
    with disk_errors(folder / NAME), (folder / NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _of_a_token(book: Book) -> dict[str, float]:
    """Device-seconds of a trained token by account, of kept steps alone."""
    accounts = {name: seconds for name, seconds in book.accounts.items() if name in STEPPING and name != "metering"}
    accounts[COMPUTING] = accounts.pop("useful", 0.0) + accounts.pop("kernel", 0.0)
    return {name: seconds / max(book.tokens, 1.0) for name, seconds in accounts.items()}


def _machine(cluster: ClusterSpec) -> str:
    return f"{cluster.accelerator} / {cluster.device_type} / torch {cluster.versions.get('torch', '?')}"
