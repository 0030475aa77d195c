"""The page's pictures, as SVG written by hand. Widths are percentages or a viewBox, so that a phone sees them whole."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from athanor.ledger.accounts import BY_NAME
from athanor.ledger.book import Book

Point = tuple[float, float]
WIDTH, TOP, BOTTOM, LEFT, RIGHT = 300, 8, 104, 46, 294  # of a chart's plotting area, in viewBox units
MOST_POINTS = 240  # of one curve; longer ones become means of neighbours


@dataclass(frozen=True)
class Curve:
    """Points in data units; `style` is 'main', 'faint' or 'dots'."""

    label: str
    points: Sequence[Point]
    style: str = "main"


@dataclass(frozen=True)
class Axis:
    """How values of an axis are written, and a second scale under the first: a factor and its format."""

    label: str
    format: Callable[[float], str]
    second: tuple[float, Callable[[float], str]] | None = None


@dataclass(frozen=True)
class Chart:
    """A small line chart. `alt` tells in words what it shows, `marks` are events: x, a sentence, and whether it is routine."""

    title: str
    alt: str
    curves: Sequence[Curve]
    x: Axis
    y: Axis
    y_range: tuple[float, float]
    marks: Sequence[tuple[float, str, bool]] = field(default_factory=list)
    band: tuple[float, float] | None = None


def stacked_bar(book: Book, longest: float, anchor: str) -> Markup:
    """A book as one horizontal bar; `longest` device-seconds fill the width, each part links to `#<anchor>-<account>`."""
    parts, at = [], 0.0
    for name in BY_NAME:
        seconds = book.accounts.get(name, 0.0)
        if seconds <= 0:
            continue
        x, width = 100 * at / longest, 100 * seconds / longest
        at += seconds
        share = 100 * seconds / book.device_seconds if book.device_seconds else 0.0
        parts.append(Markup('<a href="#{}-{}"><rect class="a-{}" x="{:.3f}%" y="0" width="{:.3f}%" height="34">'
                            "<title>{}: {:,.1f} device-seconds, {:.1f} %</title></rect>{}</a>").format(
            anchor, name, name, x, width, name, seconds, share, _bar_label(name, x, width)))
    largest = sorted(book.accounts.items(), key=lambda item: -item[1])[:4]
    alt = f"{book.kind}: " + ", ".join(f"{name} {seconds:,.1f} s" for name, seconds in largest if seconds > 0)
    return Markup('<svg class="book" width="100%" height="34" role="group" aria-label="{}">{}</svg>').format(
        f"{alt}; {book.device_seconds:,.1f} device-seconds in all", Markup().join(parts))


def _bar_label(name: str, x: float, width: float) -> Markup:
    """The account's name inside its part, shown only where the page is wide enough for it (classes of page.css)."""
    needed = (6.6 * len(name) + 8) * 100 / width  # pixels that the whole bar must have
    visible = next((style for limit, style in ((300, "always"), (430, "medium"), (720, "wide")) if needed <= limit), None)
    if visible is None:
        return Markup("")
    red, green, blue = (int(BY_NAME[name].colour[i:i + 2], 16) for i in (1, 3, 5))
    ink = "on-light" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "on-dark"
    return Markup('<text class="{} {}" x="{:.3f}%" y="21">{}</text>').format(visible, ink, x + width / 2, name)


def share_bar(share: float, style: str) -> Markup:
    """One bar of `share` (0 to 1) of the width."""
    return Markup('<svg class="share" width="100%" height="13" aria-hidden="true">'
                  '<rect class="{}" width="{:.2f}%" height="13"/></svg>').format(style, 100 * max(0.0, share))


def error_bar(seconds: float, largest: float, account: str) -> Markup:
    """An error in device-seconds from a middle line: to the right where the forecast was too high."""
    half = 48 * min(1.0, abs(seconds) / largest) if largest else 0.0
    return Markup('<svg class="error" width="100%" height="12" role="img" aria-label="{:+z,.1f} device-seconds">'
                  '<rect class="a-{}" x="{:.2f}%" y="1.5" width="{:.2f}%" height="9"/></svg>').format(
        seconds, account, 50 if seconds > 0 else 50 - half, half)


def interval_bar(low: float, value: float, high: float, scale: tuple[float, float], style: str) -> Markup:
    """A value with its interval on a common scale."""
    span = (scale[1] - scale[0]) or 1.0
    at = [3 + 94 * (v - scale[0]) / span for v in (low, value, high)]
    return Markup('<svg class="interval {}" width="100%" height="14" aria-hidden="true">'
                  '<line x1="{:.2f}%" x2="{:.2f}%" y1="7" y2="7"/><circle cx="{:.2f}%" cy="7" r="4"/></svg>').format(
        style, at[0], at[2], at[1])


def draw(chart: Chart) -> Markup:
    """A chart as SVG with rules, ticks, curves and events."""
    xs = [x for curve in chart.curves for x, _ in curve.points]
    left, right = min(xs), max(xs)
    ticks = nice_ticks(*chart.y_range)
    low, high = min(ticks[0], chart.y_range[0]), max(ticks[-1], chart.y_range[1])

    def place(x: float, y: float) -> Point:
        return (LEFT + (RIGHT - LEFT) * (x - left) / ((right - left) or 1.0),
                BOTTOM - (BOTTOM - TOP) * (min(max(y, low), high) - low) / ((high - low) or 1.0))

    parts = []
    if chart.band:
        upper, lower = place(left, chart.band[1])[1], place(left, chart.band[0])[1]
        parts.append(Markup('<rect class="band" x="{}" y="{:.1f}" width="{}" height="{:.1f}"/>').format(
            LEFT, upper, RIGHT - LEFT, lower - upper))
    for tick in ticks:
        y = place(left, tick)[1]
        parts.append(Markup('<line class="rule" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
                            '<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(
            LEFT, RIGHT, y, y, LEFT - 4, y + 3.5, chart.y.format(tick)))
    parts += _x_ticks(chart, left, right, place)
    for x, sentence, is_routine in chart.marks:
        at = place(x, low)[0]
        parts.append(Markup('<line class="{}" x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"><title>{}</title></line>').format(
            "routine" if is_routine else "mark", at, at, BOTTOM - 7 if is_routine else TOP, BOTTOM, sentence))
    parts += [_draw_curve(curve, place, chart) for curve in chart.curves]
    height = 148 if chart.x.second else 134
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, height, chart.alt, Markup().join(parts))


def _x_ticks(chart: Chart, left: float, right: float, place: Callable[[float, float], Point]) -> list[Markup]:
    parts = []
    values = [tick for tick in nice_ticks(left, right, 5) if left <= tick <= right]
    for tick in values:
        at = place(tick, chart.y_range[0])[0]
        anchor = "middle" if at < RIGHT - 12 else "end"
        parts.append(Markup('<text class="tick" x="{:.1f}" y="117" text-anchor="{}">{}</text>').format(
            min(at, RIGHT), anchor, chart.x.format(tick)))
    label_y = 129
    if chart.x.second:
        factor, write = chart.x.second
        shown = [tick for tick in nice_ticks(left * factor, right * factor, 5) if left * factor <= tick <= right * factor]
        for tick in shown:
            at = place(tick / factor, chart.y_range[0])[0]
            parts.append(Markup('<text class="tick" x="{:.1f}" y="129" text-anchor="{}">{}</text>').format(
                min(at, RIGHT), "middle" if at < RIGHT - 20 else "end", write(tick)))
        label_y = 143
    parts.append(Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>').format(RIGHT, label_y, chart.x.label))
    return parts


def _draw_curve(curve: Curve, place: Callable[[float, float], Point], chart: Chart) -> Markup:
    if curve.style == "dots":
        dots = []
        for x, y in curve.points:
            at = place(x, y)
            title = f"{curve.label}: {chart.y.format(y)} at {chart.x.format(x)}"
            dots.append(Markup('<circle class="dot" cx="{:.1f}" cy="{:.1f}" r="2.6"><title>{}</title></circle>').format(
                *at, title))
        return Markup().join(dots)
    line = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in thin(curve.points))
    return Markup('<polyline class="{}" points="{}"><title>{}</title></polyline>').format(curve.style, line, curve.label)


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points: means of equal runs of neighbours, with the first and the last kept as they are."""
    if len(points) <= most:
        return list(points)
    inner, runs = points[1:-1], most - 2
    cuts = [round(i * len(inner) / runs) for i in range(runs + 1)]
    means = [(statistics.fmean(x for x, _ in inner[a:b]), statistics.fmean(y for _, y in inner[a:b]))
             for a, b in itertools.pairwise(cuts)]
    return [points[0], *means, points[-1]]


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` + 1 round numbers (1, 2, 2.5 or 5 times a power of ten) that span low to high."""
    if not high > low:
        return [low]
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]
