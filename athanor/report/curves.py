"""A stage's charts: loss over tokens and PD, tokens per second over time, and how far off the planned step time was."""

from __future__ import annotations

import itertools
import statistics

from athanor.foundation.units import PD_FLOP, format_count, format_flops, format_seconds
from athanor.ledger.book import Book
from athanor.report.figures import signed_percent
from athanor.report.plots import Axis, Chart, Curve, Point, thin
from athanor.report.run_record import Row, StageRecord

ROUTINE = ("start", "checkpoint", "evaluation", "sample", "done")  # kinds of events that belong to every run
PROMISED = 0.25  # the error of step time that a forecast may have


def charts(stage: StageRecord, book: Book | None) -> list[Chart]:
    """The charts for which the stage's metrics have at least two steps."""
    rows = [row for row in stage.metrics if not row.get("skipped")]
    made = [loss_chart(stage.name, rows, book), throughput_chart(stage, rows), step_time_chart(stage, rows)]
    return [chart for chart in made if chart]


def loss_chart(name: str, rows: list[Row], book: Book | None) -> Chart | None:
    """Training loss per step and validation loss, over tokens; PD on a second scale when the book has model FLOPs."""
    points = [(float(row["tokens"]), float(row["loss"])) for row in rows if "tokens" in row and row.get("loss") is not None]
    if len(points) < 2:
        return None
    checks = validation_points(rows)
    ends = f"from {points[0][1]:.2f} to {points[-1][1]:.2f} over {format_count(points[-1][0])} tokens"
    alt = f"Loss of {name} {ends}" + (f"; validation loss {checks[-1][1]:.2f} at the end" if checks else "")
    values = [y for _, y in thin(points)] + [y for _, y in checks]
    per_token = book.model_flops / book.tokens if book and book.tokens else 0.0
    curves = [Curve("training loss", points)] + ([Curve("validation loss", checks, "dots")] if checks else [])
    label = "tokens; below them PD (6ND)" if per_token else "tokens"
    return Chart("Loss" + (", dots: validation" if checks else ""), alt, curves,
                 Axis(label, format_count, (per_token / PD_FLOP, format_pd) if per_token else None),
                 Axis("nats per token", lambda y: f"{y:.3g}"), (min(values), max(values)))


def format_pd(pd: float) -> str:
    """`0`, `250`, `0.02`, `2e-7`, in PD."""
    return f"{pd:.3g}" if pd == 0 or pd >= 1e-3 else f"{pd:.2g}".replace("e-0", "e-")


def validation_points(rows: list[Row]) -> list[Point]:
    """Tokens and validation loss of the steps that were validated."""
    return [(float(row["tokens"]), float(row["validation_loss"])) for row in rows if row.get("validation_loss") is not None]


def throughput_chart(stage: StageRecord, rows: list[Row]) -> Chart | None:
    """Tokens per second over time since the first step, with the stage's faults, restarts and saves as marks."""
    rows = [row for row in rows if row.get("tokens_per_second") is not None and row.get("step_seconds") is not None]
    if len(rows) < 2:
        return None
    times = _times(rows)
    scale, unit = next((pair for pair in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")) if times[-1] > 2 * pair[0]),
                       (1.0, "seconds"))
    points = [(at / scale, float(row["tokens_per_second"])) for at, row in zip(times, rows, strict=True)]
    middle = statistics.median(y for _, y in points)
    by_step = {row["step"]: at / scale for at, row in zip(times, rows, strict=True)}
    marks = [(by_step[event["step"]], str(event.get("sentence", "")), event.get("kind") in ROUTINE) for event in stage.events
             if event.get("step") in by_step]
    highest = max(y for _, y in thin(points))
    alt = f"Tokens per second of {stage.name}: median {format_count(middle)}, over {format_seconds(times[-1])}"
    unusual = [sentence for _, sentence, is_routine in marks if not is_routine]
    alt += f"; {len(unusual)} faults and restarts are marked" if unusual else ""
    x = Axis(f"{unit}, the first step at the left", "{:.3g}".format)
    return Chart("Tokens per second", alt, [Curve("tokens per second", points)], x, Axis("tokens/s", format_count),
                 (0.0, highest), marks[:200])


def _times(rows: list[Row]) -> list[float]:
    """Seconds since the first step began, at the end of each step; sums of step times where a row has no clock."""
    if all("time" in row for row in rows):
        return [row["time"] - rows[0]["time"] + rows[0]["step_seconds"] for row in rows]
    return list(itertools.accumulate(float(row["step_seconds"]) for row in rows))


def step_time_chart(stage: StageRecord, rows: list[Row]) -> Chart | None:
    """Error of the planned step time, for single steps and for the mean of all steps so far."""
    steps = [(float(row["step"]), float(row["step_seconds"])) for row in rows if row.get("step_seconds")]
    if len(steps) < 2 or not stage.step_seconds:
        return None
    planned = stage.step_seconds
    single = [(step, planned / seconds - 1) for step, seconds in thin(steps)]
    spent = itertools.accumulate(seconds for _, seconds in steps)
    so_far = [(step, planned * count / total - 1) for count, ((step, _), total) in enumerate(zip(steps, spent, strict=True), 1)]
    shown = sorted(y for _, y in single)
    low, high = shown[len(shown) // 50], shown[-1 - len(shown) // 50]  # a few odd steps must not flatten the rest
    reach = max(1.3 * PROMISED, min(2.0, max(abs(low), abs(high), *(abs(y) for _, y in so_far[len(so_far) // 10:]))))
    alt = (f"Forecast error of step time of {stage.name}: planned {format_seconds(planned)}, measured mean "
           f"{format_seconds(statistics.fmean(s for _, s in steps))}, error {signed_percent(so_far[-1][1], 1)} over all steps")
    return Chart("Was the plan right?", alt, [Curve("single steps", single, "faint"), Curve("mean of all steps so far", so_far)],
                 Axis(f"error of step time, over steps; shaded: ±{PROMISED:.0%}".replace("%", " %"), lambda x: f"{x:.0f}"),
                 Axis("error", signed_percent), (-reach, reach), band=(-PROMISED, PROMISED))


def flops_note(book: Book | None) -> str:
    """What a stage computed, or is to compute, in one phrase."""
    if book is None or not book.tokens:
        return ""
    text = f"{format_count(book.tokens)} tokens, {format_flops(book.model_flops)} (6ND)"
    return f"planned: {text}" if book.kind == "forecast" else text
