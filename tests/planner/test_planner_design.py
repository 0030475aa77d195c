from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from athanor.cli.plan_design import command
from athanor.cli.plan_search import command as search
from athanor.cost.calibrate import coefficients, rewritten
from athanor.foundation.errors import UserError
from athanor.models.shapes.find import find_shape

BASE = ["--params", "8e9", "--global-batch-tokens", "4194304", "--top", "100"]


def designs(*options: str) -> dict[str, object]:
    done = CliRunner().invoke(command, [*BASE, *options, "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_shapes_of_one_size_are_ranked_for_loss_and_speed() -> None:
    found = designs("--cluster", "H100-80 devices=256 nic_gbps=400", "--pd", "2000")
    rows = found["designs"]
    assert isinstance(rows, list) and len(rows) == found["fitting"] > 20
    costs = [row["cost"] for row in rows]
    assert all(cost == pytest.approx(ordered, rel=0.02) for cost, ordered in zip(costs, sorted(costs), strict=True))
    assert rows[0]["num_key_value_heads"] % 8 == 0, "a node's"
    assert all(abs(row["parameters"] / 8e9 - 1) <= 0.02 for row in rows)
    for row in rows:  # days are what the tokens take
        assert row["device_days"] * 86400 == pytest.approx(row["tokens"] * row["seconds_per_token"])
    deep, wide = max(rows, key=lambda row: row["num_hidden_layers"]), min(rows, key=lambda row: row["num_hidden_layers"])
    assert wide["seconds_per_token"] < deep["seconds_per_token"], "wider and shallower is faster at equal parameters"
    assert 16 <= rows[0]["num_hidden_layers"] <= 64
    assert "Laws of loss do not tell depth from width" in str(found["why"])


def test_the_best_is_written_as_search_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "best.json"
    found = designs("--cluster", "H100-80 devices=16", "--pd", "2000", "--tp", "8", "--out", str(file))
    rows = found["designs"]
    assert isinstance(rows, list)
    for row in rows:
        assert row["num_attention_heads"] % 8 == row["num_key_value_heads"] % 8 == row["intermediate_size"] % 8 == 0
    shape = find_shape(file)
    assert shape.parameters() == rows[0]["parameters"] and shape.num_hidden_layers == rows[0]["num_hidden_layers"]
    arguments = [*BASE, "--cluster", "H100-80 devices=16", "--pd", "2000", "--tp", "8", "--out", str(file)]
    done = CliRunner().invoke(command, arguments, catch_exceptions=False)
    said = shlex.split(done.stderr.splitlines()[-1])
    assert said[:3] == ["athanor", "plan", "search"] and str(file) in said
    best = json.loads(CliRunner().invoke(search, [*said[3:], "--json"], catch_exceptions=False).stdout)["layouts"][0]
    assert best["step_seconds"] * 16 / 4194304 == pytest.approx(rows[0]["seconds_per_token"], rel=0.02)


@pytest.mark.slow
def test_coefficients_of_ones_own_scale_search_and_design(tmp_path: Path) -> None:
    """A factor of 1.25 on every step makes the same layouts and shapes 1.25 times slower."""
    file = tmp_path / "own.toml"
    file.write_text(rewritten({"time": {"own": 1.25 * coefficients("time").mapping()["own"]}}, "one run"))
    words = ["--cluster", "H100-80 devices=16"]
    plain, slow = (designs(*words, "--device-days", "900", *more)["designs"] for more in ([], ["--coefficients", str(file)]))
    assert isinstance(plain, list) and isinstance(slow, list)
    keys = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_key_value_heads")
    times = {tuple(row[key] for key in keys): row["seconds_per_token"] for row in plain}
    for row in slow:
        assert row["seconds_per_token"] == pytest.approx(1.25 * times[tuple(row[key] for key in keys)])
    ask = ["--model", "llama-3-8b", *words, "--global-batch-tokens", "4194304", "--json"]
    found = [json.loads(CliRunner().invoke(search, [*ask, *more], catch_exceptions=False).stdout)["layouts"][0] for more in (
        [], ["--coefficients", str(file)])]
    assert found[1]["step_seconds"] == pytest.approx(1.25 * found[0]["step_seconds"])
    with pytest.raises(UserError, match="is no file of coefficients"):
        CliRunner().invoke(search, [*ask, "--coefficients", str(tmp_path / "none.toml")], catch_exceptions=False)


def test_what_cannot_be_designed_is_said() -> None:
    for options, words in (
            (["--cluster", "H100-80", "--pd", "1"], "on how many H100-80"),
            (["--cluster", "H100-80 devices=8", "--pd", "1", "--seq-len", "0"], "seq len = 0"),
            (["--cluster", "H100-80 devices=8", "--pd", "1", "--global-batch-tokens", "7"], "not a multiple of seq_len"),
            (["--cluster", "H100-80 devices=8", "--pd", "1", "--precision", "bf61"], "did you mean 'bf16'"),
            (["--cluster", "H100-80 devices=8", "--pd", "1e300"], "pd = 1e\\+300"),
            (["--cluster", "H100-80 devices=8"], "one budget: pd or device_days"),
            (["--cluster", "V100-32 devices=1", "--pd", "1", "--precision", "fp16"], "none of .* fits on 1 V100-32")):
        with pytest.raises(UserError, match=words):
            CliRunner().invoke(command, [*BASE, *options], catch_exceptions=False)
