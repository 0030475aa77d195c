"""A model in the dtype it computes in, with its exact weights beside it: mixed precision where nothing is sharded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn


class Masters:
    """Turns a model's parameters into copies in `dtype`, in place; their weights stay here, in the dtype they had.

    Where `is_accumulated` (several micro-batches a step) each micro-batch's gradient is added in the masters' dtype as soon
    as it is complete and is then forgotten; with one micro-batch a step it stays in `dtype` until the update. fully_shard
    adds up in the same order, so that both train alike.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], dtype: torch.dtype, is_accumulated: bool) -> None:
        self.exact = {parameter: parameter.data for parameter in parameters if parameter.requires_grad}
        self.copies = {parameter: exact.to(dtype) for parameter, exact in self.exact.items()}
        self.sums: dict[nn.Parameter, torch.Tensor] = {}
        for parameter, copy in self.copies.items():
            parameter.data = copy
            if is_accumulated:
                parameter.register_post_accumulate_grad_hook(self._add)

    def gradient(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """This rank's part of the gradient over the micro-batches so far."""
        if parameter in self.sums:
            return self.sums[parameter]
        return parameter.grad

    def publish(self) -> None:
        """Round the exact weights into the model, after an update or a restart."""
        torch._foreach_copy_(list(self.copies.values()), list(self.exact.values()))

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model's parameters be the exact weights, for an export."""
        for parameter, exact in self.exact.items():
            parameter.data = exact
        try:
            yield
        finally:
            for parameter, copy in self.copies.items():
                parameter.data = copy

    @torch.no_grad()
    def _add(self, parameter: torch.Tensor) -> None:
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None, "a hook runs when a gradient is complete"
        if parameter in self.sums:
            self.sums[parameter].add_(parameter.grad)
        else:
            self.sums[parameter] = parameter.grad.to(self.exact[parameter].dtype)
        parameter.grad = None
