"""When a layout is refused: the nearest ones of as many ranks in which the stage can be trained."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from athanor.foundation.errors import LayoutError, UserError
from athanor.foundation.layout import AXES, Layout, nearest
from athanor.foundation.recipe import Recipe
from athanor.foundation.run_folder import RunFolder

MOST_TRIED = 2000  # which takes a second or two
TOLD = 3


def with_nearest(error: LayoutError, recipe: Recipe, run: RunFolder, stage: str, world_size: int) -> LayoutError:
    """The refusal, with layouts that work instead of those that only multiply to the number of ranks."""
    try:
        found = [str(layout) for layout in islice(working(recipe, run, stage, world_size), TOLD)]
    except UserError:  # nobody knows the model yet
        found = []
    told = f"; on {world_size} rank{'' if world_size == 1 else 's'} these layouts work: {'; '.join(found)}"
    return LayoutError(str(error).partition("; nearest layouts")[0] + told) if found else error


def working(recipe: Recipe, run: RunFolder, stage: str, world_size: int) -> Iterator[Layout]:
    """Layouts in which a stage can be trained with all else as it is, the nearest first. Raises UserError without a model."""
    from athanor.data.lineage import open_manifest
    from athanor.models.huggingface import read_shape
    from athanor.train.settings import layout_of
    from athanor.train.stage import arrange, find_start, fresh_shape

    start = find_start(run, recipe, recipe.get_stage(stage))
    shape = fresh_shape(recipe, open_manifest(run.data)) if start is None else read_shape(start)
    for layout in nearest(layout_of(recipe), world_size)[:MOST_TRIED]:
        split = recipe.parallel.split if layout.pp == recipe.parallel.pp else None
        degrees = {f"parallel.{axis}": getattr(layout, axis) for axis in (*AXES, "ep")}
        other = recipe.with_values({**degrees, "parallel.split": split}, "override")
        try:
            arrange(other, other.get_stage(stage), shape, world_size)
        except UserError:
            continue
        yield layout
