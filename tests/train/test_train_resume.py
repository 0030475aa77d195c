"""What a stage can live through: kills, signals, damaged checkpoints, other layouts, a full disk."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from saved import assemble

from athanor.data.build import build
from athanor.foundation.errors import CheckpointError, DiskError, RankError, UserError
from athanor.foundation.recipe import load_recipe
from athanor.foundation.run_folder import RunFolder, read_json, read_jsonl
from athanor.ledger.book import read_book
from athanor.report.faults import timeline

Train = Callable[..., dict[str, Any]]
FIRST = ("stage.pretrain.steps=6", "stage.pretrain.checkpoint_every=2", "stage.pretrain.evaluate_every=6",
         "stage.pretrain.precision=fp32")
TWO = (*FIRST, "parallel.dp_shard=2")
SIGNALLED = "train_ranks:train_and_signal"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("undisturbed")


@pytest.fixture
def wanted(undisturbed: Path, train: Train, data_folder: Path) -> dict[str, Any]:
    """Six steps on two ranks without any disturbance."""
    if not (undisturbed / "data").exists():
        (undisturbed / "data").symlink_to(data_folder)
    return {**train(undisturbed, *TWO), "weights": weights(undisturbed)}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(RunFolder(run).stage("pretrain").model / "model.safetensors")


def kinds(run: Path) -> list[str]:
    return [row["kind"] for row in read_jsonl(RunFolder(run).stage("pretrain").events)]


def assert_bitwise(found: dict[str, Any], run: Path, wanted: dict[str, Any]) -> None:
    assert found["loss"] == wanted["loss"] and found["grad_norm"] == wanted["grad_norm"]
    assert all(torch.equal(tensor, wanted["weights"][name]) for name, tensor in weights(run).items())


def test_killed_and_run_again_ends_with_the_same_bits(train: Train, run_folder: Path, wanted: dict[str, Any]) -> None:
    with pytest.raises(RankError, match="rank 1 was killed by signal 9"):
        train(run_folder, *TWO, target=SIGNALLED, at_step=5, number=signal.SIGKILL, rank=1)
    assert not RunFolder(run_folder).stage("pretrain").model.exists()
    found = train(run_folder, *TWO)
    assert kinds(run_folder).count("start") == 2 and "restart" in kinds(run_folder)
    assert_bitwise(found, run_folder, wanted)
    book = read_json(RunFolder(run_folder).stage("pretrain").actual)
    assert book["tokens"] == read_jsonl(RunFolder(run_folder).stage("pretrain").metrics)[-1]["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_biases_that_no_gradient_moves_go_on_with_the_same_bits(train: Train, run_folder: Path, tmp_path: Path,
                                                                data_folder: Path, precision: str) -> None:
    sizes = ("moe_intermediate_size=24", "kv_lora_rank=10", "qk_nope_head_dim=6", "qk_rope_head_dim=4", "v_head_dim=8",
             "first_k_dense_replace=1")
    model = ("architecture=deepseek_v3", "num_key_value_heads=4", "num_experts=4", "num_experts_per_tok=2",
             *(f"sizes.{size}" for size in sizes))
    overrides = [*TWO, *(f"model.{size}" for size in model), f"stage.pretrain.precision={precision}"]
    other = tmp_path / "undisturbed"
    other.mkdir()
    (other / "data").symlink_to(data_folder)
    wanted = train(other, *overrides)
    with pytest.raises(RankError, match="rank 1 was killed by signal 9"):
        train(run_folder, *overrides, target=SIGNALLED, at_step=5, number=signal.SIGKILL, rank=1)
    assert_bitwise(train(run_folder, *overrides), run_folder, {**wanted, "weights": weights(other)})
    assert any(tensor.abs().max() > 0.0015 for name, tensor in weights(run_folder).items() if name.endswith("correction_bias"))


def test_asked_to_stop_it_saves_and_goes_on_later(train: Train, run_folder: Path, wanted: dict[str, Any]) -> None:
    stopped = train(run_folder, *TWO, target=SIGNALLED, at_step=3, number=signal.SIGTERM, rank=1)
    assert stopped["is_asked_to_stop"] and 3 <= stopped["step"] <= 4
    newest = max((RunFolder(run_folder).stage("pretrain").checkpoints).iterdir())
    assert newest.name == f"step-{stopped['step']:08d}" and "stop" in kinds(run_folder)
    assert_bitwise(train(run_folder, *TWO), run_folder, wanted)


@pytest.mark.parametrize("damage", ["a flipped byte", pytest.param("no COMPLETE", marks=pytest.mark.slow),
                                    pytest.param("a missing shard", marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(train: Train, run_folder: Path, wanted: dict[str, Any],
                                                                 damage: str) -> None:
    train(run_folder, *TWO, target=SIGNALLED, at_step=4, number=signal.SIGTERM, rank=0)
    newest = max((RunFolder(run_folder).stage("pretrain").checkpoints).iterdir())
    shard = newest / "rank-00001.safetensors"
    if damage == "a flipped byte":
        content = bytearray(shard.read_bytes())
        content[-7] ^= 1
        shard.write_bytes(content)
    else:
        (newest / "COMPLETE" if damage == "no COMPLETE" else shard).unlink()
    found = train(run_folder, *TWO)
    events = read_jsonl(RunFolder(run_folder).stage("pretrain").events)
    (told,) = [row["sentence"] for row in events if row["kind"] == "damaged"]
    assert newest.name in told and ("COMPLETE" if damage == "no COMPLETE" else shard.name) in told
    assert_bitwise(found, run_folder, wanted)


@pytest.mark.parametrize("layout", [pytest.param(("parallel.tp=2",), id="tp 2"),
                                    pytest.param(("parallel.pp=2",), id="pp 2"),
                                    pytest.param(("parallel.pp=2", "parallel.tp=2"), id="pp 2 x tp 2", marks=pytest.mark.slow),
                                    pytest.param((), id="one rank", marks=pytest.mark.slow)])
def test_another_layout_goes_on(train: Train, run_folder: Path, tmp_path: Path, layout: tuple[str, ...]) -> None:
    precise = ("stage.pretrain.precision=fp64", "stage.pretrain.steps=6")
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "data").symlink_to(run_folder / "data")
    train(run_folder, *TWO, *precise, target=SIGNALLED, at_step=2, number=signal.SIGTERM, rank=0)
    first = max((RunFolder(run_folder).stage("pretrain").checkpoints).iterdir())
    again = tmp_path / "again"
    train(run_folder, *FIRST, *precise, *layout, target="train_ranks:save_again", source=str(first), target_folder=str(again))
    assert_same_tensors(first, again / "checkpoints" / first.name)
    found = train(run_folder, *FIRST, *precise, *layout)
    wanted = train(whole, *FIRST, *precise)
    np.testing.assert_allclose(found["loss"], wanted["loss"], rtol=0, atol=1e-11)


def assert_same_tensors(first: Path, second: Path) -> None:
    left, right = assemble(first), assemble(second)
    assert set(left) == set(right) and any(key.startswith("optimizer.") for key in left)
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_a_full_disk_does_not_end_the_run_at_once(train: Train, run_folder: Path) -> None:
    size = 2 * 8 * 30_000  # weights fit, weights with two moments do not
    small = {"target": "train_ranks:train_on_small_disk", "file_bytes": size}
    few = train(run_folder, "stage.pretrain.checkpoint_every=2", **small)
    assert few["step"] == 4 and kinds(run_folder).count("unsaved") == 2 and "done" in kinds(run_folder)
    assert not list((RunFolder(run_folder).stage("pretrain").checkpoints).iterdir())
    with pytest.raises(DiskError, match="could not save"):
        train(run_folder, "stage.pretrain.checkpoint_every=1", is_fresh=True, **small)
    assert kinds(run_folder).count("unsaved") == 3


def test_another_configuration_is_refused_unless_begun_anew(train: Train, run_folder: Path) -> None:
    first = train(run_folder)
    assert train(run_folder, "stage.pretrain.checkpoint_every=1") == first  # that does not alter what it learns
    with pytest.raises(UserError, match=r"learning_rate was 0.01 and is 0.02; start it anew with --fresh"):
        train(run_folder, "stage.pretrain.learning_rate=0.02")
    with pytest.raises(UserError, match=r"model.hidden_size was 32 and is 64"):
        train(run_folder, "model.hidden_size=64")
    assert train(run_folder)["loss"] == first["loss"]
    anew = train(run_folder, "stage.pretrain.learning_rate=0.02", is_fresh=True)
    assert anew["loss"][0] == first["loss"][0] and anew["loss"][3] != first["loss"][3]
    assert json.dumps(anew)


def test_a_checkpoint_of_other_data_is_refused_where_no_configuration_tells(train: Train, run_folder: Path, tmp_path: Path,
                                                                            recipe_file: Path) -> None:
    train(run_folder, *FIRST, target=SIGNALLED, at_step=3, number=signal.SIGTERM, rank=0)
    other = tmp_path / "other"
    build(load_recipe(recipe_file, ["data.evaluation_share=0.2"]), other / "data")
    shutil.copytree(RunFolder(run_folder).stage("pretrain").checkpoints, RunFolder(other).stage("pretrain").checkpoints)
    with pytest.raises(CheckpointError, match=r"step-0000000\d was made with other data, rows, tokenizer than"):
        train(other, *FIRST)
    assert train(other, *FIRST, is_fresh=True)["step"] == 6
    RunFolder(run_folder).stage("pretrain").config.unlink()
    assert train(run_folder, *FIRST)["step"] == 6 and "restart" in kinds(run_folder), "the same data"


def test_what_a_fresh_start_throws_away_was_paid_for(train: Train, run_folder: Path) -> None:
    stage, spent = RunFolder(run_folder).stage("pretrain"), 0.0
    for _ in range(2):  # the second one throws away what the first has thrown away, too
        with pytest.raises(RankError, match="rank 0 was killed by signal 9"):
            train(run_folder, *FIRST, target=SIGNALLED, at_step=5, number=signal.SIGKILL, rank=0, is_fresh=True)
        lines = [line for line in read_jsonl(stage.ledger) if "lost" not in line.get("accounts", "lost")]
        assert [line["last_step"] for line in lines][-1] == 4, "as it was when a checkpoint was begun"
        spent += sum(line["device_seconds"] for line in lines)
        spent += read_jsonl(stage.metrics)[-1]["time"] - lines[-1]["time"]
    train(run_folder, *FIRST, "stage.pretrain.learning_rate=0.02", is_fresh=True)
    book = read_book(stage.actual)
    assert book.accounts["lost"] == pytest.approx(spent) and spent > 0
    assert sum(book.accounts.values()) == pytest.approx(book.device_seconds) and book.wall_seconds == pytest.approx(
        book.device_seconds), "of one rank"
    (fault,) = timeline(read_jsonl(stage.events), read_jsonl(stage.ledger))
    assert "thrown away, as asked" in fault.sentence and fault.cost.accounts["lost"] == pytest.approx(spent)
    assert fault.cost.steps_again == 5
    kept = [line for line in read_jsonl(stage.ledger) if "lost" not in line.get("accounts", "lost")]
    assert book.device_seconds == pytest.approx(spent + sum(line["device_seconds"] for line in kept))
    assert book.tokens == sum(line["tokens"] for line in kept) == read_jsonl(stage.metrics)[-1]["tokens"]


def test_logs_outlive_a_fresh_start_and_a_damaged_configuration_is_named(train: Train, run_folder: Path) -> None:
    train(run_folder)
    stage = RunFolder(run_folder).stage("pretrain")
    (stage.logs / "rank-0.log").write_text("what went wrong")
    (stage.root / "link").symlink_to(run_folder / "data")
    stage.config.write_text("[identity]\nsteps = ")
    with pytest.raises(UserError, match=r"config\.toml is damaged .* start it anew with --fresh"):
        train(run_folder)
    train(run_folder, is_fresh=True)
    assert (stage.logs / "rank-0.log").exists() and not (stage.root / "link").is_symlink()
    assert (run_folder / "data" / "manifest.json").exists()


def test_damaged_later_checkpoints_do_not_crowd_out_good_ones(train: Train, run_folder: Path) -> None:
    often = ("stage.pretrain.steps=6", "stage.pretrain.checkpoint_every=1", "stage.pretrain.evaluate_every=6")
    folder = RunFolder(run_folder).stage("pretrain").checkpoints
    train(run_folder, *often, target=SIGNALLED, at_step=4, number=signal.SIGTERM, rank=0)
    later = sorted(path.name for path in folder.iterdir())
    assert len(later) == 2
    for name in later:
        (folder / name / "COMPLETE").unlink()
    train(run_folder, *often, target=SIGNALLED, at_step=2, number=signal.SIGTERM, rank=0)
    left = sorted(path.name for path in folder.iterdir())
    assert left[-1] < later[0] and len(left) == 2
    assert all((folder / name / "COMPLETE").exists() for name in left)
