"""The page of goodput on 16,384 devices says what its script prints, and the script what the verb says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from athanor.cli.plan_goodput import command

ROOT = Path(__file__).parents[2]


def test_the_page_holds_every_table_of_its_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import goodput

    text, result = (ROOT / "docs" / "goodput.md").read_text(), goodput.found()
    for table in goodput.tables(result):
        assert table in text, table.partition("\n")[0]
    rows = {row["name"]: row for row in result["cases"]}
    common = ["--devices", "16384", "--days-of-steps", "54", "--params", "405B", "--write-rate", "2T", "--save-async", "--json"]
    defaults = json.loads(CliRunner().invoke(command, [*common, "--target", "0.97"], catch_exceptions=False).stdout)
    assert defaults["goodput"] == pytest.approx(rows["the planner's defaults, 5 and 10 minutes"]["goodput"], rel=1e-9)
    assert defaults["levers"] == result["levers"]["the planner's defaults, 5 and 10 minutes"]
    grown = json.loads(CliRunner().invoke(command, [*common, "--detect-seconds", "0.1", "--hang-seconds", "64",
                                                    "--restart-seconds", "47"], catch_exceptions=False).stdout)
    assert grown["goodput"] == pytest.approx(rows["with what grows with size"]["goodput"], abs=2e-4)
    assert all(0 < row["goodput"] < 1 and abs(row["goodput"] + sum(row["shares"].values()) - 1) < 1e-9 for row in rows.values())
