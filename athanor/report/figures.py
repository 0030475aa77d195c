"""The figures at the head of the page and under each book, each with the name of its definition."""

from __future__ import annotations

from dataclasses import dataclass

from athanor.foundation.units import format_bytes, format_count, format_flops, format_rate, format_seconds, format_share
from athanor.ledger.book import Book
from athanor.ledger.reconcile import DEFINITIONS, Reconciliation
from athanor.report.run_record import Row, RunRecord

NO_BREAK = "\u00a0"
NAMES = {"mfu": "MFU", "mfu_full_attention": "MFU, full-square attention", "hfu": "HFU", "pd_6nd": "PD (6ND)",
         "goodput": "goodput", "end_to_end": "end to end", "unattributed_share": "unattributed", "bits_per_byte": "bits per byte"}


@dataclass(frozen=True)
class Figure:
    """A value in people's units, its name, the words after the name, and the key of its definition."""

    value: str
    name: str
    rest: str
    definition: str


def clock(seconds: float, least: int = 60) -> str:
    """`4:11`, `1:04:11`; `42 s` below `least` seconds."""
    whole = round(seconds)
    if whole < least:
        return format_seconds(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def signed_percent(ratio: float | None, digits: int = 0) -> str:
    """`+12 %`, `-3 %`, `0 %`; a dash when there is nothing to compare, `>+999 %` where digits would say no more."""
    if ratio is None:
        return "–"
    if abs(ratio) >= 9.995:
        return f"{'>+' if ratio > 0 else '<-'}999{NO_BREAK}%"
    text = f"{100 * ratio:+.{digits}f}"
    return ("0" if float(text) == 0 else text) + NO_BREAK + "%"


def headlines(record: RunRecord) -> list[Figure]:
    """Wall-clock, bits per byte, end to end, MFU and goodput, as far as the run has got."""
    figures = []
    leading = record.books[0] if record.books else None
    if leading:
        figures.append(_wall_clock(leading))
    bits = _bits_per_byte(record)
    if bits:
        figures.append(bits)
    if leading:
        book = leading.actual or leading.forecast
        assert book is not None, "a reconciliation has at least one book"
        figures += _ratios(book, leading.name, leading.forecast)
    return figures


def _wall_clock(leading: Reconciliation) -> Figure:
    forecast, actual, error = leading.forecast, leading.actual, leading.wall_error
    if actual is None:
        assert forecast is not None, "a reconciliation has at least one book"
        rest = f" of the {leading.name}, forecast; not measured yet"
        return Figure(clock(forecast.wall_seconds), "wall-clock", rest, "wall-clock")
    if leading.progress:
        rest = f" of {leading.name} so far ({leading.progress})"
        rest += f"; forecast {clock(forecast.wall_seconds)} in all" if forecast else ""
        return Figure(clock(actual.wall_seconds), "wall-clock", rest, "wall-clock")
    if forecast is None or error is None:
        return Figure(clock(actual.wall_seconds), "wall-clock", f" of the {leading.name}; there was no forecast", "wall-clock")
    foreseen = f"; forecast {clock(forecast.wall_seconds)}, "
    side = f"{format_share(abs(error)).replace(' ', NO_BREAK)} too {'high' if error > 0 else 'low'}"
    return Figure(clock(actual.wall_seconds), "wall-clock", foreseen + (side if abs(error) >= 0.0005 else "met"), "wall-clock")


def _bits_per_byte(record: RunRecord) -> Figure | None:
    for model, tasks in record.scores.items():
        score = tasks.get("bits_per_byte")
        if score:
            beside = ", ".join(f"{name}{NO_BREAK}{value:.2f}" for name, value in baselines(score))
            return Figure(f"{score['value']:.2f}", "bits per byte", f", held-out, {model}" + (f"; {beside}" if beside else ""),
                          "bits_per_byte")
    return None


def baselines(score: Row) -> list[tuple[str, float]]:
    """Bits per byte that xz and gzip need for the same bytes, from a score's details."""
    details = score.get("details", {})
    return [(name, float(details[key])) for name in ("xz", "gzip") for key in (name, f"{name}_bits_per_byte") if key in details]


def _ratios(book: Book, name: str, foreseen: Book | None) -> list[Figure]:
    derived, forecast = book.derived(), " (forecast)" if book.kind == "forecast" else ""
    of = "" if name == "whole chain" else f", {name}"
    figures = []
    if "end_to_end" in derived and derived["end_to_end"] > 0:
        figures.append(Figure(_percent(derived["end_to_end"]), "end to end", f"{of}: useful / paid device-seconds{forecast}",
                              "end_to_end"))
    if "mfu" in derived:
        full = derived.get("mfu_full_attention")
        beside = f"; {_percent(full)} with full-square attention" if full else ""
        hfu = "the same" if abs(derived["hfu"] - derived["mfu"]) < 5e-4 else _percent(derived["hfu"])
        figures.append(Figure(_percent(derived["mfu"]), "MFU", f", causal attention{beside}; HFU {hfu}{forecast}", "mfu"))
    if "goodput" in derived:
        beside = f"; forecast {_percent(foreseen.derived()['goodput'])}" if foreseen and not forecast else ""
        rest = f": kept stepping time / paid{forecast}{beside}"
        figures.append(Figure(_percent(derived["goodput"]), "goodput", rest, "goodput"))
    return figures


def _percent(share: float) -> str:
    return (f"{100 * share:.0f}" if share >= 0.0995 else f"{100 * share:.1f}") + NO_BREAK + "%"


def book_figures(found: Reconciliation) -> list[tuple[str, str, str, str]]:
    """(name, key of the definition, forecast, actual) of what a pair of books says besides its accounts."""
    rows = [("wall-clock", "wall-clock", [format_seconds(b.wall_seconds) for b in found.books.values()]),
            ("paid, device-seconds", "device-seconds", [f"{b.device_seconds:,.1f}" for b in found.books.values()]),
            ("devices", "", [f"{b.devices} × {b.accelerator}" for b in found.books.values()]),
            ("peak of one device", "", [format_rate(b.peak_flops) if b.peak_flops else "unknown" for b in found.books.values()])]
    if found.layouts:
        rows.append(("layout", "", [b.layout or "unknown" for b in found.books.values()]))
    if any(book.tokens for book in found.books.values()):
        rows += [("tokens", "", [format_count(b.tokens) for b in found.books.values()]),
                 ("model FLOPs (6ND)", "pd_6nd", [format_flops(b.model_flops) for b in found.books.values()])]
    for key in ("mfu", "mfu_full_attention", "hfu", "goodput", "end_to_end", "unattributed_share"):
        values = [book.derived().get(key) for book in found.books.values()]
        if any(value is not None for value in values):
            rows.append((NAMES[key], key, [format_share(round(v, 5) + 0.0) if v is not None else "–" for v in values]))
    for name, held, unit in (("money", [b.money for b in found.books.values()], ""),
                             ("energy", [b.energy_joules for b in found.books.values()], " J")):
        if any(value is not None for value in held):
            rows.append((name, "", [f"{value:,.2f}{unit}" if value is not None else "–" for value in held]))
    for kind in sorted({kind for book in found.books.values() for kind in book.memory_bytes}):
        peaks = [max(book.memory_bytes.get(kind, []), default=None) for book in found.books.values()]
        rows.append((f"memory, {kind}", "", [format_bytes(peak) if peak is not None else "–" for peak in peaks]))
    kinds = list(found.books)
    by_kind = [(name, key, dict(zip(kinds, values, strict=True))) for name, key, values in rows]
    return [(name, key, held.get("forecast", "–"), held.get("actual", "–")) for name, key, held in by_kind]


def definitions() -> dict[str, str]:
    """Every key that a figure of the page refers to, with its definition."""
    return {**DEFINITIONS,
            "wall-clock": "seconds from the start to the end, by the clock; of a chain, over all its invocations",
            "bits_per_byte": "-log2 of the probability that the model gives the held-out text, per byte of it; every byte is "
                             "scored, the first of each document included; xz -9 and gzip -9 compress exactly the same bytes",
            "interval": "95 % confidence interval of the score"}
