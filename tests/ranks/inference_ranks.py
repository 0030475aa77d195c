"""What the ranks of the engine's tests do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PROMPTS = [[5, 6, 7], [9] * 20, [3, 11, 4, 60, 8]]
ASKED: dict[str, Any] = {"max_new_tokens": 24, "temperature": 0.8, "top_k": 30, "seed": 3}


def tensor_parallel_answers(channel: Callable[..., None], architecture: str) -> list[list[int]]:
    """Every rank's answers with the model cut over all ranks."""
    import models_ranks
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from athanor.inference.engine import generate
    from athanor.models.context import Groups

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = models_ranks.build(False, architecture)
    models_ranks.shard(model, mesh)
    models_ranks.initialize(model, 7)
    answers = generate(model, PROMPTS, groups=Groups(tp=mesh.get_group()), **ASKED)
    dist.destroy_process_group()
    return answers
