"""Tensor parallelism: which part of which parameter a rank holds. What is computed with it stands in the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from athanor.foundation.errors import LayoutError, ModelError
from athanor.foundation.placement import Cut, Placement, placements

EXPERTS = ".experts."  # in the names of parameters whose dim 0 counts experts
EVEN_AXES = ("ep", "tp")  # those of `shard_parameters`; what fully_shard has cut is a DTensor


def shard_parameters(module: nn.Module, tensor_dims: Mapping[str, int | None], tp: DeviceMesh | None,
                     experts: DeviceMesh | None = None) -> None:
    """Replace parameters by this rank's part of them, cut along the dim their names say: experts on their mesh, all others on
    that of tp. Which part it is stands in the module's `placements`.

    `tensor_dims` maps the end of a name, such as `q_proj.weight`, to a dim, or to None for a copy on each rank. `experts` is
    the mesh with the axes ep and (with tensor parallelism) tp, on which stacked experts are cut along dim 0 and that dim;
    None when experts are cut by tp alone. Raises ModelError for a name that `tensor_dims` does not know, LayoutError for a
    dim that does not divide.
    """
    assert tp is None or experts is None or "tp" in (experts.mesh_dim_names or ()), "experts are cut by tp as well"
    table, made = placements(module), dict[nn.Parameter, nn.Parameter]()
    for path, owner in list(module.named_modules()):
        for leaf, parameter in list(owner.named_parameters(recurse=False)):
            name = f"{path}.{leaf}" if path else leaf
            mesh = experts if experts is not None and EXPERTS in name else tp
            if mesh is None:
                continue
            if parameter not in made:  # tied parameters stay one
                axes = (mesh.mesh_dim_names or ()) if mesh is experts else ("tp",)
                for number, axis in enumerate(axes):
                    dim = 0 if axis == "ep" else tensor_dim(name, tensor_dims)
                    table[name] = _cut(name, table[name], Cut(axis, mesh.size(number), mesh.get_local_rank(number), dim))
                part = parameter.data[table[name].box().slices()].clone(memory_format=torch.contiguous_format)
                made[parameter] = nn.Parameter(part, parameter.requires_grad)
            setattr(owner, leaf, made[parameter])


def _cut(name: str, placement: Placement, cut: Cut) -> Placement:
    if cut.dim is not None and (length := placement.box().shape[cut.dim]) % cut.ranks:
        raise LayoutError(f"{cut.axis} = {cut.ranks} does not divide dim {cut.dim} of {name}, which is {length}")
    return placement.then(cut)


def tensor_dim(name: str, tensor_dims: Mapping[str, int | None]) -> int | None:
    """The dim that tensor parallelism cuts a parameter along: that of the longest entry its name ends with."""
    fitting = [end for end in tensor_dims if name.endswith(end)]
    if not fitting:
        raise ModelError(f"TENSOR_DIMS of the architecture has no entry for the parameter '{name}'")
    return tensor_dims[max(fitting, key=len)]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of what fully_shard may have cut, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sum_copies(gradients: Sequence[torch.Tensor], group: dist.ProcessGroup) -> None:
    """Add up gradients of parameters that every rank of the group holds in full, in place and in one message."""
    if gradients:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, group=group)
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def full(tensor: torch.Tensor, placement: Placement, group: Callable[[str], dist.ProcessGroup | None]) -> torch.Tensor:
    """The whole of what has the parts that `placement` says, on every rank that has one; `group` is that of an axis."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    for cut in reversed(placement.cuts):
        if cut.axis in EVEN_AXES and cut.dim is not None:
            parts = [torch.empty_like(whole, memory_format=torch.contiguous_format) for _ in range(cut.ranks)]
            dist.all_gather(parts, whole.contiguous(), group=group(cut.axis))
            whole = torch.cat(parts, cut.dim)
    return whole
