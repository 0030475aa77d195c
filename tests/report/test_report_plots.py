"""Pictures: ticks are round and few, thinned curves keep their means, values land where they belong."""

from __future__ import annotations

import re
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from athanor.ledger.book import Book
from athanor.report.curves import charts, step_time_chart
from athanor.report.plots import BOTTOM, LEFT, RIGHT, TOP, Axis, Chart, Curve, draw, error_bar, nice_ticks, thin
from athanor.report.run_record import StageRecord


@settings(max_examples=200, deadline=None)
@given(st.floats(-1e9, 1e9), st.floats(1e-9, 1e9))
def test_ticks_span_the_range_and_are_few(low: float, width: float) -> None:
    high = low + width
    if high - low < 1e-9 * max(abs(low), abs(high)):
        return
    ticks = nice_ticks(low, high)
    step = (ticks[-1] - ticks[0]) / (len(ticks) - 1)
    assert 2 <= len(ticks) <= 7
    assert ticks[0] <= low + 1e-6 * step and ticks[-1] >= high - 1e-6 * step
    assert ticks == sorted(ticks)


def test_ticks_are_round() -> None:
    assert nice_ticks(0, 10_000) == [0, 2500, 5000, 7500, 10_000]
    assert nice_ticks(1.83, 2.61) == [1.8, 2.0, 2.2, 2.4, 2.6, 2.8]
    assert nice_ticks(3, 3) == [3]


@given(st.lists(st.floats(-100, 100), min_size=3, max_size=700))
def test_a_thinned_curve_keeps_its_ends_and_its_reach(values: list[float]) -> None:
    points = list(enumerate(values))
    kept = thin(points, most=50)  # type: ignore[arg-type]
    assert len(kept) <= 50 and kept[0] == points[0] and kept[-1] == points[-1]
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    assert min(values) <= min(y for _, y in kept) and max(y for _, y in kept) <= max(values)


def test_a_point_lands_where_its_value_says() -> None:
    curve = Curve("c", [(0.0, 0.0), (5.0, 10.0), (10.0, 5.0)])
    chart = Chart("t", "in words", [curve], Axis("x", str), Axis("y", str), (0.0, 10.0))
    points = re.search(r'points="([^"]+)"', draw(chart))
    assert points is not None
    middle = (LEFT + RIGHT) / 2
    assert points[1] == f"{LEFT:.1f},{BOTTOM:.1f} {middle:.1f},{TOP:.1f} {RIGHT:.1f},{(TOP + BOTTOM) / 2:.1f}"


def stage(planned: float | None, /, **columns: list[float]) -> StageRecord:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return StageRecord("pretrain", [{"step": i + 1, "tokens": 100 * (i + 1), **row} for i, row in enumerate(rows)], [], [],
                       planned)


def test_the_error_of_step_time_ends_at_the_error_of_the_mean() -> None:
    seconds = [0.5, 0.3, 0.4, 0.2, 0.6]
    record = stage(0.5, step_seconds=seconds)
    chart = step_time_chart(record, list(record.metrics))
    assert chart is not None
    assert chart.curves[0].points == [(i + 1, pytest.approx(0.5 / s - 1)) for i, s in enumerate(seconds)]
    assert chart.curves[1].points[-1] == (5.0, pytest.approx(0.5 / statistics.fmean(seconds) - 1))


def test_charts_appear_only_where_there_is_something_to_show() -> None:
    book = Book("actual", 1, "CPU", None, tokens=500.0, model_flops=8.64e19)
    full = stage(0.5, step_seconds=[0.5] * 5, tokens_per_second=[200.0] * 5, loss=[3.0, 2.0, 1.5, 1.2, 1.1])
    assert [chart.title for chart in charts(full, book)] == ["Loss", "Tokens per second", "Was the plan right?"]
    assert charts(full, book)[0].x.second is not None and charts(full, book)[0].x.second[0] == pytest.approx(1 / 500)
    assert [chart.title for chart in charts(stage(None, loss=[3.0, 2.0]), None)] == ["Loss"]
    assert charts(stage(0.5, loss=[3.0], step_seconds=[1.0], tokens_per_second=[1.0]), None) == []


def test_validation_stands_as_dots_at_its_tokens() -> None:
    record = stage(None, loss=[3.0, 2.0, 1.5])
    record.metrics[1]["validation_loss"] = 2.2
    chart = charts(record, None)[0]
    assert chart.curves[1].points == [(200.0, 2.2)] and 'class="dot"' in draw(chart)


def test_an_error_bar_goes_right_where_the_forecast_was_too_high() -> None:
    high, low = (error_bar(seconds, 10.0, "useful") for seconds in (5.0, -5.0))
    assert 'x="50.00%" y="1.5" width="24.00%"' in high and 'x="26.00%" y="1.5" width="24.00%"' in low
