"""Evaluation takes a bounded share of a short budget, by fewer held-out rows and items; a long one reads them all."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from athanor.cluster.spec import ClusterSpec
from athanor.foundation.recipe import Recipe
from athanor.planner.plan import EVALUATION_SHARE, LEAST_ITEMS, Plan, make_plan

SCAN = {"bytes": 10_000_000, "documents": 5_000}
TASKS = 'evaluate.tasks=["bits_per_byte","identifiers","python_parses"]'
Toy = Callable[..., Recipe]


def seconds(plan: Plan, devices: int) -> tuple[float, float]:
    """Of the steps of all stages, and of all evaluation: validations and the chain's own."""
    stepping = sum(stage["steps"] * plan.steps[stage["name"]].seconds for stage in plan.values["stage"])
    return stepping, plan.forecast.accounts["evaluation"] / devices


def stage_of(plan: Plan, name: str) -> dict[str, Any]:
    return next(stage for stage in plan.values["stage"] if stage["name"] == name)


@pytest.mark.parametrize("minutes", [1, 2, 4])
def test_a_short_budget_is_not_spent_on_evaluation(machine: ClusterSpec, toy: Toy, minutes: float) -> None:
    slow = replace(machine, python={"loops_per_second": 15e6, "text_bytes_per_second": 10e6})
    recipe = toy(TASKS, f"budget.minutes={minutes}", "data.evaluation_share=0.2")
    plan = make_plan(recipe, slow, SCAN)
    stepping, evaluating = seconds(plan, slow.devices)
    limit = plan.values["evaluate"]["limit"]
    if limit > LEAST_ITEMS:
        assert evaluating <= EVALUATION_SHARE * stepping * 1.001
        assert evaluating >= 0.5 * EVALUATION_SHARE * stepping, "no less is read than there is room for"
        assert "15.0 %" in plan.reasons["evaluate.limit"] or "15 %" in plan.reasons["evaluate.limit"]
    whole = make_plan(toy(TASKS, f"budget.minutes={minutes}", "data.evaluation_share=0.2", "evaluate.limit=100000",
                          "stage.pretrain.evaluate_rows=100000", "stage.chat.evaluate_rows=100000"), slow, SCAN)
    assert seconds(whole, slow.devices)[1] > 1.5 * evaluating and "evaluate" not in whole.values
    filled = recipe.with_plan(tomllib.loads(plan.to_toml()))
    assert filled.evaluate.limit == limit and filled.origin("evaluate.limit") == "plan"


def test_validations_read_fewer_rows_where_time_is_short(machine: ClusterSpec, toy: Toy) -> None:
    short = make_plan(toy("budget.minutes=0.5", "data.evaluation_share=0.2"), machine, SCAN)
    stage, step = stage_of(short, "pretrain"), short.steps["pretrain"]
    batch = stage["micro_batch_size"] * 2
    assert stage["evaluate_rows"] % batch == 0 and "evaluate_rows" in "".join(short.reasons)
    spent = short.books["pretrain"].accounts["evaluation"] / 2
    one_batch = 2 * (step.forward_seconds + 64 * 1e-3 * short.values["model"]["num_hidden_layers"])  # and its samples
    assert spent <= max(0.03 * stage["steps"] * step.seconds, one_batch * 1.01)


def test_a_long_budget_reads_everything(machine: ClusterSpec, toy: Toy) -> None:
    plan = make_plan(toy(TASKS, "budget.minutes=4000"), machine, SCAN)
    assert "evaluate" not in plan.values and not any("evaluate_rows" in stage for stage in plan.values["stage"])
    assert not any("evaluate_rows" in key or key == "evaluate.limit" for key in plan.reasons)


def test_what_the_recipe_says_stays(machine: ClusterSpec, toy: Toy) -> None:
    plan = make_plan(toy(TASKS, "budget.minutes=1", "evaluate.limit=7", "stage.pretrain.evaluate_rows=64"), machine, SCAN)
    assert "evaluate" not in plan.values and stage_of(plan, "pretrain").get("evaluate_rows", 64) == 64


def test_a_busy_machine_is_told_again(machine: ClusterSpec, toy: Toy) -> None:
    busy, quiet = (make_plan(toy(), replace(machine, processor_share=share), SCAN).notes for share in (0.4, 0.98))
    assert any("other processes had 60 % of the processor time" in note for note in busy)
    assert not any("busy" in note for note in quiet)
