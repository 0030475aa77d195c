"""What the ranks of the models' tests do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2}
Z_LOSS = 0.1  # of tensor- and context-parallel ranks
LENGTHS = [5, 16, 1, 11]  # 33 tokens, which two ranks cannot share evenly


def batch(count: int = sum(LENGTHS)) -> dict[str, Any]:
    """Tokens, targets and weights of a fixed small batch."""
    import torch

    generator = torch.Generator().manual_seed(3)
    tokens, targets = torch.randint(0, SIZES["vocab_size"], (2, count), generator=generator)
    weights = torch.rand(count, generator=generator, dtype=torch.float64)
    return {"tokens": tokens, "targets": targets, "weights": weights}


def build(is_tied: bool, architecture: str = "llama", **changes: Any) -> Any:
    """The test model in fp64, not initialised."""
    import torch

    from athanor.models.find import load_architecture
    from athanor.models.shapes.find import new_shape

    own = {"num_key_value_heads": SIZES["num_attention_heads"]} if architecture in ("gpt2", "yuan") else {}
    shape = new_shape(architecture, **{**SIZES, **own, **changes}, tie_word_embeddings=is_tied)
    return load_architecture(architecture).build(shape).to(torch.float64)


def initialize(model: Any, seed: int) -> None:
    """Initial weights, and vectors that are neither 0 nor 1, whatever the layout."""
    import torch

    from athanor.foundation.placement import placements
    from athanor.models import initialize as initializer

    initializer.initialize(model, seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            placement = placements(model)[name]
            count = placement.shape[0]
            initializer.fill(parameter, placement, 1 + torch.sin(torch.arange(count, dtype=torch.float64) + len(name)) / 3)


def shard(model: Any, mesh: Any) -> None:
    """Leave of every parameter this rank's part on the tensor-parallel mesh, as TENSOR_DIMS says."""
    from athanor.models.find import load_architecture
    from athanor.parallel.tensor import shard_parameters

    shard_parameters(model, load_architecture(model.shape.MODEL_TYPE).TENSOR_DIMS, mesh)


def whole(model: Any, mesh: Any) -> dict[str, Any]:
    """Every parameter in full, on each rank."""
    from athanor.foundation.placement import placements
    from athanor.parallel.tensor import full

    return {name: full(p.detach(), placements(model)[name], mesh.group).clone().numpy() for name, p in model.named_parameters()}


def complete(model: Any, group: Any) -> None:
    """Add up the gradients of what tensor-parallel ranks hold in full, as training does once a step."""
    from athanor.foundation.placement import placements
    from athanor.parallel.tensor import sum_copies

    sum_copies([p.grad for name, p in model.named_parameters() if placements(model)[name].is_copied], group)


def results(model: Any, context: Any, weighted: bool) -> dict[str, Any]:
    """Loss and the full gradients of one forward and backward pass, as numpy."""
    from athanor.foundation.placement import placements
    from athanor.parallel.tensor import full

    data = batch(len(context.positions))
    model.zero_grad()
    if weighted:
        scored = model(data["tokens"], context, data["targets"], data["weights"])
        loss = scored.weighted_sum
    else:
        scored = model(data["tokens"], context, data["targets"])
        loss = -(scored.logp * data["weights"]).sum() + 0.01 * scored.logsumexp.square().sum()
    loss.backward()
    if context.groups.tp is not None:
        complete(model, context.groups.tp)
    gradients = {name: full(p.grad, placements(model)[name], lambda axis: context.groups.tp)
                 for name, p in model.named_parameters()}
    return {"loss": loss.item(), "logp": scored.logp.detach().numpy(),
            "gradients": {name: g.numpy() for name, g in gradients.items()}}


def tensor_parallel(channel: Callable[..., None], is_tied: bool, weighted: bool, architecture: str = "llama",
                    folder: str | None = None, **changes: Any) -> dict[str, Any]:
    """Weights are initial ones, or those of a folder."""
    from dataclasses import replace

    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from athanor.foundation.intervals import Recorder, activate
    from athanor.foundation.placement import placements
    from athanor.models.context import Groups, Packed
    from athanor.models.huggingface import load_weights
    from athanor.parallel.tensor import full

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    model = build(is_tied, architecture, **changes)
    shard(model, mesh)
    initialize(model, 7)
    if folder is not None:
        load_weights(model, folder)
    context = replace(Packed.of(LENGTHS, groups=Groups(tp=mesh.get_group())), z_loss=Z_LOSS)
    recorder = Recorder()
    activate(recorder)
    found = results(model, context, weighted)
    activate(None)
    with torch.no_grad():
        found["logits"] = model(batch()["tokens"], context).numpy()
    found["weights"] = {name: full(p.detach(), placements(model)[name], lambda axis: mesh.get_group()).numpy()
                        for name, p in model.named_parameters()}
    found["intervals"] = sorted({(row.name, row.group) for row in recorder.rows})
    dist.destroy_process_group()
    return found


def context_parallel(channel: Callable[..., None], lengths: list[int], is_compiled: bool = False, row_tokens: int = 0,
                     architecture: str = "llama", **changes: Any) -> dict[str, Any]:
    """Each rank holds its part of the tokens; losses and gradients add up."""
    from dataclasses import replace

    import torch.distributed as dist

    from athanor.foundation.intervals import Recorder, activate
    from athanor.models.context import Groups, Packed

    dist.init_process_group("gloo")
    rank, ranks, total = dist.get_rank(), dist.get_world_size(), sum(lengths)
    model = build(False, architecture, **changes)
    initialize(model, 7)
    if is_compiled:
        for block in model.blocks.values():
            block.compile(backend="aot_eager", fullgraph=True)
    context = replace(Packed.of(lengths, groups=Groups(cp=dist.group.WORLD)), z_loss=Z_LOSS, row_tokens=row_tokens)
    mine = slice(rank * total // ranks, (rank + 1) * total // ranks)
    data = {name: column[mine] for name, column in batch(total).items()}
    recorder = Recorder()
    activate(recorder)
    scored = model(data["tokens"], context, data["targets"], data["weights"])
    scored.weighted_sum.backward()
    activate(None)
    loss = scored.weighted_sum.detach().clone()
    dist.all_reduce(loss)
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    dist.destroy_process_group()
    return {"loss": loss.item(), "gradients": {name: p.grad.numpy() for name, p in model.named_parameters()},
            "intervals": [row.name for row in recorder.rows]}


def sharded_both_ways(channel: Callable[..., None], folder: str, architecture: str) -> dict[str, Any]:
    """fully_shard over 2 ranks after tensor parallelism over 2: initialise, save, and load again what was saved."""
    import torch.distributed as dist

    from athanor.foundation.layout import Layout
    from athanor.models.find import load_architecture
    from athanor.models.huggingface import load_weights, save_model
    from athanor.parallel.apply import Choices, parallelize
    from athanor.parallel.mesh import leave, make_mesh
    from athanor.parallel.stages import Stages

    mesh = make_mesh(Layout(dp_shard=2, tp=2), "cpu")
    model = build(False, architecture)
    parallelize(model, mesh, load_architecture(architecture).TENSOR_DIMS, Choices(precision="fp64"))
    initialize(model, 7)
    found = whole(model, mesh)
    save_model(build(False, architecture), folder, Stages.alone(model, mesh).whole)
    dist.barrier()
    initialize(model, 8)
    load_weights(model, folder)
    again = whole(model, mesh)
    leave()
    return {"initial": found, "loaded": again}
