"""What would bring a run to a goodput: how far each of faults, detection, restarts and saves must come down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from athanor.foundation.errors import UserError
from athanor.foundation.units import format_share
from athanor.laws.goodput import DAY, Job, Saving

NOTHING = 1e-9  # of what it is: as good as none


@dataclass(frozen=True)
class Lever:
    """How far `name` must come down: to `share` of what it is `now`; None where even `most`, with none of it, is not enough."""

    name: str
    unit: str
    now: float
    share: float | None
    most: float  # goodput

    @property
    def needed(self) -> float | None:
        return None if self.share is None else self.share * self.now


def improved(job: Job, *, faults: float = 1.0, detection: float = 1.0, restart: float = 1.0, saves: float = 1.0) -> Job:
    """The job with these shares of what it has now, saved as often as is best then."""
    saving = Saving(saves * job.saving.blocked_seconds, saves * job.saving.write_seconds, job.saving.slowed)
    return Job(job.stepping_seconds, saving, detection * job.detect_seconds, restart * job.restart_seconds, faults * job.faults)


def reach(job: Job, target: float) -> list[Lever]:
    """Each lever alone, the others as they are; then all, by the same share: the least improvement of all at once.

    Raises UserError for a target that is no share, or has been reached already.
    """
    if not 0 < target < 1:
        raise UserError(f"a goodput of {target:g} is no target; a share between 0 and 1 is, such as 0.97")
    if (goodput := improved(job).goodput) >= target:
        raise UserError(f"the goodput is {format_share(goodput, 2)} already, and the target is {format_share(target, 2)}")
    now = {"faults": ("a day", job.faults * DAY), "detection": ("seconds", job.detect_seconds),
           "restart": ("seconds", job.restart_seconds),
           "saves": ("seconds", job.saving.blocked_seconds + job.saving.write_seconds)}
    return [*(_pull(job, target, [name], unit, amount) for name, (unit, amount) in now.items()),
            _pull(job, target, list(now), "of each", 1.0)]


def _pull(job: Job, target: float, names: Sequence[str], unit: str, now: float) -> Lever:
    """The largest share that these levers may keep together."""
    def goodput(share: float) -> float:
        return improved(job, **dict.fromkeys(names, share)).goodput

    name, most = names[0] if len(names) == 1 else "all together", goodput(NOTHING)
    if most < target:
        return Lever(name, unit, now, None, most)
    enough, too_much = NOTHING, 1.0
    for _ in range(60):
        middle = (enough + too_much) / 2
        enough, too_much = (middle, too_much) if goodput(middle) >= target else (enough, middle)
    return Lever(name, unit, now, enough, most)
