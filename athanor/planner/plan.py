"""From recipe, cluster and scanned bytes to a plan: every open value filled, each with its reason, and the forecast books."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from athanor.cluster.spec import ClusterSpec, busy_note, with_devices
from athanor.foundation.layout import AXES
from athanor.foundation.recipe import Parallel, Recipe
from athanor.foundation.toml import toml_value
from athanor.foundation.units import format_count, format_seconds, format_share
from athanor.laws import goodput, scaling
from athanor.ledger.book import Book, total
from athanor.planner.chain import ACCOUNT, chain_seconds, functions_in
from athanor.planner.choose import Candidate, Text, block_parameters, layouts, rank_candidates
from athanor.planner.forecast import Forecaster, StageChoice, Step
from athanor.planner.named import DATASHEET, caveat
from athanor.planner.stage import GIVEN, FilledStage, budget_part, budget_shares, describe_text, fill_stage, open_stage

EVALUATION_SHARE = 0.15  # of the training's step time, for validations and the chain's evaluation together
LEAST_ITEMS = 32  # of a task; scores of fewer say little
MANY_EPOCHS = 16.0  # of repeated text, some 15.4 (R*) are worth anything (Muennighoff et al. 2023)


@dataclass
class Plan:
    """What to do and why. `values` has the recipe's tables; `books` one forecast per stage; `chain` the other steps' seconds."""

    values: dict[str, Any]
    reasons: dict[str, str]
    scan: dict[str, Any]
    books: dict[str, Book]
    steps: dict[str, Step]
    chain: dict[str, float]
    forecast: Book
    runner_ups: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    factors: dict[str, float] = field(default_factory=dict)  # by which own runs corrected the forecast

    def to_toml(self) -> str:
        """The text of `plan.toml`."""
        lines = ["# What `athanor plan` decided. Values of the recipe win over these; [reason] says why each was chosen."]
        for table in (name for name in ("data", "model", "parallel", "evaluate") if name in self.values):
            lines += [f"\n[{table}]", *(f"{key} = {toml_value(value)}" for key, value in self.values[table].items())]
        for stage in self.values["stage"]:
            lines += ["\n[[stage]]", *(f"{key} = {toml_value(value)}" for key, value in stage.items())]
        lines += ["\n[reason]", *(f"{toml_value(key)} = {toml_value(text)}" for key, text in self.reasons.items())]
        lines += ["\n[scan]", *(f"{toml_value(key)} = {toml_value(value)}" for key, value in self.scan.items())]
        for name, step in self.steps.items():
            lines += [f"\n[forecast.{toml_value(name)}]", f"step_seconds = {step.seconds!r}",
                      f"accounts = {toml_value(step.accounts)}", f"computing = {toml_value(step.parts)}"]
        lines += ["\n[own_runs]", *(f"{key} = {value!r}" for key, value in self.factors.items())]
        lines += ["\n[forecast.chain]", *(f"{key} = {value!r}" for key, value in self.chain.items())]
        return "\n".join(lines) + "\n"


def make_plan(recipe: Recipe, cluster: ClusterSpec, scan: dict[str, Any], factors: Mapping[str, float] | None = None,
              measures: bool = True) -> Plan:
    """Fill what the recipe left open. `scan` has the sources' "bytes" and "documents"; `factors` are those of `own.factors`;
    `measures` says whether measuring the machine is a step of this chain.

    Raises UserError when the budget is too small to train anything, LayoutError when no layout is legal.
    """
    cluster = with_devices(cluster, recipe.cluster.devices)
    forecaster, text = Forecaster(cluster, factors), describe_text(recipe, scan)
    shares = budget_shares(recipe.stage)
    main = max(recipe.stage, key=lambda stage: shares[stage.name])

    def ranking() -> list[Candidate]:
        return rank_candidates(forecaster, recipe, main, open_stage(main, text, cluster, recipe), text,
                               budget_part(recipe, cluster, shares[main.name], main))

    ranked, job = ranking(), None
    if recipe.budget.days is not None:
        job = _expected(forecaster, ranked[0], main.save_async, recipe.budget.days)
        shares = {name: share * job.goodput for name, share in shares.items()}
        ranked = ranking()
    best, spare = ranked[0], 0.0
    filled: dict[str, FilledStage] = {}
    for stage in sorted(recipe.stage, key=lambda stage: stage is main):  # the main stage takes what the others leave
        part = budget_part(recipe, cluster, shares[stage.name] + (spare if stage is main else 0.0), stage)
        filled[stage.name] = fill_stage(forecaster, best, stage, open_stage(stage, text, cluster, recipe), text, part)
        spare += filled[stage.name].unused * shares[stage.name]
    filled = {stage.name: filled[stage.name] for stage in recipe.stage}
    choices = {name: stage.choice for name, stage in filled.items()}
    reasons = {"model": _why_model(best, ranked), "parallel": _why_layout(best, recipe.parallel, cluster)}
    reasons |= {f"stage.{name}.{key}": why for name, stage in filled.items() for key, why in stage.reasons.items()}
    books = {name: forecaster.stage(best.shape, best.layout, choice) for name, choice in choices.items()}
    stepping = sum(each.choice.steps * each.step.seconds for each in filled.values())
    validating = sum(book.accounts.get("evaluation", 0.0) for book in books.values()) / cluster.devices
    limit, chain = _chain(recipe, cluster, scan, text, best, filled[main.name], EVALUATION_SHARE * stepping - validating)
    if not measures or recipe.cluster.file != "auto" or cluster.source == DATASHEET:
        chain["check"] = 0.0
    notes = _notes(best, text, choices[main.name], cluster)
    if job is None and cluster.device_type != "cpu" and stepping > goodput.RESTART_SECONDS:  # what is shorter is not restarted
        job = _expected(forecaster, best, main.save_async, None, stepping)
    if job is not None:
        _add_faults(books[main.name], replace(job, stepping_seconds=stepping, interval=0.0))
        notes.append(_said_of_faults(job, cluster.devices))
    values = plan_values(recipe, best, choices, text)
    if limit is not None:
        values["evaluate"] = {"limit": limit}
        reasons["evaluate.limit"] = (
            f"{limit} items of each task, so that all evaluation takes no more than {format_share(EVALUATION_SHARE, 0)} of the "
            f"{format_seconds(stepping)} of training" + ("" if limit > LEAST_ITEMS else "; with fewer, scores would say little"))
    scanned = {"bytes": scan["bytes"], "documents": scan["documents"], "bytes_per_token": round(text.bytes_per_token, 3),
               "tokens": round(text.unique_tokens), "evaluation_tokens": round(text.evaluation_tokens)}
    return Plan(values, reasons, scanned, books,
                {name: stage.step for name, stage in filled.items()}, chain, whole_forecast(books, chain, cluster),
                [_row(candidate) for candidate in ranked[1:6]],
                notes, dict(factors or {}))


def _expected(forecaster: Forecaster, best: Candidate, save_async: bool, days: float | None, stepping: float = 0) -> goodput.Job:
    """What faults leave of so many days of the calendar on this shape and layout, or add to so many seconds of steps."""
    saving, faults = forecaster.saving(best.shape, best.layout, save_async), goodput.faults_per_second(best.layout.world_size)
    if days is None:
        return goodput.Job(stepping, saving, goodput.DETECT_SECONDS, goodput.RESTART_SECONDS, faults)
    return goodput.within(days * goodput.DAY, saving, faults)


def _add_faults(book: Book, job: goodput.Job) -> None:
    """What faults are expected to take; saves and the first start stand in the book already."""
    for name, seconds in job.expect().items():
        if name not in ("kernel", "checkpoint"):
            more = seconds - (job.restart_seconds if name == "startup" else 0.0)
            book.add(name, more * book.devices, "planned")
            book.wall_seconds += more
    book.device_seconds = book.wall_seconds * book.devices
    book.close()


def _said_of_faults(job: goodput.Job, devices: int) -> str:
    return (f"{job.faults * goodput.DAY:.2g} faults a day are expected on {devices:,} devices (the rate of Llama 3 405B's run): "
            f"of {job.wall_seconds / goodput.DAY:.3g} days, {job.stepping_seconds / goodput.DAY:.3g} are steps that are kept, a "
            f"goodput of {format_share(job.goodput)}")


def plan_values(recipe: Recipe, best: Candidate, choices: dict[str, StageChoice], text: Text) -> dict[str, Any]:
    """The recipe's tables with every open value filled."""
    shape, layout = best.shape, best.layout
    model: dict[str, Any] = {"architecture": recipe.model.architecture}
    sizes = {key: getattr(shape, key, 0) for key in type(recipe.model).model_fields}
    model |= {key: value for key, value in sizes.items() if value or value is False}  # 0: it has none, such as experts
    model |= {"sizes": recipe.model.sizes} if recipe.model.sizes else {}
    stages = []
    for stage in recipe.stage:
        choice = choices[stage.name]
        rate = scaling.learning_rate(shape.hidden_size, choice.optimizer, is_start=stage.start_from is None)
        warmup = min(choice.steps // 5, max(10, choice.steps // 20))  # a twentieth, but ten at least, never more than a fifth
        stages.append({
            "name": stage.name, "seq_len": choice.seq_len, "steps": choice.steps, "micro_batch_size": choice.micro_batch_size,
            "global_batch_tokens": choice.global_batch_tokens(layout), "learning_rate": stage.learning_rate or rate,
            "learning_rate_schedule": stage.learning_rate_schedule or "linear",
            "warmup_steps": warmup if stage.warmup_steps is None else stage.warmup_steps,
            "weight_decay": 0.1 if stage.weight_decay is None else stage.weight_decay,
            "gradient_clip": stage.gradient_clip or 1.0, "optimizer": choice.optimizer, "precision": choice.precision,
            "compile": bool(stage.compile), "checkpoint_every": choice.checkpoint_every, "evaluate_every": choice.evaluate_every,
            **({} if choice.evaluate_rows is None else {"evaluate_rows": choice.evaluate_rows})})
    data = {} if recipe.data.tokenizer else {"vocab_size": text.vocab_size}
    parallel = {axis: getattr(layout, axis) for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")}
    parallel["recompute"] = recipe.parallel.recompute or "none"
    return {"data": data, "model": model, "parallel": parallel, "stage": stages}


def whole_forecast(books: dict[str, Book], chain: dict[str, float], cluster: ClusterSpec) -> Book:
    """One book over the stages and the chain's other steps."""
    parts = list(books.values())
    for name, seconds in chain.items():
        book = Book("forecast", cluster.devices, cluster.accelerator, None, wall_seconds=seconds,
                    device_seconds=seconds * cluster.devices)
        book.add(ACCOUNT[name], seconds * cluster.devices, "planned")
        parts.append(book)
    return total(parts, "forecast", wall_seconds=sum(book.wall_seconds for book in parts), devices=cluster.devices)


def _chain(recipe: Recipe, cluster: ClusterSpec, scan: dict[str, Any], text: Text, best: Candidate, main: FilledStage,
           room_seconds: float) -> tuple[int | None, dict[str, float]]:
    """Seconds of the chain's other steps, and to how many items each task is limited (None: as the recipe says) to stay in
    the evaluation's room."""
    speed = main.choice.seq_len * main.choice.micro_batch_size / main.step.forward_seconds
    documents = scan["documents"] * recipe.data.evaluation_share

    def seconds(limit: int | None) -> dict[str, float]:
        return chain_seconds(cluster, source_bytes=scan["bytes"], evaluation_tokens=text.evaluation_tokens,
                             evaluation_documents=documents, models=len(recipe.stage), tasks=recipe.evaluate.tasks,
                             step_forward_tokens_per_second=speed, num_hidden_layers=best.shape.num_hidden_layers, limit=limit)

    limit, chosen = recipe.evaluate.limit, None
    most = math.ceil(max(documents, functions_in(text.evaluation_tokens)))
    if limit is None and most > LEAST_ITEMS and seconds(None)["evaluate"] > room_seconds:
        fitting = range(LEAST_ITEMS + 1, most)
        limit = chosen = LEAST_ITEMS + bisect.bisect_right(fitting, room_seconds, key=lambda items: seconds(items)["evaluate"])
    return chosen, seconds(limit)


def _row(candidate: Candidate) -> dict[str, Any]:
    shape = candidate.shape
    return {"hidden_size": shape.hidden_size, "num_hidden_layers": shape.num_hidden_layers, "parameters": shape.parameters(),
            "tokens": candidate.tokens, "layout": str(candidate.layout), "predicted_loss": candidate.loss,
            "tokens_per_second": candidate.batch_tokens / candidate.step.seconds}


def _why_model(best: Candidate, ranked: list[Candidate]) -> str:
    if len(ranked) == 1:
        return "its sizes are given, by the recipe or by the model that a stage starts from; all stages have them"
    by = (f"lowest predicted loss ({best.loss:.2f} nats per token) of {len(ranked)} shapes" if best.loss <= ranked[1].loss else
          f"nearest to 20 tokens per parameter of {len(ranked)} shapes")
    return (f"{best.shape.hidden_size} wide, {best.shape.num_hidden_layers} deep: {by}; "
            f"{format_count(best.shape.parameters())} parameters, of them {format_count(block_parameters(best.shape))} in "
            f"decoder blocks, on {format_count(best.tokens)} tokens")


def _why_layout(best: Candidate, parallel: Parallel, cluster: ClusterSpec) -> str:
    given = [f"{axis}={size}" for axis in (*AXES, "ep") if (size := getattr(parallel, axis)) not in (None, -1)]
    if given and len(layouts(parallel, cluster)) == 1:
        return f"{best.layout} is {GIVEN}"
    held = f" with {' '.join(given)}, as the recipe says," if given else ""
    return f"{best.layout} is the fastest layout of {cluster.devices} devices{held} that fits memory and divides shape and batch"


def _notes(best: Candidate, text: Text, choice: StageChoice, cluster: ClusterSpec) -> list[str]:
    tokens = choice.steps * choice.global_batch_tokens(best.layout)
    epochs = tokens / text.unique_tokens
    unique = format_count(text.unique_tokens)
    times = f"{epochs:.2g}" if epochs < 100 else f"{epochs:,.0f}"
    notes = [f"the main stage reads {format_count(tokens)} of about {unique} tokens ({times} epochs)"]
    if epochs > MANY_EPOCHS:
        notes.append(f"text that is read more than some {MANY_EPOCHS:g} times teaches little more, and the predicted loss "
                     "is far from all runs that its law knows: give more text, or a smaller budget")
    notes += [busy] if (busy := busy_note(cluster)) else []
    return [*notes, caveat(cluster)] if cluster.source == DATASHEET else notes
