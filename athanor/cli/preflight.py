"""What can be refused before anything is measured, built or trained; and what a plan depends on."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from athanor.foundation.errors import DataError, LayoutError, RecipeError, UserError, did_you_mean
from athanor.foundation.layout import AXES, Layout, check_model, resolve
from athanor.foundation.recipe import Recipe, read_plan
from athanor.foundation.run_folder import RunFolder, hash_file, hash_value

if TYPE_CHECKING:
    from athanor.models.shapes.decoder import DecoderShape


def refuse_early(recipe: Recipe) -> None:
    """Whatever the recipe names must exist; told before anything is measured, built or trained."""
    from athanor.cli.board import find_writer
    from athanor.cluster.spec import read_cluster
    from athanor.data.documents import check_readable
    from athanor.data.rows import check_conversations
    from athanor.data.sources import list_files
    from athanor.data.text.chat import ChatTemplate
    from athanor.evaluate.find import HARNESS, check_name
    from athanor.models.shapes.find import check_architecture
    from athanor.objectives.find import check_objective

    if recipe.metrics.tensorboard is not None:
        find_writer()
    check_architecture(recipe.model.architecture, "model.architecture")
    benchmarks = recipe.evaluate.lm_eval_data
    for task in recipe.evaluate.tasks:
        check_name("tasks", task)
        if task.startswith(HARNESS) and (benchmarks is None or not Path(benchmarks).is_dir()):
            raise RecipeError(f"evaluate.lm_eval_data must name the folder with the data of '{task}', not "
                              f"{benchmarks!r}")
    given = [] if recipe.data.tokenizer is None else [Path(recipe.data.tokenizer), Path(recipe.data.tokenizer) / "tokenizer.json"]
    if given and not given[0].exists():
        raise DataError(f"data.tokenizer = '{recipe.data.tokenizer}' does not exist; give a folder with a tokenizer in it")
    for source in recipe.data.source:
        check_readable(source)
    for stage in recipe.stage:
        check_objective(stage.objective)
        if stage.data not in ("documents", "pairs"):
            check_conversations(Path(stage.data), f"stage.{stage.name}.data", ChatTemplate.to_come(recipe.data.tokenizer))
        elif stage.data == "pairs" and all(file.suffix != ".py" for source in recipe.data.source for file in list_files(source)):
            raise DataError(f"stage.{stage.name}.data = 'pairs' are made from Python functions with docstrings, and no source "
                            "has a Python file; name a JSONL file of conversations, or leave the stage out")
    check_starts(recipe, recipe.data.vocab_size, next(filter(Path.is_file, given), None))
    if recipe.cluster.file != "auto":
        read_cluster(Path(recipe.cluster.file))
    if recipe.plan.file != "auto":
        read_plan(Path(recipe.plan.file))
    others = recipe.parallel
    degrees = [others.pp, others.dp_replicate, others.cp, others.tp, None if others.dp_shard == -1 else others.dp_shard]
    needed, devices = math.prod(degree or 1 for degree in degrees), devices_of(recipe)
    if devices % needed:
        raise LayoutError(f"the degrees of [parallel] multiply to {needed}, which does not divide the {devices} devices")


def check_starts(recipe: Recipe, vocabulary: int | None, tokenizer: Path | None) -> None:
    """Model folders that stages start from must be there, and be the one model that the recipe plans and trains.

    `vocabulary` and `tokenizer` are the data's, as for `check_start`.
    """
    from athanor.models.shapes.find import load_shape
    from athanor.train.settings import check_start

    names, first = [stage.name for stage in recipe.stage], dict[str, Any]()
    for stage in (stage for stage in recipe.stage if stage.start_from and stage.start_from not in names):
        where, folder = f"stage.{stage.name}.start_from = '{stage.start_from}'", Path(stage.start_from or "")
        if not folder.is_dir():
            stages = [name for name in names if name != stage.name]
            raise RecipeError(f"{where} is neither a stage nor a model folder"
                              + (f"; {did_you_mean(stage.start_from or '', stages)}" if stages else ""))
        shape = load_shape(folder)
        check_start(folder, shape, recipe, vocabulary, tokenizer)
        first = first or vars(shape)
        for key, value in first.items():
            if vars(shape)[key] != value and not key.endswith("_token_id"):
                raise RecipeError(f"{where} has {key} = {vars(shape)[key]}, but the model that another stage starts from "
                                  f"{value}; a recipe has one model, so give each a recipe of its own")


def refuse_unsettled(recipe: Recipe, devices: int) -> None:
    """Raise what any stage of a planned recipe would refuse as it begins, but for what only its model or its data can tell."""
    from athanor.models.shapes.find import load_shape, new_shape
    from athanor.train.settings import layout_of, settle

    layout = resolve(layout_of(recipe), devices)
    vocabulary = math.lcm(layout.tp, recipe.evaluate.tp)  # only the data tell whether theirs can be cut so
    shapes: dict[str, DecoderShape] = {}  # which a later stage goes on with
    for stage in recipe.stage:
        if stage.start_from:
            shapes[stage.name] = shapes.get(stage.start_from) or load_shape(Path(stage.start_from))
        else:
            shapes[stage.name] = new_shape(recipe.model.architecture, vocab_size=vocabulary, **recipe.model.given())
        settle(recipe, stage, layout, shapes[stage.name])
        check_model(Layout(tp=recipe.evaluate.tp), shapes[stage.name], 1)  # which is evaluated


def refuse_elsewhere(recipe: Recipe) -> None:
    """Raises UserError for a machine that a recipe only describes: nothing can be run there."""
    if recipe.cluster.accelerator and recipe.cluster.file == "auto":
        raise UserError(f"cluster.accelerator = '{recipe.cluster.accelerator}' is another machine, for `athanor plan` and "
                        "`athanor rehearse`; to run on this one leave it out, or give this one's cluster.toml as cluster.file")


def devices_of(recipe: Recipe) -> int:
    """Devices to use: the recipe's, or this machine's (on CPU a device is one core)."""
    return recipe.cluster.devices or len(os.sched_getaffinity(0))


def planned(recipe: Recipe, run: RunFolder) -> Recipe:
    """What a recipe leaves open, filled from the plan that it names, or else from the one in its run folder, if there is one.

    Where it has other degrees than the plan, dp_shard is what they leave over of the ranks, as without a plan.
    """
    file = run.plan if recipe.plan.file == "auto" else Path(recipe.plan.file)
    if recipe.plan.file == "auto" and not file.exists():
        return recipe
    plan = read_plan(file)
    filled = recipe.with_plan(plan, str(file))
    other = any((getattr(filled.parallel, axis) or 1) != plan.get("parallel", {}).get(axis, 1) for axis in AXES)
    is_open = other and filled.origin("parallel.dp_shard") == "plan"
    return filled.with_values({"parallel.dp_shard": None}, "default") if is_open else filled


def plan_inputs(recipe: Recipe, run: RunFolder, sources: dict[str, Any]) -> dict[str, str]:
    """By hash: the recipe, how it evaluates, the measured cluster, the sources' sizes and the plan that is to be followed."""
    given = read_plan(Path(recipe.plan.file)) if recipe.plan.file != "auto" else {}
    cluster = run.cluster if recipe.cluster.file == "auto" else Path(recipe.cluster.file)
    return {"recipe": hash_value(recipe.model_dump(exclude={"serve", "metrics", "evaluate"})),
            "evaluate": hash_value(recipe.evaluate.model_dump()),
            "cluster": hash_file(cluster) if cluster.exists() else "",
            "sources": hash_value(sources), "given": hash_value(given)}


def refuse_replacing_forecast(run: RunFolder, recipe: Recipe) -> None:
    """A forecast that training has begun with stays what it was."""
    trained = [stage.name for stage in recipe.stage if run.stage(stage.name).metrics.exists()]
    if trained and run.plan.exists():  # without a plan, it was trained with none
        raise UserError(f"stage '{trained[0]}' of {run.root} has been trained with its plan, and the forecast made for it stays; "
                        "give this plan a file of its own with --out, or the run another name=…")
