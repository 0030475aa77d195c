"""Changes of a layout that runs out of memory: each fits when it is asked for itself, and they come cheapest first."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from athanor.cli.plan_estimate import command
from athanor.cost.memory import GIB
from athanor.models.shapes.find import find_shape
from athanor.planner.estimate import estimate
from athanor.planner.remedies import MOST_ODDS, _line, remedies

CASES = [("llama-3-8b", "H100-80 devices=8", "dp_shard=8 micro_batch_size=4 seq_len=8192"),
         ("llama-3-70b", "H100-80", "tp=4 pp=2 dp_shard=8 micro_batch_size=4 seq_len=8192"),
         ("llama-3-70b", "H100-80 devices=64", "dp_replicate=64 seq_len=8192"),
         ("llama-3-405b", "H100-80", "tp=8 pp=8 dp_shard=32 seq_len=8192 num_microbatches=16 stages_per_rank=4 split=3,30x4,3")]


@pytest.mark.parametrize(("model", "cluster", "layout"), CASES)
def test_each_remedy_fits_and_costs_what_it_says(model: str, cluster: str, layout: str) -> None:
    shape = find_shape(model)
    before = estimate(shape, cluster, layout)
    assert before["out_of_memory_probability"] > MOST_ODDS, "or there is nothing to mend"
    found = remedies(shape, cluster, before)
    assert 1 <= len(found) <= 3 and [each.costs for each in found] == sorted(each.costs for each in found)
    for each in found:
        changes = dict(change.split("=") for change in each.changes)
        kept = {key: value for key, value in before["layout"].items() if key not in ("num_microbatches", *changes)
                and not (key == "split" and "pp" in changes)}
        after = estimate(shape, cluster, _line(kept | changes))
        assert after["out_of_memory_probability"] <= MOST_ODDS
        assert after["devices"] == before["devices"]
        assert after["layout"]["global_batch_tokens"] == before["layout"]["global_batch_tokens"]
        assert each.costs == pytest.approx(after["step_seconds"] / before["step_seconds"] - 1)
        assert each.saves_bytes == pytest.approx((max(before["memory_gib"]) - max(after["memory_gib"])) * GIB)


def test_one_change_is_enough_where_it_is() -> None:
    shape, cluster = find_shape("llama-3-8b"), "H100-80 devices=8"
    before = estimate(shape, cluster, "dp_shard=8 micro_batch_size=2 seq_len=8192")
    alone = estimate(shape, cluster, "dp_shard=8 micro_batch_size=2 seq_len=8192 recompute=full")
    assert alone["out_of_memory_probability"] <= MOST_ODDS, "one choice does it"
    for each in remedies(shape, cluster, before):
        assert len({change.partition("=")[0] for change in each.changes} - {"dp_shard", "sequence_parallel"}) == 1, each


def test_what_fits_or_cannot_has_none(tmp_path: object) -> None:
    shape = find_shape("llama-3-8b")
    assert remedies(shape, "H100-80 devices=8", estimate(shape, "H100-80 devices=8", "dp_shard=8 seq_len=4096")) == []
    large = find_shape("llama-3-405b")
    assert remedies(large, "H100-80", estimate(large, "H100-80", "dp_shard=1 seq_len=4096")) == []


def test_the_verb_names_them() -> None:
    arguments = ["--model", CASES[2][0], "--cluster", CASES[2][1], "--layout", CASES[2][2]]
    people, machine = CliRunner().invoke(command, arguments), CliRunner().invoke(command, [*arguments, "--json"])
    assert "What would fit" in people.stderr and "zero=3" in people.stderr and "saves about" in people.stderr
    assert json.loads(machine.stdout)["remedies"][0]["changes"]
    hopeless = CliRunner().invoke(command, ["--model", "llama-3-405b", "--cluster", "H100-80", "--layout", "dp_shard=1"])
    assert "athanor plan search" in hopeless.stderr and "What would fit" not in hopeless.stderr
