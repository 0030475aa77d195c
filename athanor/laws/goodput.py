"""What faults, saves and restarts take: the best interval between saves, goodput, the finish, and what would bring more."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from athanor.foundation.errors import UserError
from athanor.foundation.units import check_positive, format_seconds
from athanor.laws.published import constants

DAY = 86400.0
BYTES_PER_PARAMETER = 14  # of a checkpoint in mixed precision: weights in 2, master weights and both moments of Adam in 12
DETECT_SECONDS, RESTART_SECONDS = 300.0, 600.0  # unless given: from a fault to new processes, from these to the first step
MOST_FAULTS = 100_000
LEAST_GOODPUT = 0.01  # below this nobody would start, and a simulation would not end
NOTHING = 1e-9  # of what there is: as good as none


def faults_per_second(devices: int, per_day: float | None = None, per_device_day: float | None = None) -> float:
    """Rate of faults of a job: a + b N. A given b stands for the whole rate, so a is then 0 unless it is given too."""
    check_positive(devices=devices, faults_per_day=per_day or None, faults_per_device_day=per_device_day or None)
    table = constants()["faults"]
    if per_day is None:
        per_day = table["per_day"] if per_device_day is None else 0.0
    return float(per_day + devices * (table["per_device_day"] if per_device_day is None else per_device_day)) / DAY


def mean_detection(seen_seconds: float, hang_seconds: float | None, hang_share: float | None = None) -> float:
    """Mean seconds from a fault to new processes; of a share (None: Llama 3 405B's) that only a watchdog sees, `hang_seconds`."""
    if hang_share is None:
        kinds = constants()["faults"]["kind"]
        hang_share = sum(kind["count"] for kind in kinds if kind["hangs"]) / sum(kind["count"] for kind in kinds)
    if not 0 <= hang_share <= 1:
        raise UserError(f"hang share = {hang_share:g}; it must be a share from 0 to 1")
    check_positive(detect_seconds=seen_seconds or None, hang_seconds=hang_seconds or None)
    return seen_seconds if hang_seconds is None else (1 - hang_share) * seen_seconds + hang_share * hang_seconds


def saving_seconds(parameters: float, write_bytes_per_second: float) -> float:
    """Seconds that a checkpoint blocks when all devices together write at that rate."""
    check_positive(parameters=parameters, write_rate=write_bytes_per_second)
    return BYTES_PER_PARAMETER * parameters / write_bytes_per_second


@dataclass(frozen=True)
class Saving:
    """What a checkpoint takes: the loop waits `blocked_seconds`; then it is written, and steps lose the share `slowed` meanwhile.

    Until it is written it protects nothing, and the next one waits for it. A synchronous one is waited for as a whole.
    """

    blocked_seconds: float
    write_seconds: float = 0.0
    slowed: float = 0.0

    def __post_init__(self) -> None:
        check_positive(blocked_seconds=self.blocked_seconds, write_seconds=self.write_seconds or None, slowed=self.slowed or None)
        if self.slowed >= 1:
            raise UserError(f"slowed = {self.slowed:g}; steps lose a share below 1 while a checkpoint is written")

    def __str__(self) -> str:
        blocked, written = format_seconds(self.blocked_seconds), format_seconds(self.write_seconds)
        return f"a save blocks {blocked} and is complete {written} later" if self.write_seconds else f"a save takes {blocked}"

    @property
    def cost_seconds(self) -> float:
        """What it takes from the steps, where the next one need not wait."""
        return self.blocked_seconds + self.slowed * self.write_seconds

    def beside_seconds(self, interval: float) -> float:
        """How long steps go on beside a write, when `interval` seconds of them lie between saves."""
        return min(self.write_seconds, interval / (1 - self.slowed))

    def seconds(self, saves: float, followed: float, interval: float) -> dict[str, float]:
        """What saves take by account, if steps that are kept followed `followed` of them and the last was waited for."""
        beside = self.beside_seconds(interval)
        waited = self.write_seconds + followed * (self.write_seconds - beside)
        return {"kernel": followed * self.slowed * beside, "checkpoint": saves * self.blocked_seconds + waited}


def typical_saving(waiting_seconds: float, is_async: bool, device_type: str = "cuda") -> Saving:
    """A checkpoint for which a waiting loop would wait so long; asynchronous, by the shares in `laws.toml`."""
    shares = constants()["saving"]["cpu" if device_type == "cpu" else "accelerator"]
    return Saving(waiting_seconds) if not is_async else Saving(
        shares["blocked"] * waiting_seconds, shares["written"] * waiting_seconds, shares["slowed"])


def young_interval(save_seconds: float, faults: float) -> float:
    """Seconds of stepping between saves, to first order: sqrt(2 w / rate) (Young 1974)."""
    return math.sqrt(2 * save_seconds / faults)


def best_interval(saving: Saving, faults: float) -> float:
    """Seconds of stepping between saves with the highest goodput, for `faults` per second.

    Exact for exponential faults (Daly 2006): x = rate x interval solves 1 - x = exp(-x - rate x cost), whatever restarts take.
    That a save protects only when it is written costs the same at every interval in which the write has room (see `Job`).
    """
    save = faults * saving.cost_seconds
    x = min(1.0, math.sqrt(2 * save))
    for _ in range(50):  # Newton; both sides are concave, so from above it comes down to the root
        x -= (x + math.expm1(-x - save)) / -math.expm1(-x - save)
    return max(x / faults, (1 - saving.slowed) * saving.write_seconds)


@dataclass(frozen=True)
class Job:
    """A run that must spend `stepping_seconds` in steps. Faults come while stepping, saving and restarting alike.

    New processes start `detect_seconds` after a fault and step `restart_seconds` later, from the last save that is complete:
    a fault in a write undoes the interval before it, too. So the first save after a start is complete after an interval, the
    wait and the write, A seconds, each further one B = A - (what steps did beside the write) after the one before. The
    interval is in both, and minimises (1 - exp(-rate B)) exp(rate A) / interval = exp(rate (A - B)) (exp(rate B) - 1) / interval.
    """

    stepping_seconds: float
    saving: Saving
    detect_seconds: float
    restart_seconds: float
    faults: float  # per second
    interval: float = 0.0  # seconds of stepping between saves; 0: the best

    def __post_init__(self) -> None:
        check_positive(stepping_seconds=self.stepping_seconds, rate_of_faults=self.faults, interval=self.interval or None,
                       detect_seconds=self.detect_seconds or None, restart_seconds=self.restart_seconds or None)
        interval = self.interval or best_interval(self.saving, self.faults)
        object.__setattr__(self, "interval", self.stepping_seconds / max(1, math.ceil(self.stepping_seconds / interval - 1e-9)))
        if self.faults * (self.first_seconds + self.restart_seconds) > 50 or self.goodput < LEAST_GOODPUT:
            raise UserError(f"{self.faults * DAY:.3g} faults a day leave less than {100 * LEAST_GOODPUT:g} % of the time for "
                            "steps that are kept; shorten restarts and saves, save more often, or use fewer devices")

    @property
    def saves(self) -> int:
        return round(self.stepping_seconds / self.interval)

    @property
    def first_seconds(self) -> float:
        """From the first step after a start until a save is complete, if no fault comes."""
        return self.interval + self.saving.blocked_seconds + self.saving.write_seconds

    @property
    def next_seconds(self) -> float:
        """From then until the next save is complete."""
        return self.first_seconds - (1 - self.saving.slowed) * self.saving.beside_seconds(self.interval)

    def expect(self) -> dict[str, float]:
        """Expected wall seconds of the whole run by account, besides `stepping_seconds`; `kernel` is what writes slow steps by.

        Of a renewal process: work of X seconds that each fault undoes is tried exp(rate X) - 1 times in vain, and a fault comes
        once in 1 / rate seconds of work. Restarts fail alike; the first start counts as one.
        """
        again = math.expm1(self.faults * self.first_seconds)  # tries in vain at the first save after a start
        missed = -math.expm1(-self.faults * self.next_seconds)  # share of the other saves that a fault comes before
        vain = again + (self.saves - 1) * missed * (1 + again)
        took = self.saving.seconds(self.saves, (self.saves - 1) * (1 - missed), self.interval)
        failed = (1 + vain) * math.expm1(self.faults * self.restart_seconds)  # starts that fail, of 1 + vain that succeed
        return {**took, "lost": vain / self.faults - self.stepping_seconds - math.fsum(took.values()),
                "down": (vain + failed) * self.detect_seconds, "startup": failed / self.faults}

    @property
    def wall_seconds(self) -> float:
        """Expected."""
        return self.stepping_seconds + math.fsum(self.expect().values())

    @property
    def goodput(self) -> float:
        """Expected share of the wall time in steps that are kept, as fast as they are beside no write."""
        return self.stepping_seconds / self.wall_seconds

    def at_interval(self, seconds: float) -> Job:
        return replace(self, interval=seconds)

    def simulate(self, trials: int = 2000, seed: int = 0) -> dict[str, NDArray[np.float64]]:
        """Seconds by account and of `wall`, one per trial: faults drawn one after the other, all trials at once."""
        if self.wall_seconds * self.faults > MOST_FAULTS:
            raise UserError(f"{self.wall_seconds * self.faults:.3g} faults are too many to draw one by one; at most "
                            f"{MOST_FAULTS:,} are, so give fewer days of steps")
        rng = np.random.default_rng(seed)
        left, followed = np.full(trials, self.saves), np.zeros(trials)  # saves that kept steps followed without a fault
        spent = {name: np.zeros(trials) for name in self.expect()}
        running = np.arange(trials)
        while running.size:
            until_fault = rng.exponential(1 / self.faults, running.size)
            worked = np.maximum(0.0, until_fault - self.restart_seconds)
            done = np.clip(1 + np.floor((worked - self.first_seconds) / self.next_seconds).astype(np.int64), 0, left[running])
            left[running] -= done
            followed[running] += (more := np.maximum(0, done - 1))
            faulty, until_kept = left[running] > 0, self.first_seconds - self.saving.write_seconds + more * self.next_seconds
            spent["startup"][running] += np.minimum(until_fault, self.restart_seconds)
            spent["lost"][running] += np.where(faulty, worked - np.where(done > 0, until_kept, 0.0), 0.0)
            spent["down"][running] += np.where(faulty, self.detect_seconds, 0.0)
            running = running[faulty]
        none, one = (self.saving.seconds(self.saves, times, self.interval) for times in (0, 1))
        for name, seconds in none.items():
            spent[name] += seconds + followed * (one[name] - seconds)
        return {**spent, "wall": self.stepping_seconds + sum(spent.values(), np.zeros(trials))}


def within(wall_seconds: float, saving: Saving, faults: float, detect_seconds: float = DETECT_SECONDS,
           restart_seconds: float = RESTART_SECONDS) -> Job:
    """The job whose expected wall time is `wall_seconds`: what a budget of the calendar leaves for steps that are kept."""
    def job(stepping_seconds: float) -> Job:
        return Job(stepping_seconds, saving, detect_seconds, restart_seconds, faults)

    check_positive(wall_seconds=wall_seconds)
    found = largest(0.0, wall_seconds, lambda seconds: job(seconds).wall_seconds <= wall_seconds)
    if not found:
        raise UserError(f"{wall_seconds / DAY:.3g} days are not enough for one restart")
    return job(found)


def largest(least: float, most: float, is_fine: Callable[[float], bool]) -> float:
    """The largest number between these that is fine, when all smaller ones are; `least` when none is."""
    for _ in range(50):
        middle = (least + most) / 2
        least, most = (middle, most) if is_fine(middle) else (least, middle)
    return least


@dataclass(frozen=True)
class Lever:
    """What `name` is now and must come down to for a goodput, None where even the goodput without any of it is not enough."""

    name: str
    unit: str
    now: float
    needed: float | None
    goodput_without: float


def improved(job: Job, *, faults: float = 1.0, detection: float = 1.0, restart: float = 1.0, saves: float = 1.0) -> Job:
    """The job with these shares of what it has now, saved as often as is best then."""
    saving = Saving(saves * job.saving.blocked_seconds, saves * job.saving.write_seconds, job.saving.slowed)
    return Job(job.stepping_seconds, saving, detection * job.detect_seconds, restart * job.restart_seconds, faults * job.faults)


def levers(job: Job, target: float) -> list[Lever]:
    """What would bring a goodput: each improvement alone; then all, by the same share, the least of all at once.

    None where the target is reached. Raises UserError for one that is no share.
    """
    if not 0 < target < 1:
        raise UserError(f"a goodput of {target:g} is no target; a share between 0 and 1 is, such as 0.97")
    if improved(job).goodput >= target:
        return []

    def lever(name: str, unit: str, now: float, parts: Sequence[str]) -> Lever:
        def reached(share: float) -> float:
            return improved(job, **dict.fromkeys(parts, share)).goodput

        most = reached(NOTHING)
        share = largest(NOTHING, 1.0, lambda share: reached(share) >= target)
        return Lever(name, unit, now, share * now if most >= target else None, most)

    now = {"faults": ("a day", job.faults * DAY), "detection": ("seconds", job.detect_seconds),
           "restart": ("seconds", job.restart_seconds),
           "saves": ("seconds", job.saving.blocked_seconds + job.saving.write_seconds)}
    return [*(lever(name, *amount, [name]) for name, amount in now.items()), lever("all together", "of each", 1.0, list(now))]
