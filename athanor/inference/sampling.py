"""Chooses the next tokens of a batch, each by its own request's sampling and random numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from athanor.inference.scheduler import Request


def choose(logits: Tensor, requests: Sequence[Request]) -> tuple[list[int], list[float]]:
    """Token and its log-probability under the unmodified distribution, for each row of logits [B, V]."""
    logp = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    tokens = logp.argmax(-1)
    drawn = [i for i, r in enumerate(requests) if r.sampling.temperature > 0]
    if drawn:
        tokens[drawn] = _draw(logp[drawn], [requests[i] for i in drawn])
    return tokens.tolist(), logp.gather(1, tokens.unsqueeze(1)).squeeze(1).tolist()


def _draw(logp: Tensor, requests: Sequence[Request]) -> Tensor:
    """One token per row [B, V]: the largest of probability / exponential noise, which draws by probability.

    Rounding differences between batches change the outcome only where two such values are all but equal.
    """
    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=logp.dtype, device=logp.device).unsqueeze(1)

    probabilities = (logp / column([max(r.sampling.temperature, 1e-5) for r in requests])).softmax(-1)  # less is beyond float32
    if any(r.sampling.top_k > 0 or r.sampling.top_p < 1 for r in requests):
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        below = column([r.sampling.top_p if r.sampling.top_p < 1 else 2.0 for r in requests])
        number = torch.arange(logp.shape[1], device=logp.device)
        keep = (before < below) & (number < column([r.sampling.top_k or logp.shape[1] for r in requests]))
        keep[:, 0] = True
        probabilities = probabilities * torch.zeros_like(keep).scatter_(1, order, keep)
    noise = torch.stack([torch.empty(logp.shape[1]).exponential_(generator=r.generator) for r in requests])
    return (probabilities / noise.to(logp)).argmax(-1)
