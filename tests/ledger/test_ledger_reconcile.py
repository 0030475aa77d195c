"""Books side by side: errors, shares, and where in the chain an account's seconds lay."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from athanor.foundation.errors import UserError
from athanor.ledger.accounts import NAMES
from athanor.ledger.book import Book, Kind, total
from athanor.ledger.reconcile import DEFINITIONS, WHOLE_CHAIN, Line, reconcile, reconcile_run


def book(kind: Kind, wall: float, **accounts: float) -> Book:
    made = Book(kind, 2, "CPU", 1e10, wall_seconds=wall, device_seconds=2 * wall, tokens=100.0, model_flops=1e10)
    for name, seconds in accounts.items():
        made.add(name, seconds)
    return made.close()


def by_name(lines: object) -> dict[str, Line]:
    return {line.account.name: line for line in lines}  # type: ignore[attr-defined]


def test_an_error_is_forecast_over_actual_minus_one() -> None:
    found = reconcile("pretrain", book("forecast", 110, useful=120, kernel=60),
                      book("actual", 100, useful=100, kernel=80, skew=4))
    lines = by_name(found.lines)
    assert lines["useful"].error == pytest.approx(0.2) and lines["useful"].error_seconds == pytest.approx(20)
    assert lines["kernel"].error == pytest.approx(-0.25) and lines["kernel"].error_seconds == pytest.approx(-20)
    assert lines["skew"].error == -1.0 and lines["skew"].forecast == 0.0
    assert lines["useful"].share == pytest.approx(0.5)
    assert lines["unattributed"].forecast == pytest.approx(40) and lines["unattributed"].actual == pytest.approx(16)
    assert found.wall_error == pytest.approx(0.1)


def test_lines_stand_in_the_ledgers_order_and_empty_accounts_are_left_out() -> None:
    found = reconcile("a", None, book("actual", 10, skew=2, useful=10, startup=3))
    assert [line.account.name for line in found.lines] == ["useful", "skew", "startup", "unattributed"]


def test_there_is_no_error_where_a_book_is_missing_or_the_actual_is_not_above_zero() -> None:
    alone = reconcile("a", book("forecast", 10, useful=10), None)
    assert alone.wall_error is None and all(line.error is None and line.actual is None for line in alone.lines)
    assert by_name(alone.lines)["useful"].share == pytest.approx(0.5)
    both = by_name(reconcile("a", book("forecast", 10, useful=10, input=1), book("actual", 10, useful=22)).lines)
    assert both["unattributed"].actual == pytest.approx(-2) and both["unattributed"].error is None
    assert both["input"].error is None and both["input"].error_seconds == 1
    with pytest.raises(ValueError, match="no book of a"):
        reconcile("a", None, None)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.sampled_from([n for n in NAMES if n != "unattributed"]), st.floats(0, 1e6), max_size=8),
       st.dictionaries(st.sampled_from([n for n in NAMES if n != "unattributed"]), st.floats(0, 1e6), max_size=8),
       st.floats(1, 1e6))
def test_lines_add_up_to_what_was_paid(forecast: dict[str, float], actual: dict[str, float], wall: float) -> None:
    found = reconcile("a", book("forecast", 2 * wall, **forecast), book("actual", wall, **actual))
    assert math.fsum(line.actual or 0 for line in found.lines) == pytest.approx(2 * wall, rel=1e-7, abs=1e-6)
    assert math.fsum(line.forecast or 0 for line in found.lines) == pytest.approx(4 * wall, rel=1e-7, abs=1e-6)
    assert math.fsum(line.share for line in found.lines) == pytest.approx(1, abs=1e-6)
    assert math.fsum(line.error_seconds or 0 for line in found.lines) == pytest.approx(2 * wall, rel=1e-6, abs=1e-5)


def test_a_run_has_the_chain_first_and_says_in_which_stage_the_seconds_lay(tmp_path: Path) -> None:
    stages = {"pretrain": book("actual", 50, useful=60, startup=8), "chat": book("actual", 10, useful=12)}
    for name, actual in stages.items():
        (tmp_path / name).mkdir()
        actual.write(tmp_path / name / "actual.json")
    book("forecast", 9, useful=11).write(tmp_path / "chat" / "forecast.json")
    data = book("actual", 8, data=16, startup=1)
    total([*stages.values(), data], "actual", wall_seconds=70, devices=2).write(tmp_path / "actual.json")
    found = reconcile_run(tmp_path, ["pretrain", "chat", "never started"])
    assert [f.name for f in found] == [WHOLE_CHAIN, "pretrain", "chat"]
    lines = by_name(found[0].lines)
    assert lines["useful"].parts == {"pretrain": 60.0, "chat": 12.0} and lines["useful"].actual == 72.0
    assert lines["startup"].parts == {"pretrain": 8.0, "other steps": pytest.approx(1)}
    assert lines["data"].parts == {"other steps": pytest.approx(16)}
    assert found[1].forecast is None and found[2].forecast is not None


def test_parts_of_a_forecast_are_those_of_forecasts(tmp_path: Path) -> None:
    (tmp_path / "pretrain").mkdir()
    book("forecast", 50, useful=60).write(tmp_path / "pretrain" / "forecast.json")
    book("actual", 50, useful=70).write(tmp_path / "pretrain" / "actual.json")
    book("forecast", 60, useful=60).write(tmp_path / "forecast.json")
    assert by_name(reconcile_run(tmp_path, ["pretrain"])[0].lines)["useful"].parts == {"pretrain": 60.0}


def test_a_file_that_is_no_book_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "actual.json").write_text("{}")
    with pytest.raises(UserError, match=r"actual\.json is not a book"):
        reconcile_run(tmp_path, [])


def test_json_holds_the_errors_in_si_units() -> None:
    value = reconcile("a", book("forecast", 110, useful=120), book("actual", 100, useful=100)).to_json()
    assert json.loads(json.dumps(value, allow_nan=False)) == value
    assert value["accounts"]["useful"] == {"forecast": 120.0, "actual": 100.0, "share": 0.5, "error_seconds": 20.0,
                                           "error": pytest.approx(0.2), "evidence": "measured"}
    assert value["actual"]["derived"]["end_to_end"] == 0.5


def test_every_derived_figure_is_defined_and_none_is_called_an_efficiency() -> None:
    assert set(book("actual", 10, useful=5).derived()) <= set(DEFINITIONS)
    assert "efficien" not in json.dumps(DEFINITIONS).lower()


def test_what_rounding_leaves_over_is_no_account() -> None:
    made = book("forecast", 10, useful=0.1 + 0.2, kernel=19.7)
    made.accounts["unattributed"] = -3e-15
    assert [line.account.name for line in reconcile("a", made, None).lines] == ["useful", "kernel"]
