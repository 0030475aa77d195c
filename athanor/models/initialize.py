"""Initial weights as a function of (seed, parameter name) alone, so that they are the same for every layout."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from athanor.models.decoder import Decoder

INTO_RESIDUAL = ("o_proj.weight", "down_proj.weight")  # these add to the residual stream, 2 x layers of them


@torch.no_grad()
def initialize(module: Decoder, seed: int) -> None:
    """Fill every parameter: norms with 1, matrices with normal noise of initializer_range.

    Matrices that add to the residual stream get initializer_range / sqrt(2 layers) (GPT-2), so that depth does not change
    its variance. Each parameter is drawn in full, in fp32 on the CPU, and this rank's part of it is kept.
    """
    shape = module.shape
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
            continue
        deviation = shape.initializer_range
        if name.endswith(INTO_RESIDUAL):
            deviation /= math.sqrt(2 * shape.num_hidden_layers)
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        full = torch.empty(parameter.shape, dtype=torch.float32).normal_(0.0, deviation, generator=generator)
        fill(parameter, full)


@torch.no_grad()
def fill(parameter: Tensor, full: Tensor) -> None:
    """Copy this rank's part of `full` into a plain or sharded parameter."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(full)
        return
    parameter.to_local().copy_(local_part(full, parameter))


def local_part(full: Tensor, parameter: DTensor) -> Tensor:
    """This rank's part of a full tensor, as the parameter's placements cut it.

    Cuts go from the outer mesh dim to the inner one, but those of fully_shard that came after tensor parallelism (strided
    shards of an outer dim) cut what the inner one left.
    """
    mesh, coordinate = parameter.device_mesh, parameter.device_mesh.get_coordinate()
    assert coordinate is not None, "a parameter lives on the ranks of its mesh"
    dims = sorted(range(mesh.ndim), key=lambda i: (hasattr(parameter.placements[i], "split_factor"), i))
    for i in dims:
        placement = parameter.placements[i]
        if placement.is_replicate():
            continue
        dim = int(placement.dim)  # type: ignore[attr-defined]
        length, ranks = full.shape[dim], mesh.size(i)
        step = -(-length // ranks)
        begin = min(coordinate[i] * step, length)
        full = full.narrow(dim, begin, min(step, length - begin))
    return full
