"""The learning rate over the steps of a stage, as a pure function of the step."""

from __future__ import annotations

import math

from athanor.foundation.errors import RecipeError, did_you_mean

SCHEDULES = ("cosine", "linear", "wsd", "constant")
WSD_DECAY_SHARE = 0.2  # of the steps, at the end
COSINE_FLOOR = 0.1  # of the peak


def learning_rate(step: int, steps: int, peak: float, warmup_steps: int, schedule: str) -> float:
    """The rate of step `step` (the first is 1) of `steps`.

    It rises linearly over `warmup_steps` (steps, however many rows they have), reaching `peak` at their last. Then `linear`
    falls towards 0 and `cosine` along half a wave to a tenth of the peak, which the last step has; `wsd` stays, and falls
    towards 0 over the last fifth; `constant` stays. What falls towards 0 would be there one step after the last, so that no
    step is wasted.
    """
    if schedule not in SCHEDULES:
        raise RecipeError(f"learning_rate_schedule '{schedule}' is unknown; {did_you_mean(schedule, SCHEDULES)}")
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    if schedule == "wsd":
        decay_steps = max(1, round(steps * WSD_DECAY_SHARE))
        return peak * min(1.0, (steps - step + 1) / (decay_steps + 1))
    done = (step - warmup_steps) / max(1, steps - warmup_steps + (schedule == "linear"))
    if schedule == "linear":
        return peak * max(0.0, 1.0 - done)
    return peak * (COSINE_FLOOR + (1 - COSINE_FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
