from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import athanor.planner
from athanor.cluster.spec import ClusterSpec
from athanor.cost.case import mean_context
from athanor.cost.coefficients import load
from athanor.cost.measured import Measured, Table
from athanor.foundation.errors import UserError
from athanor.foundation.layout import Layout
from athanor.models.shapes.decoder import DecoderShape
from athanor.models.shapes.find import new_shape
from athanor.planner.forecast import Forecaster, StageChoice
from athanor.planner.memory import fullest, peak_memory

PEAK, RATE, PASS_SECONDS = 2e10, 1e10, 1e-9
SHAPE = DecoderShape(vocab_size=4096, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
                     num_key_value_heads=4, head_dim=32, max_position_embeddings=256, tie_word_embeddings=True)
STAGE = StageChoice("pretrain", seq_len=256, micro_batch_size=8, num_microbatches=2, steps=100, precision="fp32",
                    checkpoint_every=25, evaluate_every=50, optimizer="adamw", document_tokens=1e9, evaluation_tokens=10_000)


def test_table_interpolates_between_logarithms_and_keeps_its_points() -> None:
    rows = [[m, k, m**1.5 * k**0.5] for m in (4, 16, 64) for k in (2, 8)]
    for extrapolate in (True, False):
        table = Table(rows, extrapolate)
        assert table(16, 8) == pytest.approx(16**1.5 * 8**0.5)
        assert table(30, 5) == pytest.approx(30**1.5 * 5**0.5), "a power law is a line between logarithms"
    assert Table(rows, True)(256, 32) == pytest.approx(256**1.5 * 32**0.5)
    assert Table(rows, False)(256, 32) == pytest.approx(64**1.5 * 8**0.5)
    with pytest.raises(UserError, match="lacks rows"):
        Table(rows[:-1], True)


def test_rates_follow_the_measured_laws(machine: ClusterSpec) -> None:
    rates = Measured(machine, "fp32")
    assert rates.matmul("forward", 1000, 200, 300) == pytest.approx(2 * 1000 * 200 * 300 / RATE)
    assert rates.linear(1000, 200, 300)[1] == pytest.approx(2 * rates.linear(1000, 200, 300)[0])
    assert rates.passes(50_000, copy=1, multiply=2) == pytest.approx(3 * PASS_SECONDS * 50_000)
    with pytest.raises(UserError, match="bf16 were not measured"):
        Measured(machine, "bf16")


def test_collectives_cost_latency_when_small(machine: ClusterSpec) -> None:
    curves = Measured(machine, "fp32").collective
    assert curves("all_reduce", 8) == curves("all_reduce", 4096)
    assert curves("all_gather", 2**26) == pytest.approx(2**26 / 1e9, rel=0.05)


def test_a_layer_without_a_gate_is_priced_without_one(machine: ClusterSpec) -> None:
    """GELU is a pass forward and a pass backward; SwiGLU multiplies, computes SiLU again and splits: five passes more, and two
    joined matrices to copy, forward and backward."""
    sizes = {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4,
             "max_position_embeddings": 256}
    plain, gated = (Forecaster(machine).step(new_shape(name, **sizes, **more), Layout(), STAGE).parts["elementwise"]
                    for name, more in (("gpt2", {}), ("llama", {"num_key_value_heads": 4, "head_dim": 32})))
    elements = 5 * 2048 * 352 + 4 * 128 * 352
    assert gated - plain == pytest.approx(load()["step"]["pass_factor"] * PASS_SECONDS * 4 * 2 * elements, rel=1e-6)


@pytest.mark.parametrize("layout", [Layout(dp_shard=2), Layout(tp=2), Layout()])
def test_accounts_of_a_step_add_up(machine: ClusterSpec, layout: Layout) -> None:
    step = Forecaster(machine).step(SHAPE, layout, STAGE)
    assert math.fsum(step.accounts.values()) == pytest.approx(step.seconds * layout.world_size)
    tokens = STAGE.global_batch_tokens(layout)
    assert step.accounts["useful"] == pytest.approx(SHAPE.flops(tokens, 128.5) / PEAK, rel=1e-3)
    assert ("data_parallel" in step.accounts) == (layout.dp_shard > 1)
    assert ("tensor" in step.accounts) == (layout.tp > 1)
    assert ("skew" in step.accounts) == (layout.world_size > 1)


def test_matmuls_of_a_step_are_their_flops_over_the_rate(machine: ClusterSpec) -> None:
    step, constants = Forecaster(machine).step(SHAPE, Layout(), STAGE), load()["step"]
    matrices = 4 * (4 * 128 * 128 + 3 * 128 * 352) + 4096 * 128
    flops = 6 * STAGE.global_batch_tokens(Layout()) * matrices
    assert step.parts["matmul"] == pytest.approx(constants["matmul_factor"] * flops / RATE)
    logits, hidden = 8 * 256 * 4096, 8 * 256 * 128
    passes = 2 * (2 * logits + 3 * hidden + 4096 * 128)
    assert step.parts["cross_entropy"] == pytest.approx(constants["pass_factor"] * passes * PASS_SECONDS)


def test_muon_costs_its_iteration_shared_over_ranks_and_two_messages(machine: ClusterSpec) -> None:
    forecaster = Forecaster(machine)
    steps = {(kind, ranks): forecaster.step(SHAPE, Layout(dp_shard=ranks), replace(STAGE, optimizer=kind)).accounts
             for kind in ("adamw", "muon") for ranks in (1, 2)}
    products = [(128, 128)] * 4 + [(128, 352)] * 3
    flops = 4 * 5 * sum(2 * 2 * r * r * c + 2 * r**3 for r, c in products)
    more = steps["muon", 1]["optimizer"] - steps["adamw", 1]["optimizer"]
    factor = load()["step"]["muon_factor"]
    assert factor * flops / RATE < more < 1.2 * factor * flops / RATE
    shared = steps["muon", 2]["optimizer"] - steps["adamw", 2]["optimizer"]
    assert shared == pytest.approx(more, rel=0.02), "device-seconds: half as long on twice the ranks"
    assert steps["muon", 2]["data_parallel"] > steps["adamw", 2]["data_parallel"]


def test_more_work_takes_more_time(machine: ClusterSpec) -> None:
    forecaster = Forecaster(machine)
    base = forecaster.step(SHAPE, Layout(dp_shard=2), STAGE).seconds
    for larger in (replace(SHAPE, num_hidden_layers=8), replace(SHAPE, hidden_size=192, num_attention_heads=6,
                                                                  num_key_value_heads=6), replace(SHAPE, intermediate_size=704)):
        assert forecaster.step(larger, Layout(dp_shard=2), STAGE).seconds > base
    slower = Forecaster(replace(machine, matmul=[[*row[:5], row[5] / 2] for row in machine.matmul]))
    step, slow = forecaster.step(SHAPE, Layout(), STAGE), slower.step(SHAPE, Layout(), STAGE)
    assert slow.seconds - step.seconds == pytest.approx(step.parts["matmul"])


def test_book_of_a_stage_closes_and_counts_saves_and_validations(machine: ClusterSpec) -> None:
    forecaster, layout = Forecaster(machine), Layout(dp_shard=2)
    book = forecaster.stage(SHAPE, layout, STAGE)
    assert book.accounts["unattributed"] == pytest.approx(0.0, abs=1e-6)
    assert book.kind == "forecast" and book.device_seconds == pytest.approx(2 * book.wall_seconds)
    assert book.tokens == 100 * 2 * 8 * 2 * 256
    waiting, save = forecaster.stage(SHAPE, layout, replace(STAGE, save_async=False)), forecaster.save_seconds(SHAPE, layout)
    assert waiting.accounts["checkpoint"] == pytest.approx(2 * (4 + 1) * save), "four and the model's folder, of two devices"
    saving, step = forecaster.saving(SHAPE, layout, True), forecaster.step(SHAPE, layout, STAGE)
    assert 0 < saving.blocked_seconds < 0.1 * save and 25 * step.seconds > saving.write_seconds, "the writes have room"
    assert book.accounts["checkpoint"] == pytest.approx(2 * (4 * saving.blocked_seconds + save + save)), (
        "the last write is waited for, as long as one that nothing goes on beside")
    slower = 2 * 3 * saving.slowed * saving.write_seconds
    assert book.accounts["kernel"] - waiting.accounts["kernel"] == pytest.approx(slower, rel=1e-6)
    saved = waiting.wall_seconds - book.wall_seconds
    assert 2 * saved == pytest.approx(waiting.accounts["checkpoint"] - book.accounts["checkpoint"] - slower)
    more = forecaster.stage(SHAPE, layout, replace(STAGE, evaluate_every=25))
    assert more.accounts["evaluation"] == pytest.approx(2 * book.accounts["evaluation"])
    assert book.model_flops < book.model_flops_full


def test_mean_context_is_that_of_documents_that_end_at_random() -> None:
    rng, seq_len, length, rows = np.random.default_rng(0), 256, 90, 4000
    ends = rng.random((rows, seq_len)) < 1 / length
    seen = np.zeros(rows)
    total = 0.0
    for position in range(seq_len):
        seen = np.where(ends[:, position], 1, seen + 1)
        total += seen.mean()
    assert mean_context(seq_len, length) == pytest.approx(total / seq_len, rel=0.02)
    assert mean_context(256, 1e9) == pytest.approx(128.5, rel=1e-3)


def test_memory_is_sharded_and_grows_with_rows() -> None:
    one = peak_memory(SHAPE, Layout(), rows=4, seq_len=256, dtype="fp32")
    two = peak_memory(SHAPE, Layout(dp_shard=2), rows=8, seq_len=256, dtype="fp32")
    assert one["parameters"] == [4 * SHAPE.parameters()] == [2 * two["parameters"][0]]
    assert two["activations"][0] == pytest.approx(2 * one["activations"][0], rel=0.06)
    tp = peak_memory(SHAPE, Layout(tp=2), rows=4, seq_len=256, dtype="fp32")
    assert tp["activations"][0] < one["activations"][0] and tp["parameters"][0] < one["parameters"][0]


# peaks that `athanor rehearse` found on 2026-11-29 (tests/train holds the rehearsal to real runs)
@pytest.mark.parametrize(("sizes", "layout", "options", "megabytes"), [
    ((64, 160, 4), Layout(), {"rows": 16, "num_microbatches": 1}, 84.6),
    ((128, 352, 6), Layout(), {"rows": 2, "num_microbatches": 8, "optimizer": "muon"}, 64.2),
    ((192, 512, 4), Layout(dp_shard=2), {"rows": 16, "seq_len": 128}, 150.2),
    ((128, 352, 6), Layout(dp_shard=2), {"rows": 8, "seq_len": 512, "optimizer": "muon"}, 241.8),
    ((128, 352, 6), Layout(tp=2), {"rows": 16}, 143.1),
    ((128, 352, 6), Layout(pp=2), {"rows": 2, "num_microbatches": 8, "optimizer": "muon"}, 62.6),
    ((192, 512, 4), Layout(pp=2), {"rows": 4, "seq_len": 128, "num_microbatches": 8, "schedule": "GPipe"}, 217.2),
    ((128, 352, 6), Layout(cp=2), {"rows": 16, "recompute": "full", "optimizer": "muon"}, 49.3),
    ((128, 352, 6), Layout(dp_shard=2), {"rows": 8, "seq_len": 512, "dtype": "bf16", "device_type": "cuda"}, 255.2),
    ((128, 352, 6), Layout(tp=2), {"rows": 16, "dtype": "bf16", "device_type": "cuda"}, 141.4)])
def test_memory_is_what_a_rehearsal_finds(sizes: tuple[int, int, int], layout: Layout, options: dict[str, Any],
                                          megabytes: float) -> None:
    hidden, inner, layers = sizes
    shape = DecoderShape(vocab_size=4096, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
                         num_attention_heads=hidden // 32, tie_word_embeddings=True)
    found = fullest(peak_memory(shape, layout, **{"seq_len": 256, "dtype": "fp32", **options}))
    assert found / 1e6 == pytest.approx(megabytes, rel=0.1)


def test_every_constant_of_the_file_is_dated_and_finite() -> None:
    constants = load()
    assert constants["date"] and constants["measured_on"]
    numbers = [value for table in constants.values() if isinstance(table, dict) for value in table.values()
               if isinstance(value, (int, float))]
    assert len(numbers) > 20 and all(math.isfinite(value) and value >= 0 for value in numbers)


def test_planning_loads_no_torch() -> None:
    files = Path(athanor.planner.__path__[0]).glob("*.py")
    modules = [f"athanor.planner.{file.stem}" for file in files if file.stem != "__init__"]
    code = f"import {', '.join(modules)}, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
