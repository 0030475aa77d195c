"""Any layout trains the same model: losses, gradient norms and every gradient, in fp64 so that no tolerance hides a mistake."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Result = dict[str, Any]
CLIP = 0.42  # of the recipe
KINDS = {
    "dense": [],
    "untied": ["model.tie_word_embeddings=false"],
    "muon": ["stage.pretrain.optimizer=muon"],
    "wide": ["model.hidden_size=64", "model.intermediate_size=96"],  # what products in fp8 can be cut from
    "mixture": ["model.architecture=mixtral", "model.num_experts=4", "model.num_experts_per_tok=2",
                "model.num_hidden_layers=4", "stage.pretrain.optimizer=muon"],
    "gpt2": ["model.architecture=gpt2", "model.num_hidden_layers=4"],
    "gpt2 wide": ["model.architecture=gpt2", "model.hidden_size=64", "model.intermediate_size=96", "model.num_hidden_layers=4"],
    "mistral": ["model.architecture=mistral", "model.num_key_value_heads=2", "model.num_hidden_layers=4"],
    "one key head": ["model.architecture=mistral", "model.num_key_value_heads=1", "model.sizes.sliding_window=7"],
    "gemma": ["model.architecture=gemma", "model.num_hidden_layers=4", "model.head_dim=6"],
    "qwen2": ["model.architecture=qwen2", "model.num_key_value_heads=2", "model.num_hidden_layers=4",
              "model.tie_word_embeddings=false"],
    "qwen3": ["model.architecture=qwen3", "model.num_key_value_heads=2", "model.head_dim=6", "model.num_hidden_layers=4",
              "stage.pretrain.optimizer=muon"],
    "deepseek": ["model.architecture=deepseek_v3", "model.num_key_value_heads=4", "model.num_experts=4",
                 "model.num_experts_per_tok=2", "model.num_hidden_layers=4", *(f"model.sizes.{size}" for size in (
                     "moe_intermediate_size=24", "q_lora_rank=12", "kv_lora_rank=10", "qk_nope_head_dim=6", "qk_rope_head_dim=4",
                     "v_head_dim=8", "first_k_dense_replace=1", "n_group=2", "topk_group=1", "routed_scaling_factor=1.5")),
                 "stage.pretrain.expert_bias_rate=0.02"],
    "yuan": ["model.architecture=yuan", "model.num_hidden_layers=4", "model.tie_word_embeddings=false"],
    "yuan reading on": ["model.architecture=yuan", "model.num_hidden_layers=4", "model.sizes.filter_crosses_documents=true",
                        "stage.pretrain.optimizer=muon"],
    "m32": ["model.architecture=yuan", "model.num_experts=32", "model.head_dim=8", "model.num_hidden_layers=2"],
    "qwen3 mixture": ["model.architecture=qwen3_moe", "model.num_experts=4", "model.num_experts_per_tok=2",
                      "model.num_hidden_layers=4"],
}
KINDS["mtp"] = [*KINDS["deepseek"], "model.sizes.num_nextn_predict_layers=1", "model.tie_word_embeddings=false"]
KINDS["mtp twice"] = [*KINDS["deepseek"], "model.sizes.num_nextn_predict_layers=2", "stage.pretrain.optimizer=muon",
                      "stage.pretrain.mtp_weight=0.7"]
# what is trained, and how it is laid out
QUICK = [
    ("dense", "micro_batch_size=4"), ("dense", "dp_shard=2"), ("muon", "dp_replicate=2"), ("dense", "cp=2"), ("untied", "tp=2"),
    ("dense", "pp=2"), ("untied", "pp=2 split=[1,7] recompute=every-2"), ("dense", "pp=2 pipeline_schedule=GPipe"),
    ("untied", "pp=2 pipeline_schedule=Interleaved1F1B"), ("dense", "pp=2 pipeline_schedule=LoopedBFS split=[1,3,2,2]"),
    ("untied", "pp=2 pipeline_schedule=InterleavedZeroBubble"), ("dense", "pp=2 pipeline_schedule=ZBVZeroBubble recompute=full"),
    ("untied", "pp=2 pipeline_schedule=DualPipeV"), ("muon", "pp=2 dp_shard=2"), ("mixture", "dp_shard=2 ep=2"),
    ("gpt2", "tp=2"), ("gpt2", "pp=2"), ("qwen2", "tp=2"), ("qwen3", "tp=2"), ("gemma", "tp=2"), ("yuan", "tp=2"),
    ("yuan reading on", "cp=2 micro_batch_size=1"), ("m32", "dp_shard=2 ep=2 recompute=selective"),
    ("gpt2", "tp=2 seq_len=21 global_batch_tokens=336 micro_batch_size=1"), ("one key head", "cp=2 micro_batch_size=1"),
    ("dense", "dp_shard=2 keep_whole=false"), ("dense", "dp_replicate=2 keep_whole=false"),
    ("mtp", "tp=2"), ("mtp twice", "pp=2"),
]
SLOW = [
    ("dense", "dp_shard=4"), ("dense", "dp_shard=3 global_batch_tokens=432"), ("muon", "dp_shard=2 tp=2 recompute=full"),
    ("dense", "dp_replicate=2 dp_shard=2"), ("untied", "dp_replicate=2 tp=2"), ("dense", "cp=4"), ("untied", "cp=2 tp=2"),
    ("dense", "dp_shard=2 cp=2"), ("dense", "dp_replicate=2 cp=2"), ("dense", "tp=4"), ("muon", "pp=2 tp=2"),
    ("dense", "pp=2 cp=2"), ("dense", "pp=2 dp_replicate=2"), ("dense", "pp=4"), ("untied", "pp=4 split=[3,1,1,3]"),
    ("dense", "pp=3 split=[1,2,5]"), ("dense", "pp=4 pipeline_schedule=GPipe recompute=full"),
    ("dense", "pp=4 pipeline_schedule=Interleaved1F1B"), ("untied", "pp=4 pipeline_schedule=LoopedBFS"),
    ("dense", "pp=4 pipeline_schedule=InterleavedZeroBubble"), ("muon", "pp=4 pipeline_schedule=ZBVZeroBubble"),
    ("dense", "pp=4 pipeline_schedule=DualPipeV micro_batch_size=1"), ("dense", "pp=2 dp_shard=2 tp=2"),
    ("untied", "pp=2 dp_shard=2 cp=2 pipeline_schedule=Interleaved1F1B"),
    ("dense", "pp=2 cp=2 tp=2 pipeline_schedule=ZBVZeroBubble"),
    ("dense", "pp=2 dp_replicate=2 dp_shard=2 pipeline_schedule=InterleavedZeroBubble micro_batch_size=1"),
    ("dense", "pp=2 dp_shard=2 tp=2 pipeline_schedule=DualPipeV recompute=every-2 micro_batch_size=1"),
    ("muon", "dp_replicate=2 dp_shard=2 tp=2"), ("dense", "dp_replicate=2 cp=2 tp=2"), ("muon", "dp_shard=2 cp=2 tp=2"),
    ("dense", "pp=2 dp_shard=2 keep_whole=false"), ("dense", "pp=2 dp_replicate=2 dp_shard=2 keep_whole=false"),
    ("mixture", "dp_replicate=2 dp_shard=2 ep=2 keep_whole=false"),
    ("mixture", "tp=2"), ("mixture", "dp_shard=4 ep=2"), ("mixture", "cp=2 ep=2"), ("mixture", "dp_shard=2 ep=2 tp=2"),
    ("mixture", "dp_replicate=2 dp_shard=2 ep=2 recompute=full"), ("m32", "dp_shard=2 ep=2"),
    ("mixture", "pp=2 dp_shard=2 ep=2 recompute=selective keep_whole=false"),
    ("untied", "cp=2 tp=2 seq_len=22 global_batch_tokens=352 micro_batch_size=1"), ("mixture", "dp_shard=2 cp=2 ep=4"),
    ("mixture", "pp=2 dp_shard=2 ep=2"), ("mixture", "pp=2 dp_shard=2 tp=2 ep=2 pipeline_schedule=ZBVZeroBubble"),
    ("mixture", "pp=2 dp_shard=2 ep=2 pipeline_schedule=InterleavedZeroBubble"),
    ("gpt2", "cp=2"), ("gpt2", "dp_shard=2"), ("gpt2", "dp_shard=2 cp=2 tp=2 recompute=full"), ("gpt2", "dp_replicate=2"),
    ("gpt2", "pp=2 tp=2 pipeline_schedule=ZBVZeroBubble"), ("gpt2", "pp=2 dp_shard=2 cp=2 recompute=selective"),
    ("deepseek", "tp=2"), ("deepseek", "cp=2"), ("deepseek", "pp=2 dp_shard=2 ep=2"), ("deepseek", "dp_shard=2 ep=2 tp=2"),
    ("deepseek", "dp_replicate=2 cp=2 recompute=full"), ("deepseek", "pp=2 tp=2 pipeline_schedule=ZBVZeroBubble"),
    ("yuan", "dp_shard=2"), ("yuan", "pp=2 tp=2 pipeline_schedule=ZBVZeroBubble"), ("yuan", "cp=2 tp=2 recompute=full"),
    ("yuan", "tp=4"), ("yuan", "cp=4"), ("yuan", "dp_shard=2 recompute=selective"), ("yuan reading on", "micro_batch_size=4"),
    ("yuan reading on", "pp=2 dp_shard=2"), ("yuan reading on", "dp_shard=2 cp=2"), ("m32", "dp_replicate=2 dp_shard=2 ep=2"),
    ("m32", "dp_shard=2 ep=2 tp=2"), ("m32", "pp=2 cp=2 ep=2"), ("m32", "dp_shard=2 cp=2 ep=4 recompute=full"),
    ("qwen2", "pp=2"), ("qwen2", "cp=2"), ("qwen2", "dp_shard=2"), ("qwen2", "pp=2 tp=2"), ("gemma", "pp=2 dp_shard=2"),
    ("qwen3", "pp=2"), ("qwen3", "cp=2"),
    ("qwen3", "dp_shard=2"), ("qwen3", "dp_shard=2 tp=2 recompute=full"), ("mistral", "dp_shard=2 tp=2"),
    ("mistral", "pp=2 cp=2"), ("qwen3 mixture", "dp_shard=2 ep=2 tp=2"), ("qwen3 mixture", "pp=2 cp=2 ep=2"),
    ("mtp", "dp_shard=2"), ("mtp", "pp=2"), ("mtp", "pp=2 tp=2"), ("mtp", "dp_shard=2 ep=2"), ("mtp", "cp=2 micro_batch_size=1"),
    *(("mtp", f"pp=2 pipeline_schedule={name}") for name in ("ZBVZeroBubble", "InterleavedZeroBubble", "DualPipeV")),
    ("mtp", "micro_batch_size=4"), ("mtp", "pp=2 dp_shard=2 ep=2 recompute=full"), ("mtp", "dp_shard=2 tp=2 keep_whole=false"),
    ("mtp twice", "dp_shard=2"), ("mtp twice", "tp=2"), ("mtp twice", "pp=2 tp=2"), ("mtp twice", "dp_shard=2 ep=2"),
    ("mtp twice", "cp=2 tp=2 recompute=selective"), ("mtp twice", "dp_replicate=2 recompute=every-2"),
    ("mtp twice", "pp=2 cp=2 pipeline_schedule=Interleaved1F1B"), ("mtp twice", "pp=2 pipeline_schedule=LoopedBFS"),
    ("mistral", "cp=4"), ("one key head", "pp=2 cp=2 recompute=selective"), ("one key head", "dp_shard=2 cp=2 keep_whole=false"),
    ("untied", "pp=4 tp=2 pipeline_schedule=LoopedBFS"), ("dense", "pp=4 dp_shard=2 pipeline_schedule=ZBVZeroBubble"),
]


def overrides(layout: str) -> list[str]:
    stage = ("seq_len", "micro_batch_size", "global_batch_tokens", "compile", "precision")
    return [f"{'stage.pretrain' if item.split('=')[0] in stage else 'parallel'}.{item}" for item in layout.split()]


@pytest.mark.parametrize(("kind", "layout"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_layouts_train_the_same(in_layout: Callable[..., list[Result]], alone: Callable[..., Result], kind: str,
                                layout: str) -> None:
    batch = [item for item in overrides(layout) if "global_batch_tokens" in item or "seq_len" in item]
    wanted = alone(*KINDS[kind], *batch)
    ranks = in_layout(*KINDS[kind], *overrides(layout))
    assert min(wanted["tokens"]) > 100 and min(wanted["grad_norm"]) > CLIP, "clipping is at work"
    for found in ranks:
        assert found["tokens"] == wanted["tokens"]
        np.testing.assert_allclose(found["loss"], wanted["loss"], rtol=0, atol=1e-11)
        np.testing.assert_allclose(found["grad_norm"], wanted["grad_norm"], rtol=0, atol=1e-11)
        for name, gradient in found["gradients"].items():
            np.testing.assert_allclose(gradient, wanted["gradients"][name], rtol=0, atol=1e-9, err_msg=name)
        for name, weight in found["weights"].items():  # also those that no gradient moves
            np.testing.assert_allclose(weight, wanted["weights"][name], rtol=0, atol=1e-9, err_msg=name)
    assert {name for found in ranks for name in found["gradients"]} == set(wanted["gradients"]), "every parameter has a place"


# the same in the dtypes that models are trained in: what is laid out, and how far the first step may be from one process in fp32
ROUGH = [
    ("dense", "precision=fp32 dp_shard=2", 1e-6), ("dense", "precision=fp32 tp=2", 1e-6), ("untied", "precision=fp32 pp=2", 1e-6),
    ("dense", "precision=fp32 cp=2", 1e-6), ("mixture", "precision=fp32 dp_shard=2 ep=2", 1e-6),
    ("dense", "precision=fp32 pp=2 dp_shard=2 pipeline_schedule=Interleaved1F1B", 1e-6),
    ("dense", "precision=fp32 dp_shard=2 compile=true", 1e-6), ("untied", "precision=fp32 pp=2 compile=true", 1e-6),
    ("dense", "precision=fp32 pp=2 pipeline_schedule=GPipe compile=true recompute=full", 1e-6),
    ("dense", "precision=fp32 pp=2 pipeline_schedule=Interleaved1F1B compile=true", 1e-6),
    ("dense", "precision=fp32 pp=2 pipeline_schedule=LoopedBFS compile=true", 1e-6),
    ("dense", "precision=fp32 tp=2 compile=true", 1e-6), ("dense", "precision=bf16", 3e-2),
    ("dense", "precision=bf16 dp_shard=2", 3e-2),
    ("untied", "precision=bf16 tp=2", 3e-2), ("dense", "precision=bf16 pp=2 pipeline_schedule=ZBVZeroBubble", 3e-2),
    ("wide", "precision=fp8", 6e-2), ("wide", "precision=fp8 dp_shard=2 tp=2", 6e-2), ("wide", "precision=fp8 pp=2", 6e-2),
    ("gpt2", "precision=fp32 tp=2 compile=true", 1e-6), ("qwen3", "precision=fp32 pp=2 compile=true", 1e-6),
    ("gpt2", "precision=bf16 dp_shard=2 tp=2", 3e-2), ("gpt2 wide", "precision=fp8 tp=2", 6e-2),
    ("yuan", "precision=fp32 tp=2 compile=true", 1e-6), ("yuan reading on", "precision=fp32 cp=2 compile=true", 1e-6),
    ("deepseek", "precision=fp32 dp_shard=2 compile=true recompute=full", 1e-6),
    ("m32", "precision=fp32 dp_shard=2 ep=2 compile=true recompute=selective", 1e-6),
    pytest.param("m32", "precision=fp32 dp_shard=2 ep=2 compile=true", 1e-6, marks=pytest.mark.drill),
    ("m32", "precision=bf16 dp_shard=2 ep=2", 3e-2),
    ("dense", "precision=bf16 pp=2 dp_shard=2", 3e-2), ("mixture", "precision=bf16 dp_shard=2 ep=2", 3e-2),
    ("mtp", "precision=fp32 pp=2 compile=true", 1e-6),
    pytest.param("mtp", "precision=fp32 tp=2 compile=true recompute=full", 1e-6, marks=pytest.mark.drill),  # a minute to compile
    ("mtp", "precision=bf16 pp=2 dp_shard=2", 3e-2),
]


# how far from one process in the same dtype: the first step's loss (its gradient norm ten times as far), and the losses of all
# steps. The worst that was measured: bf16 2.1e-4, norm 2.1e-3 (tp 2), 8.4e-3 (M32); fp8 6.0e-3, norm 0.078, 0.055 (tp 2, whose
# parts have scales of their own).
ALIKE = {"fp32": (1e-6, 3e-5), "bf16": (1e-3, 0.02), "fp8": (0.02, 0.1)}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "layout", "tolerance"), ROUGH)
def test_coarser_dtypes_and_compiled_blocks_stay_close(in_layout: Callable[..., list[Result]], alone: Callable[..., Result],
                                                       kind: str, layout: str, tolerance: float) -> None:
    precision = next(item for item in overrides(layout) if "precision" in item)
    wanted, alike = (alone(*KINDS[kind], each) for each in ("stage.pretrain.precision=fp32", precision))
    first, later = ALIKE[precision.partition("=")[2]]
    for found in in_layout(*KINDS[kind], *overrides(layout)):
        np.testing.assert_allclose(found["loss"][0], wanted["loss"][0], rtol=tolerance)
        np.testing.assert_allclose(found["grad_norm"][0], wanted["grad_norm"][0], rtol=3 * tolerance)
        np.testing.assert_allclose(found["loss"][0], alike["loss"][0], rtol=first)
        np.testing.assert_allclose(found["grad_norm"][0], alike["grad_norm"][0], rtol=10 * first)
        np.testing.assert_allclose(found["loss"], alike["loss"], rtol=later)


def test_a_growing_batch_goes_through_a_pipeline(in_layout: Callable[..., list[Result]], alone: Callable[..., Result]) -> None:
    ramp = "stage.pretrain.batch_ramp=[8,4,24]"
    wanted, found = alone(ramp), in_layout(ramp, "parallel.pp=2", "stage.pretrain.micro_batch_size=1")[0]
    assert wanted["tokens"][0] < wanted["tokens"][-1]
    np.testing.assert_allclose(found["loss"], wanted["loss"], rtol=0, atol=1e-11)
