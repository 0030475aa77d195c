"""Schedules at their edges: no warm-up, warm-up alone, a single step, the last step; each against its formula."""

from __future__ import annotations

import math

import pytest

from athanor.train.schedule import SCHEDULES, learning_rate

PEAK = 0.5
LAST = {"constant": 1.0, "cosine": 0.1, "linear": 1 / 101, "wsd": 1 / 21}  # of 100 steps without warm-up, in peaks


def rates(schedule: str, steps: int, warmup: int) -> list[float]:
    return [learning_rate(step, steps, PEAK, warmup, schedule) / PEAK for step in range(1, steps + 1)]


def formula(schedule: str, step: int, steps: int, warmup: int) -> float:
    """The definitions, written down once more: with x the share of the fall that is done."""
    if step <= warmup:
        return step / warmup
    if schedule == "cosine":
        x = (step - warmup) / (steps - warmup)
        return 0.1 + 0.9 * (1 + math.cos(math.pi * x)) / 2
    if schedule == "linear":
        return 1 - (step - warmup) / (steps - warmup + 1)
    if schedule == "wsd":
        decay = max(1, round(steps / 5))
        x = max(0.0, (step - (steps - decay)) / (decay + 1))
        return 1 - x
    return 1.0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("steps", "warmup"), [(100, 0), (100, 1), (100, 20), (100, 99), (100, 100), (7, 2), (2, 1), (1, 0),
                                               (1, 1)])
def test_every_step_is_that_of_the_formula(schedule: str, steps: int, warmup: int) -> None:
    found = rates(schedule, steps, warmup)
    assert found == pytest.approx([formula(schedule, step, steps, warmup) for step in range(1, steps + 1)], rel=1e-12)
    assert all(0 < rate <= 1 for rate in found), "every step learns, and none faster than the peak"
    assert found[:warmup] == sorted(found[:warmup]) and found[warmup:] == sorted(found[warmup:], reverse=True)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_warm_up_it_begins_high_and_ends_where_it_says(schedule: str) -> None:
    found = rates(schedule, 100, 0)
    assert found[0] > 0.99 - 1 / 101 and found[-1] == pytest.approx(LAST[schedule])
    assert rates(schedule, 100, 10)[9] == 1.0, "the last step of warm-up has the peak"


def test_a_single_step_learns() -> None:
    assert {schedule: rates(schedule, 1, 0)[0] for schedule in SCHEDULES} == pytest.approx(
        {"constant": 1.0, "cosine": 0.1, "linear": 0.5, "wsd": 0.5})
    assert all(rates(schedule, 1, 1) == [1.0] for schedule in SCHEDULES)
