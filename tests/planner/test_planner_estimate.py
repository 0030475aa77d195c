"""`athanor plan estimate`: anchors of published runs, what its numbers mean, and what contradictions are told."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from athanor.cli.plan_estimate import command
from athanor.cluster.spec import ClusterSpec
from athanor.cost.calibrate import coefficients
from athanor.cost.runs import NUMBERS, WORDS, Run
from athanor.cost.score import predict
from athanor.foundation.errors import LayoutError, UserError
from athanor.models.shapes.find import find_shape
from athanor.planner.estimate import estimate, read_cluster_words
from athanor.planner.search import Task

LLAMA = "tp=8 pp=8 dp_shard=32 micro_batch_size=1 seq_len=8192 num_microbatches=16 stages_per_rank=4"


def asked(model: str, cluster: str, layout: str) -> dict[str, Any]:
    return estimate(find_shape(model), cluster, layout)


def test_the_command_prints_one_document() -> None:
    done = CliRunner().invoke(command, ["--model", "llama-3-8b", "--cluster", "H100-80 devices=8", "--layout",
                                        "dp_shard=-1 micro_batch_size=2 seq_len=8192", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {"step_seconds", "tokens_per_second_per_device", "mfu", "hfu", "memory_gib", "out_of_memory_probability",
            "accounts"} <= set(found)
    assert found["layout"]["dp_shard"] == 8 and len(found["memory_gib"]) == 1
    assert sum(found["accounts"].values()) == pytest.approx(found["step_seconds"], rel=1e-9)
    assert CliRunner().invoke(command, ["--model", "llama-3-8b", "--cluster", "H100-80"]).exit_code == 0


@pytest.mark.parametrize(("model", "cluster", "layout", "seconds", "within"), [
    # Korthikanti et al. 2022, table 5: GPT-3 on 64 A100, full recomputation, without sequence parallelism
    ("gpt-3-175b", "A100-80 devices=64 nic_gbps=200",
     "tp=8 pp=8 num_microbatches=64 seq_len=2048 stages_per_rank=3 recompute=full sequence_parallel=0 program=megatron "
     "kernel=fused",
     18.13, 0.12),
    # the same, MT-NLG 530B on 280 A100, selective recomputation and sequence parallelism
    ("mt-nlg-530b", "A100-80 devices=280 nic_gbps=200",
     "tp=8 pp=35 num_microbatches=280 seq_len=2048 stages_per_rank=3 recompute=selective program=megatron kernel=fused",
     37.83, 0.12),
    # Yuan 1.0 245B on 2,128 A100 with 2 x 200 Gb/s a node: 46.20 s (Yuan 2.0, appendix C)
    ("yuan-1.0", "A100-80 devices=2128 nic_gbps=50",
     "tp=8 pp=38 dp_replicate=7 num_microbatches=480 seq_len=2048 recompute=full sequence_parallel=0 program=megatron "
     "kernel=fused",
     46.20, 0.05)])
def test_published_steps_are_met(model: str, cluster: str, layout: str, seconds: float, within: float) -> None:
    assert asked(model, cluster, layout)["step_seconds"] == pytest.approx(seconds, rel=within)


def test_mfu_and_hfu_are_flops_over_the_peak() -> None:
    plain = asked("llama-2-7b", "A100-80 devices=8", "dp_shard=8 seq_len=4096")
    again = asked("llama-2-7b", "A100-80 devices=8", "dp_shard=8 seq_len=4096 recompute=full")
    flops = find_shape("llama-2-7b").flops(8 * 4096, 4097 / 2)
    assert plain["mfu"] == pytest.approx(flops / (8 * 3.12e14 * plain["step_seconds"]), rel=1e-9)
    assert plain["hfu"] == plain["mfu"] and 1.3 < again["hfu"] / again["mfu"] < 4 / 3
    assert again["step_seconds"] > plain["step_seconds"] and again["memory_gib"][0] < plain["memory_gib"][0]


def test_memory_is_that_of_each_pipeline_rank() -> None:
    found = asked("llama-3-405b", "H100-80 devices=2048", LLAMA)
    memory = found["memory_gib"]
    assert len(memory) == 8 and memory[:-1] == sorted(memory[:-1], reverse=True)  # earlier ranks keep more micro-batches
    assert 0 <= found["out_of_memory_probability"] <= 1
    assert found["out_of_memory_probability"] > asked("llama-3-405b", "B300 devices=2048", LLAMA)["out_of_memory_probability"]


@pytest.mark.parametrize(("cluster", "layout", "words"), [
    ("H100-8O", "", "did you mean 'H100-80'"), ("H100-80 device=8", "", "did you mean 'devices'"),
    ("H100-80", "micro_batch=1", "did you mean 'micro_batch_size'"), ("H100-80", "tp=three", "tp=three"),
    ("H100-80", "recompute=some", "allowed: full, none, selective"), ("H100-80", "program=megatron-cor", "megatron-core"),
    ("H100-80 devices=16", "tp=4 dp_shard=2", "there are 16 ranks"), ("H100-80", "tp=3", "does not divide"),
    ("H100-80", "dp_shard=-1", "needs a cluster with a number of devices"), ("H100-80", "pp=64", "more than the 32 blocks"),
    ("H100-80", "dp_shard=3 global_batch_tokens=8192 seq_len=4096", "do not split into micro-batches"),
    ("H100-80", "global_batch_tokens=8192 seq_len=4096 num_microbatches=3", "makes 2 of them"),
    ("H100-80 devices=0", "dp_shard=-1", "whole number from 1 to"), ("H100-80 devices=1.5", "", "devices=1.5; a whole number"),
    ("H100-80 nic_gbps=0", "", "from 0.001 to"), ("H100-80 per_node=0", "", "per_node=0"), ("H100-80", "tp=1.5", "tp=1.5"),
    ("H100-80", "zero=7", "from 0 to 3"), ("H100-80", "tp=2 tp=4", "tp is given twice"), ("H100-80", "seq_len=0", "seq_len=0"),
    ("H100-80", "micro_batch_size=0", "micro_batch_size=0"), ("H100-80", "num_microbatches=0", "num_microbatches=0"),
    ("H100-80", "pp=8 stages_per_rank=5", "makes 40 stages, more than the 32 blocks"),
    ("H100-80", "pp=8 pipeline_schedule=1F1B stages_per_rank=4", "but 1F1B has 1 on a rank"),
    ("H100-80", "tp=8 seq_len=7", "does not divide the 7 tokens"), ("H100-80 devices=8", "dp_shard=1e300", "dp_shard=1e300"),
    ("H100-80", "tp=nan", "tp=nan"), ("H100-80", "ep=2 dp_shard=2", "has no experts"), ("nowhere.toml", "", "does not exist")])
def test_contradictions_are_one_sentence(cluster: str, layout: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        asked("llama-3-8b", cluster, layout)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("change", "words"), [
    ({"device_type": "cpu", "accelerator": "cpu"}, "is of processors"), ({"memory_bytes": 0.0}, "memory_gib=0; a number from"),
    ({"devices": 10**9}, "devices=1e\\+09; a whole number"), ({"accelerator": "H100-8O"}, "did you mean 'H100-80'")])
def test_a_cluster_file_must_be_of_an_accelerator_with_memory(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    fine = ClusterSpec("H100-80", "cuda", 8, 8, 1, 8e10, {"bf16": 9e14}, 3e12)
    fine.write(tmp_path / "cluster.toml")
    assert asked("gpt2", str(tmp_path / "cluster.toml"), "dp_shard=-1")["devices"] == 8
    replace(fine, **change).write(tmp_path / "cluster.toml")
    with pytest.raises(UserError, match=words):
        asked("gpt2", str(tmp_path / "cluster.toml"), "dp_shard=-1")


def test_a_split_is_priced_with_its_own_stages() -> None:
    """GPipe's step is (m - 1) x the costliest stage + the sum of all, and a stage's blocks all cost the same but the head."""
    shape, cluster = find_shape("llama-3-8b"), "H100-80 devices=4"
    words = "pp=4 seq_len=4096 num_microbatches=16 pipeline_schedule=GPipe program=megatron "
    even, more, less = (estimate(shape, cluster, words + split) for split in ("split=8,8,8,8", "split=7,8,8,9", "split=4x8"))
    plain = estimate(shape, cluster, words)
    assert even["step_seconds"] == less["step_seconds"] == pytest.approx(plain["step_seconds"], rel=0.01)
    assert even["memory_gib"] == pytest.approx(plain["memory_gib"])
    times = [one["accounts"][name] for one in (even, more) for name in ("bubble", "pipeline")]
    stepping = sum(even["accounts"][name] for name in ("useful", "kernel"))
    block = stepping / 16 / (8 + 0.25 * 1.3)  # of a micro-batch, an average rank's blocks and its quarter of the head
    assert (times[2] + times[3]) - (times[0] + times[1]) == pytest.approx(15 * block, rel=0.1)
    assert more["memory_gib"][0] < even["memory_gib"][0] and more["memory_gib"][3] > even["memory_gib"][3]
    assert more["memory_gib"][1] == pytest.approx(even["memory_gib"][1]) and more["layout"]["split"] == [7, 8, 8, 9]
    loops = estimate(shape, cluster, "pp=4 split=8x4 pipeline_schedule=Interleaved1F1B")
    assert loops["layout"]["stages_per_rank"] == 2
    folded = estimate(shape, cluster, "pp=4 pipeline_schedule=ZBVZeroBubble")["memory_gib"]
    assert folded[0] == max(folded), "both ends of the model lie on the first rank of a V"
    for split, said in (("8,8,8", "has 3 stages; 1F1B on pp = 4 needs 4"), ("8,8,8,9", r"places 33 blocks.*32 once"),
                        ("8,a", "blocks of each stage are expected"), ("0,16,8,8", "at least one per stage"),
                        ("-1,17,8,8", "blocks of each stage are expected")):
        with pytest.raises(LayoutError, match=said):
            estimate(shape, cluster, f"pp=4 split={split}")


@pytest.mark.parametrize(("model", "framework", "program", "words"), [
    ("llama-3-8b", "torchtitan", "fsdp", {"zero_stage": "3"}),
    ("llama-3-8b", "Megatron-Core", "megatron-core", {"tp": "2", "zero_stage": "1"}),
    ("mixtral-8x7b", "Megatron-Core", "megatron-core", {"tp": "2", "ep": "8", "zero_stage": "1", "pp": "4"})])
def test_score_and_estimate_agree_on_a_row_without_a_year(model: str, framework: str, program: str,
                                                          words: dict[str, str]) -> None:
    layout = {"tp": "1", "pp": "1", "ep": "1"} | words
    texts = {"model": model, "gpu": "H100-80", "framework": framework, "precision": "bf16", "recompute": "none"} | layout
    sizes = {"n_gpus": 64, "seq": 4096, "global_batch_seqs": 512, "micro_batch": 1, **{key: int(n) for key, n in layout.items()}}
    run = Run("X-1", "", "ok", {name: texts.get(name, "") for name in WORDS},
              {name: float(sizes.get(name, math.nan)) for name in NUMBERS}, math.nan, math.nan)
    shard = 64 // int(layout["tp"]) // int(layout["pp"])
    asked = (f"tp={layout['tp']} pp={layout['pp']} ep={layout['ep']} dp_shard={shard} seq_len=4096 zero={layout['zero_stage']} "
             f"global_batch_tokens={512 * 4096} program={program}")
    found = estimate(find_shape(model), "H100-80 devices=64", asked)
    assert predict([run]).seconds[0] == pytest.approx(found["step_seconds"], rel=1e-9)
    assert predict([run]).memory_bytes[0] <= max(found["memory_gib"]) * 2**30 * (1 + 1e-9)


def test_fp32_is_priced_at_its_own_peak() -> None:
    """H100 (datasheet, SXM): 67 TFLOP/s in fp32, 989 in bf16; products dominate a step of long rows."""
    shape, words = find_shape("llama-3-8b"), "seq_len=8192 micro_batch_size=2 precision="
    half, single = (estimate(shape, "H100-80 devices=1", words + precision) for precision in ("bf16", "fp32"))
    assert 10 < single["step_seconds"] / half["step_seconds"] < 989 / 67
    assert single["accounts"]["useful"] / half["accounts"]["useful"] == pytest.approx(989 / 67, rel=1e-3)
    with pytest.raises(UserError, match="Gaudi2 is known to compute in bf16, fp16, fp8, not in fp32"):
        estimate(shape, "Gaudi2 devices=1", "precision=fp32")


def test_hybrid_sharding_gathers_inside_a_group_and_reduces_across() -> None:
    """Over 25 Gbit/s a device, 8 x 8: parameters gathered inside a node take NVLink alone, and a step's reduction of a node's
    shards moves 1/8 of the gradients by each device."""
    shape, cluster = find_shape("llama-3-8b"), "H100-80 devices=64 nic_gbps=25"
    words = "seq_len=4096 num_microbatches=4 zero=3 program=fsdp "
    everywhere, hybrid, inside = (estimate(shape, one, words + layout)["accounts"]["data_parallel"] for one, layout in (
        (cluster, "dp_shard=64"), (cluster, "dp_replicate=8 dp_shard=8"), ("H100-80 devices=8", "dp_shard=8")))
    assert inside < hybrid < everywhere / 3
    across = 2 * (8.03e9 * 2 / 8) * 7 / 8 / (25e9 / 8)  # seconds of a ring of 8 at the whole rate of the link
    c = coefficients("time").mapping()  # what of it is not hidden, and of the link's rate is reached
    assert hybrid - inside == pytest.approx(across * c["data_parallel"] * c["data_parallel.fsdp"] / c["network"], rel=0.02)


@pytest.mark.parametrize(("accelerator", "precision", "known"), [
    ("V100-32", "bf16", "fp16, fp32"), ("A100-80", "fp8", "bf16, fp16, fp32"), ("H100-80", "fp4", "bf16, fp16, fp32, fp8")])
def test_a_precision_that_an_accelerator_lacks_is_refused(accelerator: str, precision: str, known: str) -> None:
    shape, words = find_shape("llama-3-8b"), f"{accelerator} is known to compute in {known}, not in {precision}"
    with pytest.raises(UserError, match=words):
        estimate(shape, f"{accelerator} devices=8", f"dp_shard=8 precision={precision}")
    task = Task(shape, read_cluster_words(accelerator), 8, 65536, 8192, precision=precision)
    with pytest.raises(UserError, match=words):
        task.check()
    replace(task, precision="fp16").check()


def test_whose_speed_and_memory_are_told_is_said() -> None:
    words = ["--model", "llama-3-8b", "--cluster", "H100-80", "--layout", "dp_shard=8"]
    for program in ("megatron-core", "fsdp"):
        told = " ".join(CliRunner().invoke(command, [*words[:-1], f"{words[-1]} program={program}"]).stderr.split())
        assert f"memory are those of {program}," in told and "cluster.accelerator=H100-80" in told and "program=fsdp is" in told
