"""The device mesh: which ranks share what, by axis, and the process groups that collectives use.

Parameters are laid on `pp`, `dp_replicate`, `shard` and `tp`, where `shard` is dp_shard x cp: context-parallel ranks hold
parts of the parameters too. Experts are laid on the same ranks, `shard` being `expert_shard` x `ep` there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from athanor.foundation.intervals import interval
from athanor.foundation.layout import Layout


@dataclass(frozen=True)
class Mesh:
    """A rank's place in a layout. The meshes are None where nothing is shared and nothing is sent.

    `devices` lays out parameters, `experts` those of experts, `context` gives the groups of cp; `stage` is the group of
    all ranks that hold the same pipeline stages.
    """

    layout: Layout
    device: torch.device
    rank: int
    devices: DeviceMesh | None = None
    experts: DeviceMesh | None = None
    context: DeviceMesh | None = None
    stage: dist.ProcessGroup | None = None

    @property
    def coordinates(self) -> dict[str, int]:
        return self.layout.coordinates(self.rank)

    def place(self, rank: int) -> dict[str, int]:
        """The coordinates of a rank on the axes that parameters are laid out on."""
        place, layout = self.layout.coordinates(rank), self.layout
        shard = place["dp_shard"] * layout.cp + place["cp"]
        return {"pp": place["pp"], "dp_replicate": place["dp_replicate"], "shard": shard, "expert_shard": shard // layout.ep,
                "ep": shard % layout.ep, "tp": place["tp"]}

    @property
    def data_rank(self) -> int:
        """This rank's number among those that read different rows."""
        place = self.coordinates
        return place["dp_replicate"] * self.layout.dp_shard + place["dp_shard"]

    @property
    def counts_parameters(self) -> bool:
        """Whether this rank speaks for its shards: of several replicas of a shard only the first does."""
        return self.coordinates["dp_replicate"] == 0

    @property
    def counts_tokens(self) -> bool:
        """Whether this rank speaks for its tokens: tensor-parallel ranks have the same ones."""
        return self.coordinates["tp"] == 0

    @property
    def counts_rows(self) -> bool:
        """Whether this rank speaks for its rows: only one of those that have read the same ones does."""
        place = self.coordinates
        return place["tp"] == place["cp"] == place["pp"] == 0

    def axis(self, name: str) -> DeviceMesh | None:
        """The sub-mesh of an axis; None when it has no ranks to talk to."""
        mesh = self.experts if name in ("expert_shard", "ep") else self.context if name == "cp" else self.devices
        return None if mesh is None or name not in (mesh.mesh_dim_names or ()) else mesh[name]

    def expert_axes(self) -> DeviceMesh | None:
        """The sub-mesh on which experts are cut, ep and (with tensor parallelism) tp; None without expert parallelism."""
        if self.experts is None:
            return None
        return self.experts["ep", "tp"] if self.layout.tp > 1 else self.experts["ep"]

    @cached_property
    def groups(self) -> dict[str, dist.ProcessGroup]:
        """The process groups of all axes that have one, by axis, also of those with a single rank."""
        return {name: axis.get_group() for name in ("pp", "dp_replicate", "shard", "expert_shard", "ep", "cp", "tp")
                if (axis := self.axis(name)) is not None}

    def group(self, name: str) -> dist.ProcessGroup | None:
        """The process group of an axis; None when it has one rank only."""
        group = self.groups.get(name)
        return None if group is None or group.size() == 1 else group

    def label(self, name: str) -> str:
        """The name of an axis' group for recorded intervals: the same on its members, different from other groups."""
        ranks = dist.get_process_group_ranks(group) if (group := self.group(name)) is not None else [self.rank]
        return f"{name}:{','.join(map(str, ranks))}"

    def peers(self) -> list[list[int]]:
        """Ranks that do equal work: those of one pipeline stage."""
        size = self.layout.world_size // self.layout.pp
        return [list(range(first, first + size)) for first in range(0, self.layout.world_size, size)]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add a small tensor over all ranks, in place; bitwise the same on every rank."""
        if self.devices is not None:
            layout = self.layout
            account = ("data_parallel" if layout.data_ranks > 1 else "tensor" if layout.tp > 1 else
                       "context" if layout.cp > 1 else "pipeline")
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
    computed in, which fully_shard sees to, so that even one rank needs a mesh.
    """
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if layout.world_size == 1 and not is_mixed:
        return Mesh(layout, device, rank)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo")
    shard = layout.dp_shard * layout.cp
    sizes = {"pp": layout.pp, "dp_replicate": layout.dp_replicate, "shard": shard, "tp": layout.tp}
    kept = {name for name, size in sizes.items() if size > 1}
    if layout.dp_replicate > 1 or is_mixed or not kept:
        kept.add("shard")  # where replicas are kept equal, and weights cast
    devices = _lay_out(device_type, {name: size for name, size in sizes.items() if name in kept})
    experts = context = stage = None
    if layout.ep > 1:
        experts = _lay_out(device_type, {"pp": layout.pp, "dp_replicate": layout.dp_replicate,
                                         "expert_shard": shard // layout.ep, "ep": layout.ep, "tp": layout.tp})
    if layout.cp > 1:
        context = _lay_out(device_type, {"outer": layout.pp * layout.data_ranks, "cp": layout.cp, "inner": layout.tp})
    if layout.pp > 1:
        size = layout.world_size // layout.pp
        stage, _ = dist.new_subgroups_by_enumeration([list(range(i, i + size)) for i in range(0, layout.world_size, size)])
    return Mesh(layout, device, rank, devices, experts, context, stage)


def _lay_out(device_type: str, sizes: dict[str, int]) -> DeviceMesh:
    return init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def leave() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()
