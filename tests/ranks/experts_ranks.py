"""What the ranks of the mixtures' tests do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models_ranks

SIZES = {**models_ranks.SIZES, "intermediate_size": 24, "num_experts": 8, "initializer_range": 0.1}
PARTS = [[5, 16], [1, 11]]  # the documents of each expert-parallel rank


def build(**changes: Any) -> Any:
    """The test model in fp64, not initialised."""
    import torch

    from athanor.models.shapes.mixtral import Shape
    from athanor.models.zoo import mixtral

    return mixtral.build(Shape(**{**SIZES, **changes})).to(torch.float64)


def starve(model: Any) -> None:
    """Make every token choose among experts 0 to 3, whatever it is: v and -v, u and -u, before those that say 0."""
    import torch

    for block in model.blocks.values():
        full = torch.zeros(SIZES["num_experts"], SIZES["hidden_size"], dtype=torch.float64)
        full[0:4:2] = torch.randn(2, SIZES["hidden_size"], dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        full[1:4:2] = -full[0:4:2]
        with torch.no_grad():
            block.mlp.gate.weight.copy_(full)


def make(degrees: dict[str, int], is_starved: bool, mesh: Any) -> Any:
    """The model on a mesh with the axes of `degrees`, initialised."""
    from athanor.models.initialize import initialize
    from athanor.models.zoo.mixtral import TENSOR_DIMS
    from athanor.parallel.tensor import shard_parameters

    names = tuple(name for name in ("ep", "tp") if name in degrees)
    model = build()
    shard_parameters(model, TENSOR_DIMS, mesh["tp"] if "tp" in degrees else None, mesh[names] if "ep" in degrees else None)
    initialize(model, 7)
    if is_starved:
        starve(model)
    return model


def _mesh(degrees: dict[str, int]) -> Any:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo")
    return init_device_mesh("cpu", tuple(degrees.values()), mesh_dim_names=tuple(degrees))


def train(channel: Callable[..., None], degrees: dict[str, int], is_starved: bool, is_compiled: bool) -> dict[str, Any]:
    """Loss and every gradient in full, of the documents of all expert-parallel ranks together."""
    import torch.distributed as dist

    from athanor.foundation.intervals import Recorder, activate
    from athanor.foundation.placement import placements
    from athanor.models.context import Groups, Packed
    from athanor.parallel.tensor import full

    mesh = _mesh(degrees)
    model = make(degrees, is_starved, mesh)
    groups = Groups(**{axis: mesh[axis].get_group() for axis in degrees})
    place, lengths = (mesh["ep"].get_local_rank(), PARTS) if "ep" in degrees else (0, [[*PARTS[0], *PARTS[1]]])
    before = sum(map(sum, lengths[:place]))
    mine = {name: column[before:before + sum(lengths[place])] for name, column in models_ranks.batch().items()}
    is_one_graph = [block.is_one_graph for block in model.blocks.values()]
    if is_compiled:
        for block in model.blocks.values():
            block.compile(backend="aot_eager", fullgraph=block.is_one_graph)
    recorder = Recorder()
    activate(recorder)
    scored = model(mine["tokens"], Packed.of(lengths[place], groups=groups), mine["targets"], mine["weights"])
    scored.weighted_sum.backward()
    activate(None)
    if groups.tp is not None:
        models_ranks.complete(model, groups.tp)
    loss, gradients = scored.weighted_sum.detach().clone(), {}
    for name, parameter in model.named_parameters():
        gradients[name] = full(parameter.grad, placements(model)[name], lambda axis: mesh[axis].get_group()).clone()
        if groups.ep is not None and ".experts." not in name:
            dist.all_reduce(gradients[name], group=groups.ep)
    if groups.ep is not None:
        dist.all_reduce(loss, group=groups.ep)
    dist.destroy_process_group()
    return {"loss": loss.item(), "gradients": {name: g.numpy() for name, g in gradients.items()}, "is_one_graph": is_one_graph,
            "intervals": sorted({(row.name, row.group) for row in recorder.rows})}


def look_at_shards(channel: Callable[..., None], degrees: dict[str, int], folder: str) -> dict[str, Any]:
    """This rank's boxes with their content, initialised and read back from a folder."""
    import torch.distributed as dist

    from athanor.foundation.layout import Layout
    from athanor.foundation.placement import placements
    from athanor.models.huggingface import load_weights, save_model
    from athanor.models.initialize import initialize
    from athanor.models.zoo.mixtral import TENSOR_DIMS
    from athanor.parallel.apply import Choices, parallelize
    from athanor.parallel.mesh import leave, make_mesh
    from athanor.parallel.stages import Stages
    from athanor.parallel.tensor import local

    mesh = make_mesh(Layout(**degrees), "cpu")
    model = build()
    parallelize(model, mesh, TENSOR_DIMS, Choices(precision="fp64"))
    initialize(model, 7)
    boxes = {name: (placements(model)[name].box(), local(p).detach().clone().numpy()) for name, p in model.named_parameters()}
    whole = models_ranks.whole(model, mesh)
    save_model(build(), folder, Stages.alone(model, mesh).whole)
    dist.barrier()
    initialize(model, 8)
    load_weights(model, folder)
    again = models_ranks.whole(model, mesh)
    leave()
    return {"boxes": boxes, "whole": whole, "again": again}


def refuse(channel: Callable[..., None], degrees: dict[str, int], changes: dict[str, int]) -> str:
    """What is said about a model whose experts cannot be shared out."""
    import torch.distributed as dist

    from athanor.foundation.errors import LayoutError
    from athanor.models.zoo.mixtral import TENSOR_DIMS
    from athanor.parallel.tensor import shard_parameters

    mesh = _mesh(degrees)
    try:
        shard_parameters(build(**changes), TENSOR_DIMS, None, mesh)
    except LayoutError as error:
        return str(error)
    finally:
        dist.destroy_process_group()
    return "nothing"
