"""Which blocks forget their activations and compute them again in the backward pass."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from athanor.foundation.errors import LayoutError
from athanor.foundation.intervals import interval


def recomputed(policy: str, count: int) -> list[bool]:
    """For each of `count` blocks whether it is recomputed: `none`, `full`, or `every-k` (the k-th, the 2k-th, …)."""
    if policy in ("none", "full"):
        return [policy == "full"] * count
    match = re.fullmatch(r"every-([1-9]\d*)", policy)
    if match is None:
        raise LayoutError(f"parallel.recompute is '{policy}'; allowed: none, full, every-2, every-3, …")
    return [(index + 1) % int(match[1]) == 0 for index in range(count)]


def apply(blocks: Sequence[nn.Module], policy: str, is_compiled: bool) -> None:
    """Make the blocks that `policy` names forget what they can compute again. The second time counts as `recompute`."""
    options: dict[str, Any] = {} if is_compiled else {"context_fn": _contexts}  # nothing is timed inside compiled code
    for block, chosen in zip(blocks, recomputed(policy, len(blocks)), strict=True):
        if chosen:
            block.forward = functools.partial(  # type: ignore[method-assign]
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, **options)


def _contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    return contextlib.nullcontext(), _Again()


class _Again(contextlib.AbstractContextManager[None]):
    """The interval of computing again; entered twice where a schedule splits the backward pass."""

    def __enter__(self) -> None:
        self.open = interval("recompute")
        self.open.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.open.__exit__(*error)
