"""How a model is cut into stages, and what goes with which schedule."""

from __future__ import annotations

import pytest

from athanor.foundation.errors import LayoutError
from athanor.foundation.layout import Layout, check_experts
from athanor.foundation.schedules import SCHEDULES, check_pipeline, cut


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pp", [2, 3, 4])
def test_every_block_is_placed_once_in_order(schedule: str, pp: int) -> None:
    pipeline = cut(pp, schedule, [1.0] * 13)
    assert [block for blocks in pipeline.blocks for block in blocks] == list(range(13))
    assert all(pipeline.blocks) and set(pipeline.ranks) == set(range(pp))
    placed = sorted(stage for rank in range(pp) for stage in pipeline.stages_of(rank))
    assert placed == list(range(len(pipeline.blocks)))


def test_stages_lie_where_their_schedule_wants_them() -> None:
    assert cut(3, "1F1B", [1.0] * 6).ranks == (0, 1, 2)
    assert cut(3, "Interleaved1F1B", [1.0] * 6).ranks == (0, 1, 2, 0, 1, 2)
    assert cut(3, "ZBVZeroBubble", [1.0] * 6).ranks == (0, 1, 2, 2, 1, 0)
    assert cut(2, "LoopedBFS", [1.0] * 6, [1, 1, 1, 1, 1, 1]).ranks == (0, 1, 0, 1, 0, 1)


def test_costly_ends_get_fewer_blocks() -> None:
    """A head that costs three blocks: its stage gets what is left when all are as even as can be."""
    sizes = [len(blocks) for blocks in cut(4, "1F1B", [1.0] * 12 + [4.0]).blocks]
    assert sizes == [4, 4, 4, 1]


@pytest.mark.parametrize(("pp", "schedule", "split", "sentence"), [
    (2, "1F1b", None, "'1F1b' is unknown; did you mean '1F1B'"),
    (5, "1F1B", None, "makes 5 stages, more than the 4 blocks of the model; use pp = 4 at most"),
    (3, "DualPipeV", None, "makes 6 stages, more than the 4 blocks of the model; use pp = 2 at most"),
    (2, "1F1B", [1, 1, 2], "has 3 stages; 1F1B on pp = 2 needs 2"),
    (2, "ZBVZeroBubble", [2, 2], "has 2 stages; ZBVZeroBubble on pp = 2 needs 4"),
    (2, "LoopedBFS", [2, 2], "has 2 stages; LoopedBFS on pp = 2 needs 4, 6, …"),
    (2, "1F1B", [2, 1], r"\[2, 1\] places 3 blocks; it must place each of the model's 4 once"),
    (2, "1F1B", [4, 0], "at least one per stage, as \\[2, 2\\] does"),
])
def test_what_cannot_be_cut_is_refused(pp: int, schedule: str, split: list[int] | None, sentence: str) -> None:
    with pytest.raises(LayoutError, match=sentence):
        cut(pp, schedule, [1.0] * 4, split)


@pytest.mark.parametrize(("schedule", "micro_batches", "is_compiled", "sentence"), [
    ("ZBVZeroBubble", 8, True, "wrong gradients in compiled blocks; set compile = false, or use one of GPipe, 1F1B"),
    ("InterleavedZeroBubble", 8, True, "splits the backward pass"),
    ("DualPipeV", 8, True, "splits the backward pass"),
    ("DualPipeV", 3, False, "at least as many micro-batches as its 4 stages, but there are 3"),
    ("Interleaved1F1B", 5, False, "2 rounds of about pp = 2, which does not divide 5; a multiple of pp works, such as 4"),
    ("InterleavedZeroBubble", 5, False, "does not divide 5"),
])
def test_pairs_that_do_not_go_together(schedule: str, micro_batches: int, is_compiled: bool, sentence: str) -> None:
    with pytest.raises(LayoutError, match=sentence):
        check_pipeline(Layout(pp=2), schedule, stages=4, num_microbatches=micro_batches, is_compiled=is_compiled)


def test_what_is_kept_selectively_is_used_once() -> None:
    for schedule, row in SCHEDULES.items():
        if row.splits_backward:
            with pytest.raises(LayoutError, match=f"{schedule} splits the backward pass, and what selective recomputation keeps"):
                check_pipeline(Layout(pp=2), schedule, stages=4, num_microbatches=4, is_compiled=False, recompute="selective")
        else:
            check_pipeline(Layout(pp=2), schedule, stages=4, num_microbatches=4, is_compiled=False, recompute="selective")


def test_a_weight_on_the_way_twice_needs_a_whole_backward_pass() -> None:
    for schedule, row in SCHEDULES.items():
        choices = {"stages": 4, "num_microbatches": 4, "is_compiled": False}
        check_pipeline(Layout(pp=2), schedule, **choices, embedding_uses=1)
        check_pipeline(Layout(), schedule, **choices, embedding_uses=2)
        if row.splits_backward:
            with pytest.raises(LayoutError, match=r"more than once \(2 times here\): predict one .* or use one of GPipe, 1F1B"):
                check_pipeline(Layout(pp=2), schedule, **choices, embedding_uses=2)
        else:
            check_pipeline(Layout(pp=2), schedule, **choices, embedding_uses=2)


@pytest.mark.parametrize("schedule", [name for name, row in SCHEDULES.items() if not row.splits_backward])
def test_schedules_with_a_whole_backward_pass_may_be_compiled(schedule: str) -> None:
    check_pipeline(Layout(pp=2), schedule, stages=4, num_microbatches=4, is_compiled=True)


def test_experts_must_divide() -> None:
    check_experts(Layout(dp_shard=4, ep=2), 8)
    with pytest.raises(LayoutError, match="the model has no experts"):
        check_experts(Layout(dp_shard=2, ep=2), 0)
    with pytest.raises(LayoutError, match=r"ep = 4 must divide both the 6 experts and dp_shard x cp = 4; ep may be 1, 2"):
        check_experts(Layout(dp_shard=2, cp=2, ep=4), 6)
