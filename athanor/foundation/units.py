"""Numbers in files are SI; here they become what people read."""

from __future__ import annotations

import re
from decimal import Decimal

from athanor.foundation.errors import UserError

PD_FLOP = 8.64e19  # one petaFLOP/s for a day
GIB = 2**30
MOST = 1e30  # beyond it products of figures overflow
COUNT = re.compile(r"([+-]?(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|[\d_.]+(?:e[+-]?\d+)?)) ?([kmbt]?)", re.IGNORECASE)
FACTORS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def format_seconds(seconds: float) -> str:
    """`0.31 s`, `42 s`, `4 min 05 s`, `3 h 12 min`, `13.8 days`."""
    if seconds < 0:
        return "-" + format_seconds(-seconds)
    if seconds < 0.0995:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 9.95:
        return f"{seconds:.2f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    if seconds < 2 * 86400:
        hours, rest = divmod(round(seconds / 60), 60)
        return f"{hours} h {rest:02d} min"
    return f"{seconds / 86400:.1f} days"


def format_count(count: float) -> str:
    """`950`, `12.3 k`, `4.00 M`, `245.7 B`, `1.50 T`: parameters, tokens, documents."""
    for limit, divisor, suffix in ((1e3, 1, ""), (1e6, 1e3, " k"), (1e9, 1e6, " M"), (1e12, 1e9, " B")):
        if abs(count) < limit:
            return f"{count:.0f}" if divisor == 1 else f"{count / divisor:.3g}{suffix}"
    return f"{count / 1e12:.3g} T"


def read_count(text: str) -> int | float:
    """What `format_count` prints, and what people write: `950`, `1e6`, `2.5B`, `15T`, `245.7 B`, `8,388,608`; decimal.

    Whole numbers come as int. Raises ValueError for anything else.
    """
    found = COUNT.fullmatch(text.strip())
    try:
        value = Decimal(found[1].replace(",", "")) * FACTORS[found[2].lower()] if found else Decimal("nan")
        if abs(value) < MOST:
            return int(value) if value == int(value) else float(value)
    except ArithmeticError:  # several points, an exponent beyond all numbers, or no number at all
        pass
    raise ValueError("a number such as 4096, 1e6, 2.5B or 15T is expected")


def format_bytes(count: float) -> str:
    """Decimal: `512 B`, `12.2 MB`, `3.40 GB`."""
    for limit, divisor, suffix in ((1e3, 1, "B"), (1e6, 1e3, "kB"), (1e9, 1e6, "MB"), (1e12, 1e9, "GB")):
        if abs(count) < limit:
            return f"{count / divisor:.3g} {suffix}"
    return f"{count / 1e12:.3g} TB"


def format_flops(flop: float) -> str:
    """A count of floating-point operations in PD (8.64e19 FLOP), or with a plain exponent where PD would be tiny."""
    pd = flop / PD_FLOP
    return f"{pd:,.3g} PD" if pd >= 1e-3 else f"{flop:.3g} FLOP ({pd:.2g} PD)"


def format_rate(flop_per_second: float) -> str:
    """`94.1 GFLOP/s`, `312 TFLOP/s`."""
    for limit, divisor, suffix in ((1e9, 1e6, "M"), (1e12, 1e9, "G"), (1e15, 1e12, "T")):
        if flop_per_second < limit:
            return f"{flop_per_second / divisor:.3g} {suffix}FLOP/s"
    return f"{flop_per_second / 1e15:.3g} PFLOP/s"


def format_share(share: float, digits: int = 1) -> str:
    return f"{100 * share:z.{digits}f} %"


def check_positive(**values: float | None) -> None:
    """Raises UserError for a value that is given and not a number above 0 (or beyond what is computed with), by its name."""
    for name, value in values.items():
        if value is not None and not 1 / MOST < value < MOST:
            raise UserError(f"{name.replace('_', ' ')} = {value:g}; it must be a number above 0 and below {MOST:g}")
