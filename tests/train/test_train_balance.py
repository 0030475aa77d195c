"""Biases that balance experts move by the signs of their loads, and make loads equal."""

from __future__ import annotations

import pytest
import torch

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
