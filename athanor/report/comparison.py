"""Several models side by side: what they are, what they took, how good they are, and how much of that for a FLOP.

Losses are not shown: those of different tokenizers are of different things. Bits per byte are the same thing for all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from athanor.foundation.errors import UserError, did_you_mean
from athanor.foundation.run_folder import write_atomic
from athanor.foundation.units import PD_FLOP, format_count, format_flops, format_rate
from athanor.ledger.accounts import ACCOUNTS
from athanor.registry.contenders import Contender
from athanor.report.plots import interval_bar
from athanor.report.run_record import Row, check_scores
from athanor.report.sections import score_text, scores

PFLOP = 1e15
BITS = "bits_per_byte"
ACCURACIES = ("share", "acc", "acc_norm", "exact_match", "pass@1")  # units, before a comma, of scores that a mean may take
DEFINITIONS = {
    "parameters": "all of them; a tied head counts once",
    "active": "parameters that take part in one token: of the experts, those it is sent to",
    "forward_2n": "FLOPs of one token forward, as 2 for each active parameter",
    "forward_shape": "FLOPs of one token forward, from the shape: every matrix it meets, and causal attention in documents "
                     "of the longest context that all of these models have; the embedding multiplies nothing",
    "tokens": "tokens that it and all it started from were trained on; at least so many where nobody knows of one of them",
    "pd_6nd": "6 x active parameters x tokens, in PD (8.64e19 FLOP)",
    "pd_ledger": "model FLOPs that the books of these trainings hold, in PD; at least so many where one has no book",
    "interval": "95 % confidence interval of a score",
    "mean": "mean of the accuracies of the tasks named, in points (percent), each task counting the same; its interval takes "
            "tasks as independent",
    "per_pflop": "points of the mean accuracy / FLOPs of one token forward, per PFLOP (1e15 FLOP)",
    "per_pd": "points of the mean accuracy / PD of training, as the ledger has it, else as 6ND",
    "difference": "the second score minus the first; its 95 % interval is a paired bootstrap: the same items are drawn again for "
                  "both, 2,000 times",
}

Difference = Callable[[Row, Row], tuple[float, float, float] | None]


def compare(contenders: Sequence[Contender], difference: Difference, tasks: Sequence[str] = ()) -> dict[str, Any]:
    """The figures of a comparison: `models`, `differences` from the first of them, the tasks of the mean, and notes.

    The mean takes `tasks`, or every accuracy that all models have on the same items. `difference` of two scores gives it with
    its interval, or None. Raises UserError for a task that the mean cannot take.
    """
    held = check_scores({one.name: one.scores for one in contenders}, "comparison")
    everything = list(dict.fromkeys(task for scores_of in held.values() for task in scores_of))
    unfit = {task: why for task in everything if (why := _unfit(task, held))}
    for task in tasks:
        if task not in everything:
            raise UserError(f"no model has a score of '{task}'; {did_you_mean(task, everything)}")
        if task in unfit:
            raise UserError(f"the mean cannot take '{task}': {unfit[task]}")
    meant = list(tasks) or [task for task in everything if task not in unfit]
    notes = [f"{task} is not in the mean: {unfit.get(task, 'it was not asked for')}" for task in everything
             if task not in meant and task != BITS]
    if any(BITS in scores_of for scores_of in held.values()) and (odd := _other_items(BITS, held)):
        notes.append(f"bits per byte: {odd}")
    differences = [{"task": task, "first": contenders[0].name, "second": other.name,
                    **dict(zip(("difference", "low", "high"), found, strict=True))}
                   for task in everything for other in contenders[1:]
                   if task in held[contenders[0].name] and task in held[other.name]
                   and (found := difference(held[contenders[0].name][task], held[other.name][task])) is not None]
    length = min(one.shape.max_position_embeddings for one in contenders)
    return {"models": [_figures(one, held[one.name], meant, length) for one in contenders], "context_tokens": length,
            "mean_tasks": meant, "tasks": everything, "differences": differences, "notes": notes}


def _unfit(task: str, held: dict[str, dict[str, Row]]) -> str:
    """Why the mean cannot take a task; empty when it can."""
    lacking = [name for name, scores_of in held.items() if task not in scores_of]
    if lacking:
        return f"{', '.join(lacking)} has no score of it"
    units = {str(scores_of[task].get("unit", "")).partition(",")[0] for scores_of in held.values()}
    return f"it is no accuracy ({', '.join(sorted(units))})" if units - set(ACCURACIES) else _other_items(task, held)


def _other_items(task: str, held: dict[str, dict[str, Row]]) -> str:
    """Which models were asked other items than the first one; empty when none was, as far as is known."""
    found = {name: scores_of[task] for name, scores_of in held.items() if task in scores_of}
    first = next(iter(found))

    def known(name: str) -> list[Any]:
        details = found[name].get("details") or {}
        return [found[name]["count"], details.get("bytes"), (details.get("items") or {}).get("hash")]

    odd = [name for name in found if any(None not in pair and pair[0] != pair[1]
                                         for pair in zip(known(first), known(name), strict=True))]
    return f"{', '.join(odd)} was asked other items than {first}" if odd else ""


def _figures(one: Contender, own: dict[str, Row], meant: Sequence[str], length: int) -> dict[str, Any]:
    shape = one.shape.answering()
    active, forward = shape.active_parameters(), shape.flops(1.0, (length + 1) / 2) / 3  # backward takes twice as much
    pd_6nd = None if one.tokens is None else 6 * one.shape.active_parameters() * one.tokens / PD_FLOP
    pd_ledger = None if one.ledger_flops is None else one.ledger_flops / PD_FLOP
    mean = _mean([own[task] for task in meant])
    trained = pd_ledger or pd_6nd
    return {"name": one.name, "architecture": one.shape.MODEL_TYPE, "parameters": one.shape.parameters(),
            "active_parameters": active, "forward_flops_2n": 2 * active, "forward_flops_shape": forward, "tokens": one.tokens,
            "known_tokens": one.known_tokens, "known_pd": None if one.known_flops is None else one.known_flops / PD_FLOP,
            "pd_6nd": pd_6nd, "pd_ledger": pd_ledger, "mean_accuracy_points": mean,
            "points_per_pflop_2n": _per(mean, 2 * active / PFLOP), "points_per_pflop_shape": _per(mean, forward / PFLOP),
            "points_per_pd": _per(mean, trained) if trained else None, BITS: own.get(BITS), "scores": own}


def _mean(found: Sequence[Row]) -> dict[str, float] | None:
    if not found:
        return None
    value = 100 * math.fsum(score["value"] for score in found) / len(found)
    half = 100 * math.hypot(*((score["high"] - score["low"]) / 2 for score in found)) / len(found)
    return {"value": value, "low": value - half, "high": value + half}


def _per(mean: dict[str, float] | None, amount: float) -> dict[str, float] | None:
    return None if mean is None else {key: value / amount for key, value in mean.items()}


def rows(found: dict[str, Any]) -> list[tuple[str, str, list[str]]]:
    """(figure, key of its definition, a cell for each model) for people; a dash for what nobody knows."""
    def cells(key: str, text: Callable[[Any], str], known: str = "") -> list[str]:
        return [f"at least {text(one[known])}" if one[key] is None and one.get(known) is not None else
                "–" if one[key] is None else text(one[key]) for one in found["models"]]

    def interval(digits: str) -> Callable[[dict[str, float]], str]:
        return lambda v: f"{v['value']:{digits}} [{v['low']:{digits}}, {v['high']:{digits}}]"

    def counted(v: dict[str, float]) -> str:
        return f"{format_count(v['value'])} [{format_count(v['low'])}, {format_count(v['high'])}]"

    def work(flops: float) -> str:
        return format_rate(flops).removesuffix("/s")

    def trained(pd: float) -> str:
        return f"{pd:,.0f} PD" if pd >= 1000 else format_flops(pd * PD_FLOP)

    made = [("architecture", "", cells("architecture", str)), ("parameters", "parameters", cells("parameters", format_count)),
            ("active parameters", "active", cells("active_parameters", format_count)),
            ("forward, 2 x active", "forward_2n", cells("forward_flops_2n", work)),
            ("forward, from the shape", "forward_shape", cells("forward_flops_shape", work)),
            ("tokens", "tokens", cells("tokens", format_count, "known_tokens")),
            ("training, 6ND", "pd_6nd", cells("pd_6nd", trained)),
            ("training, ledger", "pd_ledger", cells("pd_ledger", trained, "known_pd"))]
    for task in sorted(found["tasks"], key=lambda task: task != BITS):
        held = [one["scores"].get(task) for one in found["models"]]
        made.append((task.replace("_", " ") if task == BITS else task, "interval", ["–" if s is None else
                     f"{score_text(s['value'], s)} [{score_text(s['low'], s)}, {score_text(s['high'], s)}]" for s in held]))
    if found["mean_tasks"]:
        made += [(f"mean accuracy of {len(found['mean_tasks'])}", "mean", cells("mean_accuracy_points", interval(".2f"))),
                 ("points per PFLOP of a token, 2 x active", "per_pflop", cells("points_per_pflop_2n", counted)),
                 ("points per PFLOP of a token, shape", "per_pflop", cells("points_per_pflop_shape", counted)),
                 ("points per PD of training", "per_pd", cells("points_per_pd", interval(".4g")))]
    return made


def difference_text(row: Row, found: dict[str, Any]) -> list[str]:
    """A difference and its interval for people, and what it says."""
    score = next(one["scores"][row["task"]] for one in found["models"] if one["name"] == row["second"])
    sign = 1 if score.get("higher_is_better", True) else -1
    verdict = "not told apart" if row["low"] <= 0 <= row["high"] else "better" if sign * row["difference"] > 0 else "worse"
    scale, unit = (100, " points") if score.get("unit") == "share" else (1, "")
    return [f"{scale * row['difference']:+.3g}{unit}", f"[{scale * row['low']:+.3g}, {scale * row['high']:+.3g}]", verdict]


def write_comparison(found: dict[str, Any], path: Path) -> None:
    """Write the page of a comparison; everything that comes from it is escaped."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
                                     undefined=jinja2.StrictUndefined)
    ends = {task: max(abs(row[key]) for row in found["differences"] if row["task"] == task for key in ("low", "high"))
            for task in {row["task"] for row in found["differences"]}}
    drawn = [(row, difference_text(row, found), interval_bar(row["low"], row["difference"], row["high"],
                                                             (-ends[row["task"]], ends[row["task"]]), "model-1"))
             for row in found["differences"]]
    by_task = [(task, list(group)) for task, group in itertools.groupby(drawn, key=lambda each: each[0]["task"])]
    write_atomic(path, environment.get_template("comparison.html").render(
        found=found, rows=rows(found), differences=by_task, definitions=DEFINITIONS, accounts=ACCOUNTS, books=[],
        scores=scores({one["name"]: one["scores"] for one in found["models"]})))
