from __future__ import annotations

import json
import math

import numpy as np
import pytest
from click.testing import CliRunner

from athanor.cli.plan_goodput import command
from athanor.foundation.errors import UserError
from athanor.laws.goodput import DAY, Job, best_interval, faults_per_second, saving_seconds, within, young_interval
from athanor.ledger.accounts import NAMES


def rsc(faults: float, overhead: float, interval: float, save: float) -> float:
    """The effective training time ratio of Kokolis et al. 2024 (arXiv 2410.21680)."""
    return (1 - faults * (overhead + interval / 2)) / (1 + save / interval)


def test_rate_of_faults_agrees_with_published_runs() -> None:
    assert 86400 / DAY / faults_per_second(16384) / 3600 == pytest.approx(54 * 24 / 419, rel=2e-3), "Llama 3: one in 3.09 h"
    assert faults_per_second(1024) * DAY == pytest.approx(90 / 60, rel=0.1), "OPT-175B: about 90 restarts in two months"
    assert faults_per_second(384, per_day=0.0) * DAY == pytest.approx(1 / 7, rel=0.15), "BLOOM: a GPU a week"
    assert 0.4 < faults_per_second(1024) * DAY / (24 / 7.9) < 1, "RSC-1: 7.9 h, of many users' jobs, is worse"
    assert faults_per_second(1000, per_device_day=2e-3) * DAY == pytest.approx(2.0), "a given rate is the whole"


def test_seconds_of_a_save_agree_with_published_runs() -> None:
    assert saving_seconds(1e12, 273e9) == pytest.approx(13.8e12 / 273e9, rel=0.02), "the trillion-parameter run of SC21"
    assert saving_seconds(176e9, 57e9) == pytest.approx(40, rel=0.1), "BLOOM-176B"


@pytest.mark.parametrize("save", [0.01, 5.0, 120.0, 3600.0])
@pytest.mark.parametrize("faults", [1e-6, 1e-4, 1e-3])
def test_best_interval_is_where_a_search_finds_it(save: float, faults: float) -> None:
    tried = np.geomspace(1, 1e6, 200_001)
    renewal = np.log(tried) - faults * (tried + save) - np.log(-np.expm1(-faults * (tried + save)))  # up to a constant
    assert best_interval(save, faults) == pytest.approx(tried[np.argmax(renewal)], rel=1e-3)
    if faults * save < 1e-4:
        assert best_interval(save, faults) == pytest.approx(young_interval(save, faults), rel=0.01)


@pytest.mark.parametrize("job", [Job(30 * DAY, 30, 300, 600, 7.76 / DAY), Job(5 * DAY, 200, 60, 1800, 40 / DAY, 2000.0)])
def test_simulation_and_closed_form_agree(job: Job) -> None:
    trials = 4000
    drawn, expected = job.simulate(trials, seed=5), job.expect()
    assert set(expected) < set(NAMES)
    for name, seconds in expected.items():
        error = drawn[name].std() / math.sqrt(trials)
        assert abs(drawn[name].mean() - seconds) <= 4 * error + 1e-6 * seconds, name
    assert drawn["wall"].mean() == pytest.approx(job.wall_seconds, rel=2e-3)
    assert np.allclose(drawn["wall"], job.stepping_seconds + sum(drawn[name] for name in expected))
    assert drawn["wall"].std() > 0 and np.array_equal(drawn["wall"], job.simulate(trials, seed=5)["wall"])


def test_goodput_falls_off_on_both_sides_of_the_best_interval() -> None:
    job = Job(100 * DAY, 60, 300, 600, 2 / DAY)
    assert job.goodput > max(job.at_interval(job.interval * factor).goodput for factor in (0.5, 0.8, 1.25, 2))
    assert job.goodput >= job.at_interval(young_interval(60, 2 / DAY)).goodput


def test_published_goodput() -> None:
    """Where a paper leaves a time open, it is taken in favour of nobody: its upper bound, or minutes."""
    llama = Job(54 * DAY, 5, 120, 480, faults_per_second(16384))
    assert llama.goodput > 0.90, "Llama 3: more than 90 % with restarts within ten minutes"
    assert Job(54 * DAY, 5, 300, 1200, faults_per_second(16384)).goodput < 0.90, "and not with 25 minutes"
    mega = Job(21 * DAY, 5, 600, 900, 100 / (28 * DAY))  # 100 repairs in four weeks, at the bounds of what it promises
    assert mega.goodput > 0.90, "MegaScale: more than 90 %, noticed within 10 and caught up within 15 minutes"
    rate = 6.5e-3 / DAY * 512  # RSC-1, 4,096 GPUs
    hourly = Job(60 * DAY, 60, 120, 180, rate, interval=3600.0)
    assert hourly.goodput == pytest.approx(0.9, abs=0.02), "about 0.9 with a save an hour"
    assert hourly.goodput == pytest.approx(rsc(rate, 300, 3600, 60), abs=0.01)
    rare = Job(60 * DAY, 10, 60, 60, 0.05 / DAY, interval=1800.0)
    assert rare.goodput == pytest.approx(rsc(0.05 / DAY, 120, 1800, 10), abs=2e-5)


def test_impossible_jobs_are_refused_in_one_sentence() -> None:
    for arguments, message in (((DAY, 10, 0, 0, math.nan), "rate of faults = nan"), ((DAY, 0, 0, 0, 1e-5), "seconds = 0"),
                               ((DAY, 10, -1, 0, 1e-5), "detect seconds = -1"), ((DAY, 10, 0, 1e6, 1e-3), "less than 1 %"),
                               ((DAY, 10, 0, 1500, 4e-3), "leave less than 1 %")):
        with pytest.raises(UserError) as error:
            Job(*arguments)
        assert message in str(error.value)
    with pytest.raises(UserError, match="too many to draw"):
        Job(1e6 * DAY, 10, 60, 60, 1 / DAY).simulate()


def test_verb_goodput_prints_interval_accounts_and_finish() -> None:
    arguments = ["--devices", "16384", "--days-of-steps", "54", "--checkpoint-seconds", "5"]
    found = json.loads(CliRunner().invoke(command, [*arguments, "--json"], catch_exceptions=False).stdout)
    assert found["faults_per_day"] == pytest.approx(419 / 54, rel=2e-3)
    assert found["stepping_device_seconds"] + sum(found["accounts"].values()) == pytest.approx(found["device_seconds"])
    finish = found["finish_seconds"]
    assert 54 * DAY < finish["p10"] < finish["p50"] < finish["p90"]
    assert finish["mean"] == pytest.approx(found["wall_seconds"], rel=2e-3)
    more = json.loads(CliRunner().invoke(command, [*arguments, "--failures-per-1000-device-days", "1", "--json"]).stdout)
    assert more["faults_per_day"] == pytest.approx(16.384) and more["goodput"] < found["goodput"]
    done = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert not done.stdout and "Save every" in done.stderr and "checkpoint" in done.stderr and "P90" in done.stderr
    late = ["--devices", "1", "--days-of-steps", "4e6", "--checkpoint-seconds", "30", "--failures-per-1000-device-days", "0.001"]
    assert "after the year 9999" in CliRunner().invoke(command, late, catch_exceptions=False).stderr
    assert Job(DAY, 1e-25, 0, 0, 1e-9).goodput == pytest.approx(1), "no save is too short"
    for wrong, message in ((["--devices", "8", "--days-of-steps", "1"], "give --checkpoint-seconds"),
                           (["--devices", "0", *arguments[2:]], "devices = 0"),
                           ([*arguments, "--days-of-steps", "inf"], "days of steps = inf"),
                           ([*arguments, "--days-of-steps", "1e-300"], "days of steps = 1e-300"),
                           ([*arguments[:4], "--params", "1e9", "--write-rate", "0"], "write rate = 0"),
                           ([*arguments, "--failures-per-1000-device-days", "-3"], "= -3; it must be a number above 0")):
        error = CliRunner().invoke(command, wrong).exception
        assert isinstance(error, UserError) and message in str(error), wrong


def test_a_budget_of_the_calendar_leaves_what_the_expectation_says() -> None:
    for days in (0.5, 10.0, 54.0):
        job = within(days * DAY, 30.0, faults_per_second(16384))
        assert job.wall_seconds == pytest.approx(days * DAY, rel=2e-3) and job.wall_seconds <= days * DAY
        assert Job(1.01 * job.stepping_seconds, 30.0, 300.0, 600.0, job.faults).wall_seconds > days * DAY
    found = CliRunner().invoke(command, ["--devices", "16384", "--days", "54", "--checkpoint-seconds", "30", "--json"])
    printed = json.loads(found.stdout)
    assert printed["wall_seconds"] == pytest.approx(54 * DAY, rel=2e-3)
    assert printed["stepping_device_seconds"] == pytest.approx(16384 * 54 * DAY * printed["goodput"], rel=2e-3)
    for arguments in ([], ["--days", "3", "--days-of-steps", "2"]):
        with pytest.raises(UserError, match="either --days-of-steps, or --days"):
            CliRunner().invoke(command, ["--devices", "8", "--checkpoint-seconds", "30", *arguments], catch_exceptions=False)
