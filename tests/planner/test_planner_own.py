from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from athanor.cluster.spec import ClusterSpec
from athanor.cost.own import NAME, corrected, factors, record
from athanor.foundation.errors import UserError
from athanor.foundation.layout import Layout
from athanor.ledger.book import Book
from athanor.models.shapes.decoder import DecoderShape
from athanor.planner.forecast import Forecaster, StageChoice

SHAPE = DecoderShape(vocab_size=4096, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4)
STAGE = StageChoice("pretrain", seq_len=256, micro_batch_size=8, num_microbatches=2, steps=100, precision="fp32",
                    checkpoint_every=25, evaluate_every=50, optimizer="adamw", document_tokens=1e9,
                    save_async=False)  # so that steps are all that `kernel` holds
LAYOUT = Layout(tp=2)
TRUE = {"computing": 1.5, "tensor": 2.0, "optimizer": 0.7}


def actual_of(forecast: Book, by: dict[str, float], tokens: float = 1.0) -> Book:
    """What a machine does whose operations take so many times what is forecast without corrections."""
    book = replace(forecast, kind="actual", tokens=forecast.tokens * tokens, model_flops=forecast.model_flops * tokens)
    book.accounts = {name: seconds * tokens for name, seconds in corrected(forecast.accounts, by).items()}
    return book


def test_each_run_brings_the_forecast_nearer(machine: ClusterSpec, tmp_path: Path) -> None:
    raw = Forecaster(machine).stage(SHAPE, LAYOUT, STAGE)
    truth = Forecaster(machine, TRUE).step(SHAPE, LAYOUT, STAGE).seconds
    errors = []
    for _ in range(6):
        used = factors(tmp_path, machine)
        forecaster = Forecaster(machine, used)
        errors.append(abs(forecaster.step(SHAPE, LAYOUT, STAGE).seconds / truth - 1))
        record(tmp_path, machine, forecaster.stage(SHAPE, LAYOUT, STAGE), actual_of(raw, TRUE, tokens=0.5), used, "toy/pretrain")
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.25 and errors[-1] < 0.11
    found = factors(tmp_path, machine)
    assert found["computing"] == pytest.approx(1.5 ** (6 / 8)) and found["tensor"] == pytest.approx(2 ** (6 / 8))


def test_one_run_is_believed_to_a_third(machine: ClusterSpec, tmp_path: Path) -> None:
    raw = Forecaster(machine).stage(SHAPE, LAYOUT, STAGE)
    record(tmp_path, machine, raw, actual_of(raw, TRUE), {}, "toy/pretrain")
    assert factors(tmp_path, machine)["computing"] == pytest.approx(1.5 ** (1 / 3))
    assert factors(tmp_path, replace(machine, accelerator="another")) == {}


def test_a_corrected_step_still_adds_up_and_keeps_its_flops(machine: ClusterSpec) -> None:
    raw, step = (Forecaster(machine, by).step(SHAPE, LAYOUT, STAGE) for by in ({}, TRUE))
    assert math.fsum(step.accounts.values()) == pytest.approx(step.seconds * 2)
    assert step.accounts["useful"] == raw.accounts["useful"]
    assert step.accounts["useful"] + step.accounts["kernel"] == pytest.approx(
        1.5 * (raw.accounts["useful"] + raw.accounts["kernel"]))
    assert step.forward_seconds == pytest.approx(1.5 * raw.forward_seconds)


def test_what_was_not_planned_says_nothing(machine: ClusterSpec, tmp_path: Path) -> None:
    raw = Forecaster(machine).stage(SHAPE, LAYOUT, STAGE)
    other = replace(actual_of(raw, TRUE), model_flops=2 * raw.model_flops)
    record(tmp_path, machine, raw, other, {}, "toy/pretrain")
    record(tmp_path, machine, raw, replace(actual_of(raw, TRUE), devices=1), {}, "toy/pretrain")
    record(tmp_path, machine, raw, replace(actual_of(raw, TRUE), layout="dp_shard=2"), {}, "toy/pretrain")
    assert not (tmp_path / NAME).exists()


def test_damaged_rows_are_named(machine: ClusterSpec, tmp_path: Path) -> None:
    (tmp_path / NAME).write_text('{"machine": "x", "ratios": {}}\nnonsense\n')
    with pytest.raises(UserError, match=r"own_runs\.jsonl, line 2: not a row of a finished run"):
        factors(tmp_path, machine)
