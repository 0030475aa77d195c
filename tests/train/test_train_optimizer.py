"""Updates without waiting for the device: clipping, skipping, groups by name, state in bf16, exact weights beside copies."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from athanor.foundation.errors import RecipeError
from athanor.models.initialize import initialize
from athanor.models.shapes.decoder import DecoderShape
from athanor.models.zoo.llama import build
from athanor.objectives.batch import collate
from athanor.objectives.find import load_objective
from athanor.parallel.stages import Stages
from athanor.train import optimizer as optimizer_module
from athanor.train.groups import Group, check_groups
from athanor.train.masters import Masters
from athanor.train.optimizer import Optimizer
from athanor.train.step import Trainee, run_step

SHAPE = DecoderShape(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
NAMES = [name for name, _ in build(SHAPE).named_parameters()]


def make(kind: str = "muon", dtype: torch.dtype = torch.float32, copies: torch.dtype | None = None,
         **choices: Any) -> tuple[Any, Optimizer]:
    model = build(SHAPE).to(dtype)
    initialize(model, 3)
    masters = None if copies is None else Masters(model.parameters(), copies, is_accumulated=True)
    return model, Optimizer(Stages.alone(model), kind, 0.1, masters=masters, **choices)


def give_gradients(optimizer: Optimizer, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for piece in optimizer.pieces:
        gradient = scale * torch.randn(piece.shard.shape, generator=generator)
        if optimizer.masters is not None:
            optimizer.masters.sums[piece.parameter] = gradient
        else:
            piece.parameter.grad = gradient.to(piece.shard.dtype)


def take_step(optimizer: Optimizer, *, clip: float = math.inf, loss: float = 1.0) -> bool:
    is_made = optimizer.step(0.01, optimizer.squared_norm(), torch.tensor(loss, dtype=torch.float64), clip)
    optimizer.clear()
    return bool(is_made)


def bits(model: Any, optimizer: Optimizer) -> list[torch.Tensor]:
    kept = [p.detach() for p in model.parameters()] + [shard for *_, shard in (*optimizer.weights(), *optimizer.state())]
    return [tensor.clone() for tensor in kept]


@pytest.mark.parametrize(("state_dtype", "copies"), [(None, None), (torch.bfloat16, None), (torch.bfloat16, torch.bfloat16)])
@pytest.mark.parametrize("fault", ["gradient", "overflow", "loss"])
def test_a_skipped_step_leaves_every_bit(fault: str, state_dtype: torch.dtype | None, copies: torch.dtype | None) -> None:
    model, optimizer = make(state_dtype=state_dtype, copies=copies)
    give_gradients(optimizer, 1)
    assert take_step(optimizer) and optimizer.updates == 1
    before = bits(model, optimizer)
    give_gradients(optimizer, 2)
    if fault != "loss":
        for piece in optimizer.pieces[2:9]:
            assert piece.gradient is not None
            piece.gradient.view(-1)[3] = math.nan if fault == "gradient" else math.inf
    assert not take_step(optimizer, loss=math.nan if fault == "loss" else 1.0, clip=1.0)
    assert all(map(torch.equal, before, bits(model, optimizer))) and optimizer.updates == 1
    other, undisturbed = make(state_dtype=state_dtype, copies=copies)
    for seed in (1, 3):
        give_gradients(undisturbed, seed)
        take_step(undisturbed)
    give_gradients(optimizer, 3)
    assert take_step(optimizer)
    assert all(map(torch.equal, bits(model, optimizer), bits(other, undisturbed))), "as if the skipped step had not been"


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_device_clips_as_the_host_would(kind: str) -> None:
    model, optimizer = make(kind)
    other, by_hand = make(kind)
    for seed, scale in ((1, 3.0), (2, 1e-5)):  # the second is below the bound
        for each in (optimizer, by_hand):
            give_gradients(each, seed, scale)
        norm = math.sqrt(float(by_hand.squared_norm()))
        if norm > 0.7:
            torch._foreach_mul_([piece.gradient for piece in by_hand.pieces], 0.7 / (norm + 1e-6))  # type: ignore[arg-type]
        take_step(optimizer, clip=0.7)
        take_step(by_hand)
    assert all(map(torch.equal, bits(model, optimizer), bits(other, by_hand)))


def test_a_step_passes_its_bound_on() -> None:
    batch = collate([{"tokens": np.arange(9), "starts": np.array([0]), "weight": np.ones(8)}], 8)
    norms, seen = [], []
    for clip in (1e9, 0.01):
        _, optimizer = make("adamw")
        trainee = Trainee(optimizer.stages, optimizer.stages.mesh, load_objective("pretrain"), optimizer)
        outcome = run_step(trainee, [batch], 0.1, clip)
        norms.append(outcome.grad_norm)
        seen.append(optimizer.pieces[-1].slots["exp_avg"])
    assert norms[0] == norms[1] > 0.02
    torch.testing.assert_close(seen[1], seen[0] * 0.01 / norms[0], rtol=1e-3, atol=1e-12)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for chunk in (1 << 24, 100):
        monkeypatch.setattr(optimizer_module, "CHUNK", chunk)
        model, optimizer = make("adamw", state_dtype=torch.bfloat16)
        give_gradients(optimizer, 1)
        take_step(optimizer)
        found.append(bits(model, optimizer))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_groups_learn_at_their_own_rate() -> None:
    groups = [Group("*.layers.0.*norm.weight", 0.0), Group("*norm.weight", 0.5, 0.2), Group("*.mlp.*", 0.25)]
    plain, optimizer = make()
    grouped, other = make(groups=groups)
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    for each in (optimizer, other):
        give_gradients(each, 1)
        take_step(each)
    for (name, a), b in zip(plain.named_parameters(), grouped.parameters(), strict=True):
        moved, start = b.detach() - before[name], before[name]
        full = a.detach() - start
        if "layers.0" in name and "norm" in name:
            assert torch.equal(b, start)
        elif "norm" in name:
            torch.testing.assert_close(moved, 0.5 * full - 0.01 * 0.5 * 0.2 * start, rtol=1e-4, atol=1e-7)
        else:
            torch.testing.assert_close(moved, (0.25 if ".mlp." in name else 1.0) * full, rtol=1e-4, atol=1e-7)


def test_a_group_for_nothing_is_refused_with_the_nearest_names() -> None:
    check_groups(NAMES, [Group("*norm.weight"), Group("*")], "pretrain")
    with pytest.raises(RecipeError, match=r"stage.pretrain.group: the pattern '\*q_prj.weight' fits no .*q_proj.weight"):
        check_groups(NAMES, [Group("*q_prj.weight")], "pretrain")
    with pytest.raises(RecipeError, match=r"all that the pattern '\*\.0\.\*norm\*' fits, such as .* belongs to groups before it"):
        check_groups(NAMES, [Group("*norm*"), Group("*.0.*norm*")], "pretrain")
    with pytest.raises(RecipeError, match=r"the nearest names are model\.embed_tokens\.weight"):
        check_groups(NAMES, [Group("[0-9]")], "pretrain")


def test_state_in_bf16_takes_half_and_stays_near() -> None:
    _, exact = make(kind="muon")
    _, optimizer = make(kind="muon", state_dtype=torch.bfloat16)
    assert {shard.dtype for *_, shard in optimizer.state()} == {torch.bfloat16}
    for seed in range(30):
        for each in (exact, optimizer):
            give_gradients(each, seed)
            take_step(each)
    for (key, _, a), (_, _, b) in zip(exact.state(), optimizer.state(), strict=True):
        assert float((a - b).norm() / a.norm()) < 2**-7, key  # roundings of 2^-9 add up over some twenty steps
    moved = [float((a - b).norm() / a.norm()) for (*_, a), (*_, b) in zip(exact.weights(), optimizer.weights(), strict=True)]
    assert 0 < max(moved) < 0.01


def test_exact_weights_are_what_is_updated_and_exported() -> None:
    model, optimizer = make("adamw", copies=torch.bfloat16)
    plain, exact = make("adamw")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for each in (optimizer, exact):
        give_gradients(each, 1)
        take_step(each)
    for p, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, wanted.bfloat16())
    with optimizer.exact():
        assert all(map(torch.equal, model.parameters(), plain.parameters()))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for _, _, weight in optimizer.weights():
        weight.zero_()
    optimizer.set_updates(5)
    assert optimizer.updates == 5 and not any(p.any() for p in model.parameters())
    assert next(iter(optimizer.weights()))[1].requires_grad


@pytest.mark.parametrize("is_accumulated", [True, False])
def test_gradients_of_micro_batches_add_up_in_fp32(is_accumulated: bool) -> None:
    layer = torch.nn.Linear(4, 3, bias=False)
    masters = Masters(layer.parameters(), torch.bfloat16, is_accumulated)
    inputs = [torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in range(3)]
    wanted = torch.zeros(3, 4)
    for x in inputs[:3 if is_accumulated else 1]:
        layer(x).sum().backward()
        wanted += torch.autograd.grad(torch.nn.functional.linear(x, w := layer.weight.detach().requires_grad_()).sum(), w)[0]
        assert (layer.weight.grad is None) == is_accumulated
    found = masters.gradient(layer.weight)
    assert found is not None and found.dtype == (torch.float32 if is_accumulated else torch.bfloat16)
    assert torch.equal(found.float(), wanted)
    masters.sums.clear()
    layer.weight.grad = None
    assert masters.gradient(layer.weight) is None
