"""Pipeline schedules: which stage lies on which rank, and what goes with what. One table, torch-free.

The schedules are those of torch.distributed.pipelining, under its names. Compiled blocks can give silently wrong gradients
where a schedule splits the backward pass (torch 2.13; pytorch#161904), so that pair is refused; so is a weight that one path
through the last stage meets twice, of which a split backward pass frees what it still needs. Recomputed blocks are exact with
every schedule, but are computed once more for each half of a split backward pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from athanor.foundation.errors import LayoutError, did_you_mean
from athanor.foundation.layout import Layout, split_evenly


@dataclass(frozen=True)
class Schedule:
    """One row of the table. `placement` is one stage per rank, several in turn (`looped`), or two in a V.

    `splits_backward`: gradients of inputs and of weights are computed apart. `rounds`: micro-batches must divide into
    rounds of about pp. `fills`: at least as many micro-batches as stages.
    """

    placement: str
    splits_backward: bool = False
    rounds: bool = False
    fills: bool = False


SCHEDULES = {
    "GPipe": Schedule("single"),
    "1F1B": Schedule("single", fills=True),
    "Interleaved1F1B": Schedule("looped", rounds=True),
    "LoopedBFS": Schedule("looped"),
    "InterleavedZeroBubble": Schedule("looped", splits_backward=True, rounds=True),
    "ZBVZeroBubble": Schedule("v", splits_backward=True),
    "DualPipeV": Schedule("v", splits_backward=True, fills=True),
}
DEFAULT_SCHEDULE = "1F1B"
LOOPS = 2  # stages per rank of a looped schedule, unless the split says otherwise


@dataclass(frozen=True)
class Pipeline:
    """A model cut into stages. blocks[s] are the decoder blocks of stage s, and ranks[s] the pipeline rank that holds it."""

    schedule: str
    blocks: tuple[range, ...]
    ranks: tuple[int, ...]

    def stages_of(self, rank: int) -> list[int]:
        """The stages that a pipeline rank holds, in order."""
        return [stage for stage, holder in enumerate(self.ranks) if holder == rank]


def find_schedule(name: str) -> Schedule:
    """The table's row. Raises LayoutError with the nearest name."""
    if name not in SCHEDULES:
        raise LayoutError(f"parallel.pipeline_schedule '{name}' is unknown; {did_you_mean(name, SCHEDULES)}")
    return SCHEDULES[name]


def stages_of(name: str) -> int:
    """Stages of a pipeline rank, unless the split says otherwise. Raises LayoutError for an unknown schedule."""
    return {"single": 1, "looped": LOOPS, "v": 2}[find_schedule(name).placement]


def cut(pp: int, schedule: str, costs: Sequence[float], split: Sequence[int] | None = None) -> Pipeline:
    """Cut blocks into stages, by `split` where it is given, otherwise so that the costliest stage is as cheap as possible.

    `costs` has one number per block; the first includes the embedding's, the last the head's. Each block is placed exactly
    once, or LayoutError is raised with what would work.
    """
    placement, count = find_schedule(schedule).placement, len(costs)
    wanted = pp * stages_of(schedule)
    if split is None:
        if wanted > count:
            raise LayoutError(f"pp = {pp} with {schedule} makes {wanted} stages, more than the {count} blocks of the model; "
                              f"use pp = {max(1, count * pp // wanted)} at most, or more blocks")
        split = split_evenly(costs, wanted)
    is_fitting = len(split) % pp == 0 and len(split) > pp if placement == "looped" else len(split) == wanted
    if not is_fitting:
        allowed = f"{2 * pp}, {3 * pp}, …" if placement == "looped" else str(wanted)
        raise LayoutError(f"parallel.split has {len(split)} stages; {schedule} on pp = {pp} needs {allowed}")
    if sum(split) != count or min(split) < 1:
        raise LayoutError(f"parallel.split = {list(split)} places {sum(split)} blocks; it must place each of the model's {count} "
                          f"once, at least one per stage, as {split_evenly(costs, len(split))} does")
    edges = [sum(split[:stage]) for stage in range(len(split) + 1)]
    blocks = tuple(range(begin, end) for begin, end in itertools.pairwise(edges))
    stages = range(len(split))
    ranks = tuple(min(s, 2 * pp - 1 - s) for s in stages) if placement == "v" else tuple(s % pp for s in stages)
    return Pipeline(schedule, blocks, ranks)


def check_pipeline(layout: Layout, schedule: str, *, stages: int, num_microbatches: int, is_compiled: bool,
                   recompute: str = "none", embedding_uses: int = 1) -> None:
    """Refuse what does not go with a schedule. Raises LayoutError with the numbers and what would work.

    `embedding_uses`: how often the last stage uses the embedding, as the head's weight or for blocks that predict further tokens.
    """
    row = find_schedule(schedule)
    if layout.pp == 1:
        return
    plain = ", ".join(name for name, other in SCHEDULES.items() if not other.splits_backward)
    if row.splits_backward and is_compiled:
        raise LayoutError(f"{schedule} splits the backward pass, which gives wrong gradients in compiled blocks; set compile = "
                          f"false, or use one of {plain}")
    if row.splits_backward and recompute == "selective":
        raise LayoutError(f"{schedule} splits the backward pass, and what selective recomputation keeps can be used once only; "
                          f"set recompute = full, or use one of {plain}")
    if row.splits_backward and embedding_uses > 1:
        raise LayoutError(f"{schedule} splits the backward pass, which fails where the last stage uses the embedding more than "
                          f"once ({embedding_uses} times here): predict one further token with tie_word_embeddings = false, or "
                          f"use one of {plain}")
    if row.fills and num_microbatches < stages:
        raise LayoutError(f"{schedule} needs at least as many micro-batches as its {stages} stages, but there are "
                          f"{num_microbatches}; make micro_batch_size smaller or the batch larger")
    rounds = max(1, num_microbatches // layout.pp)
    if row.rounds and num_microbatches % rounds:
        raise LayoutError(f"{schedule} runs micro-batches in {rounds} rounds of about pp = {layout.pp}, which does not divide "
                          f"{num_microbatches}; a multiple of pp works, such as {rounds * layout.pp}")
