"""The ledger on the terminal: the same accounts, in the same order and hues as on the page."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from athanor.foundation.progress import console as people
from athanor.foundation.units import format_seconds, format_share
from athanor.ledger.accounts import BY_NAME
from athanor.ledger.reconcile import Line, Reconciliation
from athanor.report import faults
from athanor.report.figures import clock, signed_percent
from athanor.report.run_record import StageRecord

MOST_BAR = 72  # characters of the longest bar


def print_ledger(found: Reconciliation, console: Console | None = None) -> None:
    """Show a pair of books to people (on standard error unless another console is given)."""
    console = console or people
    console.print(ledger(found, console.width))


def print_faults(stage: StageRecord, paid_seconds: float) -> None:
    """Show people what interrupted a stage, and what each time cost in device-seconds."""
    if not stage.faults:
        return
    people.print(Text(f"{stage.name} was {faults.summary(stage.faults, paid_seconds)}"))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("at", "what happened", "again", *(f"{name}, s" for name in faults.COSTS), "in all"):
        table.add_column(column, justify="left" if column == "what happened" else "right", no_wrap=column != "what happened")
    for fault in stage.faults:
        at = "–" if fault.at is None else clock(fault.at, 0)
        table.add_row(at, Text(fault.sentence), str(fault.cost.steps_again), *faults.cells(fault))
    people.print(table)


def ledger(found: Reconciliation, width: int = 100) -> RenderableType:
    """Bars of both books, the table of accounts with errors, and the derived figures."""
    bar_width = max(10, min(MOST_BAR, width - 30))
    longest = max(sum(s for s in book.accounts.values() if s > 0) for book in found.books.values()) or 1.0
    head = Text(found.name, style="bold")
    head.append(f"  wall-clock {_wall(found)}", style="not bold")
    bars = [Text.assemble(f"{found.called[kind]:>8} ", bar(book.accounts, longest, bar_width),
                          f" {format_seconds(book.wall_seconds)}") for kind, book in found.books.items()]
    return Group(head, *bars, _table(found, width), *_figures(found))


def bar(accounts: Mapping[str, float], longest: float, width: int) -> Text:
    """Device-seconds as one bar of blocks; `longest` of them are `width` characters, and rounding never adds up."""
    text, at, used = Text(), 0.0, 0
    for name in BY_NAME:
        at += max(0.0, accounts.get(name, 0.0))
        until = round(width * at / longest)
        text.append("█" * (until - used), style=style_of(name))
        used = until
    return text


def style_of(account: str) -> str:
    """The hue of an account; what is unattributed has the terminal's ink, dark on light and light on dark."""
    return "default" if account == "unattributed" else BY_NAME[account].colour


def _wall(found: Reconciliation) -> str:
    if found.actual is None:
        return f"{format_seconds(found.books['forecast'].wall_seconds)} (forecast; not measured yet)"
    text = format_seconds(found.actual.wall_seconds)
    if found.progress:
        text += f" so far ({found.progress})"
        return text if found.forecast is None else f"{text}, forecast {format_seconds(found.forecast.wall_seconds)} in all"
    if found.forecast is None:
        return f"{text} (there was no forecast)"
    return f"{text}, forecast {format_seconds(found.forecast.wall_seconds)} ({signed_percent(found.wall_error, 1)})"


def _table(found: Reconciliation, width: int) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("account", no_wrap=True)
    for column in ("forecast, s", f"{found.called['actual']}, s", "share", "error"):
        table.add_column(column, justify="right", no_wrap=True)
    if width >= 100:
        table.add_column("", style="dim", no_wrap=True)
    for line in found.lines:
        name = Text("■ ", style=style_of(line.account.name)).append(line.account.name, style="default")
        table.add_row(name, *_cells(line), *([line.account.meaning] if width >= 100 else []))
    paid = [f"{book.device_seconds:,.1f}" if book else "–" for book in (found.forecast, found.actual)]
    table.add_row(Text("  paid", style="bold"), *paid, format_share(1.0), signed_percent(found.paid_error))
    return table


def _cells(line: Line) -> list[str]:
    seconds = ["–" if value is None else f"{value:z,.1f}" for value in (line.forecast, line.actual)]
    return [*seconds, format_share(line.share), signed_percent(line.error)]


def _figures(found: Reconciliation) -> list[Text]:
    """MFU, HFU, goodput and end to end of the actual book (else the forecast), each with its definition in brief; layouts."""
    book = found.actual or found.books["forecast"]
    derived = book.derived()
    shown = (("mfu", "MFU, causal attention: useful / stepping time"), ("mfu_full_attention", "MFU, full-square attention"),
             ("hfu", "HFU: useful + recompute / stepping time"), ("goodput", "goodput: kept stepping time / paid"),
             ("end_to_end", "end to end: useful / paid"))
    foreseen = found.forecast.derived() if found.forecast and found.actual else {}
    lines = [Text(f"{format_share(derived[key]):>8}  {words}" + (f"; forecast {format_share(foreseen[key])}" if key == "goodput"
                  and key in foreseen else "")) for key, words in shown if key in derived]
    lines += [Text(f"{'layout':>8}  {found.layouts}")] if found.layouts else []
    return lines + [Text(note, style="dim") for note in book.notes]
