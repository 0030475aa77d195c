"""Engines on models that several ranks share by tensor parallelism."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist

from athanor.foundation.errors import UserError
from athanor.foundation.layout import Layout, check_model
from athanor.inference.engine import Engine
from athanor.models.context import Groups
from athanor.models.find import load_architecture
from athanor.models.huggingface import describe_model, load_weights
from athanor.parallel.mesh import Mesh, make_mesh
from athanor.parallel.tensor import shard_parameters


def join(tp: int) -> Mesh:
    """Divide this launch's ranks into groups of `tp` that share a model; every rank must call, once."""
    world_size, is_cuda = int(os.environ["WORLD_SIZE"]), torch.cuda.is_available()
    if is_cuda and torch.cuda.device_count() < world_size:
        raise UserError(f"{world_size} ranks that share models need as many accelerators, and there are "
                        f"{torch.cuda.device_count()}")
    if not dist.is_initialized():  # also where the ranks are one group
        dist.init_process_group("cpu:gloo,cuda:nccl" if is_cuda else "gloo")
    return make_mesh(Layout(dp_replicate=world_size // tp, dp_shard=1, tp=tp), "cuda" if is_cuda else "cpu")


def open_shared_engine(folder: Path, cache_tokens: int, mesh: Mesh, dtype: str = "float32") -> Engine:
    """An engine on this rank's part of a Hugging Face folder's model; all ranks of its group must ask all engines the same.

    Raises LayoutError for a model that cannot be divided so.
    """
    module = describe_model(folder, dtype)
    shape = module.shape
    check_model(mesh.layout, shape, shape.max_position_embeddings)
    shard_parameters(module, load_architecture(shape.MODEL_TYPE).TENSOR_DIMS, mesh.axis("tp"))
    module.to_empty(device=mesh.device)
    load_weights(module, folder)
    return Engine(module.requires_grad_(False).eval(), cache_tokens, groups=Groups(tp=mesh.group("tp")))
