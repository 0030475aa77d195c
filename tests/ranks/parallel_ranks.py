"""What the ranks of the layouts' tests do."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def look_at_shards(channel: Callable[..., None], degrees: dict[str, int], keeps_whole: bool = False) -> dict[str, Any]:
    """Lay a tiny model out and train a step: this rank's boxes with their content, and what was recorded."""
    import torch

    from athanor.foundation.intervals import Recorder, activate
    from athanor.foundation.layout import Layout
    from athanor.foundation.placement import placements
    from athanor.models.context import Groups, Packed
    from athanor.models.initialize import initialize
    from athanor.models.shapes.decoder import DecoderShape
    from athanor.models.zoo.llama import TENSOR_DIMS, build
    from athanor.parallel.apply import Choices, parallelize
    from athanor.parallel.mesh import leave, make_mesh
    from athanor.parallel.stages import Stages
    from athanor.parallel.tensor import full, local

    mesh = make_mesh(Layout(**degrees), "cpu")
    shape = DecoderShape(vocab_size=60, hidden_size=20, intermediate_size=28, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=2)
    with torch.device("meta"):
        model = build(shape)
    sharded = parallelize(model, mesh, TENSOR_DIMS, Choices(keeps_whole=keeps_whole))
    model.to_empty(device="cpu")
    initialize(model, 0)
    owned = Stages.alone(model, mesh).owned()
    table = placements(model)
    boxes = {name: (table[name].box(), local(p).detach().clone().numpy(), p in owned) for name, p in model.named_parameters()}
    whole = {name: full(p, table[name], mesh.group).detach().clone().numpy() for name, p in model.named_parameters()}
    recorder = Recorder()
    activate(recorder)
    tokens = torch.arange(1, 13)
    context = Packed(torch.arange(12), torch.tensor([0, 12], dtype=torch.int32), 12, Groups(tp=mesh.group("tp")))
    for number in range(2):
        if sharded is not None:
            sharded.begin(number == 1)
        model(tokens, context, tokens + 1, torch.ones(12)).weighted_sum.backward()
    activate(None)
    Stages.alone(model, mesh).complete(lambda parameter: local(parameter.grad))
    gradients = {name: full(p.grad, table[name], mesh.group).clone().numpy() for name, p in model.named_parameters()}
    place = {"rank": int(os.environ["RANK"]), "data_rank": mesh.data_rank, **mesh.coordinates}
    leave()
    return {"place": place, "boxes": boxes, "whole": whole, "gradients": gradients,
            "rows": [tuple(row) for row in recorder.rows]}
