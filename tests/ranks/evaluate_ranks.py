"""What the ranks of the evaluation's tests do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any


def tensor_parallel_scores(channel: Callable[..., None], folder: Path, data: Path, tasks: list[str]) -> list[dict[str, Any]]:
    """Every rank's scores of a folder's model that is cut over all ranks."""
    import models_ranks
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from athanor.data.text.tokenizer import Tokenizer
    from athanor.evaluate.find import load
    from athanor.evaluate.subject import Subject
    from athanor.inference.engine import Engine
    from athanor.models.context import Groups
    from athanor.models.decoder import Decoder
    from athanor.models.huggingface import load_weights, read_shape

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = Decoder(read_shape(folder))
    models_ranks.shard(model, mesh)
    load_weights(model, folder)
    engine = Engine(model.requires_grad_(False).eval(), 64 * 512, groups=Groups(tp=mesh.get_group()))
    subject = Subject("m", folder, False, 512, engine, Tokenizer.load(folder))
    scores = [asdict(load("tasks", task).run(subject, data, None, lambda done, total: None)) for task in tasks]
    dist.destroy_process_group()
    return scores
