"""A rehearsal says what a real run does: the same messages, FLOPs and memory; and what would help where it does not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from athanor.foundation.errors import OutOfMemory, UserError
from athanor.foundation.launch import run_ranks
from athanor.foundation.recipe import load_recipe
from athanor.foundation.run_folder import RunFolder
from athanor.ledger.book import Book
from athanor.planner.memory import fullest, peak_memory
from athanor.train.memory import changed, remedies
from athanor.train.observe import Observed
from athanor.train.rehearse import chosen_ranks, rehearsal_job, rehearse
from athanor.train.settings import layout_of

RECIPE = """
name = "rehearsed"
[data]
vocab_size = 512
[[data.source]]
name = "unused"
kind = "text"
path = "unused"
[model]
hidden_size = 64
num_hidden_layers = 4
num_attention_heads = 4
num_key_value_heads = 4
intermediate_size = 160
max_position_embeddings = 64
tie_word_embeddings = false
[parallel]
dp_shard = 1
[[stage]]
name = "pretrain"
seq_len = 32
steps = 4
global_batch_tokens = 512
micro_batch_size = 2
optimizer = "adamw"
"""
Rehearse = Callable[..., list[Observed]]
DEEPSEEK = "model.architecture=deepseek_v3 model.num_experts=8 model.num_experts_per_tok=2 " + " ".join(
    f"model.sizes.{size}" for size in ("moe_intermediate_size=96", "kv_lora_rank=64", "qk_nope_head_dim=32",
                                       "qk_rope_head_dim=16", "v_head_dim=32", "first_k_dense_replace=1"))


@pytest.fixture
def make_job(tmp_path: Path) -> Callable[..., Any]:
    file = tmp_path / "recipe.toml"
    file.write_text(RECIPE)

    def make(*overrides: str) -> Any:
        recipe = load_recipe(file, list(overrides))
        return rehearsal_job(RunFolder(tmp_path / "run"), recipe, "pretrain", layout_of(recipe).world_size)

    return make


@pytest.fixture
def rehearsed(make_job: Callable[..., Any], tmp_path: Path) -> Rehearse:
    """`rehearsed(overrides…, ranks=…, device_type=…)`: what was seen of the chosen ranks."""

    def run(*overrides: str, ranks: list[int] | None = None, device_type: str = "cpu") -> list[Observed]:
        job = make_job(*overrides)
        return [each.seen for each in rehearse(job, device_type, ranks or chosen_ranks(job), tmp_path / "logs")]

    return run


@pytest.mark.parametrize("overrides", [
    "parallel.dp_shard=2",
    *(pytest.param(case, marks=pytest.mark.slow) for case in (
        "parallel.dp_shard=2 parallel.tp=2", "parallel.pp=2 parallel.dp_shard=2", "parallel.cp=2 parallel.dp_shard=2",
        "parallel.dp_replicate=2 parallel.dp_shard=2 stage.pretrain.optimizer=muon",
        "parallel.pp=2 parallel.pipeline_schedule=ZBVZeroBubble parallel.recompute=full",
        "parallel.dp_shard=2 stage.pretrain.precision=bf16 parallel.recompute=selective",
        "model.architecture=gpt2 parallel.pp=2 parallel.tp=2", "model.architecture=qwen3 parallel.dp_shard=2 parallel.tp=2",
        "model.architecture=yuan parallel.cp=2 parallel.tp=2",
        "model.architecture=yuan model.num_experts=8 model.head_dim=32 parallel.dp_shard=2",
        f"{DEEPSEEK} model.sizes.num_nextn_predict_layers=2 parallel.pp=2 parallel.tp=2",
        f"{DEEPSEEK} model.sizes.num_nextn_predict_layers=1 parallel.dp_shard=2",
        "stage.pretrain.precision=bf16 stage.pretrain.optimizer_state_dtype=bf16"))])
def test_a_rehearsal_is_what_a_real_run_does(make_job: Callable[..., Any], rehearsed: Rehearse, tmp_path: Path,
                                             overrides: str) -> None:
    job = make_job(*overrides.split())
    world_size = job.layout.world_size
    real = run_ranks("rehearse_ranks:observe_real", {"job": job}, world_size, log_folder=tmp_path / "logs", threads=1, timeout=90)
    for found, seen in zip(rehearsed(*overrides.split(), ranks=list(range(world_size))), real, strict=True):
        assert found.collectives == seen.collectives and (len(seen.collectives) > 2 or world_size == 1)
        assert found.flops["model"] == pytest.approx(seen.flops["model"], rel=0.01) and seen.flops["model"] > 1e7
        assert found.flops["recompute"] == pytest.approx(seen.flops["recompute"], rel=0.01)
        assert (found.flops["recompute"] > 0) == ("recompute=full" in overrides)  # selective recomputes nothing that has FLOPs
        assert found.peak_bytes == pytest.approx(seen.peak_bytes, rel=0.01)


def test_what_can_be_counted_by_hand_is_counted_exactly(make_job: Callable[..., Any], rehearsed: Rehearse) -> None:
    overrides = ["stage.pretrain.seq_len=8", "stage.pretrain.micro_batch_size=1", "stage.pretrain.global_batch_tokens=8"]
    shape = make_job(*overrides).shape
    parameters = shape.parameters()
    # v_proj's gradient is a part of the fused weight's, whose parts of q and k were copied out of it and live on
    fused = shape.num_hidden_layers * shape.hidden_size * (shape.query_size + shape.key_value_size)
    (one,) = rehearsed(*overrides)
    memory = one.memory_bytes
    assert memory["parameters"] == 4 * parameters and memory["gradients"] == 4 * (parameters + fused)
    assert memory["optimizer"] == 8 * parameters and memory["gathered"] == 0
    (narrow,) = rehearsed(*overrides, "stage.pretrain.optimizer_state_dtype=bf16")
    assert narrow.memory_bytes["optimizer"] == 4 * parameters


@pytest.mark.slow
def test_shards_divide_and_the_first_stage_keeps_most_in_flight(make_job: Callable[..., Any], rehearsed: Rehearse) -> None:
    parameters = make_job().shape.parameters()
    halves = rehearsed("parallel.dp_shard=2", ranks=[0, 1])
    assert sum(each.memory_bytes["parameters"] for each in halves) == 4 * parameters
    assert sum(each.memory_bytes["optimizer"] for each in halves) == 8 * parameters
    first, middle, last = rehearsed("parallel.pp=4", "parallel.split=[1,1,1,1]")
    assert first.memory_bytes["activations"] > 1.5 * middle.memory_bytes["activations"]
    assert last.memory_bytes["logits"] > 0 == first.memory_bytes["logits"]


@pytest.mark.slow
def test_an_accelerators_branches_are_taken(rehearsed: Rehearse) -> None:
    shape = ["parallel.dp_shard=2", "stage.pretrain.precision=bf16", "data.vocab_size=40960"]
    (here,), (there,) = rehearsed(*shape, ranks=[0]), rehearsed(*shape, ranks=[0], device_type="cuda")
    assert here.collectives == there.collectives and here.flops["model"] == there.flops["model"]
    assert there.memory_bytes["logits"] >= 64 * 40960 * 4  # one chunk for all tokens, in fp32
    assert there.memory_bytes != here.memory_bytes
    (plain,) = rehearsed("stage.pretrain.precision=fp32", device_type="cuda")  # attention from torch's pieces
    assert plain.flops["model"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("base", "change", "within"), [
    ("", "parallel.recompute=full", 0.2), ("", "stage.pretrain.micro_batch_size=4", 0.2),("parallel.dp_shard=2", "tp", 0.4),
    ("parallel.dp_replicate=2 parallel.dp_shard=2", "parallel.dp_replicate=1", 0.3),
    ("parallel.dp_shard=2", "parallel.keep_whole=false", 0.5), ("", "stage.pretrain.optimizer_state_dtype=bf16", 0.05)])
def test_remedies_save_about_what_they_say(make_job: Callable[..., Any], rehearsed: Rehearse, base: str, change: str,
                                           within: float) -> None:
    sizes = ["stage.pretrain.seq_len=64", "stage.pretrain.micro_batch_size=8", "stage.pretrain.global_batch_tokens=2048"]
    overrides = [*base.split(), *sizes]
    job = make_job(*overrides)
    before = rehearsed(*overrides)[0]
    wanted = change if "=" in change else f"parallel.{change}"
    (remedy,) = [each for each in remedies(before.memory_bytes, job) if each.changes[0].startswith(wanted)]
    after = rehearsed(*overrides, *remedy.changes)[0]
    assert remedy.saves_bytes == pytest.approx(before.peak_bytes - after.peak_bytes, rel=within)


@pytest.mark.parametrize(("model", "layout"), [
    ("model.architecture=gemma", "dp_shard=2"), ("model.architecture=yuan", "tp=2"),
    ("model.architecture=yuan model.num_experts=32", "dp_shard=2"), (DEEPSEEK, "dp_shard=2"),
    (f"{DEEPSEEK} model.sizes.num_nextn_predict_layers=1", "dp_shard=2"),
    (f"{DEEPSEEK} model.sizes.num_nextn_predict_layers=2 model.tie_word_embeddings=false", "pp=2")])
def test_the_planner_forecasts_the_memory_of_every_kind_of_block(make_job: Callable[..., Any], rehearsed: Rehearse,
                                                                 model: str, layout: str) -> None:
    sizes = ["hidden_size=128", "intermediate_size=352", "max_position_embeddings=256", "tie_word_embeddings=true"]
    stage = ["seq_len=256", "micro_batch_size=8", "global_batch_tokens=4096", "precision=fp32"]
    overrides = [*(f"model.{size}" for size in sizes), *model.split(), *(f"stage.pretrain.{one}" for one in stage),
                 f"parallel.{layout}", "data.vocab_size=4096"]
    job = make_job(*overrides)
    forecast = peak_memory(job.shape, job.layout, rows=8, seq_len=256, dtype="fp32", num_microbatches=2 // job.layout.dp_shard)
    assert fullest(forecast) == pytest.approx(max(seen.peak_bytes for seen in rehearsed(*overrides)), rel=0.1)


def test_remedies_are_legal_and_cheapest_first(make_job: Callable[..., Any]) -> None:
    job = make_job("parallel.dp_shard=2", "model.num_attention_heads=1", "model.num_key_value_heads=1")
    memory = {"parameters": 1e9, "gradients": 1e9, "optimizer": 2e9, "gathered": 1e9, "activations": 9e9}
    found = remedies(memory, job)
    assert [each.costs for each in found] == sorted(each.costs for each in found) and len(found) >= 3
    keys = [change.split("=")[0] for each in found for change in each.changes]
    assert "parallel.tp" not in keys, "one head cannot be cut in two"
    assert "parallel.recompute" in keys and "stage.pretrain.micro_batch_size" in keys
    recipe = changed(job.recipe, ("parallel.dp_shard=1", "stage.pretrain.micro_batch_size=1", "parallel.recompute=full"))
    assert (recipe.parallel.dp_shard, recipe.stage[0].micro_batch_size, recipe.parallel.recompute) == (1, 1, "full")
    single = make_job("stage.pretrain.micro_batch_size=1", "parallel.recompute=full", "stage.pretrain.optimizer_state_dtype=bf16")
    assert not remedies(memory, single), "one rank has no axis to lengthen"


def test_memory_that_runs_out_ends_in_a_sentence(train: Any, run_folder: Path) -> None:
    with pytest.raises(OutOfMemory, match=r"pretrain ran out of memory: this process took .*, nothing was predicted \(athanor "
                                          r"rehearse does\); cheapest first: .*=") as error:
        train(run_folder, target="train_ranks:train_too_large")
    assert "saves" not in str(error.value)
    book = Book("rehearsal", 1, "cpu", None)
    book.memory_bytes = {"activations": [3e6], "optimizer": [1e6]}
    book.write(RunFolder(run_folder).stage("pretrain").rehearsal)
    with pytest.raises(OutOfMemory, match=r"rehearsal\.json says 4 MB a rank; cheapest first: .*saves about [0-9.]+ [kM]B"):
        train(run_folder, "stage.pretrain.precision=fp32", target="train_ranks:train_too_large", is_fresh=True)


def test_sizes_that_nobody_knows_are_asked_for(make_job: Callable[..., Any], tmp_path: Path) -> None:
    recipe = load_recipe(tmp_path / "recipe.toml")
    open_size = recipe.model_copy(update={"data": recipe.data.model_copy(update={"vocab_size": None})})
    with pytest.raises(UserError, match=r"data\.vocab_size is open"):
        rehearsal_job(RunFolder(tmp_path / "run"), open_size, "pretrain", 1)
