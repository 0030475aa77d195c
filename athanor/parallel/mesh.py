"""The device mesh: which ranks share what, by axis, and the process groups that collectives use."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from athanor.foundation.errors import LayoutError
from athanor.foundation.intervals import interval
from athanor.foundation.layout import AXES, Layout

TRAINED = ("dp_replicate", "dp_shard", "tp")  # axes that may be larger than 1


@dataclass(frozen=True)
class Mesh:
    """A rank's place in a layout. `devices` is None on one rank alone, where nothing is shared and nothing is sent."""

    layout: Layout
    device: torch.device
    rank: int
    devices: DeviceMesh | None

    @property
    def coordinates(self) -> dict[str, int]:
        return self.layout.coordinates(self.rank)

    @property
    def data_rank(self) -> int:
        """This rank's number among those that read different rows."""
        place = self.coordinates
        return place["dp_replicate"] * self.layout.dp_shard + place["dp_shard"]

    @property
    def counts_parameters(self) -> bool:
        """Whether this rank speaks for its shards: of several replicas of a shard only the first does."""
        return self.coordinates["dp_replicate"] == 0

    def axis(self, name: str) -> DeviceMesh | None:
        """The sub-mesh of an axis; None when it has no ranks to talk to."""
        if self.devices is None or name not in (self.devices.mesh_dim_names or ()):
            return None
        return self.devices[name]

    def group(self, name: str) -> dist.ProcessGroup | None:
        """The process group of an axis; None when it has one rank only."""
        axis = self.axis(name)
        return None if axis is None or axis.size() == 1 else axis.get_group()

    def label(self, name: str) -> str:
        """The name of an axis' group for recorded intervals: the same on its members, different from other groups."""
        ranks = dist.get_process_group_ranks(group) if (group := self.group(name)) is not None else [self.rank]
        return f"{name}:{','.join(map(str, ranks))}"

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add a small tensor over all ranks, in place; bitwise the same on every rank."""
        if self.devices is not None:
            account = "data_parallel" if self.layout.data_ranks > 1 else "tensor"
            with interval(account, group="world"):
                dist.all_reduce(values)
        return values

    def share(self, value: Any) -> Any:
        """Rank 0's picklable value, on every rank; also a place where all ranks meet."""
        if self.devices is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def collect(self, value: Any) -> list[Any]:
        """Every rank's picklable value, in the order of ranks, on every rank."""
        if self.devices is None:
            return [value]
        values: list[Any] = [None] * self.layout.world_size
        dist.all_gather_object(values, value)
        return values


def make_mesh(layout: Layout, device_type: str, is_mixed: bool = False) -> Mesh:
    """Join the process group that the environment describes (RANK, WORLD_SIZE, …) and lay its ranks out.

    `layout` is resolved: its degrees multiply to the world size. `is_mixed`: weights are kept in another dtype than is
    computed in, which fully_shard sees to, so that even one rank needs a mesh. Raises LayoutError for axes that cannot
    train yet.
    """
    check_trainable(layout)
    rank = int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if layout.world_size == 1 and not is_mixed:
        return Mesh(layout, device, rank, None)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo")
    sizes = {axis: getattr(layout, axis) for axis in AXES if getattr(layout, axis) > 1}
    if layout.dp_replicate > 1 or is_mixed:
        sizes.setdefault("dp_shard", 1)  # where replicas are kept equal, and weights cast
    names = tuple(axis for axis in AXES if axis in sizes)
    return Mesh(layout, device, rank, init_device_mesh(device_type, tuple(sizes[a] for a in names), mesh_dim_names=names))


def check_trainable(layout: Layout) -> None:
    """Refuse axes that this version plans but does not train with. Raises LayoutError."""
    for name in ("pp", "cp", "ep"):
        if (size := getattr(layout, name)) != 1:
            raise LayoutError(f"{name} = {size} cannot be trained with; this version trains with {', '.join(TRAINED)}")


def leave() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()
