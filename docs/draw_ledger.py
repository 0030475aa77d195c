"""Draws docs/ledger.svg, the README's picture, from the two books of a run.

    .venv/bin/python docs/draw_ledger.py runs/stdlib
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.sax.saxutils import escape

from athanor.foundation.run_folder import RunFolder
from athanor.foundation.units import format_seconds
from athanor.ledger.accounts import ACCOUNTS
from athanor.ledger.book import Book, read_book

WIDTH, LEFT, BAR = 980, 76, 780
SHARE_SHOWN = 0.01  # of the longer bar; smaller accounts have no row of their own


def draw(forecast: Book, actual: Book) -> str:
    """Two stacked bars on one scale, and the larger accounts with their error (forecast / actual - 1)."""
    longest = max(sum(s for s in book.accounts.values() if s > 0) for book in (forecast, actual))
    shown = [a for a in ACCOUNTS if max(b.accounts.get(a.name, 0.0) for b in (forecast, actual)) > SHARE_SHOWN * longest]
    height = 110 + 24 * -(-len(shown) // 2)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="system-ui,sans-serif" '
           f'font-size="13"><title>Forecast and actual device-seconds by account</title>',
           f'<rect width="{WIDTH}" height="{height}" rx="6" fill="#fbfaf6"/>']
    for row, (name, book) in enumerate((("forecast", forecast), ("actual", actual))):
        y, x = 16 + 38 * row, float(LEFT)
        out.append(f'<text x="14" y="{y + 18}" fill="#1c1b19">{name}</text>')
        for account in ACCOUNTS:
            width = max(0.0, book.accounts.get(account.name, 0.0)) / longest * BAR
            out.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="28" fill="{account.colour}"/>')
            if width > 7.2 * len(account.name):
                out.append(f'<text x="{x + width / 2:.1f}" y="{y + 18}" fill="#fff" font-size="11" text-anchor="middle">'
                           f"{account.name}</text>")
            x += width
        out.append(f'<text x="{WIDTH - 14}" y="{y + 18}" fill="#1c1b19" text-anchor="end">'
                   f"{format_seconds(book.wall_seconds)}</text>")
    for index, account in enumerate(shown):
        x, y = 14 + 490 * (index % 2), 116 + 24 * (index // 2)
        planned, spent = (book.accounts.get(account.name, 0.0) for book in (forecast, actual))
        error = f"{100 * (planned / spent - 1):+.0f} %" if spent > 0 else ""
        out.append(f'<rect x="{x}" y="{y - 10}" width="11" height="11" rx="2" fill="{account.colour}"/>'
                   f'<text x="{x + 18}" y="{y}" fill="#1c1b19">{account.name}'
                   f'<tspan fill="#6f6b63" font-size="12" dx="7">{escape(account.meaning[:38])}</tspan></text>'
                   f'<text x="{x + 455}" y="{y}" text-anchor="end" fill="#1c1b19">'
                   f"{planned:,.1f} | {spent:,.1f} s  {error}</text>")
    return "\n".join([*out, "</svg>"]) + "\n"


if __name__ == "__main__":
    run = RunFolder(Path(sys.argv[1]))
    (Path(__file__).parent / "ledger.svg").write_text(draw(read_book(run.forecast), read_book(run.actual)))
