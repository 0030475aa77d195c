"""What one stage does with its part of the budget: batch, steps, how often it saves and validates, and why."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from athanor.cluster.spec import ClusterSpec
from athanor.cost.coefficients import load
from athanor.foundation.errors import UserError
from athanor.foundation.recipe import Recipe, Stage
from athanor.foundation.schedules import DEFAULT_SCHEDULE
from athanor.foundation.units import PD_FLOP, format_bytes, format_count, format_seconds, format_share
from athanor.laws import goodput, scaling
from athanor.models.shapes.find import filled_up, tokenizer_size
from athanor.planner.choose import LEAST_STEPS, Candidate, Part, Text, buy
from athanor.planner.forecast import Forecaster, StageChoice, Step
from athanor.planner.named import DATASHEET

PRETRAIN_SHARE = 0.85
MOST_EPOCHS_OF_PAIRS = 3.0
VALIDATION_SHARE = 0.03  # of a stage's step time
LEAST_VALIDATIONS, MOST_VALIDATIONS = 2, 10
GIVEN = "given by the recipe"


@dataclass(frozen=True)
class FilledStage:
    """A stage with nothing left open; `unused` is the share of its part of the budget that it leaves to the main stage."""

    choice: StageChoice
    step: Step
    reasons: dict[str, str]
    unused: float


def budget_part(recipe: Recipe, cluster: ClusterSpec, share: float, stage: Stage) -> Part:
    """`share` of the recipe's budget; without one, the stage's own steps or tokens. UserError when there is neither."""
    budget, price = recipe.budget, recipe.cluster.price_per_device_hour or cluster.price_per_device_hour
    if budget.minutes is not None or budget.days is not None:  # of days, `share` is without what faults take
        return Part("seconds", ((budget.minutes or 0) * 60 + (budget.days or 0) * goodput.DAY) * share)
    if budget.money is not None:
        if price is None:
            raise UserError("budget.money needs cluster.price_per_device_hour")
        return Part("seconds", budget.money / (price * cluster.devices) * 3600 * share)
    if budget.pd is not None:
        return Part("flops", budget.pd * PD_FLOP * share)
    if budget.tokens is not None:
        return Part("tokens", budget.tokens * share)
    if stage.tokens is not None:
        return Part("tokens", stage.tokens)
    if stage.steps is not None:
        return Part("steps", stage.steps)
    raise UserError(f"there is no budget: give budget.minutes, days, pd, tokens or money, or stage.{stage.name}.steps")


def budget_shares(stages: list[Stage]) -> dict[str, float]:
    """Shares of the budget: as given; pretraining 0.85 of the rest when others share it; the rest in equal parts."""
    given = {stage.name: stage.share for stage in stages if stage.share}
    rest = 1.0 - sum(given.values())
    open_stages = [stage for stage in stages if stage.name not in given]
    if rest < -1e-9 or (open_stages and rest <= 1e-9):
        raise UserError(f"the stages' shares add up to {sum(given.values()):g}, which leaves nothing for "
                        + (open_stages[0].name if open_stages else "rounding; together they may be at most 1"))
    first = [s for s in open_stages if s.objective == "pretrain"]
    others = [s for s in open_stages if s.objective != "pretrain"]
    for group, share in ((first, PRETRAIN_SHARE if others else 1.0), (others, 1.0 - PRETRAIN_SHARE if first else 1.0)):
        given |= {stage.name: rest * share / len(group) for stage in group}
    return given


def describe_text(recipe: Recipe, scan: dict[str, Any]) -> Text:
    """How many tokens the sources will give, from their bytes and constants of earlier builds."""
    constants = load()["text"]
    vocabulary = recipe.data.vocab_size or (tokenizer_size(recipe.data.tokenizer) if recipe.data.tokenizer
                                            else vocabulary_for(scan["bytes"]))
    growth = (vocabulary / constants["reference_vocab_size"]) ** constants["bytes_per_token_exponent"]
    per_token = constants["bytes_per_token"] * growth
    tokens = scan["bytes"] * constants["kept_share"] / per_token
    held_out = recipe.data.evaluation_share
    return Text(filled_up(vocabulary), per_token, max(1.0, tokens * (1 - held_out)), tokens * held_out,
                max(16.0, scan["bytes"] / per_token / max(1, scan["documents"])), constants["pair_tokens"],
                max(1.0, tokens * (1 - held_out) * constants["pairs_share"]))


def vocabulary_for(source_bytes: float) -> int:
    """Entries of a new tokenizer: 4096 for 10 MB of text, doubling with every fourfold of it, at most 131072."""
    return 1 << min(17, max(9, round(12 + math.log(max(source_bytes, 1) / 1e7, 4))))


def open_stage(stage: Stage, text: Text, cluster: ClusterSpec, recipe: Recipe) -> StageChoice:
    """A stage before its batch and steps are known; its rows, unless given, are as long as the longest of other stages."""
    is_pairs, longest = stage.data != "documents", max(other.seq_len or 0 for other in recipe.stage)
    return StageChoice(
        stage.name, seq_len=stage.seq_len or longest or (256 if cluster.device_type == "cpu" else 2048),
        micro_batch_size=stage.micro_batch_size or 1, num_microbatches=1, steps=stage.steps or 1,
        precision=stage.precision or ("fp32" if cluster.device_type == "cpu" else "bf16"),
        checkpoint_every=stage.checkpoint_every or 1, evaluate_every=stage.evaluate_every or 1,
        optimizer=stage.optimizer or "muon", document_tokens=text.pair_tokens if is_pairs else text.document_tokens,
        evaluation_tokens=text.evaluation_tokens * (load()["text"]["pairs_share"] if is_pairs else 1.0),
        recompute=recipe.parallel.recompute or "none", schedule=recipe.parallel.pipeline_schedule or DEFAULT_SCHEDULE,
        save_async=stage.save_async)


def fill_stage(forecaster: Forecaster, best: Candidate, stage: Stage, template: StageChoice, text: Text,
               part: Part) -> FilledStage:
    """Batch, steps and intervals of one stage on the chosen shape.

    Raises UserError when the part pays for fewer than LEAST_STEPS steps, saying what would be enough, or when the stage
    does not fit memory.
    """
    is_pairs = stage.data == "pairs"
    bought = buy(forecaster, best.shape, [best.layout], stage, template, part,
                 text.pairs_tokens if is_pairs else text.unique_tokens)
    if bought is None:
        raise UserError(f"stage.{stage.name} does not fit memory with {best.shape.parameters():,} parameters; "
                        "lower its seq_len or micro_batch_size, or the model's sizes")
    choice, step, batch = bought.choice, bought.step, bought.batch_tokens
    paid, cap = bought.tokens / batch, MOST_EPOCHS_OF_PAIRS * text.pairs_tokens / batch if is_pairs else math.inf
    unused = 0.0
    if stage.steps is not None or stage.tokens is not None:
        steps, why = stage.steps or max(1, round((stage.tokens or 0.0) / batch)), GIVEN
    elif paid < LEAST_STEPS:
        raise UserError(_too_small(stage, paid, part))
    elif cap < paid:
        steps = math.ceil(max(cap, LEAST_STEPS))
        unused = max(0.0, 1.0 - steps / paid)
        why = f"{MOST_EPOCHS_OF_PAIRS:g} epochs of the data; the budget would pay for {paid:,.0f} steps"
    else:
        steps = int(paid)
        spent = format_seconds(part.amount) if part.kind == "seconds" else "the budget"
        why = f"{spent} at {format_seconds(step.seconds)} a step; {format_count(steps * batch)} tokens"
    critical = scaling.critical_batch_tokens(steps * batch)
    reasons = {"steps": why, "global_batch_tokens": (
        f"{GIVEN}: {batch / critical:.2g} times the critical batch of {critical:,.0f} tokens" if stage.global_batch_tokens else
        f"lowest predicted loss: smaller steps learn more per token, larger ones are faster ({batch / step.seconds:,.0f} "
        "tokens/s)" if part.kind == "seconds" else f"about the critical batch of {critical:,.0f} tokens"),
        "micro_batch_size": (GIVEN if stage.micro_batch_size else "the fastest of what fits memory")
        + f"; {choice.num_microbatches} a step and rank"}
    choice = _with_intervals(forecaster, best, stage, replace(choice, steps=steps), step, reasons)
    return FilledStage(choice, step, reasons, unused)


def _with_intervals(forecaster: Forecaster, best: Candidate, stage: Stage, choice: StageChoice, step: Step,
                    reasons: dict[str, str]) -> StageChoice:
    """How often to save (with the highest goodput) and to validate."""
    saving = forecaster.saving(best.shape, best.layout, choice.save_async)
    apart = goodput.best_interval(saving, goodput.faults_per_second(best.layout.world_size))
    best_apart, quarter = max(1, round(apart / step.seconds)), math.ceil(choice.steps / 4)
    checkpoint = stage.checkpoint_every or min(best_apart, quarter)
    why = "balances saving against work lost to faults" if best_apart <= quarter else "is a quarter of the stage"
    why = f"is {GIVEN}" if stage.checkpoint_every else why
    every, disk = format_seconds(checkpoint * step.seconds), forecaster.cluster.disk["write_bytes_per_second"]
    whence = "cluster.write_bytes_per_second sets it" if forecaster.cluster.source == DATASHEET else "as measured"
    reasons["checkpoint_every"] = f"{saving}, at {format_bytes(disk)}/s a device ({whence}); one every {every} {why}"
    return _with_validations(forecaster, best, stage, replace(choice, checkpoint_every=checkpoint), step, reasons)


def _with_validations(forecaster: Forecaster, best: Candidate, stage: Stage, choice: StageChoice, step: Step,
                      reasons: dict[str, str]) -> StageChoice:
    """How often to validate, and on how many rows, in VALIDATION_SHARE of the stage's step time; at least on one batch."""
    def seconds(tokens: float) -> float:
        return forecaster.validation_seconds(step, best.shape, best.layout, replace(choice, evaluation_tokens=tokens))

    room, batch = VALIDATION_SHARE * choice.steps * step.seconds, choice.micro_batch_size * best.layout.data_ranks
    count = min(MOST_VALIDATIONS, max(LEAST_VALIDATIONS, int(room / max(seconds(choice.evaluation_tokens), 1e-9))))
    evaluate = stage.evaluate_every or max(1, math.ceil(choice.steps / count))
    count = math.ceil(choice.steps / evaluate)
    each = seconds(batch * choice.seq_len) - seconds(0)
    rows, all_rows = stage.evaluate_rows, math.ceil(choice.evaluation_tokens / choice.seq_len)
    if rows is None and each > 0 and count * seconds(choice.evaluation_tokens) > room:
        rows = batch * max(1, int((room / count - seconds(0)) / each))
    if rows is not None and rows < all_rows:
        choice = replace(choice, evaluate_rows=rows, evaluation_tokens=float(rows * choice.seq_len))
        reasons["evaluate_rows"] = f"of about {all_rows:,}, " + (GIVEN if stage.evaluate_rows else (
            f"so that validations take no more than {format_share(VALIDATION_SHARE, 0)} of the stage, or one batch each"))
    each_seconds = format_seconds(seconds(choice.evaluation_tokens))
    reasons["evaluate_every"] = f"{f'{GIVEN}: ' if stage.evaluate_every else ''}{count} validations of {each_seconds} each"
    return replace(choice, evaluate_every=evaluate)


def _too_small(stage: Stage, paid: float, part: Part) -> str:
    needed = part.amount * LEAST_STEPS / max(paid, 1e-12)
    scale, unit = {"seconds": (60.0, "minutes"), "flops": (PD_FLOP, "PD"), "tokens": (1.0, "tokens")}[part.kind]
    return (f"the budget pays for {paid:.2g} steps of stage.{stage.name}; the smallest that trains anything is {LEAST_STEPS} "
            f"steps, {float(f'{1.02 * needed / scale:.3g}'):g} {unit} for this stage")
