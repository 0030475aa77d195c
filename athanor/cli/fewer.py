"""How a stage goes on where there are devices for fewer ranks than it was begun with."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from athanor.foundation.errors import AthanorError
from athanor.foundation.recipe import Recipe

if TYPE_CHECKING:
    from athanor.train.stage import Job


def fewer_ranks(job: Job) -> Callable[[int], tuple[int, Recipe] | None]:
    """What an agent asks: the most ranks up to a number, fewer than the job's, on which it goes on, and the recipe for them."""
    from athanor.train.elastic import world_sizes
    from athanor.train.stage import resolve

    layout = job.layout
    sizes = [size for size in world_sizes(layout, job.settings.data_shards) if size < layout.world_size]

    def find(most: int) -> tuple[int, Recipe] | None:
        for size in sorted(sizes, reverse=True):
            recipe = recipe_for(job, size * layout.data_ranks // layout.world_size)
            if size <= most:
                try:
                    resolve(job.run, recipe, job.settings.stage, size)
                except AthanorError:  # as a schedule that wants other numbers of micro-batches
                    continue
                return size, recipe
        return None

    return find


def recipe_for(job: Job, data_ranks: int) -> Recipe:
    """The job's recipe with so many data ranks, the same batches and micro-batches of the same size.

    Replicas go first, so that where it can be a rank holds no more than before.
    """
    layout, settings, stage = job.layout, job.settings, f"stage.{job.settings.stage}"
    shard = layout.dp_shard if data_ranks % layout.dp_shard == 0 else data_ranks
    return job.recipe.with_values({
        "parallel.dp_shard": shard, "parallel.dp_replicate": data_ranks // shard, "parallel.num_microbatches": None,
        f"{stage}.micro_batch_size": settings.micro_batch_size, f"{stage}.global_batch_tokens": settings.global_batch_tokens,
        f"{stage}.data_shards": settings.data_shards}, "fewer devices")
