"""Products in 8 bits against exact ones, and a small training run in them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from athanor.foundation.errors import ModelError
from athanor.models.context import Packed
from athanor.models.decoder import Decoder
from athanor.models.fp8 import BACKWARD, FORWARD, check, convert, linear, quantise
from athanor.models.shapes.deepseek_v3 import Shape

Build = Callable[..., Decoder]
# half the distance between neighbours is 2^-4 of a number in e4m3 (3 bits), 2^-3 in e5m2 (2 bits); uniform in between, the
# root mean square of the error is below a half of that
E4M3, E5M2 = 2.0**-5, 2.0**-4


def relative(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("dtype", "step"), [(FORWARD, 2.0**-4), (BACKWARD, 2.0**-3)])
@pytest.mark.parametrize("size", [1e-9, 1.0, 3e5])
def test_a_tensor_fills_the_range_whatever_its_size(dtype: torch.dtype, step: float, size: float) -> None:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) * size
    small, scale = quantise(x, dtype)
    back = small.float() * scale
    assert small.float().abs().max() == torch.finfo(dtype).max
    large = x.abs() > x.abs().max() / 64  # numbers in the dtype's normal range
    assert ((back - x).abs() <= x.abs() * step * 1.0001)[large].all()
    nothing, scale = quantise(torch.zeros(4, 4), dtype)
    assert (nothing.float() == 0).all() and scale > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [64, 50])
def test_products_are_exact_up_to_rounding(tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, flowing = (torch.randn(shape, generator=generator).to(dtype) for shape in ((tokens, 96), (48, 96), (tokens, 48)))
    x, weight = x.requires_grad_(), (weight * 0.02).detach().requires_grad_()
    out = linear(x, weight)
    to_x, to_weight = torch.autograd.grad(out, (x, weight), flowing * 1e-4)
    assert out.dtype == to_x.dtype == to_weight.dtype == dtype
    exact, gradient = [t.detach().double() for t in (x, weight)], flowing.double() * 1e-4
    both = (2 * E4M3**2) ** 0.5  # of two factors rounded on their own
    assert E4M3 / 4 < relative(out, exact[0] @ exact[1].t()) < both
    mixed = (E4M3**2 + E5M2**2) ** 0.5
    assert E5M2 / 4 < relative(to_x, gradient @ exact[1]) < mixed
    assert E5M2 / 4 < relative(to_weight, gradient.t() @ exact[0]) < mixed


def train(module: Decoder, steps: int) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    context, losses = Packed.of([32] * 8), []
    for _ in range(steps):
        start = torch.randint(0, 200, (8, 1), generator=generator)
        ids = ((start + 7 * torch.arange(33)) % 200)  # counting by seven is soon learned
        loss = module(ids[:, :-1].flatten(), context, ids[:, 1:].flatten(), torch.ones(256)).weighted_sum / 256
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_the_loss_falls_as_in_half_precision(small: Build) -> None:
    half, eight = (small(torch.bfloat16, initializer_range=0.05) for _ in range(2))
    convert(eight)
    before, after = train(half, 30), train(eight, 30)
    assert before[0] > 5 and before[-1] < 0.5 * before[0]
    assert before != after
    for a, b in zip(before, after, strict=True):
        assert b == pytest.approx(a, abs=0.15)
    assert sum(after[-5:]) == pytest.approx(sum(before[-5:]), rel=0.1)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the tracer looks at it
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # and makes one of those itself
def test_compiled_blocks_multiply_alike(small: Build) -> None:
    ids = torch.arange(48) % 200
    results = []
    for is_compiled in (False, True):
        module = small(torch.bfloat16)
        convert(module)
        if is_compiled:
            for block in module.blocks.values():
                block.compile(backend="aot_eager", fullgraph=True)
        loss = module(ids, Packed.of([48]), ids, torch.ones(48)).weighted_sum
        loss.backward()
        results.append((loss, [p.grad for p in module.parameters()]))
    assert results[0][0].item() == pytest.approx(results[1][0].item(), rel=2e-3)
    assert all(relative(b, a) < 0.1 for a, b in zip(results[0][1], results[1][1], strict=True))


def test_matrices_of_odd_sizes_are_refused(small: Build) -> None:
    with pytest.raises(ModelError, match=r"multiples of 16 on each rank, but intermediate_size / tp is 90;"):
        convert(small(intermediate_size=90))
    check(small().shape, tp=2)
    with pytest.raises(ModelError, match=r"num_key_value_heads x head_dim / tp is 8;"):
        check(small().shape, tp=4)


def test_matrices_that_not_all_models_have_are_looked_at_too() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
             "num_experts": 4, "num_experts_per_tok": 2, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
             "q_lora_rank": 32, "kv_lora_rank": 48, "first_k_dense_replace": 1}
    check(Shape(**sizes, moe_intermediate_size=32), tp=2)
    check(Shape(**sizes, moe_intermediate_size=24, n_shared_experts=0), tp=2)  # experts are not multiplied in fp8
    for key, size, told in (("q_lora_rank", 40, "height of q_down is 40"), ("kv_lora_rank", 40, "height of kv_down is 56"),
                            ("moe_intermediate_size", 24, "height of shared_gate_up is 24")):
        with pytest.raises(ModelError, match=f"but the {told}; train in bf16"):
            check(Shape(**{"moe_intermediate_size": 32, **sizes, key: size}), tp=2)
