"""Log-probabilities of targets without ever holding all logits: chunk by chunk, vocabulary-parallel where there is a group.

Under tensor parallelism every rank holds a part of the vocabulary and all T tokens; results are the same on all ranks, and
the gradient of `hidden` is this rank's share, to be summed by whoever gathered it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from athanor.models.collectives import Group, all_reduce, rank, size
from athanor.models.context import Scored
from athanor.models.rehearsed import device_type

CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 1 << 30}  # of logits in fp32: fit for a shared cache, or memory that does not hurt
LEAST_ROWS = {"cpu": 64, "cuda": 2048}  # fewer keep the multiplications from their full rate


def score(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None, group: Group,
          z_loss: float = 0.0) -> Scored:
    """Score targets [T] given hidden [T, H] and the head's weight [V, H] (this rank's part of V).

    With weights [T] only `weighted_sum` carries a gradient, made in the forward loop. Without, `logp` and `logsumexp` do,
    and chunks are computed again on the way back. `z_loss` x weight x logsumexp^2 is added to `weighted_sum` (PaLM, section
    5, with 1e-4), and its sum is told apart as `z_sum`.
    """
    if weights is None:
        logp, logsumexp = _LogProbabilities.apply(hidden, weight, targets, group)
        summed, z_sum = -logp.sum(), z_loss * logsumexp.square().sum()
    else:
        wants_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        summed, logp, logsumexp = _WeightedSum.apply(hidden, weight, targets, weights, group, z_loss, wants_gradient)
        z_sum = z_loss * (weights * logsumexp.square()).sum()
    if not z_loss:
        return Scored(summed, logp, logsumexp)
    return Scored(summed + z_sum, logp, logsumexp, z_sum=z_sum.detach())


def chunk_rows(tokens: int, vocabulary: int, kind: str) -> int:
    """Tokens per chunk: as equal as possible, with logits of at most CHUNK_BYTES unless LEAST_ROWS need more."""
    most = max(LEAST_ROWS.get(kind, 2048), CHUNK_BYTES.get(kind, 1 << 30) // (4 * vocabulary))
    chunks = max(1, -(-tokens // most))
    return max(1, -(-tokens // chunks))


class _Targets:
    """Where the targets of a chunk lie in this rank's part of the vocabulary."""

    def __init__(self, targets: Tensor, vocabulary: int, group: Group) -> None:
        self.column, self.inside = targets.unsqueeze(1), None
        if size(group) > 1:
            column = self.column - rank(group) * vocabulary
            self.inside = (column >= 0) & (column < vocabulary)
            self.column = column.clamp(0, vocabulary - 1)

    def take(self, logits: Tensor) -> Tensor:
        """The targets' logits [t, 1], 0 where another rank has them."""
        found = logits.gather(1, self.column)
        return found if self.inside is None else found * self.inside

    def add(self, logits: Tensor, value: Tensor) -> None:
        """Add value [t, 1] at the targets, in place."""
        logits.scatter_add_(1, self.column, value if self.inside is None else value * self.inside)


def _normalise(logits: Tensor, at: _Targets, group: Group) -> tuple[Tensor, Tensor]:
    """Turn logits [t, V] into probabilities, in place; return log-probabilities of the targets and logsumexp, both [t].

    The largest probability is 1 / (the sum of exp(logit - largest logit)), which spares a pass of exponentials.
    """
    largest, wanted = logits.amax(1, keepdim=True), at.take(logits)
    if size(group) == 1:
        torch.softmax(logits, -1, out=logits)
        logsumexp = largest.sub_(logits.amax(1, keepdim=True).log_())
        return (wanted - logsumexp).squeeze(1), logsumexp.squeeze(1)
    largest = all_reduce(largest, group, is_max=True)
    logits.sub_(largest).exp_()
    both = all_reduce(torch.cat([logits.sum(1, keepdim=True), wanted], 1), group)
    logits.div_(both[:, :1])
    logsumexp = largest + both[:, :1].log()
    return (both[:, 1:] - logsumexp).squeeze(1), logsumexp.squeeze(1)


def _logits(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """hidden x weight^T into out [t, V], which may be wider than both on an accelerator, so that nothing is rounded."""
    if out.dtype != hidden.dtype:
        return torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    return torch.mm(hidden, weight.t(), out=out)


class _Buffers:
    """The logits' buffer and the sums of gradients, allocated once for all chunks."""

    def __init__(self, hidden: Tensor, weight: Tensor, rows: int) -> None:
        self.wide = torch.promote_types(hidden.dtype, torch.float32)
        self.is_wide = self.wide == hidden.dtype
        self.buffer = hidden.new_empty(rows, weight.shape[0], dtype=self.wide if device_type(hidden) == "cuda" else hidden.dtype)
        self.weight = weight
        self.to_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        self.is_single = rows >= hidden.shape[0]
        self.to_weight = None if self.is_single else torch.zeros_like(weight, dtype=self.wide,
                                                                      memory_format=torch.contiguous_format)

    def logits(self, hidden: Tensor) -> Tensor:
        """[t, V] in fp32 or wider; overwritten by the next call."""
        return _logits(hidden, self.weight, self.buffer[:hidden.shape[0]]).to(self.wide)

    def add(self, to_logits: Tensor, hidden: Tensor, scale: Tensor | None, tokens: slice) -> None:
        """Carry a chunk's gradient on; `scale` [t, 1] multiplies its rows (the smaller factors, not [t, V])."""
        to_logits = to_logits.to(hidden.dtype)
        torch.mm(to_logits, self.weight, out=self.to_hidden[tokens])
        if scale is not None:
            self.to_hidden[tokens].mul_(scale)
            hidden = hidden * scale
        if self.to_weight is None:
            self.to_weight = torch.mm(to_logits.t(), hidden)  # its sum over tokens is rounded once
        elif self.is_wide:
            self.to_weight.addmm_(to_logits.t(), hidden)
        elif device_type(hidden) == "cuda":
            torch.addmm(self.to_weight, to_logits.t(), hidden, out_dtype=self.wide, out=self.to_weight)
        else:
            self.to_weight.add_(torch.mm(to_logits.t(), hidden))

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Those of `hidden`, in its dtype, and of `weight`, in a wider one where several chunks were added."""
        assert self.to_weight is not None, "every chunk has been added"
        return self.to_hidden, self.to_weight


def _times(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x times a scalar in dtype, rounded once: as 1 / N in bf16 the scalar would be off by up to 0.4 % everywhere."""
    return torch.mul(x, factor.reshape(1), out=torch.empty_like(x, dtype=dtype))


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, group: Group,
                z_loss: float, wants_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
        rows = chunk_rows(hidden.shape[0], weight.shape[0], device_type(hidden))
        buffers = _Buffers(hidden, weight, rows)
        logp = hidden.new_empty(hidden.shape[0], dtype=buffers.wide)
        logsumexp = torch.empty_like(logp)
        scale = weights.to(hidden.dtype).unsqueeze(1)
        minus_one = logp.new_full((), -1.0)
        for start in range(0, hidden.shape[0], rows):
            tokens = slice(start, min(start + rows, hidden.shape[0]))
            part = hidden[tokens]
            logits = buffers.logits(part)
            at = _Targets(targets[tokens], weight.shape[0], group)
            logp[tokens], logsumexp[tokens] = _normalise(logits, at, group)
            if wants_gradient:
                if z_loss:
                    logits.mul_(logsumexp[tokens].unsqueeze(1).mul(2 * z_loss).add_(1))
                at.add(logits, minus_one.expand(part.shape[0], 1))
                buffers.add(logits, part, scale[tokens], tokens)
        if wants_gradient:
            ctx.save_for_backward(*buffers.gradients())
            ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(logp, logsumexp)
        return -(logp * weights).sum(), logp, logsumexp

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *unused: Tensor) -> Any:
        to_hidden, to_weight = ctx.saved_tensors
        found = _times(to_hidden, gradient, to_hidden.dtype), _times(to_weight, gradient, ctx.dtype)
        return *found, None, None, None, None, None


class _LogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, group: Group) -> tuple[Tensor, Tensor]:
        rows = chunk_rows(hidden.shape[0], weight.shape[0], device_type(hidden))
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logp = hidden.new_empty(hidden.shape[0], dtype=wide)
        logsumexp = torch.empty_like(logp)
        for start in range(0, hidden.shape[0], rows):
            tokens = slice(start, min(start + rows, hidden.shape[0]))
            part = hidden[tokens]
            out = part.new_empty(part.shape[0], weight.shape[0], dtype=wide if device_type(part) == "cuda" else part.dtype)
            logits = _logits(part, weight, out).to(wide)
            logp[tokens], logsumexp[tokens] = _normalise(logits, _Targets(targets[tokens], weight.shape[0], group), group)
        ctx.save_for_backward(hidden, weight, targets, logsumexp)
        ctx.group, ctx.rows = group, rows
        return logp, logsumexp

    @staticmethod
    def backward(ctx: Any, to_logp: Tensor, to_logsumexp: Tensor) -> Any:
        hidden, weight, targets, logsumexp = ctx.saved_tensors
        buffers = _Buffers(hidden, weight, ctx.rows)
        for start in range(0, hidden.shape[0], ctx.rows):
            tokens = slice(start, min(start + ctx.rows, hidden.shape[0]))
            part, scale = hidden[tokens], to_logp[tokens].unsqueeze(1)
            probabilities = buffers.logits(part).sub_(logsumexp[tokens].unsqueeze(1)).exp_()
            probabilities.mul_(to_logsumexp[tokens].unsqueeze(1) - scale)
            _Targets(targets[tokens], weight.shape[0], ctx.group).add(probabilities, scale)
            buffers.add(probabilities, part, None, tokens)
        to_hidden, to_weight = buffers.gradients()
        return to_hidden, to_weight.to(weight.dtype), None, None
