"""Data parallelism: parameters, gradients and optimizer state are sharded over `shard`, and copied over `dp_replicate`.

Gradients are summed, never averaged: the loss is already divided by the global count. Every collective is recorded as
the time this rank's main thread waits in it, which on a CPU is all of its cost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from athanor.foundation.intervals import interval
from athanor.foundation.placement import Cut, placements
from athanor.parallel.exact import Shards, exchange, gather, gather_into, reduce_scatter_into
from athanor.parallel.mesh import Mesh

ACCOUNT = "data_parallel"


def apply(model: nn.Module, blocks: Sequence[nn.Module], mesh: Mesh, dtype: torch.dtype | None,
          keeps_whole: bool, data_shards: int | None = None) -> DataParallel:
    """Shard each block, then what is left (embedding, norm, head), in place; one gather and one reduction for each.

    `dtype` is what to compute in when it differs from the weights'; gradients are then reduced in the weights' dtype.
    `keeps_whole`: weights stay gathered and gradients unreduced during a step, instead of a block at a time. With `data_shards`
    gradients are added up by a fixed tree over so many virtual shards of a batch.
    """
    axis, experts = mesh.axis("shard"), mesh.axis("expert_shard")
    assert axis is not None, "make_mesh gives every data-parallel layout a shard axis"
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=None if dtype is None else torch.float32,
                                  cast_forward_inputs=False)
    where = [(module, experts) for name, module in model.named_modules() if experts and name.endswith(".experts")]
    where += [(module, axis) for module in (*blocks, model)]
    # what no gradient moves stays whole and is not cast: a router's biases move by less than bf16 can tell apart
    still = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    for module, on in where:
        fully_shard(module, mesh=on, mp_policy=policy, reshard_after_forward=not keeps_whole and module is not model,
                    ignored_params=still)
    table = placements(model)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor) or parameter in still, "every parameter lies in the model"
        on = parameter.device_mesh if isinstance(parameter, DTensor) else axis
        dim = 0 if isinstance(parameter, DTensor) else None
        table[name] = table[name].then(Cut((on.mesh_dim_names or ("",))[0], on.size(), on.get_local_rank(), dim))
    group = mesh.group("dp_replicate")
    replicas = None if group is None or data_shards is not None else Replicas(group, mesh.label("dp_replicate"))
    for number, (unit, on) in enumerate(where):
        label = mesh.label("shard" if on is axis else "expert_shard")
        assert isinstance(unit, FSDPModule)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        unit.set_custom_all_gather(_AllGather(label))  # type: ignore[arg-type]
        if data_shards is not None:
            tree = _TreeReduceScatter(label, mesh, Shards.of(data_shards, mesh))
            unit.set_custom_reduce_scatter(tree)  # type: ignore[arg-type]
            unit.set_all_reduce_hook(tree.hook)
            continue
        unit.set_custom_reduce_scatter(_ReduceScatter(label))  # type: ignore[arg-type]
        if replicas is not None:
            unit.set_all_reduce_hook(replicas.hook(number))
    assert isinstance(model, FSDPModule)
    return DataParallel(model, replicas, keeps_whole, data_shards is not None)


class DataParallel:
    """A model whose parameters are sharded: what has to be said before each micro-batch of a step."""

    def __init__(self, model: FSDPModule, replicas: Replicas | None, keeps_whole: bool, is_exact: bool) -> None:
        self.model, self.replicas, self.keeps_whole, self.is_exact = model, replicas, keeps_whole, is_exact

    def begin(self, is_last_micro_batch: bool, ends_shard: bool = True) -> None:
        """Gradients are complete, and are reduced, after the last micro-batch (of each, unless weights stay whole).

        When they are added up by a tree, they go into it whenever a virtual shard ends.
        """
        if self.replicas is not None:
            self.replicas.is_last_micro_batch = is_last_micro_batch
        if self.keeps_whole:
            self.model.set_reshard_after_backward(is_last_micro_batch)
        if self.keeps_whole or self.is_exact:
            is_reduced = ends_shard if self.is_exact else is_last_micro_batch
            self.model.set_requires_gradient_sync(is_reduced)
            self.model.set_is_last_backward(is_reduced)

    def rest(self) -> None:
        """Give up weights that forward passes without a backward one left gathered, so that the parameters are shards again."""
        for module in self.model.modules():  # type: ignore[attr-defined]
            if isinstance(module, FSDPModule):
                module.reshard()


class Replicas:
    """Keeps the replicas' gradients equal: sums them over `dp_replicate` in the last micro-batch's backward pass.

    fully_shard hands every reduced gradient to a hook; those of earlier micro-batches wait here.
    """

    def __init__(self, group: dist.ProcessGroup, label: str) -> None:
        self.group, self.label = group, label
        self.is_last_micro_batch = True
        self.waiting: dict[int, torch.Tensor] = {}

    def hook(self, unit: int) -> Callable[[torch.Tensor], None]:
        """The hook of one sharded unit."""

        def add_up(gradient: torch.Tensor) -> None:
            held = self.waiting.pop(unit, None)
            if not self.is_last_micro_batch:
                self.waiting[unit] = gradient.clone() if held is None else held.add_(gradient)
                gradient.zero_()
                return
            if held is not None:
                gradient.add_(held)
            with interval(ACCOUNT, group=self.label):
                dist.all_reduce(gradient, group=self.group)

        return add_up


class _TimedWork(dist.Work):
    """A collective under way since `arrived`; waiting for it is recorded."""

    def __init__(self, work: dist.Work, label: str, arrived: float) -> None:
        super().__init__()
        self.work, self.label, self.arrived = work, label, arrived

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        with interval(ACCOUNT, group=self.label, arrived=self.arrived):
            return bool(self.work.wait())


class _Timed:
    """Allocates as fully_shard does by itself; the label names the group in recorded intervals."""

    def __init__(self, label: str) -> None:
        self.label = label

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def run(self, collective: Callable[..., Any], is_async: bool) -> dist.Work | None:
        if is_async:
            arrived = time.perf_counter()
            return _TimedWork(collective(async_op=True), self.label, arrived)
        with interval(ACCOUNT, group=self.label):
            collective(async_op=False)
        return None


class _AllGather(_Timed):
    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: dist.ProcessGroup,
                 async_op: bool = False) -> dist.Work | None:
        return self.run(lambda **how: gather_into(output_tensor, input_tensor, group=group, **how), async_op)


class _ReduceScatter(_Timed):
    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: dist.ProcessGroup, op: Any,
                 async_op: bool = False) -> dist.Work | None:
        return self.run(lambda **how: reduce_scatter_into(output_tensor, input_tensor, op=op, group=group, **how), async_op)


class _TreeReduceScatter(_Timed):
    """Reduces a unit's gradients by the tree: they wait here until this rank has given those of all its virtual shards.

    Until then fully_shard gets zeros. It calls the object where there is a group to scatter to, and then the hook.
    """

    def __init__(self, label: str, mesh: Mesh, shards: Shards) -> None:
        super().__init__(label)
        self.mesh, self.shards, self.tree = mesh, shards, shards.tree()
        self.group, self.replicas = mesh.group("shard"), mesh.group("dp_replicate")

    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: dist.ProcessGroup, op: Any,
                 async_op: bool = False) -> None:
        self.take(input_tensor)

    def take(self, gradient: torch.Tensor) -> None:
        """One more virtual shard's gradient of the whole unit."""
        _use(gradient)
        self.tree.add([gradient])

    def hook(self, gradient: torch.Tensor) -> None:
        """Put this rank's slice of the sum into `gradient`, if it is complete; without a group to scatter to it is whole."""
        if self.group is None:
            self.take(gradient.clone())
        if self.tree.next < self.shards.end:
            gradient.zero_()
            return
        tree, first = self.tree, self.shards.rank // self.mesh.layout.dp_shard * self.mesh.layout.dp_shard
        for _, _, values in tree.nodes:
            _use(values[0])
        if self.group is not None:
            with interval(ACCOUNT, group=self.label):
                tree = exchange(tree, self.shards, first, self.group)
        if self.replicas is not None:
            with interval(ACCOUNT, group=self.mesh.label("dp_replicate")):
                tree = gather(tree, self.shards, self.mesh.layout.dp_shard, self.replicas)
        gradient.copy_(tree.root()[0])
        self.tree = self.shards.tree()


def _use(tensor: torch.Tensor) -> None:
    """Its memory may not be given away before the device has done what it was told so far: fully_shard uses several streams."""
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream())
