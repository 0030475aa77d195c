"""What whole measured steps teach the forecast: factors of computing and of gathers, and the cost of sharding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from athanor.cluster.spec import ClusterSpec
from athanor.foundation.layout import Layout
from athanor.models.shapes.decoder import DecoderShape
from athanor.planner.forecast import Forecaster, StageChoice, Step

LATENCY, BANDWIDTH = 1e-4, 1e9  # of the machine's collectives
SIZES = (4096, 128, 352, 4, 4, 1024, 256)
SHAPE = DecoderShape(*SIZES[:5], tie_word_embeddings=True)
STAGE = StageChoice("pretrain", seq_len=256, micro_batch_size=4, num_microbatches=1, steps=100, precision="fp32",
                    checkpoint_every=25, evaluate_every=50, optimizer="adamw", document_tokens=1e13)
SHARDED, CUT = Layout(dp_shard=2), Layout(tp=2)


def step(machine: ClusterSpec, layout: Layout, *rows: list[Any], shape: DecoderShape = SHAPE) -> Step:
    return Forecaster(replace(machine, devices=layout.world_size, steps=list(rows))).step(shape, layout, STAGE)


def row(ranks: int, seconds: float, waited: float = 0.0, tp: int = 1) -> list[Any]:
    return ["fp32", *SIZES, ranks, tp, seconds, waited]


def computing(found: Step) -> float:
    return sum(found.parts.values())


@pytest.mark.parametrize("factor", [0.7, 1.0, 1.6])
def test_a_measured_step_is_forecast_as_it_was_measured(machine: ClusterSpec, factor: float) -> None:
    before = step(machine, Layout())
    after = step(machine, Layout(), row(1, factor * computing(before)))
    assert computing(after) == pytest.approx(factor * computing(before))
    assert after.accounts["useful"] == pytest.approx(before.accounts["useful"]), "model FLOPs stay what they are"


def test_a_disturbed_measurement_is_trusted_to_a_third_and_to_threefold(machine: ClusterSpec) -> None:
    before = step(machine, Layout())
    for seconds, factor in ((1e-6, 1 / 3), (1e6, 3.0)):
        assert computing(step(machine, Layout(), row(1, seconds))) == pytest.approx(factor * computing(before))


def test_sharding_costs_what_it_took_in_collectives_and_beside_them(machine: ClusterSpec) -> None:
    before = step(machine, SHARDED)
    alone, waited, beside = computing(before) / 2, before.accounts["data_parallel"], 0.030
    after = step(machine, SHARDED, row(1, alone), row(2, alone + waited + beside, waited))
    assert after.accounts["data_parallel"] == pytest.approx(2 * waited), "the wall's seconds, on two devices"
    assert after.accounts["kernel"] == pytest.approx(before.accounts["kernel"] + 2 * beside)
    assert step(machine, Layout(dp_replicate=2), row(1, alone), row(2, alone + waited + beside, waited)).accounts[
        "kernel"] == pytest.approx(step(machine, Layout(dp_replicate=2)).accounts["kernel"]), "copies have no shards"


def test_keys_are_gathered_where_heads_do_not_divide(machine: ClusterSpec) -> None:
    odd = replace(SHAPE, hidden_size=96, num_attention_heads=3, num_key_value_heads=0)
    slow = {name: [[size, seconds * (3 if name in ("all_gather", "reduce_scatter") else 1)] for size, seconds in rows]
            for name, rows in machine.collectives.items()}
    machine = replace(machine, collectives=slow)
    whole = 2 * 96 * 1024 * 4  # bytes of keys and values of all tokens
    gathered = 4 * 2 * 1.3 * 3 * (LATENCY + whole / BANDWIDTH)  # 4 blocks, a gather and a scatter; 1.3 is collective_factor
    assert step(machine, Layout(cp=2), shape=odd).accounts["context"] == pytest.approx(2 * gathered, rel=0.1)
    part = 4 * 128 * 512 * 4  # queries, keys and values there, and what comes back, of half the tokens
    exchanged = 4 * 2 * 1.3 * (LATENCY + part / BANDWIDTH)
    assert step(machine, Layout(cp=2)).accounts["context"] == pytest.approx(2 * exchanged, rel=0.1)


def test_ranks_of_a_pipeline_exchange_no_matrices_of_muon(machine: ClusterSpec) -> None:
    stage = replace(STAGE, optimizer="muon", num_microbatches=4)
    found = Forecaster(machine).step(SHAPE, Layout(pp=2), stage)
    assert found.accounts.get("data_parallel", 0.0) == 0.0


def test_collectives_within_blocks_cost_what_they_took(machine: ClusterSpec) -> None:
    """A step of tensor parallelism, measured, in place of the factor; context parallelism's are like it."""
    before, before_cp = step(machine, CUT), step(machine, Layout(cp=2))
    waited = before.accounts["tensor"] / 2
    for factor in (0.5, 2.0):
        measured = row(1, 1.0, factor * waited, tp=2)
        assert step(machine, CUT, measured).accounts["tensor"] == pytest.approx(2 * factor * waited)
        assert step(machine, Layout(cp=2), measured).accounts["context"] == pytest.approx(factor * before_cp.accounts["context"])
        assert step(machine, CUT, measured).accounts["kernel"] == pytest.approx(before.accounts["kernel"])
    gpus = replace(machine, device_type="cuda")  # whose hosts do not wait
    assert step(gpus, CUT, row(1, 1.0, 0.1 * waited, tp=2)).accounts == step(gpus, CUT).accounts
