"""Guards: nothing that is not finite, and no spike, reaches the weights; too many in a row are gone back from and passed over."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from athanor.data.lineage import trace
from athanor.data.order import pass_over
from athanor.foundation.errors import AthanorError, RankError
from athanor.foundation.run_folder import RunFolder, StageFolder, hash_folder, read_json, read_jsonl
from athanor.ledger.book import read_book
from athanor.models.shapes.decoder import DecoderShape
from athanor.models.zoo.llama import build
from athanor.parallel.stages import Stages
from athanor.report.faults import timeline
from athanor.train import checkpoint
from athanor.train.guards import find_good
from athanor.train.optimizer import Optimizer
from athanor.train.saver import Saver
from athanor.train.spikes import LEAST_DEVIATIONS, Guard

Train = Callable[..., dict[str, Any]]
SHAPE = DecoderShape(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
ROWS = 16  # of a step
STEPS = 8
SIZES = (f"stage.pretrain.steps={STEPS}", "stage.pretrain.checkpoint_every=2", "stage.pretrain.evaluate_every=1000",
         "stage.pretrain.precision=fp32")
# so early the loss still falls from step to step, and a window of so few would call much a spike
WATCHFUL = ("stage.pretrain.spike_window=3", "stage.pretrain.spike_sigma=20")
TWO = (*SIZES, *WATCHFUL, "parallel.dp_shard=2", "stage.pretrain.most_skipped_steps=2")
SPOILED = "guards_ranks:train_spoiled"
BAD = [[5 * ROWS, 7 * ROWS]]  # of steps 6 and 7; the newest checkpoint is that of step 4


def numbers(*values: float) -> list[torch.Tensor]:
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def judge(guard: Guard, loss: float, norm: float) -> bool:
    loss_, squared = numbers(loss, norm * norm)
    is_usual = guard.judge(loss_, squared)
    guard.keep(is_usual & torch.tensor(math.isfinite(loss) and math.isfinite(norm)))
    return bool(is_usual)


def rows_of(stage: StageFolder, *kinds: str) -> list[dict[str, Any]]:
    return [row for row in read_jsonl(stage.events) if row["kind"] in kinds]


def test_a_spike_is_far_above_the_mean_of_the_steps_that_were_made() -> None:
    chance = np.random.default_rng(7)
    losses, norms = 3.0 + 0.4 * chance.random(12), chance.lognormal(0.0, 3.0, 12)
    guard = Guard(6.0, 8, torch.device("cpu"))
    for loss, norm in zip(losses[:7], norms[:7], strict=True):
        assert judge(guard, loss, norm)
    guard.judge(*numbers(1e9, 1e9))  # the window is not full: nothing is a spike, whether it is kept or not
    assert bool(guard.judge(*numbers(1e9, 1e9)))
    for loss, norm in zip(losses[7:], norms[7:], strict=True):
        assert judge(guard, loss, norm)
    seen = losses[-8:], norms[-8:]
    loss_limit, norm_limit = (float(values.mean() + 6 * values.std(ddof=1)) for values in seen)
    assert loss_limit > seen[0].max() and norm_limit > seen[1].max()
    assert seen[1].std(ddof=1) > seen[1].mean()
    for loss, norm, wanted in ((loss_limit + 1e-9, 1.0, False), (3.0, norm_limit * (1 + 1e-9), False), (1e9, 1e9, False),
                               (math.nan, 1.0, True), (loss_limit - 1e-9, norm_limit * (1 - 1e-9), True)):
        assert judge(guard, loss, norm) == wanted, (loss, norm)
    assert guard.state()["losses"][-2:] == [losses[-1], loss_limit - 1e-9], "only what was made is remembered"
    off = Guard(0.0, 2, torch.device("cpu"))
    assert all(judge(off, value, value) for value in (1.0, 1.0, 1.0, 1e30))


def test_where_nothing_varies_a_small_rise_is_no_spike() -> None:
    guard = Guard(6.0, 4, torch.device("cpu"))
    for _ in range(4):
        judge(guard, 2.0, 1.0)
    loss, norm = 2.0 * (1 + 6 * LEAST_DEVIATIONS[0]), 1 + 6 * LEAST_DEVIATIONS[1]
    assert not bool(guard.judge(*numbers(loss + 1e-9, 1.0))) and bool(guard.judge(*numbers(loss - 1e-9, 1.0)))
    assert not bool(guard.judge(*numbers(2.0, (norm + 1e-9) ** 2))) and bool(guard.judge(*numbers(2.0, (norm - 1e-9) ** 2)))


@pytest.mark.parametrize(("loss", "norm", "why"), [
    (math.nan, 1.0, "its loss is not finite"), (2.0, math.inf, "its gradient is not finite"),
    (2.0, 50.0, "its gradient norm 50 is above 7, the mean of 4 steps + 6 deviations"),
    (9.0, 1.0, "its loss 9 is above 2.24, the mean of 4 steps + 6 deviations")])
def test_the_reason_of_a_skip_is_a_sentence(loss: float, norm: float, why: str) -> None:
    guard = Guard(6.0, 4, torch.device("cpu"))
    for _ in range(4):
        judge(guard, 2.0, 1.0)
    guard.judge(*numbers(loss, norm * norm))
    said, values = guard.reason()
    assert said == why
    assert values["grad_norm"] == (norm if math.isfinite(norm) else None)


@pytest.mark.parametrize("steps", [3, 8, 21])
def test_a_guard_goes_on_with_the_same_bits(steps: int) -> None:
    chance = np.random.default_rng(steps)
    first = Guard(6.0, 8, torch.device("cpu"))
    for loss, norm in chance.random((steps, 2)):
        judge(first, loss, norm)
    second = Guard(6.0, 8, torch.device("cpu"))
    second.restore(first.state())
    for loss, norm in chance.random((9, 2)):
        assert judge(first, loss, norm) == judge(second, loss, norm)
        assert torch.equal(first.limits.nan_to_num(-1), second.limits.nan_to_num(-1))
    smaller = Guard(6.0, 2, torch.device("cpu"))
    smaller.restore(first.state())
    assert smaller.state()["losses"] == first.state()["losses"][-2:]
    smaller.restore({})
    assert smaller.state() == {"losses": [], "grad_norms": []}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_nothing_waits_for_the_device(kind: str) -> None:
    with FakeTensorMode():  # here a number that the host asks for is an error
        model = build(SHAPE)
        optimizer, guard = Optimizer(Stages.alone(model), kind, 0.1), Guard(6.0, 4, torch.device("cpu"))
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        loss, squared = torch.ones((), dtype=torch.float64), optimizer.squared_norm()
        guard.keep(optimizer.step(0.01, squared, loss, 1.0, guard.judge(loss, squared)))
        with pytest.raises(RuntimeError, match=r"_local_scalar_dense"):
            bool(guard.judge(loss, squared))


def test_what_is_passed_over_is_left_out_wherever_one_comes_from() -> None:
    passed = [[64, 96], [64, 128], [256, 272]]
    assert [pass_over(at, passed) for at in (0, 63, 64, 80, 127, 128, 256, 300)] == [0, 63, 128, 128, 128, 128, 272, 300]
    assert pass_over(64, [[96, 128], [64, 96]]) == 128


@pytest.mark.parametrize(("layout", "kind"), [
    ("dp_shard=2", "gradient"), ("pp=2", "loss"),
    pytest.param("pp=2", "gradient", marks=pytest.mark.slow), pytest.param("tp=2", "loss", marks=pytest.mark.slow),
    pytest.param("tp=2", "gradient", marks=pytest.mark.slow),
    ("dp_replicate=2", "gradient"),  # in a copy of the gradient whose norm another rank counts
    pytest.param("dp_replicate=2 stage.pretrain.reduction=exact", "gradient", marks=pytest.mark.slow)])
def test_what_is_not_finite_on_one_rank_leaves_every_bit_on_all(train: Train, run_folder: Path, layout: str, kind: str) -> None:
    found = train(run_folder, *SIZES, *f"parallel.{layout}".split(), "stage.pretrain.optimizer=muon",
                  target="guards_ranks:one_step_is_spoiled", kind=kind)
    assert found["skipped"] == [True, False] and found["updates"] == 3
    assert found["kept"] and found["moved"] and found["same"] and found["everywhere"], found


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("calm")


def folder_in(parent: Path, name: str, data: Path) -> Path:
    (parent / name).mkdir(exist_ok=True)
    if not (parent / name / "data").exists():
        (parent / name / "data").symlink_to(data)
    return parent / name


@pytest.fixture
def passing_over(train: Train, calm: Path, data_folder: Path) -> Callable[..., dict[str, Any]]:
    """The same run on an order of data without those samples, by the layout."""

    def run(first: int, end: int, *overrides: str) -> dict[str, Any]:
        folder = folder_in(calm, f"{first}-{end}-{len(overrides)}", data_folder)
        found = train(folder, *TWO, *overrides, target="guards_ranks:train_passing_over", first=first, end=end)
        return {**found, "model": hash_folder(RunFolder(folder).stage("pretrain").model)}

    return run


def test_a_clean_run_is_the_same_with_guards_and_without(train: Train, tmp_path: Path, data_folder: Path) -> None:
    found = {}
    for name, guards in {"on": WATCHFUL, "off": ("stage.pretrain.spike_sigma=0",), "default": ()}.items():
        folder = folder_in(tmp_path, name, data_folder)
        losses = train(folder, *SIZES, "parallel.dp_shard=2", *guards)["loss"]
        stage = RunFolder(folder).stage("pretrain")
        assert not rows_of(stage, "skip")
        found[name] = losses, hash_folder(stage.model)
    assert found["on"] == found["off"] == found["default"]
    kept = read_json(tmp_path / "on" / "pretrain" / "checkpoints" / f"step-{STEPS:08d}" / "meta.json")["guards"]
    assert kept["losses"] == pytest.approx(found["on"][0][-3:], rel=1e-6) and len(kept["grad_norms"]) == 3, "it was awake"


@pytest.mark.parametrize("kind", ["large gradient", pytest.param("large loss", marks=pytest.mark.slow)])
def test_a_spike_is_skipped_and_its_rows_are_told(train: Train, run_folder: Path, kind: str) -> None:
    bad = [[5 * ROWS, 6 * ROWS]]
    losses = train(run_folder, *TWO, target=SPOILED, spoiled=bad, kind=kind, ranks=[0, 1])["loss"]
    stage = RunFolder(run_folder).stage("pretrain")
    assert [row["skipped"] for row in read_jsonl(stage.metrics)] == [False] * 5 + [True] + [False] * 2
    (skip,) = rows_of(stage, "skip")
    what = "gradient norm" if "gradient" in kind else "loss"
    assert skip["sentence"].startswith(f"step 6 was skipped: its {what} ") and "rows were samples 80 to 95" in skip["sentence"]
    assert skip["step"] == 6 and skip["samples"] == bad[0] and skip["rank"] == 0
    key = what.replace("gradient", "grad").replace(" ", "_")
    assert skip[key] > skip[f"{key}_limit"] > 0
    assert [row["sample"] for row in skip["rows"]] == list(range(*bad[0]))
    for row in skip["rows"]:
        for token, document in zip((row["tokens"][0], row["tokens"][1] - 1), row["documents"], strict=True):
            found = trace(run_folder / "data", token, source=row["source"])["document"]
            assert found["number"] == document and found["source"] == row["source"] == "modules"
    assert losses[6] < losses[0], "it goes on learning"
    book = read_book(stage.actual)
    assert book.tokens == read_jsonl(stage.metrics)[-1]["tokens"]
    assert book.accounts["lost"] > 0 and sum(book.accounts.values()) == pytest.approx(book.device_seconds)


@pytest.mark.parametrize("layout", ["dp_shard=2", pytest.param("pp=2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["gradient", pytest.param("large gradient", marks=pytest.mark.slow)])
def test_skips_in_a_row_roll_back_and_pass_over_their_data(train: Train, run_folder: Path, passing_over: Any, layout: str,
                                                           kind: str) -> None:
    extra = [] if layout == "dp_shard=2" else ["parallel.dp_shard=1", f"parallel.{layout}"]
    ranks = [1] if kind == "gradient" else [0, 1]
    found = train(run_folder, *TWO, *extra, target=SPOILED, spoiled=BAD, kind=kind, ranks=ranks)
    stage = RunFolder(run_folder).stage("pretrain")
    assert [row["kind"] for row in rows_of(stage, "skip", "rollback", "restart")] == ["skip", "skip", "rollback"]
    (told,) = rows_of(stage, "rollback")
    assert told["sentence"] == ("2 steps in a row were skipped, the last is step 7, so it goes on from checkpoint step-00000004 "
                                "and passes over samples 64 to 111")
    assert told["step"] == 4 and told["from_step"] == 7 and told["passed"] == [64, 112]
    wanted = passing_over(64, 112, *extra)
    assert found["loss"] == wanted["loss"] and found["grad_norm"] == wanted["grad_norm"]
    assert hash_folder(stage.model) == wanted["model"]
    book, metrics = read_book(stage.actual), read_jsonl(stage.metrics)
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8]
    assert book.tokens == metrics[-1]["tokens"] and metrics[-1]["samples"] == STEPS * ROWS + 48
    thrown_away = 2 * sum(row["step_seconds"] for row in metrics[4:7])
    assert book.accounts["lost"] == pytest.approx(thrown_away, rel=0.5), "device-seconds of three steps on two ranks"
    assert sum(book.accounts.values()) == pytest.approx(book.device_seconds)
    kept = read_json(stage.checkpoints / f"step-{STEPS:08d}" / "meta.json")["guards"]
    assert kept["passed"] == [[64, 112]] and kept["skipped_steps"] == 0


@pytest.mark.parametrize("die_at", [112, pytest.param(144, marks=pytest.mark.slow)], ids=["before", "after the next checkpoint"])
def test_killed_after_a_rollback_it_goes_on_with_the_same_bits(train: Train, run_folder: Path, tmp_path: Path, passing_over: Any,
                                                              die_at: int) -> None:
    fault = {"target": SPOILED, "spoiled": BAD, "kind": "large gradient", "ranks": [0, 1], "once": str(tmp_path / "once")}
    with pytest.raises(RankError, match="rank 1 was killed by signal 9"):
        train(run_folder, *TWO, die_at=die_at, **fault)
    stage = RunFolder(run_folder).stage("pretrain")
    assert len(rows_of(stage, "rollback")) == 1
    found = train(run_folder, *TWO, **fault)  # the samples are good now, and are passed over all the same
    assert len(rows_of(stage, "rollback")) == 1
    wanted = passing_over(64, 112)
    assert found["loss"] == wanted["loss"] and hash_folder(stage.model) == wanted["model"]
    book = read_book(stage.actual)
    assert book.tokens == read_jsonl(stage.metrics)[-1]["tokens"] and book.accounts["lost"] > 0
    assert sum(book.accounts.values()) == pytest.approx(book.device_seconds)


@pytest.mark.parametrize("die_in", ["load", pytest.param("find_good", marks=pytest.mark.slow),
                                    pytest.param("roll_back", marks=pytest.mark.slow)])
def test_killed_in_the_middle_of_a_rollback_it_goes_back_again(train: Train, run_folder: Path, passing_over: Any,
                                                               die_in: str) -> None:
    fault = {"target": SPOILED, "spoiled": BAD, "kind": "large gradient", "ranks": [0, 1]}
    with pytest.raises(RankError, match="killed by signal 9"):
        train(run_folder, *TWO, die_in=die_in, **fault)
    stage = RunFolder(run_folder).stage("pretrain")
    assert not rows_of(stage, "rollback")
    found, wanted = train(run_folder, *TWO, **fault), passing_over(64, 112)
    assert [row["kind"] for row in rows_of(stage, "rollback", "restart")] == ["restart", "rollback"]
    assert found["loss"] == wanted["loss"] and hash_folder(stage.model) == wanted["model"]
    book, faults = read_book(stage.actual), timeline(read_jsonl(stage.events), read_jsonl(stage.ledger))
    assert sum(book.accounts.values()) == pytest.approx(book.device_seconds)
    assert book.tokens == read_jsonl(stage.metrics)[-1]["tokens"]
    assert [fault.cost.resumed_step for fault in faults] == [4] * (3 if die_in == "roll_back" else 2)
    assert "passes over samples 64 to 111" in faults[-1].sentence and faults[-1].cost.steps_again == 3


@pytest.mark.slow
def test_a_checkpoint_that_is_still_being_written_can_be_gone_back_to(train: Train, run_folder: Path) -> None:
    train(run_folder, *TWO, target=SPOILED, spoiled=BAD, kind="gradient", ranks=[1], flush_seconds=0.2)
    stage = RunFolder(run_folder).stage("pretrain")
    saved, back = next(row for row in rows_of(stage, "checkpoint") if row["step"] == 4), rows_of(stage, "rollback")
    assert [row["passed"] for row in back] == [[64, 112]] and not rows_of(stage, "unsaved", "damaged")
    assert saved["time"] > [row["time"] for row in rows_of(stage, "skip")][1], "or there was nothing to wait for"


def test_stopped_in_the_step_that_rolls_back_it_goes_on_with_the_same_bits(train: Train, run_folder: Path, tmp_path: Path,
                                                                           passing_over: Any) -> None:
    fault = {"target": SPOILED, "spoiled": BAD, "kind": "gradient", "ranks": [1], "once": str(tmp_path / "once")}
    found = train(run_folder, *TWO, **fault, stop_at=96)
    stage = RunFolder(run_folder).stage("pretrain")
    assert found["is_asked_to_stop"] and found["step"] == 4 and len(found["loss"]) == 4, "what was gone back from is not told"
    assert [row["kind"] for row in rows_of(stage, "rollback", "stop")] == ["rollback", "stop"]
    found, wanted = train(run_folder, *TWO, **fault), passing_over(64, 112)
    assert found["loss"] == wanted["loss"] and hash_folder(stage.model) == wanted["model"]
    book = read_book(stage.actual)
    assert book.tokens == read_jsonl(stage.metrics)[-1]["tokens"]


def test_stopped_between_skipped_steps_and_killed_after_the_rollback(train: Train, run_folder: Path, tmp_path: Path,
                                                                     passing_over: Any) -> None:
    """The stop saves a checkpoint between skipped steps, which nothing may go on from once the stage has gone back."""
    fault = {"target": SPOILED, "spoiled": BAD, "kind": "gradient", "ranks": [1]}
    train(run_folder, *TWO, **fault, stop_at=80)
    stage = RunFolder(run_folder).stage("pretrain")
    assert (stage.checkpoints / "step-00000006").is_dir()
    with pytest.raises(RankError, match="rank 1 was killed by signal 9"):
        train(run_folder, *TWO, **fault, die_at=112)
    assert [row["passed"] for row in rows_of(stage, "rollback")] == [[64, 112]]
    found, wanted = train(run_folder, *TWO, **fault), passing_over(64, 112)
    assert found["loss"] == wanted["loss"] and hash_folder(stage.model) == wanted["model"]
    book = read_book(stage.actual)
    assert book.tokens == read_jsonl(stage.metrics)[-1]["tokens"]
    assert sum(book.accounts.values()) == pytest.approx(book.device_seconds)


@pytest.mark.slow
def test_rolled_back_where_sums_are_exact_other_ranks_go_on_with_the_same_bits(train: Train, run_folder: Path, tmp_path: Path,
                                                                              passing_over: Any) -> None:
    exact = ("stage.pretrain.reduction=exact", "stage.pretrain.micro_batch_size=4", "stage.pretrain.data_shards=4")
    fault = {"target": SPOILED, "spoiled": BAD, "kind": "gradient", "ranks": [1], "once": str(tmp_path / "once")}
    with pytest.raises(RankError, match="rank 1 was killed by signal 9"):
        train(run_folder, *TWO, *exact, die_at=112, **fault)
    found, wanted = train(run_folder, *TWO, *exact, "parallel.dp_shard=1"), passing_over(64, 112, *exact)
    assert found["loss"] == wanted["loss"]
    assert hash_folder(RunFolder(run_folder).stage("pretrain").model) == wanted["model"]


def test_resumed_its_guard_has_seen_the_same(train: Train, tmp_path: Path, data_folder: Path) -> None:
    kept = []
    for name, die_at in (("whole", None), ("killed", 7 * ROWS)):
        folder = folder_in(tmp_path, name, data_folder)
        bad = [[ROWS, 2 * ROWS], [3 * ROWS, 4 * ROWS]]  # two, but not in a row
        fault = {"target": SPOILED, "spoiled": bad, "kind": "gradient", "ranks": [1]}
        if die_at is not None:
            with pytest.raises(RankError, match="rank 1 was killed by signal 9"):
                train(folder, *TWO, die_at=die_at, **fault)
        train(folder, *TWO, **fault)
        stage = RunFolder(folder).stage("pretrain")
        assert {row["step"] for row in rows_of(stage, "skip")} == {2, 4} and not rows_of(stage, "rollback")
        kept.append((read_json(stage.checkpoints / f"step-{STEPS:08d}" / "meta.json")["guards"], hash_folder(stage.model)))
    assert kept[0] == kept[1] and len(kept[0][0]["losses"]) == 3


def test_a_limited_number_of_rollbacks_then_it_is_held(train: Train, run_folder: Path) -> None:
    often = (*TWO, "stage.pretrain.checkpoint_every=1", "stage.pretrain.most_skipped_steps=4")  # none of skipped steps
    bad = {"target": SPOILED, "spoiled": [[5 * ROWS, 10**9]], "kind": "gradient", "ranks": [1]}
    with pytest.raises(AthanorError, match=r"4 steps in a row were skipped, the last is step 9, after 2 rollbacks to checkpoint "
                                           r"step-00000005; lower learning_rate, or look at .*events\.jsonl"):
        train(run_folder, *often, "stage.pretrain.steps=9", "stage.pretrain.most_rollbacks=2", **bad)
    stage = RunFolder(run_folder).stage("pretrain")
    assert [row["passed"] for row in rows_of(stage, "rollback")] == [[80, 144], [80, 208]]
    for limit in (2, 1):  # one that has come down meanwhile is no reason to go on for ever
        with pytest.raises(AthanorError, match="after 2 rollbacks to checkpoint step-00000005"):
            train(run_folder, *often, "stage.pretrain.steps=9", f"stage.pretrain.most_rollbacks={limit}", **bad)
    assert train(run_folder, *often, "stage.pretrain.steps=9")["step"] == 9, "a limit may change meanwhile, and the data are good"


def test_before_the_first_checkpoint_there_is_nothing_to_go_back_to(train: Train, run_folder: Path) -> None:
    with pytest.raises(AthanorError, match=r"the last is step 2, and there is no checkpoint from before them to go back to"):
        train(run_folder, *TWO, target=SPOILED, spoiled=[[0, 32]], kind="loss", ranks=[1])


def test_a_checkpoint_between_skipped_steps_or_a_damaged_one_is_not_gone_back_to(tmp_path: Path) -> None:
    stages = Stages.alone(build(SHAPE))
    optimizer, told = Optimizer(stages, "adamw", 0.1), []
    folder = StageFolder(tmp_path)
    saver = Saver(folder, stages, optimizer, is_async=False)
    run: Any = SimpleNamespace(job=SimpleNamespace(folder=folder),
                               log=lambda kind, sentence: told.append((kind, sentence)))
    assert find_good(run) is None
    for step, skipped in ((2, 0), (4, 0), (6, 3)):
        saver.save(checkpoint.Meta(step, 8 * step, 0, step, 0, 1, {}, {}, {}, {"skipped_steps": skipped}))
    assert find_good(run) == (folder.checkpoints / "step-00000004", 32)
    assert checkpoint.find_intact(folder.checkpoints, lambda *_: None) == folder.checkpoints / "step-00000004", (
        "a restart before the next save goes on from where the rollback went")
    (folder.checkpoints / "step-00000004" / "COMPLETE").unlink()
    assert find_good(run) == (folder.checkpoints / "step-00000002", 16)
    assert told[0][0] == "damaged" and "step-00000004" in told[0][1]
