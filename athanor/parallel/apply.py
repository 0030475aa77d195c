"""How a layout is put on a model, from outside and in one order: tensor, recompute, compile, fully_shard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from athanor.foundation.errors import ModelError
from athanor.parallel import fully_shard, recompute, tensor
from athanor.parallel.mesh import Mesh

# what all is computed in, but for the products of fp8
COMPUTE_DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


@dataclass(frozen=True)
class Choices:
    """How a model is computed, besides where: which blocks are computed twice, whether compiled, in which dtype, whether weights
    and gradients stay whole during a step, and over how many virtual shards a fixed tree adds gradients up, if one does."""

    recompute: str = "none"
    is_compiled: bool = False
    precision: str = "fp32"
    keeps_whole: bool = False
    data_shards: int | None = None


def parallelize(model: nn.Module, mesh: Mesh, tensor_dims: Mapping[str, int | None],
                choices: Choices) -> fully_shard.DataParallel | None:
    """Put the mesh's layout on a model, or on one stage of it, whose parameters may be on the meta device, in place.

    On one rank nothing changes, unless it computes in another dtype than its weights have. Returns the handle of what is
    sharded, when something is. Raises LayoutError or ModelError for what cannot be laid out.
    """
    blocks = blocks_of(model)
    tensor.shard_parameters(model, tensor_dims, mesh.axis("tp"), mesh.expert_axes())
    recompute.apply(blocks, choices.recompute, choices.is_compiled)
    if choices.is_compiled:
        for block in blocks.values():
            block.compile(fullgraph=getattr(block, "is_one_graph", True), dynamic=False)
    if mesh.axis("shard") is None:
        return None
    return fully_shard.apply(model, list(blocks.values()), mesh, compute_dtype(choices.precision),
                             choices.keeps_whole, choices.data_shards)


def storage_dtype(precision: str) -> torch.dtype:
    """The dtype that weights, gradients and optimizer state are kept in."""
    return torch.float64 if precision == "fp64" else torch.float32


def compute_dtype(precision: str) -> torch.dtype | None:
    """The dtype to compute in, when it is not that of the weights."""
    dtype = COMPUTE_DTYPES[precision]
    return None if dtype == storage_dtype(precision) else dtype


def blocks_of(model: nn.Module) -> dict[int, nn.Module]:
    """The decoder blocks by their number in the whole model: the children of `layers`. Raises ModelError when it has none."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "layers":
            return {int(number): block for number, block in module.named_children()}
    raise ModelError(f"{type(model).__name__} has no 'layers', so it cannot be cut into blocks")
