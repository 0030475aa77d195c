"""The visible communication of model code: on plain tensors, in a group that comes with the context, differentiable.

A group of None or of one rank costs nothing. Every blocking collective is an interval of the ledger.
"""

from __future__ import annotations

import contextlib
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from athanor.foundation.intervals import interval

Group = dist.ProcessGroup | None
# torch 2.13 renamed both; up to 2.12 only the old names exist
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def size(group: Group) -> int:
    """Ranks in the group."""
    return 1 if group is None else group.size()


def rank(group: Group) -> int:
    """This rank's number in the group."""
    return 0 if group is None else group.rank()


def _waiting(account: str, group: Group) -> contextlib.AbstractContextManager[None]:
    """The interval of one collective; all ranks of a group give it the same name, other groups another."""
    if torch.compiler.is_compiling() or group is None:
        return contextlib.nullcontext()
    return interval(account, group=_label(account, group))


@lru_cache(maxsize=64)
def _label(account: str, group: dist.ProcessGroup) -> str:
    return f"{account}-{dist.get_process_group_ranks(group)[0]}"


def all_gather(x: Tensor, group: Group, account: str = "tensor") -> Tensor:
    """[t, ...] of each rank -> [t x ranks, ...]; not differentiable."""
    out = x.new_empty((x.shape[0] * size(group), *x.shape[1:]))
    with _waiting(account, group):
        _all_gather(out, x.contiguous(), group=group)
    return out


def reduce_scatter(x: Tensor, group: Group, account: str = "tensor") -> Tensor:
    """[t x ranks, ...] of each rank -> the sum's part [t, ...]; not differentiable."""
    out = x.new_empty((x.shape[0] // size(group), *x.shape[1:]))
    with _waiting(account, group):
        _reduce_scatter(out, x.contiguous(), group=group)
    return out


def all_reduce(x: Tensor, group: Group, is_max: bool = False, account: str = "tensor") -> Tensor:
    """Sum (or maximum) over the group, in place; not differentiable."""
    if size(group) > 1:
        with _waiting(account, group):
            dist.all_reduce(x, dist.ReduceOp.MAX if is_max else dist.ReduceOp.SUM, group=group)
    return x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, tokens: int, account: str) -> Tensor:
        ctx.group, ctx.account = group, account
        return _cut(all_gather(x, group, account), tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return reduce_scatter(_padded(gradient, ctx.group), ctx.group, ctx.account), None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.tokens = group, x.shape[0]
        return reduce_scatter(_padded(x, group), group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _cut(all_gather(gradient, ctx.group), ctx.tokens), None


def _padded(x: Tensor, group: Group) -> Tensor:
    """x with zeros after its last row, up to a number that the group's ranks can share."""
    lacking = -x.shape[0] % size(group)
    return torch.cat([x, x.new_zeros(lacking, *x.shape[1:])]) if lacking else x


def _cut(x: Tensor, rows: int) -> Tensor:
    """The first rows, without what `_padded` added."""
    return x if x.shape[0] == rows else x[:rows]


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, account: str) -> Tensor:
        ctx.group, ctx.account = group, account
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        with _waiting(account, group):
            dist.all_to_all_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _AllToAll.apply(gradient, ctx.group, ctx.account), None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, sent: list[int], received: list[int], account: str) -> Tensor:
        ctx.arguments = group, received, sent, account
        out = x.new_empty((sum(received), *x.shape[1:]))
        with _waiting(account, group):
            dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Exchange.apply(gradient, *ctx.arguments), None, None, None, None


def gather(x: Tensor, group: Group, tokens: int, account: str = "tensor") -> Tensor:
    """This rank's part of the tokens [t, ...] -> all of them [tokens, ...]; backward sums the ranks' gradients and scatters."""
    return x if size(group) == 1 else _Gather.apply(x, group, tokens, account)


def scatter(x: Tensor, group: Group) -> Tensor:
    """Each rank's partial sums [T, H] -> sums of this rank's part of the tokens [t, H]; backward gathers.

    t is T / ranks rounded up; the last part ends in zeros where T does not divide.
    """
    return x if size(group) == 1 else _Scatter.apply(x, group)


def own(x: Tensor, group: Group) -> Tensor:
    """This rank's part [t, ...] of what all ranks of the group have in full [T, ...], as `scatter` shares it out."""
    return x if size(group) == 1 else _padded(x, group).chunk(size(group))[rank(group)]


def all_to_all(x: Tensor, group: Group, account: str) -> Tensor:
    """Part i of dim 0 goes to rank i; part j of the result comes from rank j. Backward is the way back."""
    return x if size(group) == 1 else _AllToAll.apply(x, group, account)


def exchange(x: Tensor, group: Group, sent: list[int], received: list[int], account: str = "expert") -> Tensor:
    """The next sent[i] rows of x [sum of sent, ...] go to rank i; received[j] rows of the result come from rank j.

    Backward is the way back. Any of the numbers may be 0.
    """
    return _Exchange.apply(x, group, sent, received, account)
