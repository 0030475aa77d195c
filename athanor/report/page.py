"""One self-contained HTML page of a run: no network, no file beside it, readable without its few lines of script."""

from __future__ import annotations

import base64
import hashlib
from datetime import UTC, datetime
from pathlib import Path

import jinja2
from markupsafe import Markup

from athanor.foundation.run_folder import RunFolder, write_atomic
from athanor.foundation.units import format_count, format_seconds, format_share
from athanor.ledger.accounts import ACCOUNTS
from athanor.ledger.book import Book
from athanor.ledger.reconcile import Line, Reconciliation
from athanor.report import faults, figures, plots, sections
from athanor.report.curves import charts, flops_note
from athanor.report.run_record import RunRecord, StageRecord, read_run

SHOWN_EVENTS = 8
MOST_EVENTS = 300
FAR, FAR_SHARE = 0.25, 0.01  # an error is marked when it is over 25 % and over 1 % of the paid seconds

# A click on a part of a bar opens that account's row; without script the row is marked all the same.
SCRIPT = Markup("""
function show(){const row=location.hash.startsWith("#account-")&&document.getElementById(location.hash.slice(1));
if(row){const inside=row.querySelector("details");if(inside)inside.open=true}}
addEventListener("hashchange",show);show();
""")


def write_report(run: RunFolder, out: Path | None = None) -> Path:
    """Write the page of a run folder to `out` (its report.html unless given) and return the path."""
    path = out or run.report
    write_atomic(path, render(read_run(run)))
    return path


def render(record: RunRecord) -> str:
    """The page as HTML text; everything that comes from files is escaped."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                     trim_blocks=True, undefined=jinja2.StrictUndefined)
    of_stage = {found.name: found.actual or found.forecast for found in record.books}
    digest = hashlib.sha256(SCRIPT.encode()).digest()
    first = record.books[0] if record.books else None
    leading = (first.actual or first.forecast) if first else None
    return environment.get_template("page.html").render(
        record=record, accounts=ACCOUNTS, books=record.books, subtitle=subtitle(record), headlines=figures.headlines(record),
        paid=_paid(leading), definitions=figures.definitions(), names=figures.NAMES,
        book_figures=figures.book_figures, signed_percent=figures.signed_percent, format_seconds=format_seconds,
        format_share=format_share, seconds=_seconds, is_far=_is_far, longest=_longest,
        stacked_bar=plots.stacked_bar, error_bar=plots.error_bar, draw=plots.draw,
        stages=[(stage, charts(stage, of_stage.get(stage.name)), _events(stage)) for stage in record.stages],
        flops_note=lambda name: flops_note(of_stage.get(name)), shown_events=SHOWN_EVENTS, faults=faults, clock=figures.clock,
        paid_by={found.name: found.actual.device_seconds for found in record.books if found.actual},
        scores=sections.scores(record.scores), funnel=sections.funnel(record),
        excerpts=sections.excerpts(record), chain=sections.chain(record),
        samples=[(stage.name, sections.samples(stage)) for stage in record.stages if stage.samples],
        machine=sections.machine(record), reasons=sections.reasons(record), script=SCRIPT,
        script_hash="sha256-" + base64.b64encode(digest).decode())


def subtitle(record: RunRecord) -> str:
    """One line: what was trained, on what, until when."""
    parts = []
    shape = {**record.recipe.get("model", {}), **record.plan.get("model", {})}
    if "hidden_size" in shape:
        parts.append(f"{shape.get('architecture', 'model')}, {shape['hidden_size']} wide, "
                     f"{shape.get('num_hidden_layers', '?')} blocks")
    tokens = sum(book.tokens for found in record.books[1:] if (book := found.actual))
    if tokens:
        parts.append(f"{format_count(tokens)} tokens")
    sources = [str(source.get("name")) for source in record.recipe.get("data", {}).get("source", [])]
    if sources:
        parts.append(f"text: {', '.join(sources)}")
    if record.cluster:
        parts.append(f"{record.cluster.get('devices', '?')} × {record.cluster.get('accelerator', '?')}")
    rows = [*record.chain, *(row for stage in record.stages for row in stage.events)]
    times = [row["time"] for row in rows if isinstance(row.get("time"), (int, float))]
    if times:
        parts.append(f"last heard of {datetime.fromtimestamp(max(times), UTC):%-d %b %Y, %H:%M} UTC")
    return " · ".join(parts)


def _events(stage: StageRecord) -> list[tuple[str, str]]:
    """(time since the stage's first event, sentence); ordinary saves only when they are few, the last ones otherwise."""
    rows = [row for row in stage.events if isinstance(row.get("time"), (int, float)) and row.get("sentence")]
    saves = [row for row in rows if row.get("kind") == "checkpoint"]
    hidden = {id(row) for row in saves[:-2]}
    shown = [row for row in rows if id(row) not in hidden][:MOST_EVENTS]
    return [(figures.clock(row["time"] - rows[0]["time"], least=0), str(row["sentence"])) for row in shown]


def _paid(book: Book | None) -> str:
    if book is None:
        return "the time went"
    return f"{book.device_seconds:,.0f} device-seconds {'are to go' if book.kind == 'forecast' else 'went'}"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if abs(value) >= 99_999.5 else f"{value:z,.1f}"


def _is_far(line: Line, found: Reconciliation) -> bool:
    paid = found.actual.device_seconds if found.actual else 0.0
    return line.error is not None and abs(line.error) > FAR and abs(line.error_seconds or 0.0) > FAR_SHARE * paid


def _longest(found: Reconciliation) -> float:
    """Device-seconds that fill the width of both bars."""
    def positive(book: Book) -> float:
        return sum(seconds for seconds in book.accounts.values() if seconds > 0)

    return max([positive(book) for book in found.books.values()] + [1e-9])

