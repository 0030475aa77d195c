"""The loss beyond plain cross-entropy: z-loss, and what half precision does to gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from athanor.models import loss as loss_module
from athanor.models.loss import score

Z_LOSS = 0.3  # far more than anybody would use, so that a wrong gradient shows


def inputs(tokens: int, vocabulary: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, width, dtype=torch.float64, generator=generator) for size in (tokens, vocabulary))
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    weights = torch.rand(tokens, generator=generator, dtype=torch.float64) * (torch.arange(tokens) % 3 > 0)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, weights


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 40])
def test_z_loss_is_the_squared_logsumexp(monkeypatch: pytest.MonkeyPatch, weighted: bool, chunk_bytes: int) -> None:
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", chunk_bytes)
    hidden, weight, targets, weights = inputs(150, 300, 16, torch.float64)
    logits, factors = hidden @ weight.t(), weights if weighted else torch.ones_like(weights)
    plain = (F.cross_entropy(logits, targets, reduction="none") * factors).sum()
    squares = Z_LOSS * (factors * logits.logsumexp(-1).square()).sum()
    wanted = torch.autograd.grad((plain + squares) / 7, (hidden, weight))
    scored = score(hidden, weight, targets, weights if weighted else None, None, Z_LOSS)
    assert scored.z_sum is not None and not scored.z_sum.requires_grad
    assert scored.z_sum.item() == pytest.approx(squares.item(), rel=1e-13)
    assert scored.weighted_sum.item() == pytest.approx((plain + squares).item(), rel=1e-13)
    found = torch.autograd.grad(scored.weighted_sum / 7, (hidden, weight))
    assert max((a - b).abs().max().item() for a, b in zip(found, wanted, strict=True)) <= 1e-11
    assert score(hidden, weight, targets, weights, None).z_sum is None


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 40])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_gradients_in_half_precision_are_off_by_rounding_alone(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int,
                                                               z_loss: float) -> None:
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", chunk_bytes)
    hidden, weight, targets, _ = inputs(512, 300, 64, torch.bfloat16)
    hidden.data *= 0.25  # logits of about 2, as models have them
    leaves = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    logits = leaves[0] @ leaves[1].t()
    squares = z_loss * logits.logsumexp(-1).square().sum()
    wanted = torch.autograd.grad((F.cross_entropy(logits, targets, reduction="sum") + squares) / 7, leaves)
    value = score(hidden, weight, targets, torch.ones(512), None, z_loss).weighted_sum / 7
    for found, exact in zip(torch.autograd.grad(value, (hidden, weight)), wanted, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.float() - exact).norm() <= 2**-7 * exact.norm()  # bf16 rounds by up to 2^-9, twice or three times
        scale = (found.float() * exact).sum() / exact.square().sum()
        assert scale.item() == pytest.approx(1, abs=7e-4)  # 1/7 itself, rounded to bf16, would be off by 2e-3
