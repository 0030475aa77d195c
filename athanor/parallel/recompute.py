"""Which blocks forget their activations and compute them again in the backward pass, and what of them is kept."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, _CachedTorchDispatchMode, checkpoint, create_selective_checkpoint_contexts

from athanor.foundation.errors import LayoutError
from athanor.foundation.intervals import interval

# what takes long: matrix products, and attention as its kernels are called on the devices there are
KEPT = {f"aten::{name}" for name in (
    "mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "_grouped_mm", "_scaled_grouped_mm", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_flash_attention_forward")}
KEPT |= {"athanor::packed_attention", "torch_attn::_varlen_attn"}


def recomputed(policy: str, blocks: Iterable[int]) -> list[bool]:
    """For each of these blocks, by its number in the whole model, whether it is recomputed: `none`, `full`, `selective` (all
    of them, but for what takes long), or `every-k` (the k-th, the 2k-th, …)."""
    if policy in ("none", "full", "selective"):
        return [policy != "none" for _ in blocks]
    match = re.fullmatch(r"every-([1-9]\d*)", policy)
    if match is None:
        raise LayoutError(f"parallel.recompute is '{policy}'; allowed: none, full, selective, every-2, every-3, …")
    return [(number + 1) % int(match[1]) == 0 for number in blocks]


def check(policy: str, count: int) -> None:
    """Refuse a policy that is none, or recomputes none of a model's `count` blocks though it says so. Raises LayoutError."""
    if not any(recomputed(policy, range(count))) and policy != "none":
        raise LayoutError(f"parallel.recompute is '{policy}', but of {count} blocks none would be; at most every-{count}")


def apply(blocks: Mapping[int, nn.Module], policy: str, is_compiled: bool) -> None:
    """Make the blocks that `policy` names forget what they can compute again. The second time counts as `recompute`.

    `selective` keeps what matrix products and attention gave. Inside compiled code nothing is timed, and what is kept is only
    a wish: the compiler fuses the rest into the backward pass.
    """
    choose = _most_kept if policy == "selective" else _nothing_kept
    options: dict[str, Any] = {"context_fn": functools.partial(_timed, choose)}
    if is_compiled:
        options = {"context_fn": choose} if policy == "selective" else {}
    for block, chosen in zip(blocks.values(), recomputed(policy, blocks), strict=True):
        if chosen:
            block.forward = _twice(block.forward, options)  # type: ignore[method-assign]


def _twice(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """The block's forward pass, to be done again; a function of our own, since the compiler starts at no frame of torch's."""

    def run(*arguments: Any, **named: Any) -> Any:
        return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **options, **named)

    return run


def keeps(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    """Whether `selective` keeps what an operator gave."""
    return CheckpointPolicy.MUST_SAVE if operator._schema.name in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


class _Again(_CachedTorchDispatchMode):
    """The second time. torch's own wants each operator as often as the first time (2.13), but fully_shard, which gathers the
    experts of a block inside it, does other things then."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), options: Any = None) -> Any:
        is_kept = operator._schema.name in KEPT
        return super().__torch_dispatch__(operator, types, args, options) if is_kept else operator(*args, **options or {})


def _most_kept() -> tuple[Any, Any]:
    first, second = create_selective_checkpoint_contexts(keeps)
    return first, _Again(keeps, second.storage, False)


def _nothing_kept() -> tuple[Any, Any]:
    return contextlib.nullcontext(), contextlib.nullcontext()


def _timed(choose: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    """The contexts of the first time and of the second, which is recorded."""
    first, second = choose()
    return first, _Recorded(second)


class _Recorded(contextlib.AbstractContextManager[None]):
    """A context inside the interval `recompute`; entered twice where a schedule splits the backward pass."""

    def __init__(self, inner: contextlib.AbstractContextManager[Any]) -> None:
        self.inner = inner

    def __enter__(self) -> None:
        self.open = contextlib.ExitStack()
        self.open.enter_context(interval("recompute"))
        self.open.enter_context(self.inner)

    def __exit__(self, *error: Any) -> None:
        self.open.__exit__(*error)
