"""A batch is made of a fixed number of virtual data shards: which numbers of ranks can share them out, and do so exactly."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from athanor.foundation.errors import LayoutError
from athanor.foundation.layout import Layout
from athanor.foundation.recipe import Recipe, Stage

if TYPE_CHECKING:
    from athanor.train.settings import Settings


def world_sizes(layout: Layout, data_shards: int) -> list[int]:
    """Every number of ranks on which a stage goes on with the same batches, its degrees other than those of data kept."""
    return [layout.world_size // layout.data_ranks * ranks for ranks in range(1, data_shards + 1) if data_shards % ranks == 0
            and (layout.ep == 1 or ranks * layout.cp % layout.ep == 0)]


def fixed_shards(recipe: Recipe, stage: Stage, layout: Layout, seq_len: int) -> int | None:
    """The virtual shards that a recipe fixes; None when it leaves them to the layout, which only `fast` allows.

    Raises LayoutError with what would work when the data ranks cannot share them out, or cannot do so exactly.
    """
    shards, where, micro = stage.data_shards, f"stage.{stage.name}", stage.micro_batch_size or 1
    rows = math.gcd((stage.global_batch_tokens or 0) // seq_len, *(stage.batch_ramp or ())[:2])  # 0: the layout's choice
    if stage.reduction == "exact":
        _check_exact(recipe, stage, layout)
        shards = shards or rows // micro
        if not shards or rows % (shards * micro):
            fitting = [count for count in range(1, rows // micro + 1) if rows % (count * micro) == 0]
            raise LayoutError(f"{where}.data_shards = {shards}, but {rows} rows in micro-batches of {micro} make "
                              f"{', '.join(map(str, fitting)) or 'no'} shards of whole micro-batches")
    if shards is not None and shards % layout.data_ranks and rows % (shards * micro) == 0:
        sizes = ", ".join(map(str, world_sizes(layout, shards)))
        raise LayoutError(f"{where} has {shards} virtual data shards, which {layout.data_ranks} data ranks cannot share out "
                          f"equally; with the other degrees as they are it runs on {sizes} ranks (parallel.dp_shard)")
    return shards


def _check_exact(recipe: Recipe, stage: Stage, layout: Layout) -> None:
    """Refuse what would let kernels see other shapes, or sums another order, on other ranks."""
    where = f"stage.{stage.name}"
    cut = [f"{axis} = {getattr(layout, axis)}" for axis in ("pp", "cp", "ep") if getattr(layout, axis) > 1]
    if cut:
        raise LayoutError(f"{where}.reduction = 'exact' goes with dp_shard, dp_replicate and a fixed tp, not with "
                          f"{' and '.join(cut)}; leave it at 1, or reduce fast")
    missing = [key for key in ("micro_batch_size", "global_batch_tokens") if getattr(stage, key) is None]
    if missing:
        raise LayoutError(f"{where}.reduction = 'exact' needs {where}.{missing[0]}, or another number of ranks would choose "
                          "another one")
    if recipe.parallel.num_microbatches is not None:
        raise LayoutError(f"{where}.reduction = 'exact', but parallel.num_microbatches = {recipe.parallel.num_microbatches} "
                          f"would make other micro-batches on other ranks; leave it out, {where}.micro_batch_size says it")


def decides_bits(settings: Settings, layout: Layout, threads: int) -> dict[str, Any]:
    """What must not change either between two attempts of an exact stage; nothing for a fast one. `threads`: of a rank."""
    if settings.reduction == "fast":
        return {}
    kept = {key: getattr(settings, key) for key in ("reduction", "micro_batch_size", "data_shards", "compile")}
    return {**kept, "tp": layout.tp, "threads": threads}
