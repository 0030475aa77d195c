"""One self-contained HTML page of what `athanor plan search` found, in the look of a run's report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from athanor.foundation.run_folder import write_atomic
from athanor.foundation.units import format_count, format_seconds, format_share
from athanor.ledger.accounts import ACCOUNTS, BY_NAME
from athanor.ledger.book import Book
from athanor.report import plots

HEADROOM = 1.5  # of the plot, over the slowest of the best steps; what saves the last bytes takes many times as long


def write_search(found: dict[str, Any], path: Path) -> None:
    """Write the page of a search's document; everything that comes from it is escaped."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
                                     undefined=jinja2.StrictUndefined)
    book = Book(**found["layouts"][0]["book"])
    write_atomic(path, environment.get_template("search_page.html").render(
        found=found, best=found["layouts"][0], accounts=ACCOUNTS, by_name=BY_NAME, books=[], pareto=_pareto(found),
        format_count=format_count, format_seconds=format_seconds, format_share=format_share,
        bar=plots.stacked_bar(book, book.device_seconds, "account"), words=_words))


def _words(layout: dict[str, Any]) -> str:
    """A layout's degrees and choices, those left out that are 1, 0 or none."""
    hidden = ("split", "pipeline_schedule") if layout["pipeline_schedule"] in ("1F1B", "Interleaved1F1B") else ("split",)
    return " ".join(f"{key}={value}" for key, value in layout.items() if key not in hidden and value not in (0, 1, "none"))


def _pareto(found: dict[str, Any]) -> Markup:
    """Step time against the memory of the fullest rank, a curve for each number of devices."""
    points: dict[int, list[plots.Point]] = {}
    for row in found["pareto"]:
        points.setdefault(row["devices"], []).append((row["memory_gib"], row["step_seconds"]))
    highest = HEADROOM * max(min(y for _, y in row) for row in points.values())
    points = {devices: [point for point in row if point[1] <= highest] for devices, row in points.items()}
    curves = [plots.Curve(f"{devices:,} devices", row, "main" if devices == found["devices"] else "faint")
              for devices, row in points.items()]
    curves += [plots.Curve(f"best of {devices:,} devices", [min(row, key=lambda point: point[1])], "dots")
               for devices, row in points.items()]
    ends = "; ".join(f"{devices:,} devices down to {format_seconds(min(y for _, y in row))}" for devices, row in points.items())
    return plots.draw(plots.Chart("Step time against memory", f"fastest step for the memory of a device: {ends}", curves,
                                  plots.Axis("GiB of the fullest device", lambda value: f"{value:.0f}"),
                                  plots.Axis("step", lambda value: f"{value:,.3g} s"), (0.0, highest)))
