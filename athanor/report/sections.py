"""The parts of the page that are lists: data funnel, samples, scores, the chain's steps, what was run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from athanor.foundation.units import format_bytes, format_count, format_rate, format_seconds
from athanor.report.figures import baselines
from athanor.report.plots import interval_bar, share_bar
from athanor.report.run_record import Row, RunRecord, StageRecord

SAMPLE_STEPS, SAMPLE_CHARACTERS = 4, 2400


@dataclass(frozen=True)
class Item:
    """A labelled bar with its figures."""

    label: str
    bar: Markup
    text: str


def funnel(record: RunRecord) -> list[Item]:
    """What was read, what each reason dropped (its bar is what was left after it), and what training and evaluation got."""
    stages = record.funnel.get("stages", [])
    if not stages:
        return []
    left = {unit: stages[0][unit] for unit in ("documents", "bytes")}
    read = left["bytes"] or 1
    items = [Item("read", share_bar(1.0, "read"), _amount(left))]
    for stage in stages:
        for reason, amount in stage["dropped"].items():
            left = {unit: left[unit] - amount[unit] for unit in left}
            items.append(Item(reason, share_bar(left["bytes"] / read, "kept"), f"−{_amount(amount)}"))
    for name, counts in record.funnel.get("splits", {}).items():
        style = "a-data_parallel" if name == "evaluation" else "a-useful"
        items.append(Item(name.replace("train-", "training, "), share_bar(counts["bytes"] / read, style),
                          f"{_amount(counts)} · {format_count(counts['tokens'])} tokens"))
    return items


def _amount(counts: Row) -> str:
    documents = counts["documents"]
    return f"{documents:,} document{'' if documents == 1 else 's'} · {format_bytes(counts['bytes'])}"


def excerpts(record: RunRecord) -> list[tuple[str, list[tuple[str, list[tuple[str, str]]]]]]:
    """(kind of sample, [(reason or filter, [(where from and by how much, excerpt)])]) of the data's funnel."""
    titles = {"dropped": "What was dropped, by reason", "near_threshold": "What only just stayed, by filter",
              "kept": "What was kept"}
    found = []
    for kind, title in titles.items():
        groups = [(name, [(_origin(row), str(row.get("excerpt", ""))) for row in rows])
                  for name, rows in record.funnel.get("samples", {}).get(kind, {}).items()]
        if groups:
            found.append((title, groups))
    return found


def _origin(row: Row) -> str:
    text = f"{row.get('uri', row.get('doc_id', ''))}, {format_bytes(row.get('bytes', 0))}"
    if isinstance(row.get("value"), (int, float)):
        text += f"; value {row['value']:.3g}, threshold {row['threshold']:.3g}"
    return text + (f"; like {row['like']}" if row.get("like") else "")


def samples(stage: StageRecord) -> list[tuple[int, list[tuple[str, str]]]]:
    """(step, [(prompt, generated)]) of a few steps spread over the training, the first and the last included."""
    steps = sorted({row["step"] for row in stage.samples if "step" in row})
    last = len(steps) - 1
    picked = dict.fromkeys(steps[round(i * last / (SAMPLE_STEPS - 1))] for i in range(SAMPLE_STEPS)) if steps else {}
    return [(step, [(_short(row.get("prompt", "")), _short(row.get("text", ""))) for row in stage.samples
                    if row.get("step") == step]) for step in picked]


def _short(text: Any) -> str:
    text = str(text)
    more = len(text) - SAMPLE_CHARACTERS
    return text if more <= 0 else f"{text[:SAMPLE_CHARACTERS]} … ({more:,} more characters)"


@dataclass(frozen=True)
class ScoreRow:
    """A model's score at a task, or what a compressor needs for the same bytes."""

    model: str
    value: str
    interval: str
    bar: Markup


def scores(models: dict[str, dict[str, Row]]) -> list[tuple[str, str, list[ScoreRow]]]:
    """(task, what is counted, rows) for every task, the models in the order given."""
    found = []
    for task in dict.fromkeys(task for tasks in models.values() for task in tasks):
        held = {model: tasks[task] for model, tasks in models.items() if task in tasks}
        ends = [score[key] for score in held.values() for key in ("low", "value", "high")]
        first = next(iter(held.values()))
        beside = baselines(first) if task == "bits_per_byte" else []
        ends += [value for _, value in beside] or ([0.0] if first.get("unit") == "share" else [])
        scale = min(ends), max(ends)
        rows = [ScoreRow(model, score_text(s["value"], s), "of one item" if s["count"] == 1 else
                         f"{score_text(s['low'], s)} … {score_text(s['high'], s)}",
                         interval_bar(s["low"], s["value"], s["high"], scale, f"model-{index}"))
                for index, (model, s) in enumerate(held.items())]
        rows += [ScoreRow(f"{name} -9, same bytes", f"{value:.3f}", "exact", interval_bar(value, value, value, scale, "beside"))
                 for name, value in beside]
        better = "higher is better" if first.get("higher_is_better", True) else "lower is better"
        found.append((task, f"{first.get('unit', '')}, {first.get('count', 0):,} items, {better}", rows))
    return found


def score_text(value: float, score: Row) -> str:
    """A score, or an end of its interval, in people's units."""
    return f"{100 * value:.1f} %" if score.get("unit") == "share" else f"{value:.3f}"


def chain(record: RunRecord) -> list[Item]:
    """The steps of the chain in their order with measured and forecast seconds; a step done again counts as it last ran.

    A training step is named after its stage, with or without a verb before it.
    """
    last: dict[str, Row] = {}
    for row in record.chain:
        if "step" in row and row.get("seconds") is not None:
            last[str(row["step"])] = row
    foreseen = {found.name: found.forecast.wall_seconds for found in record.books if found.forecast}
    foreseen |= record.plan.get("forecast", {}).get("chain", {})
    longest = max((float(row["seconds"]) for row in last.values()), default=0.0) or 1.0
    return [Item(name, share_bar(row["seconds"] / longest, "chain"), format_seconds(row["seconds"])
                 + (f" · forecast {format_seconds(seconds)}" if (seconds := foreseen.get(name.split()[-1])) else ""))
            for name, row in last.items()]


def reasons(record: RunRecord) -> list[tuple[str, str, str]]:
    """(dotted key, chosen value, sentence) for everything the plan decided."""
    return [(key, _planned(record.plan, key), str(sentence)) for key, sentence in record.plan.get("reason", {}).items()]


def _planned(plan: Any, key: str) -> str:
    """The plan's value at a dotted key, entries of lists by their name, a table as its pairs; '' when there is none."""
    for part in key.split("."):
        if isinstance(plan, list):
            plan = next((entry for entry in plan if isinstance(entry, dict) and entry.get("name") == part), None)
        else:
            plan = plan.get(part) if isinstance(plan, dict) else None
    if isinstance(plan, dict):
        return ", ".join(f"{name} {value}" for name, value in plan.items() if not isinstance(value, (dict, list)))
    return "" if plan is None or isinstance(plan, list) else str(plan)


def machine(record: RunRecord) -> list[tuple[str, str]]:
    """What the run ran on, and with which versions."""
    spec = record.cluster
    if not spec:
        return []
    threads = spec.get("threads_per_device", 0)
    rows = [("devices", f"{spec.get('devices', '?')} × {spec.get('accelerator', '?')}"
             + (f", {threads} thread{'' if threads == 1 else 's'} each" if spec.get("device_type") == "cpu" else ""))]
    rows += [(f"peak, {dtype}", f"{format_rate(rate)} per device") for dtype, rate in spec.get("peak_flops", {}).items()]
    if "memory_bytes" in spec:
        rows.append(("memory", f"{format_bytes(spec['memory_bytes'])} per device"))
    rows += [(key, str(spec[key])) for key in ("host", "date", "source") if spec.get(key)]
    versions = ", ".join(f"{name} {version}" for name, version in spec.get("versions", {}).items())
    return rows + ([("versions", versions)] if versions else [])
