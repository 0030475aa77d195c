from __future__ import annotations

import pytest

from athanor.foundation.units import PD_FLOP, format_bytes, format_count, format_flops, format_rate, format_seconds


@pytest.mark.parametrize(("value", "text"), [
    (0.0123, "12.3 ms"), (0.31, "0.31 s"), (42.4, "42 s"), (245, "4 min 05 s"), (3599.7, "60 min 00 s"), (11520, "3 h 12 min"),
    (1192320, "13.8 days"), (-2, "-2.00 s")])
def test_seconds(value: float, text: str) -> None:
    assert format_seconds(value) == text


def test_other_units() -> None:
    assert (format_count(950), format_count(1.3e6), format_count(245.7e9)) == ("950", "1.3 M", "246 B")
    assert (format_bytes(12.15e6), format_bytes(512)) == ("12.2 MB", "512 B")
    assert format_flops(3640 * PD_FLOP) == "3.64e+03 PD" or format_flops(3640 * PD_FLOP) == "3,640 PD"
    assert format_rate(94.1e9) == "94.1 GFLOP/s" and format_rate(312e12) == "312 TFLOP/s"
