"""Which shape and layout: every candidate is forecast, and the one with the best predicted loss in the budget is taken."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from athanor.cluster.spec import ClusterSpec
from athanor.cost.case import mean_context
from athanor.foundation.errors import LayoutError, UserError
from athanor.foundation.layout import AXES, Layout, check_batch, check_experts, check_model, factors
from athanor.foundation.recipe import Parallel, Recipe, Stage
from athanor.foundation.schedules import DEFAULT_SCHEDULE, check_pipeline, stages_of
from athanor.foundation.units import format_bytes
from athanor.laws import scaling
from athanor.models.shapes.decoder import DecoderShape
from athanor.models.shapes.find import check_architecture, load_shape, new_shape, shape_class
from athanor.planner.forecast import Forecaster, StageChoice, Step
from athanor.planner.memory import fits, fullest
from athanor.planner.named import DATASHEET

HIDDEN_SIZES = (64, 96, 128, 160, 192, 256, 320, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 5120, 8192)
LAYERS = (2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80)
ASPECT = (16, 160)  # hidden_size / num_hidden_layers of a shape worth considering
NARROW_ASPECT = 20  # the most for narrow models: 64 x 4 ended at 1.25 bits per byte where 96 x 2 ended at 1.38 (docs/log.md)
LEAST_STEPS = 10  # below this nothing is learned
LAYOUT_MARGIN = 1.15  # a layout with more communication must be so much faster, since that is the hardest to forecast
MOST_DOUBLINGS = 12  # of the rows per rank and step
NO_STEP = Step(0.0, {}, {}, 0.0)


@dataclass(frozen=True)
class Text:
    """How much there is to learn from, in tokens; nothing was tokenized yet."""

    vocab_size: int
    bytes_per_token: float
    unique_tokens: float
    evaluation_tokens: float
    document_tokens: float
    pair_tokens: float
    pairs_tokens: float  # of all pairs together


@dataclass(frozen=True)
class Part:
    """A stage's part of the budget, of one kind: seconds of step time, model FLOPs, tokens, or steps."""

    kind: str
    amount: float

    def tokens(self, shape: DecoderShape, choice: StageChoice, layout: Layout, step: Step) -> float:
        """Tokens that it pays for."""
        batch = choice.global_batch_tokens(layout)
        if self.kind == "seconds":
            return self.amount / step.seconds * batch
        if self.kind == "flops":
            return float(self.amount / shape.flops(1.0, float(mean_context(choice.seq_len, choice.document_tokens))))
        return self.amount if self.kind == "tokens" else self.amount * batch

    def law(self, forecaster: Forecaster, dtype: str) -> scaling.Law:
        """The law of loss for so much training: a third of the peak for the seconds, 20 tokens per parameter for tokens."""
        peak = forecaster.cluster.peak_flops[dtype] * forecaster.cluster.devices
        tokens = self.amount * (1 if self.kind == "tokens" else 4096)
        return scaling.law_for({"seconds": self.amount * peak / 3, "flops": self.amount}.get(self.kind, 6 * tokens**2 / 20))


@dataclass(frozen=True)
class Candidate:
    """A shape on its best layout and batch, with what a stage's part of the budget buys on it."""

    shape: DecoderShape
    layout: Layout
    choice: StageChoice
    step: Step
    tokens: float
    loss: float  # nats per token, predicted

    @property
    def batch_tokens(self) -> int:
        return self.choice.global_batch_tokens(self.layout)


def block_parameters(shape: DecoderShape) -> float:
    """Parameters outside embedding and head."""
    return float(shape.parameters() - shape.vocab_size * shape.hidden_size * (1 if shape.tie_word_embeddings else 2))


def shapes(recipe: Recipe, vocab_size: int, max_position: int) -> Iterator[DecoderShape]:
    """All shapes that agree with what the recipe fixes; a fixed size is taken as it is, and so is a model to start from."""
    model, names = recipe.model, [stage.name for stage in recipe.stage]
    start = next((stage.start_from for stage in recipe.stage if stage.start_from and stage.start_from not in names), None)
    if start is not None:
        yield load_shape(Path(start))
        return
    check_architecture(model.architecture, "model.architecture")
    heads, width = model.num_attention_heads, model.hidden_size
    if heads and width and not model.head_dim and width % heads:
        raise UserError(f"model.num_attention_heads = {heads} does not divide model.hidden_size = {width}")
    kind = shape_class(model.architecture)
    is_free = model.hidden_size is None and model.num_hidden_layers is None
    for hidden, layers in itertools.product([model.hidden_size] if model.hidden_size else HIDDEN_SIZES,
                                            [model.num_hidden_layers] if model.num_hidden_layers else LAYERS):
        if is_free and not ASPECT[0] <= hidden / layers <= min(ASPECT[1], max(NARROW_ASPECT, hidden / 32)):
            continue
        heads = model.num_attention_heads
        head_dim = model.head_dim or (hidden // heads if heads else head_size(hidden))
        heads = heads or max(1, hidden // head_dim)
        keys = model.num_key_value_heads or heads
        if heads % keys:
            raise UserError(f"model.num_key_value_heads = {keys} does not divide the {heads} query heads")
        open_sizes = {
            "max_position_embeddings": max_position, "tie_word_embeddings": hidden < 2048,
            "intermediate_size": round(hidden * kind.GROWTH / 32) * 32}
        if kind.KEYS.get("head_dim", "") is not None:  # else other sizes say what it is
            open_sizes["head_dim"] = head_dim
        yield new_shape(model.architecture, vocab_size=vocab_size, **{
            **open_sizes, **model.given(), "hidden_size": hidden,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": keys})


def head_size(hidden_size: int) -> int:
    """32 for narrow models, so that there are several heads; 64 and 128 for wider ones."""
    wanted = 32 if hidden_size < 512 else 64 if hidden_size < 2048 else 128
    return wanted if hidden_size % wanted == 0 else math.gcd(hidden_size, 32)


def layouts(parallel: Parallel, cluster: ClusterSpec) -> list[Layout]:
    """All layouts of the cluster that agree with the recipe; what it does not name is sharded data parallelism, tensor
    parallelism (of a node) or, where sending was measured or is known, a pipeline. Raises LayoutError when none agrees.
    """
    out, devices, is_known = [], cluster.devices, "send" in cluster.collectives or cluster.source == DATASHEET
    replicate, cp, ep = parallel.dp_replicate or 1, parallel.cp or 1, parallel.ep or 1
    pipelines, tensors = devices if is_known else parallel.pp or 1, max(parallel.tp or 1, min(devices, cluster.per_node))
    for pp, tp in itertools.product(range(1, pipelines + 1), range(1, tensors + 1)):
        shard, rest = divmod(devices, pp * tp * cp * replicate)
        if rest or (parallel.pp or pp) != pp or (parallel.tp or tp) != tp:
            continue
        if parallel.dp_shard in (None, -1, shard):
            out.append(Layout(pp=pp, dp_replicate=replicate, dp_shard=shard, cp=cp, tp=tp, ep=ep))
    if not out:
        asked = ", ".join(f"{axis} = {getattr(parallel, axis)}" for axis in AXES if getattr(parallel, axis))
        raise LayoutError(f"{asked} cannot be laid out on {devices} devices; their product must be {devices}")
    return out


def row_choices(stage: Stage, seq_len: int, layout: Layout, critical_tokens: float | None) -> list[int]:
    """Possible rows per data rank and step: as the recipe says, nearest to a critical batch, or all powers of two."""
    if stage.global_batch_tokens:
        rows, _ = check_batch(global_batch_tokens=stage.global_batch_tokens, seq_len=seq_len,
                              micro_batch_size=stage.micro_batch_size or 1, data_ranks=layout.data_ranks, tp=layout.tp)
        return [rows // layout.data_ranks]
    unit = stage.micro_batch_size or 1
    if critical_tokens is None:
        return [unit * 2**power for power in range(MOST_DOUBLINGS)]
    return [unit * 2 ** max(0, round(math.log2(critical_tokens / seq_len / layout.data_ranks / unit)))]


def fastest(forecaster: Forecaster, shape: DecoderShape, layout: Layout, stage: Stage, template: StageChoice,
            rows: int) -> tuple[StageChoice, Step] | None:
    """The micro-batch size with the shortest step of `rows` rows per rank; None when none fits memory, or fills a pipeline."""
    choices = []
    for size in [stage.micro_batch_size] if stage.micro_batch_size else factors(rows):
        choice = replace(template, micro_batch_size=size, num_microbatches=rows // size)
        memory = forecaster.memory(shape, layout, choice)
        if not fits(memory, forecaster.cluster.memory_bytes) or size * template.seq_len // layout.cp % layout.tp:
            break
        choices.append(choice)
    stages = layout.pp * stages_of(template.schedule)
    choices = [choice for choice in choices if is_runnable(shape, layout, choice, stages, bool(stage.compile))]
    if not choices:
        return None
    return min(zip(choices, forecaster.steps(shape, layout, choices), strict=True), key=lambda found: found[1].seconds)


def is_runnable(shape: DecoderShape, layout: Layout, choice: StageChoice, stages: int, is_compiled: bool) -> bool:
    """Whether the stage's schedule takes so many micro-batches of the model."""
    try:
        check_pipeline(layout, choice.schedule, stages=stages, num_microbatches=choice.num_microbatches,
                       is_compiled=is_compiled, recompute=choice.recompute, embedding_uses=shape.embedding_uses())
    except LayoutError:
        return False
    return True


def buy(forecaster: Forecaster, shape: DecoderShape, options: list[Layout], stage: Stage, template: StageChoice, part: Part,
        unique_tokens: float) -> Candidate | None:
    """What a part of the budget is best spent on with this shape: layout, batch, micro-batch. None when nothing fits.

    With time to spend, small batches are weighed against fast ones by the predicted loss; otherwise the batch is the
    critical one, and the fastest layout wins.
    """
    best: Candidate | None = None
    law = part.law(forecaster, template.precision)
    for layout in sorted(options, key=lambda layout: layout.pp * layout.tp):
        margin = 1.0 if best is None or layout == best.layout else LAYOUT_MARGIN
        critical = None
        if part.kind != "seconds":
            tokens = 1e6 * part.amount if part.kind == "steps" else part.tokens(shape, template, layout, NO_STEP)
            critical = scaling.critical_batch_tokens(tokens)
        for rows in row_choices(stage, template.seq_len, layout, critical):
            found = fastest(forecaster, shape, layout, stage, template, rows)
            if found is None:
                continue  # too few rows for a pipeline, or too many for the memory
            choice, step = found
            tokens, batch = part.tokens(shape, choice, layout, step), choice.global_batch_tokens(layout)
            loss = law.loss(block_parameters(shape), tokens, unique_tokens, batch)
            if part.kind == "seconds":
                cautious = law.loss(block_parameters(shape), tokens / margin, unique_tokens, batch)
                is_better = best is None or (cautious < best.loss and tokens >= batch * LEAST_STEPS)
            else:
                is_better = best is None or batch / step.seconds > margin * best.batch_tokens / best.step.seconds
            if is_better:
                best, margin = Candidate(shape, layout, choice, step, tokens, loss), 1.0
    return best


def legal(shape: DecoderShape, options: list[Layout], lengths: list[tuple[Stage, int]], schedule: str) -> list[Layout]:
    """Layouts whose degrees divide the shape and each stage's batch of rows so long; LayoutError of the first when none does."""
    out, first = [], None
    for layout in options:
        try:
            stages = stages_of(schedule if layout.pp > 1 else DEFAULT_SCHEDULE)
            check_model(layout, shape, lengths[0][1], num_hidden_layers=shape.num_hidden_layers // stages)
            check_experts(layout, getattr(shape, "num_experts", 0))
            for stage, seq_len in lengths:
                row_choices(stage, seq_len, layout, None)
            out.append(layout)
        except LayoutError as error:
            first = first or error
    if not out and first:
        raise first
    return out


def rank_candidates(forecaster: Forecaster, recipe: Recipe, stage: Stage, template: StageChoice, text: Text,
                    part: Part) -> list[Candidate]:
    """All shapes for one part of the budget, best first.

    With time or FLOPs the predicted loss decides. With a number of tokens the loss alone would always take the largest
    model; then the shape nearest to 20 tokens per parameter is taken (Hoffmann et al. 2022).
    """
    out: list[Candidate] = []
    forecaster.rates(template.precision, template.optimizer)  # or say that nobody knows them
    smallest, refused, rows = math.inf, None, stage.micro_batch_size or 1
    options = layouts(recipe.parallel, forecaster.cluster)
    lengths = [(stage, template.seq_len), *((other, other.seq_len) for other in recipe.stage if other.seq_len)]
    for shape in shapes(recipe, text.vocab_size, max(length for _, length in lengths)):
        try:
            possible = legal(shape, options, lengths, template.schedule)
        except LayoutError as error:
            refused = refused or error
            continue
        candidate = buy(forecaster, shape, possible, stage, template, part, text.unique_tokens)
        if candidate is not None:
            out.append(candidate)
        else:
            smallest = min(smallest, fullest(forecaster.memory(shape, possible[-1], replace(template, micro_batch_size=rows))))
    if not out:
        if refused:
            raise refused
        raise UserError(f"no shape fits: the smallest possible needs {format_bytes(smallest)} with micro_batch_size = {rows}, of "
                        f"the {format_bytes(forecaster.cluster.memory_bytes)} of a device 80 % can be used")
    is_sized = part.kind in ("tokens", "steps")
    return sorted(out, key=lambda c: abs(math.log(c.tokens / c.shape.parameters() / 20)) if is_sized else c.loss)
