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
    """The refusal, with the degrees that a plan set, and layouts that work instead of those that only multiply to the ranks."""
    words, _, only_multiply = str(error).partition("; nearest layouts")
    ranks = f"{world_size} rank{'' if world_size == 1 else 's'}"
    try:
        found = [str(layout) for layout in islice(working(recipe, run, stage, world_size), TOLD)]
        told = f"; on {ranks} these layouts work: {'; '.join(found)}" if found else f"; no layout of {ranks} was found that works"
    except UserError:  # nobody knows the model yet
        told = f"; nearest layouts{only_multiply}" if only_multiply else ""
    planned = [f"{axis} = {degree}" for axis in (*AXES, "ep") if (degree := getattr(recipe.parallel, axis) or 1) != 1
               and recipe.origin(f"parallel.{axis}") == "plan"]
    return LayoutError(words + (f"; {' and '.join(planned)} from the plan" if planned else "") + told)


def working(recipe: Recipe, run: RunFolder, stage: str, world_size: int) -> Iterator[Layout]:
    """Layouts in which a stage can be trained with all else as it is, the nearest first. Raises UserError without a model.

    A stage that starts from one without a model yet is taken to have the recipe's.
    """
    from athanor.models.huggingface import read_shape
    from athanor.train.rehearse import vocabulary
    from athanor.train.settings import layout_of
    from athanor.train.stage import arrange, find_start, fresh_shape

    wanted = recipe.get_stage(stage)
    earlier = [other.name for other in recipe.stage if not run.stage(other.name).model.is_dir()]
    start = None if wanted.start_from in earlier else find_start(run, recipe, wanted)
    shape = fresh_shape(recipe, vocabulary(run, recipe)) if start is None else read_shape(start)
    for layout in nearest(layout_of(recipe), world_size)[:MOST_TRIED]:
        split = recipe.parallel.split if layout.pp == recipe.parallel.pp else None
        degrees = {f"parallel.{axis}": getattr(layout, axis) for axis in (*AXES, "ep")}
        other = recipe.with_values({**degrees, "parallel.split": split}, "override")
        try:
            arrange(other, other.get_stage(stage), shape, world_size)
        except UserError:
            continue
        yield layout
