from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from athanor.cli.plan_design import command
from athanor.foundation.errors import UserError

BASE = ["--params", "8e9", "--global-batch-tokens", "4194304", "--top", "100"]


def designs(*options: str) -> dict[str, object]:
    done = CliRunner().invoke(command, [*BASE, *options, "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_shapes_of_one_size_are_ranked_for_loss_and_speed() -> None:
    found = designs("--cluster", "H100-80 devices=256 nic_gbps=400", "--pd", "2000")
    rows = found["designs"]
    assert isinstance(rows, list) and len(rows) == found["fitting"] > 20
    assert [row["cost"] for row in rows] == sorted(row["cost"] for row in rows)
    assert all(abs(row["parameters"] / 8e9 - 1) <= 0.02 for row in rows)
    for row in rows:  # days are what the tokens take
        assert row["device_days"] * 86400 == pytest.approx(row["tokens"] * row["seconds_per_token"])
    deep, wide = max(rows, key=lambda row: row["num_hidden_layers"]), min(rows, key=lambda row: row["num_hidden_layers"])
    assert wide["seconds_per_token"] < deep["seconds_per_token"], "wider and shallower is faster at equal parameters"
    assert 16 <= rows[0]["num_hidden_layers"] <= 64
    assert "Laws of loss do not tell depth from width" in str(found["why"])


def test_what_cannot_be_designed_is_said() -> None:
    for options, words in (
            (["--cluster", "H100-80", "--pd", "1"], "on how many H100-80"),
            (["--cluster", "H100-80 devices=8", "--pd", "1", "--seq-len", "0"], "seq len = 0"),
            (["--cluster", "H100-80 devices=8", "--pd", "1", "--global-batch-tokens", "7"], "not a multiple of seq_len"),
            (["--cluster", "H100-80 devices=8", "--pd", "1", "--precision", "bf61"], "did you mean 'bf16'"),
            (["--cluster", "H100-80 devices=8", "--pd", "1e300"], "pd = 1e\\+300"),
            (["--cluster", "H100-80 devices=8"], "one budget: pd or device_days"),
            (["--cluster", "V100-32 devices=1", "--pd", "1"], "none of .* fits on 1 V100-32")):
        with pytest.raises(UserError, match=words):
            CliRunner().invoke(command, [*BASE, *options], catch_exceptions=False)
