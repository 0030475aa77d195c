"""Biases that balance experts move by the signs of their loads, and make loads equal."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from athanor.foundation.launch import run_ranks
from athanor.models.context import Packed
from athanor.models.experts import SigmoidRouter
from athanor.models.shapes.deepseek_v3 import Shape
from athanor.models.zoo import deepseek_v3
from athanor.parallel.stages import Stages
from athanor.train.balance import Balancer

SHAPE = Shape(vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_experts=8,
              num_experts_per_tok=2, moe_intermediate_size=16, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4,
              v_head_dim=8, first_k_dense_replace=0)


def router_and_balancer(rate: float) -> tuple[SigmoidRouter, Balancer]:
    torch.manual_seed(0)
    model = deepseek_v3.build(SHAPE)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.3) if parameter.ndim > 1 else torch.nn.init.zeros_(parameter.data)
    stages = Stages.alone(model)
    router = model.blocks["0"].mlp.gate
    router.load.copy_(torch.arange(8) * 10**6)  # what lay in the memory that was taken
    return router, Balancer(stages, stages.placed(), rate)


def loads(router: SigmoidRouter, x: torch.Tensor) -> torch.Tensor:
    return torch.bincount(router(x, Packed.of([len(x)]))[1].flatten(), minlength=8)


def test_a_step_is_the_sign_of_what_is_missing_to_the_mean() -> None:
    router, balancer = router_and_balancer(0.01)
    x = torch.randn(64, 16) + 0.5
    counted = loads(router.eval(), x)
    balancer.step(torch.tensor(True))
    assert router.e_score_correction_bias.abs().max() == 0, "nothing is counted outside training"
    router.train()
    for part in x.split(16):
        router(part, Packed.of([16]))
    balancer.step(torch.tensor(False))
    assert router.e_score_correction_bias.abs().max() == 0, "a skipped step moves nothing"
    router(x, Packed.of([64]))
    balancer.step(torch.tensor(True))
    expected = [0.01 if count < 16 else -0.01 if count > 16 else 0.0 for count in counted.tolist()]
    assert router.e_score_correction_bias.tolist() == pytest.approx(expected)
    assert not router.e_score_correction_bias.requires_grad


def test_loads_become_equal() -> None:
    router, balancer = router_and_balancer(0.01)
    x = torch.randn(512, 16) + 0.5
    before = loads(router, x)
    for _ in range(150):
        router(x, Packed.of([512]))
        balancer.step(torch.tensor(True))
    after = loads(router, x)
    assert before.max() > 1.5 * 128 and after.max() < 1.1 * 128 and after.sum() == before.sum()


def test_a_step_of_a_bias_counts_where_weights_are_cast_to_bf16(tmp_path: Path) -> None:
    """There 0.499 and 0.4995 are the same number."""
    biases = [0.5005, 0.5, 0.4995, 0.499] * 2
    sizes = {field.name: getattr(SHAPE, field.name) for field in fields(SHAPE)}
    first, second = run_ranks("train_ranks:biases_in_bf16", {"biases": biases, "sizes": sizes}, 2, log_folder=tmp_path, threads=1,
                              timeout=120)
    assert first["weight"] == second["weight"] == "torch.bfloat16"
    assert first["biases"] == second["biases"] == pytest.approx(biases, rel=1e-6)
    assert first["writes"] and not second["writes"]
