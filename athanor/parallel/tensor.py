"""Tensor parallelism: which part of which parameter a rank holds. What is computed with it stands in the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from athanor.foundation.errors import LayoutError, ModelError

EXPERTS = ".experts."  # in the names of parameters whose dim 0 counts experts


@dataclass(frozen=True)
class Box:
    """The part of a global tensor that a rank holds: where it begins and how far it goes, per dim."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    def overlap(self, other: Box) -> Box | None:
        """What two boxes share, in global coordinates; None when they share nothing."""
        begin = tuple(map(max, zip(self.offset, other.offset, strict=True)))
        end = tuple(min(a + n, b + m) for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True))
        if any(e <= b for b, e in zip(begin, end, strict=True)):
            return None
        return Box(begin, tuple(e - b for b, e in zip(begin, end, strict=True)))

    def slices(self, within: Box) -> tuple[slice, ...]:
        """Indices of this box inside the tensor that holds `within`."""
        return tuple(slice(a - b, a - b + n) for a, b, n in zip(self.offset, within.offset, self.shape, strict=True))


def shard_parameters(module: nn.Module, tensor_dims: Mapping[str, int | None], tp: DeviceMesh | None,
                     experts: DeviceMesh | None = None) -> None:
    """Replace parameters by DTensors, cut along the dim their names say: experts on their mesh, all others on that of tp.

    `tensor_dims` maps the end of a name, such as `q_proj.weight`, to a dim, or to None for a copy on each rank. `experts` is
    the mesh with the axes ep and (with tensor parallelism) tp, on which stacked experts are cut along dim 0 and that dim;
    None when experts are cut by tp alone. Raises ModelError for a name that `tensor_dims` does not know, LayoutError for a
    dim that does not divide.
    """
    assert tp is None or experts is None or "tp" in (experts.mesh_dim_names or ()), "experts are cut by tp as well"
    made: dict[nn.Parameter, nn.Parameter] = {}
    for path, owner in list(module.named_modules()):
        for leaf, parameter in list(owner.named_parameters(recurse=False)):
            name = f"{path}.{leaf}" if path else leaf
            mesh = experts if experts is not None and EXPERTS in name else tp
            if mesh is None:
                continue
            if parameter not in made:  # tied parameters stay one
                axes = (mesh.mesh_dim_names or ()) if mesh is experts else ("tp",)
                dims = [0 if axis == "ep" else tensor_dim(name, tensor_dims) for axis in axes]
                made[parameter] = nn.Parameter(_distribute(name, parameter.data, mesh, axes, dims))
            setattr(owner, leaf, made[parameter])


def _distribute(name: str, full: torch.Tensor, mesh: DeviceMesh, axes: Sequence[str], dims: Sequence[int | None]) -> DTensor:
    for number, (axis, dim) in enumerate(zip(axes, dims, strict=True)):
        if dim is not None and full.shape[dim] % mesh.size(number):
            raise LayoutError(f"{axis} = {mesh.size(number)} does not divide dim {dim} of {name}, which is {full.shape[dim]}")
    return distribute_tensor(full, mesh, [Replicate() if dim is None else Shard(dim) for dim in dims], src_data_rank=None)


def tensor_dim(name: str, tensor_dims: Mapping[str, int | None]) -> int | None:
    """The dim that tensor parallelism cuts a parameter along: that of the longest entry its name ends with."""
    fitting = [end for end in tensor_dims if name.endswith(end)]
    if not fitting:
        raise ModelError(f"TENSOR_DIMS of the architecture has no entry for the parameter '{name}'")
    return tensor_dims[max(fitting, key=len)]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part that this rank holds, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def box_of(tensor: torch.Tensor, place: Mapping[str, int] | None = None) -> Box:
    """Which part of the global tensor a rank has: this one, or the one with these coordinates by axis.

    Tensor parallelism cuts first and data parallelism cuts what is left, so the mesh's axes are walked from the inside.
    """
    sizes, offset = list(tensor.shape), [0] * tensor.ndim
    for index, count, dim in reversed(_cuts(tensor, place)):
        if dim is not None:
            part = -(-sizes[dim] // count)
            begin = min(sizes[dim], part * index)
            offset[dim] += begin
            sizes[dim] = min(sizes[dim], begin + part) - begin
    return Box(tuple(offset), tuple(sizes))


def is_first_copy(tensor: torch.Tensor, place: Mapping[str, int] | None = None) -> bool:
    """Whether no earlier rank of the tensor's mesh holds the same part as this one, or the one at `place`."""
    return all(dim is not None or index == 0 for index, _, dim in _cuts(tensor, place))


def is_copied(tensor: torch.Tensor) -> bool:
    """Whether tensor-parallel ranks hold the same part of it."""
    names = tensor.device_mesh.mesh_dim_names or () if isinstance(tensor, DTensor) else ()
    return isinstance(tensor, DTensor) and "tp" in names and tensor.placements[names.index("tp")].is_replicate()


def sum_copies(gradients: Sequence[torch.Tensor], group: dist.ProcessGroup) -> None:
    """Add up gradients of parameters that every rank of the group holds in full, in place and in one message."""
    if gradients:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, group=group)
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _cuts(tensor: torch.Tensor, place: Mapping[str, int] | None) -> list[tuple[int, int, int | None]]:
    """Per axis of the tensor's mesh, outer to inner: the rank's index, the axis' size, and the dim that it cuts."""
    if not isinstance(tensor, DTensor):
        return []
    mesh, names = tensor.device_mesh, tensor.device_mesh.mesh_dim_names or ()
    return [(mesh.get_local_rank(axis) if place is None else place[names[axis]], mesh.size(axis),
             getattr(tensor.placements[axis], "dim", None)) for axis in range(mesh.ndim)]


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, on every rank of its mesh."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
