"""What a source of rates offers, so that one arithmetic prices steps on measured machines and on datasheets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from athanor.cost.case import Array, Case

Seconds = dict[str, tuple[Array, Array]]  # forward and backward, by kind of work
SHARPNESS = 4.0  # of the smooth maximum of two times of which the longer one hides most of the other


@dataclass
class Work:
    """Seconds of computing of one micro-batch on one device: of an average block, of embedding, head and loss (`ends`),
    and of what of a block is computed again."""

    block: Seconds = field(default_factory=dict)
    ends: Seconds = field(default_factory=dict)
    recomputed: Array = field(default_factory=lambda: np.zeros(1))

    def add(self, kind: str, forward: Array, backward: Array, part: str = "block") -> None:
        kinds = getattr(self, part)
        before = kinds.get(kind, (np.zeros(1), np.zeros(1)))
        kinds[kind] = before[0] + forward, before[1] + backward

    def seconds(self, part: str) -> tuple[Array, Array]:
        """Of a `block` or the `ends`, forward and backward."""
        forward, backward = zip(*getattr(self, part).values(), strict=True)
        return sum(forward, np.zeros(1)), sum(backward, np.zeros(1))


class Rates(Protocol):
    """Seconds of each configuration; of communication only what no computation hides."""

    @property
    def peak_flops(self) -> Array:
        """Of one device, in the dtype of the blocks' products."""

    def work(self, case: Case) -> Work:
        """Computing of a micro-batch."""

    def tensor(self, case: Case) -> tuple[Array, Array]:
        """Tensor parallelism's collectives of a micro-batch: of a block (with what is computed again), and of the ends."""

    def context(self, case: Case) -> Array:
        """Context parallelism's exchanges of a micro-batch in an average block."""

    def expert(self, case: Case) -> Array:
        """Tokens to their experts and back, of a micro-batch in an average block."""

    def hop(self, case: Case) -> Array:
        """A micro-batch's activations from one pipeline stage to the next."""

    def data_parallel(self, case: Case, computing: Array) -> Array:
        """Gradients and sharded parameters in a step, during `computing` seconds of it."""

    def update(self, case: Case) -> tuple[Array, Array]:
        """The optimizer's update, and the messages that it needs."""

    def host(self, case: Case) -> tuple[Array, Array]:
        """What the program itself takes in a step: around the computing, and for its input."""

    def own(self) -> Array:
        """How much longer a step takes in the user's own runs."""

    def skew(self, case: Case, total: Array, computing: Array) -> Array:
        """Waiting for the slowest rank in a step of `total` seconds."""


def smooth_max(a: Array, b: Array) -> Array:
    """Close to the larger of two positive times, and a fifth above both where they are equal."""
    return np.asarray((a**SHARPNESS + b**SHARPNESS) ** (1 / SHARPNESS))
