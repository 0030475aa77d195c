"""What faults, saves and restarts take: the best interval between saves, expected goodput, and when a run will be finished."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from athanor.foundation.errors import UserError
from athanor.foundation.units import check_positive
from athanor.laws.published import constants

DAY = 86400.0
ACCOUNTS = ("checkpoint", "lost", "down", "startup")
BYTES_PER_PARAMETER = 14  # of a checkpoint in mixed precision: weights in 2, master weights and both moments of Adam in 12
DETECT_SECONDS, RESTART_SECONDS = 300.0, 600.0  # unless given: from a fault to new processes, from these to the first step
MOST_FAULTS = 100_000
LEAST_GOODPUT = 0.01  # below this nobody would start, and a simulation would not end


def faults_per_second(devices: int, per_day: float | None = None, per_device_day: float | None = None) -> float:
    """Rate of faults of a job: a + b N. A given b stands for the whole rate, so a is then 0 unless it is given too."""
    check_positive(devices=devices, faults_per_day=per_day or None, faults_per_device_day=per_device_day or None)
    table = constants()["faults"]
    if per_day is None:
        per_day = table["per_day"] if per_device_day is None else 0.0
    return float(per_day + devices * (table["per_device_day"] if per_device_day is None else per_device_day)) / DAY


def saving_seconds(parameters: float, write_bytes_per_second: float) -> float:
    """Seconds that a checkpoint blocks when all devices together write at that rate."""
    check_positive(parameters=parameters, write_rate=write_bytes_per_second)
    return BYTES_PER_PARAMETER * parameters / write_bytes_per_second


def young_interval(save_seconds: float, faults: float) -> float:
    """Seconds of stepping between saves, to first order: sqrt(2 w / rate) (Young 1974)."""
    return math.sqrt(2 * save_seconds / faults)


def best_interval(save_seconds: float, faults: float) -> float:
    """Seconds of stepping between saves of `save_seconds` with the highest goodput, for `faults` per second.

    Exact for exponential faults (Daly 2006): x = rate x interval solves 1 - x = exp(-x - rate x save), whatever restarts take.
    """
    save = faults * save_seconds
    x = min(1.0, math.sqrt(2 * save))
    for _ in range(50):  # Newton; both sides are concave, so from above it comes down to the root
        x -= (x + math.expm1(-x - save)) / -math.expm1(-x - save)
    return x / faults


@dataclass(frozen=True)
class Job:
    """A run that must spend `stepping_seconds` in steps. Faults come while stepping, saving and restarting alike.

    New processes start `detect_seconds` after a fault and step `restart_seconds` later, from the last save.
    """

    stepping_seconds: float
    save_seconds: float
    detect_seconds: float
    restart_seconds: float
    faults: float  # per second
    interval: float = 0.0  # seconds of stepping between saves; 0: the best

    def __post_init__(self) -> None:
        check_positive(stepping_seconds=self.stepping_seconds, save_seconds=self.save_seconds, rate_of_faults=self.faults)
        check_positive(**{name: getattr(self, name) or None for name in ("detect_seconds", "restart_seconds", "interval")})
        interval = self.interval or best_interval(self.save_seconds, self.faults)
        object.__setattr__(self, "interval", self.stepping_seconds / math.ceil(self.stepping_seconds / interval - 1e-9))
        if self.faults * (self.interval + self.save_seconds + self.restart_seconds) > 50 or self.goodput < LEAST_GOODPUT:
            raise UserError(f"{self.faults * DAY:.3g} faults a day leave less than {100 * LEAST_GOODPUT:g} % of the time for "
                            "steps that are kept; shorten restarts and saves, save more often, or use fewer devices")

    @property
    def saves(self) -> int:
        return round(self.stepping_seconds / self.interval)

    def expect(self) -> dict[str, float]:
        """Expected wall seconds of the whole run by account, besides `stepping_seconds`.

        Of a renewal process: work of X seconds that each fault undoes is tried exp(rate X) - 1 times in vain, for
        (exp(rate X) - 1) / rate - X seconds. Restarts fail alike; the first start counts as one.
        """
        vain = math.expm1(self.faults * (self.interval + self.save_seconds))
        starts = 1 + self.saves * vain  # that succeed
        again = math.expm1(self.faults * self.restart_seconds)  # those that fail, of each that succeeds
        return {"checkpoint": self.saves * self.save_seconds,
                "lost": self.saves * (vain / self.faults - self.interval - self.save_seconds),
                "down": (self.saves * vain + starts * again) * self.detect_seconds,
                "startup": starts * again / self.faults}

    @property
    def wall_seconds(self) -> float:
        """Expected."""
        return self.stepping_seconds + math.fsum(self.expect().values())

    @property
    def goodput(self) -> float:
        """Expected share of the wall time in steps that are kept."""
        return self.stepping_seconds / self.wall_seconds

    def at_interval(self, seconds: float) -> Job:
        return replace(self, interval=seconds)

    def simulate(self, trials: int = 2000, seed: int = 0) -> dict[str, NDArray[np.float64]]:
        """Seconds by account and of `wall`, one per trial: faults drawn one after the other, all trials at once."""
        if self.wall_seconds * self.faults > MOST_FAULTS:
            raise UserError(f"{self.wall_seconds * self.faults:.3g} faults are too many to draw one by one; at most "
                            f"{MOST_FAULTS:,} are, so give fewer days of steps")
        rng = np.random.default_rng(seed)
        left, period = np.full(trials, self.saves), self.interval + self.save_seconds
        spent = {name: np.zeros(trials) for name in ACCOUNTS}
        running = np.arange(trials)
        while running.size:
            until_fault = rng.exponential(1 / self.faults, running.size)
            worked = np.maximum(0.0, until_fault - self.restart_seconds)
            done = np.minimum(left[running], np.floor(worked / period).astype(np.int64))
            left[running] -= done
            faulty = left[running] > 0
            spent["startup"][running] += np.minimum(until_fault, self.restart_seconds)
            spent["lost"][running] += np.where(faulty, worked - done * period, 0.0)
            spent["down"][running] += np.where(faulty, self.detect_seconds, 0.0)
            running = running[faulty]
        spent["checkpoint"] += self.saves * self.save_seconds
        return {**spent, "wall": self.stepping_seconds + sum(spent.values(), np.zeros(trials))}


def within(wall_seconds: float, save_seconds: float, faults: float, detect_seconds: float = DETECT_SECONDS,
           restart_seconds: float = RESTART_SECONDS) -> Job:
    """The job whose expected wall time is `wall_seconds`: what a budget of the calendar leaves for steps that are kept."""
    check_positive(wall_seconds=wall_seconds)
    least, most = 0.0, wall_seconds
    for _ in range(50):
        middle = (least + most) / 2
        is_short = Job(middle, save_seconds, detect_seconds, restart_seconds, faults).wall_seconds <= wall_seconds
        least, most = (middle, most) if is_short else (least, middle)
    if not least:
        raise UserError(f"{wall_seconds / DAY:.3g} days are not enough for one restart")
    return Job(least, save_seconds, detect_seconds, restart_seconds, faults)
