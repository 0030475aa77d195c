"""What loss and gradient norm usually are, and whether those of a step are far above: decided on the device."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

# Of the mean, for loss and gradient norm: where values hardly differ, a small rise is no spike. Norms have long tails: in healthy
# runs of small models single ones were up to 3.7 times the mean and 11 deviations above it, and clipping takes care of those.
LEAST_DEVIATIONS = (0.02, 1.0)
NAMES = ("losses", "grad_norms")


class Guard:
    """What loss and gradient norm were in the last `window` steps that were made, and whether a new one is far above.

    A spike is more than `sigma` standard deviations above the mean, where a deviation is at least that share of the mean which
    LEAST_DEVIATIONS says. The rule, and 6 over 128 steps, are those of OLMo-core's skip-step optimizers; other than there, what
    is skipped does not count as usual, and nothing is a spike until the window is full. `sigma` 0: nothing ever is.
    """

    def __init__(self, sigma: float = 0.0, window: int = 2, device: torch.device | None = None) -> None:
        self.sigma, self.window = sigma or math.inf, window
        self.seen = torch.full((2, window), math.nan, dtype=torch.float64, device=device)  # losses, norms; the newest last
        self.least = torch.tensor(LEAST_DEVIATIONS, dtype=torch.float64, device=device)
        self.now = self.limits = self.seen[:, -1]

    def judge(self, loss: Tensor, squared_norm: Tensor) -> Tensor:
        """Whether a step with these scalars over all ranks is no spike, as a scalar on the device; `keep` comes after it."""
        self.now = torch.stack([loss, squared_norm.sqrt()])
        deviation, mean = torch.std_mean(self.seen, dim=1)
        self.limits = mean + self.sigma * torch.maximum(deviation, self.least * mean.abs())
        return (self.now > self.limits).logical_not().all()  # no number is above what is not a number yet

    def keep(self, is_made: Tensor) -> None:
        """Let what was judged last be among what is usual, if its step was made."""
        later = torch.cat([self.seen[:, 1:], self.now[:, None]], dim=1)
        self.seen = torch.where(is_made, later, self.seen)

    def state(self) -> dict[str, list[float]]:
        """What has been seen, the oldest first: exact numbers, for a checkpoint. Waits for the device."""
        return {name: [x for x in row if not math.isnan(x)] for name, row in zip(NAMES, self.seen.tolist(), strict=True)}

    def restore(self, state: Mapping[str, Sequence[float]]) -> None:
        """Go on from a `state`, maybe of another window."""
        rows = [[math.nan] * self.window + list(state.get(name, ())) for name in NAMES]
        self.seen = torch.tensor([row[-self.window:] for row in rows], dtype=self.seen.dtype, device=self.seen.device)

    def reason(self) -> tuple[str, dict[str, float | None]]:
        """Why the step that was judged last was skipped, and its values with their limits. Waits for the device."""
        (loss, norm), (loss_limit, norm_limit) = self.now.tolist(), self.limits.tolist()
        values = {"loss": loss, "loss_limit": loss_limit, "grad_norm": norm, "grad_norm_limit": norm_limit}
        name, value, limit = ("gradient norm", norm, norm_limit) if norm > norm_limit else ("loss", loss, loss_limit)
        why = f"its {name} {value:.4g} is above {limit:.4g}, the mean of {self.window} steps + {self.sigma:g} deviations"
        if not (math.isfinite(loss) and math.isfinite(norm)):
            why = f"its {'gradient' if math.isfinite(loss) else 'loss'} is not finite"
        return why, {name: value if math.isfinite(value) else None for name, value in values.items()}
