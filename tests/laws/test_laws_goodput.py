from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from athanor.cli.plan_goodput import command
from athanor.foundation.errors import UserError
from athanor.laws.goodput import (
    DAY,
    Job,
    Saving,
    best_interval,
    faults_per_second,
    improved,
    levers,
    mean_detection,
    saving_seconds,
    typical_saving,
    within,
    young_interval,
)
from athanor.laws.published import constants
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
    assert best_interval(Saving(save), faults) == pytest.approx(tried[np.argmax(renewal)], rel=1e-3)
    if faults * save < 1e-4:
        assert best_interval(Saving(save), faults) == pytest.approx(young_interval(save, faults), rel=0.01)


JOBS = [Job(30 * DAY, Saving(30), 300, 600, 7.76 / DAY), Job(5 * DAY, Saving(200), 60, 1800, 40 / DAY, 2000.0),
        Job(30 * DAY, Saving(5, 400, 0.2), 300, 600, 7.76 / DAY), Job(5 * DAY, Saving(20, 900, 0.3), 60, 1200, 40 / DAY, 1500.0),
        Job(2 * DAY, Saving(20, 1800, 0.25), 60, 300, 20 / DAY, 1000.0)]  # the last has no room for its writes


def happenings(job: Job, saved: int) -> Iterator[tuple[int, dict[str, float], int | None]]:
    """What a run does after a save while no fault comes: for which interval, seconds by account, which save is complete."""
    saving, left = job.saving, 0.0  # to write
    for interval in range(saved + 1, job.saves + 1):
        work = job.interval
        while work > 1e-9 * job.interval:
            if not left:
                yield interval, {"steps": work}, None
                break
            seconds = min(left, work / (1 - saving.slowed))
            work, left = work - seconds * (1 - saving.slowed), left - seconds
            yield interval, {"steps": seconds * (1 - saving.slowed), "kernel": seconds * saving.slowed}, (
                None if left else interval - 1)
        if left:
            yield interval, {"checkpoint": left}, interval - 1
        left = saving.write_seconds
        yield interval, {"checkpoint": saving.blocked_seconds}, None if left else interval
    if left:
        yield job.saves, {"checkpoint": left}, job.saves


def walk(job: Job, rng: np.random.Generator) -> dict[str, float]:
    """Seconds of one run by account, one thing after the other: a fault undoes all that no complete save holds."""
    saved, spent = 0, dict.fromkeys(("steps", "kernel", "checkpoint", "lost", "down", "startup"), 0.0)
    while saved < job.saves:
        life = rng.exponential(1 / job.faults)
        spent["startup"] += min(life, job.restart_seconds)
        life, unsaved = life - job.restart_seconds, list[tuple[int, dict[str, float]]]()
        for interval, seconds, complete in happenings(job, saved) if life > 0 else ():
            unsaved.append((interval, {"steps": life} if life < sum(seconds.values()) else seconds))
            life -= sum(seconds.values())
            if life < 0:
                break
            saved = complete or saved
            for _, kept in (held := [each for each in unsaved if each[0] <= saved]):
                for name, value in kept.items():
                    spent[name] += value
            unsaved = unsaved[len(held):]
        if saved < job.saves:
            spent["lost"] += sum(sum(seconds.values()) for _, seconds in unsaved)
            spent["down"] += job.detect_seconds
    return spent


@pytest.mark.parametrize("job", [replace(job, stepping_seconds=job.stepping_seconds / 5) for job in JOBS])
def test_closed_form_agrees_with_a_run_that_is_walked_through(job: Job) -> None:
    rng, trials = np.random.default_rng(11), 1500
    walked, expected = [walk(job, rng) for _ in range(trials)], job.expect()
    for name, seconds in {"steps": job.stepping_seconds, **expected}.items():
        values = np.array([each[name] for each in walked])
        assert abs(values.mean() - seconds) <= 4 * values.std() / math.sqrt(trials) + 1e-6 * job.stepping_seconds, name


def test_a_save_that_is_waited_for_is_the_special_case() -> None:
    for save, faults, restart in ((30.0, 9e-5, 600.0), (200.0, 5e-4, 1800.0)):
        job = Job(30 * DAY, Saving(save), 300.0, restart, faults)
        vain, again = math.expm1(faults * (job.interval + save)), math.expm1(faults * restart)  # Daly 2006
        starts = 1 + job.saves * vain
        assert job.expect() == pytest.approx({
            "kernel": 0.0, "checkpoint": job.saves * save, "lost": job.saves * (vain / faults - job.interval - save),
            "down": (job.saves * vain + starts * again) * 300.0, "startup": starts * again / faults})
        almost = Job(30 * DAY, Saving(save - 1e-6, 1e-6, 0.5), 300.0, restart, faults)
        assert almost.wall_seconds == pytest.approx(job.wall_seconds, rel=1e-7)


def test_a_fault_in_a_write_undoes_the_interval_before_it_too() -> None:
    """To first order a fault finds half an interval and the write, the steps since the last complete save."""
    faults, interval, write = 1e-7, 2000.0, 1500.0
    job = Job(1e7, Saving(1e-3, write), 0, 0, faults, interval)
    at_once = Job(1e7, Saving(1e-3), 0, 0, faults, interval)
    more = (job.expect()["lost"] - at_once.expect()["lost"]) / (faults * 1e7)  # seconds for each fault
    assert more == pytest.approx(write, rel=0.01)
    slower = Job(1e7, Saving(1e-3, write, 0.2), 0, 0, faults, interval)
    assert slower.expect()["kernel"] == pytest.approx((slower.saves - 1) * 0.2 * write, rel=1e-3)
    no_room = Job(1e7, Saving(1e-3, 3000.0), 0, 0, 1e-9, interval)
    assert no_room.expect()["checkpoint"] == pytest.approx(3000 + (no_room.saves - 1) * 1000, rel=1e-3), "each waits for the last"


@pytest.mark.parametrize("saving", [Saving(5, 400, 0.2), Saving(60, 60, 0.05), Saving(0.1, 5000, 0.0), Saving(1, 3000, 0.5)])
@pytest.mark.parametrize("faults", [1e-5, 1e-4])
def test_best_interval_of_asynchronous_saves_is_where_a_search_finds_it(saving: Saving, faults: float) -> None:
    def goodput(interval: float) -> float:
        return Job(1e5 * interval, saving, 0, 0, faults, interval).goodput  # so long that the first and the last do not matter

    best = best_interval(saving, faults)
    tried = np.geomspace(best / 20, 10 * best, 4001)
    assert best == pytest.approx(tried[np.argmax([goodput(float(interval)) for interval in tried])], rel=0.01)
    assert best >= (1 - saving.slowed) * saving.write_seconds, "the write has room"


def test_levers_say_what_would_bring_the_target() -> None:
    job, target = Job(54 * DAY, Saving(0.4, 2.8, 0.1), 300, 600, faults_per_second(16384)), 0.97
    found = {lever.name: lever for lever in levers(job, target)}
    assert list(found) == ["faults", "detection", "restart", "saves", "all together"]
    for name, lever in found.items():
        if lever.needed is None:
            assert lever.goodput_without < target
            assert improved(job, **{name: 1e-6}).goodput == pytest.approx(lever.goodput_without, rel=1e-4)
        else:
            names = ("faults", "detection", "restart", "saves") if name == "all together" else (name,)
            shares = dict.fromkeys(names, lever.needed / lever.now)
            assert improved(job, **shares).goodput == pytest.approx(target, abs=1e-6)
            assert improved(job, **{key: 0.98 * share for key, share in shares.items()}).goodput > target
    assert {name for name, lever in found.items() if lever.needed is None} == {"detection", "restart", "saves"}
    rate = (found["faults"].needed or 0.0) / DAY
    assert rate * (300 + 600 + 2.8) + math.sqrt(2 * rate * 0.68) == pytest.approx(1 / target - 1, rel=0.03), "to first order"
    assert (found["all together"].needed or 0) > rate / job.faults, "less of each when all come down"
    assert levers(job, 0.9) == [], "reached already"
    with pytest.raises(UserError, match="between 0 and 1"):
        levers(job, 97.0)


def test_kinds_of_faults_are_those_of_the_table() -> None:
    table = constants()["faults"]
    assert sum(kind["count"] for kind in table["kind"]) == 419
    software = sum(kind["count"] for kind in table["kind"] if "software" in kind["name"])
    assert table["per_day"] == pytest.approx(software / 54, rel=1e-3)
    assert table["per_device_day"] == pytest.approx((419 - software) / 54 / 16384, rel=1e-3)
    assert mean_detection(10.0, None) == 10.0
    assert mean_detection(10.0, 110.0, 0.25) == pytest.approx(35.0)
    assert mean_detection(0.0, 419.0) == pytest.approx(35 + 17 + 7 + 7 + 6), "network, system processors, cards, timeouts, silent"
    with pytest.raises(UserError, match="hang share = 2"):
        mean_detection(10.0, 60.0, 2.0)


@pytest.mark.parametrize("job", JOBS)
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
    job = Job(100 * DAY, Saving(60), 300, 600, 2 / DAY)
    assert job.goodput > max(job.at_interval(job.interval * factor).goodput for factor in (0.5, 0.8, 1.25, 2))
    assert job.goodput >= job.at_interval(young_interval(60, 2 / DAY)).goodput


def test_published_goodput() -> None:
    """Where a paper leaves a time open, it is taken in favour of nobody: its upper bound, or minutes."""
    llama = Job(54 * DAY, Saving(5), 120, 480, faults_per_second(16384))
    assert llama.goodput > 0.90, "Llama 3: more than 90 % with restarts within ten minutes"
    assert Job(54 * DAY, Saving(5), 300, 1200, faults_per_second(16384)).goodput < 0.90, "and not with 25 minutes"
    mega = Job(21 * DAY, Saving(5), 600, 900, 100 / (28 * DAY))  # 100 repairs in four weeks, at the bounds of what it promises
    assert mega.goodput > 0.90, "MegaScale: more than 90 %, noticed within 10 and caught up within 15 minutes"
    rate = 6.5e-3 / DAY * 512  # RSC-1, 4,096 GPUs
    hourly = Job(60 * DAY, Saving(60), 120, 180, rate, interval=3600.0)
    assert hourly.goodput == pytest.approx(0.9, abs=0.02), "about 0.9 with a save an hour"
    assert hourly.goodput == pytest.approx(rsc(rate, 300, 3600, 60), abs=0.01)
    rare = Job(60 * DAY, Saving(10), 60, 60, 0.05 / DAY, interval=1800.0)
    assert rare.goodput == pytest.approx(rsc(0.05 / DAY, 120, 1800, 10), abs=2e-5)


def test_a_run_of_next_to_no_steps_is_told_what_takes_the_time() -> None:
    with pytest.raises(UserError, match="leave less than 1 % of the time for steps"):
        Job(1e-25, Saving(0.5), 300.0, 600.0, 1e-6)


def test_impossible_jobs_are_refused_in_one_sentence() -> None:
    for arguments, message in (((DAY, Saving(10), 0, 0, math.nan), "rate of faults = nan"),
                               ((DAY, Saving(10), 0, -2, 1e-5), "restart seconds = -2"),
                               ((DAY, Saving(10), -1, 0, 1e-5), "detect seconds = -1"),
                               ((DAY, Saving(10), 0, 1e6, 1e-3), "less than 1 %"),
                               ((DAY, Saving(10), 0, 1500, 4e-3), "leave less than 1 %")):
        with pytest.raises(UserError) as error:
            Job(*arguments)
        assert message in str(error.value)
    for wrong, message in (((0.0,), "blocked seconds = 0"), ((1.0, -1.0), "write seconds = -1"),
                           ((1.0, 5.0, 1.0), "slowed = 1;")):
        with pytest.raises(UserError, match=message):
            Saving(*wrong)
    with pytest.raises(UserError, match="too many to draw"):
        Job(1e6 * DAY, Saving(10), 60, 60, 1 / DAY).simulate()


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
    beside = json.loads(CliRunner().invoke(command, [*arguments, "--save-async", "--slowed", "0.2", "--hang-seconds", "700",
                                                     "--hang-share", "0.5", "--target", "0.97", "--json"]).stdout)
    assert beside["blocked_seconds"] == pytest.approx(typical_saving(5.0, True).blocked_seconds) and beside["slowed"] == 0.2
    assert beside["accounts"]["kernel"] > 0 and beside["detect_seconds"] == pytest.approx(500) and beside["save_seconds"] == 5
    assert beside["stepping_device_seconds"] + sum(beside["accounts"].values()) == pytest.approx(beside["device_seconds"])
    needed = {lever["name"]: lever["needed"] for lever in beside["levers"]}
    assert needed["saves"] is None and 0 < needed["faults"] < 419 / 54
    told = CliRunner().invoke(command, [*arguments, "--target", "0.97"], catch_exceptions=False).stderr
    assert "is reached already" in CliRunner().invoke(command, [*arguments, "--target", "0.5"]).stderr
    assert "all together" in told and "cannot: " in told and "97.0 %" in told
    short = ["--devices", "1024", "--days-of-steps", "2", "--checkpoint-seconds", "5", "--restart-seconds", "120"]
    told = " ".join(CliRunner().invoke(command, short, catch_exceptions=False).stderr.split())
    hours = [float(each) for each in re.findall(r"P\d0 ([\d.]+) h ", told)]
    assert len(hours) == 3 and 48 <= hours[0] <= hours[1] <= hours[2] < 60 and "days (" not in told.partition("finish")[2]
    assert "5 min 00 s from a fault to new processes, and 2 min 00 s from these to the first step" in told
    rate = re.search(r"Counted with ([\d.]+) faults in 1,000 device-days", told)
    assert rate and float(rate[1]) == pytest.approx(1000 * faults_per_second(1024) * DAY / 1024, rel=5e-3)
    late = ["--devices", "1", "--days-of-steps", "4e6", "--checkpoint-seconds", "30", "--failures-per-1000-device-days", "0.001"]
    assert "after the year 9999" in CliRunner().invoke(command, late, catch_exceptions=False).stderr
    assert Job(DAY, Saving(1e-25), 0, 0, 1e-9).goodput == pytest.approx(1), "no save is too short"
    for wrong, message in ((["--devices", "8", "--days-of-steps", "1"], "give --checkpoint-seconds"),
                           (["--devices", "0", *arguments[2:]], "devices = 0"),
                           (["--devices", "0", "--days-of-steps", "1"], "devices = 0"),
                           ([*arguments, "--days-of-steps", "inf"], "days of steps = inf"),
                           ([*arguments, "--days-of-steps", "1e-300"], "days of steps = 1e-300"),
                           ([*arguments[:4], "--params", "1e9", "--write-rate", "0"], "write rate = 0"),
                           ([*arguments, "--slowed", "0.1"], "give --save-async, too"),
                           ([*arguments, "--save-async", "--slowed", "2"], "slowed = 2"),
                           ([*arguments, "--target", "50"], "goodput of 50 is no target"),
                           ([*arguments, "--failures-per-1000-device-days", "-3"], "= -3; it must be a number above 0")):
        error = CliRunner().invoke(command, wrong).exception
        assert isinstance(error, UserError) and message in str(error), wrong


def test_a_budget_of_the_calendar_leaves_what_the_expectation_says() -> None:
    for days in (0.5, 10.0, 54.0):
        job = within(days * DAY, Saving(30.0), faults_per_second(16384))
        assert job.wall_seconds == pytest.approx(days * DAY, rel=2e-3) and job.wall_seconds <= days * DAY
        assert Job(1.01 * job.stepping_seconds, Saving(30.0), 300.0, 600.0, job.faults).wall_seconds > days * DAY
    found = CliRunner().invoke(command, ["--devices", "16384", "--days", "54", "--checkpoint-seconds", "30", "--json"])
    printed = json.loads(found.stdout)
    assert printed["wall_seconds"] == pytest.approx(54 * DAY, rel=2e-3)
    assert printed["stepping_device_seconds"] == pytest.approx(16384 * 54 * DAY * printed["goodput"], rel=2e-3)
    for arguments in ([], ["--days", "3", "--days-of-steps", "2"]):
        with pytest.raises(UserError, match="either --days-of-steps, or --days"):
            CliRunner().invoke(command, ["--devices", "8", "--checkpoint-seconds", "30", *arguments], catch_exceptions=False)
