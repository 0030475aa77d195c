"""The decoder against transformers' Llama, documents against each other, and the loss against plain cross-entropy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from athanor.models import loss as loss_module
from athanor.models.attention import attend_by_runs
from athanor.models.context import Packed
from athanor.models.cpu_attention import packed_attention
from athanor.models.decoder import Decoder
from athanor.models.fused import rms_norm, rope_table, swiglu
from athanor.models.huggingface import save_model
from athanor.models.loss import chunk_rows, score
from athanor.models.rehearsed import computing_like

Build = Callable[..., Decoder]
LENGTHS = [7, 7, 1, 20, 13]
SIZES = [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4}, {"head_dim": 32, "num_key_value_heads": 1},
         {"rope_theta": 500.0, "rms_norm_eps": 1e-3}]


def tokens(count: int, module: Decoder, seed: int = 0) -> Tensor:
    return torch.randint(0, module.shape.vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize("changes", SIZES)
def test_logits_and_gradients_are_those_of_transformers(small: Build, tmp_path: Path, changes: dict[str, object]) -> None:
    from transformers import AutoModelForCausalLM

    module = small(**changes)
    save_model(module, tmp_path)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids, targets = tokens(40, module), tokens(40, module, 1)
    logits, expected = module(ids, Packed.of([40])), peer(ids[None]).logits[0]
    assert expected.abs().max() > 0.5
    assert (logits - expected).abs().max() <= 1e-5
    F.cross_entropy(expected, targets).backward()
    (module(ids, Packed.of([40]), targets, torch.ones(40)).weighted_sum / 40).backward()
    assert largest_difference(gradients(module), gradients(peer)) <= 1e-5


@pytest.mark.parametrize("lengths", [LENGTHS, [16, 16, 16], [5, 16, 16, 16, 2, 2]])
def test_a_packed_document_is_the_document_alone(small: Build, lengths: list[int]) -> None:
    module = small(torch.float64)
    ids, targets = tokens(sum(lengths), module), tokens(sum(lengths), module, 1)
    padded = replace(context := Packed.of(lengths),
                     cu_seqlens=torch.cat([context.cu_seqlens, context.cu_seqlens.new_full((9,), sum(lengths))]))
    whole = module(ids, padded)
    module(ids, padded, targets, torch.ones(sum(lengths))).weighted_sum.backward()
    packed = gradients(module)
    module.zero_grad()
    for part, answer, rows in zip(ids.split(lengths), targets.split(lengths), whole.split(lengths), strict=True):
        alone = Packed.of([len(part)])
        assert (module(part, alone) - rows).abs().max() <= 1e-12
        module(part, alone, answer, torch.ones(len(part))).weighted_sum.backward()
    assert largest_difference(packed, gradients(module)) <= 1e-12
    changed = ids.clone()
    changed[:lengths[0]] = tokens(lengths[0], module, 5)
    assert torch.equal(module(changed, padded)[lengths[0]:], whole[lengths[0]:])


@pytest.mark.parametrize("lengths", [LENGTHS, [16, 16], [30], [300, 300, 130, 5], [1200]])
def test_the_operator_is_attention_of_plain_torch(lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    size, context = sum(lengths), Packed.of(lengths)
    qkv = torch.randn(size, 8, 16, dtype=torch.float64, generator=generator, requires_grad=True)
    flowing = torch.randn(size, 4, 16, dtype=torch.float64, generator=generator)
    rope = rope_table(context.positions, 16, 100.0, torch.float64)
    out, _, _ = packed_attention(qkv, rope, context.cu_seqlens, 4, 2, 0)
    (found,) = torch.autograd.grad(out, qkv, flowing)
    cos, sin = rope.unbind(-1)
    even, odd = qkv[:, :6, 0::2], qkv[:, :6, 1::2]
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
    expected = attend_by_runs(turned[:, :4], turned[:, 4:], qkv[:, 6:], context.cu_seqlens)
    (wanted,) = torch.autograd.grad(expected, qkv, flowing)
    assert (out - expected).abs().max() <= 1e-12 and (found - wanted).abs().max() <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_by_hand_are_those_of_autograd(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tolerance = 1e-12 if dtype == torch.float64 else 0.05
    x, flowing = (torch.randn(1100, size, dtype=torch.float64, generator=generator).to(dtype) for size in (24, 12))
    weight = torch.randn(24, dtype=torch.float64, generator=generator).to(dtype)
    wide = torch.cat([flowing, flowing * 0.5], 1)
    for inputs, by_hand, plain, back in (
            ((x, weight), lambda a, w: rms_norm(a, w, 1e-5), lambda a, w: F.rms_norm(a, (24,), w, 1e-5), wide),
            ((x,), swiglu, lambda a: F.silu(a[:, :12]) * a[:, 12:], flowing)):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        exact = [tensor.double().requires_grad_() for tensor in inputs]
        out, expected = by_hand(*leaves), plain(*exact)
        assert out.dtype == dtype and (out - expected).abs().max() <= tolerance
        found = torch.autograd.grad(out, leaves, back)
        for a, b in zip(found, torch.autograd.grad(expected, exact, back.double()), strict=True):
            assert a.dtype == dtype and (a - b).norm() <= tolerance * b.norm()


def test_a_rehearsed_norm_keeps_what_an_accelerators_kernel_keeps() -> None:
    """torch's fused kernel saves its input, its weight and one fp32 number for each row (aten/native/layer_norm)."""
    x, weight = (torch.ones(*size, dtype=torch.bfloat16, requires_grad=True) for size in ((40, 64), (64,)))
    kept: list[Tensor] = []
    with computing_like("cuda", [40]), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x, weight, 1e-5)
    assert sum(tensor.nbytes for tensor in kept) == 2 * (40 * 64 + 64) + 4 * 40


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 40])
def test_chunked_loss_is_cross_entropy(monkeypatch: pytest.MonkeyPatch, weighted: bool, chunk_bytes: int) -> None:
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", chunk_bytes)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 16, dtype=torch.float64, generator=generator, requires_grad=True) for size in (150, 300))
    targets = torch.randint(0, 300, (150,), generator=generator)
    weights = torch.rand(150, dtype=torch.float64, generator=generator) * (torch.arange(150) % 3 > 0)
    assert (chunk_rows(150, 300, hidden.device.type) == 150) == (chunk_bytes > 1)
    logits = hidden @ weight.t()
    expected = (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / 7
    wanted = torch.autograd.grad(expected, (hidden, weight))
    scored = score(hidden, weight, targets, weights if weighted else None, None)
    value = (scored.weighted_sum if weighted else -(scored.logp * weights).sum()) / 7
    found = torch.autograd.grad(value, (hidden, weight))
    assert (value - expected).abs() <= 1e-12
    assert (scored.logp - logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]).abs().max() <= 1e-12
    assert (scored.logsumexp - logits.logsumexp(-1)).abs().max() <= 1e-12
    assert max((a - b).abs().max().item() for a, b in zip(found, wanted, strict=True)) <= 1e-12


def test_the_logarithm_of_the_denominator_carries_a_gradient_too() -> None:
    hidden, weight = (torch.randn(size, 8, dtype=torch.float64, requires_grad=True) for size in (20, 30))
    targets = torch.randint(0, 30, (20,))
    wanted = torch.autograd.grad((hidden @ weight.t()).logsumexp(-1).square().sum(), (hidden, weight))
    found = torch.autograd.grad(score(hidden, weight, targets, None, None).logsumexp.square().sum(), (hidden, weight))
    assert max((a - b).abs().max().item() for a, b in zip(found, wanted, strict=True)) <= 1e-12


def test_bfloat16_trains_like_float32(small: Build) -> None:
    exact, coarse = small(torch.float32), small(torch.bfloat16)
    coarse.load_state_dict({name: p.bfloat16() for name, p in exact.state_dict().items()})
    exact.load_state_dict({name: p.float() for name, p in coarse.state_dict().items()})
    ids, targets = tokens(60, exact), tokens(60, exact, 1)
    values = []
    for module in (exact, coarse):
        scored = module(ids, Packed.of([60]), targets, torch.full((60,), 1 / 60))
        assert scored.logp.dtype == torch.float32
        scored.weighted_sum.backward()
        values.append(scored.weighted_sum.item())
    assert values[0] == pytest.approx(values[1], rel=5e-3)
    for name, wanted in gradients(exact).items():
        found = gradients(coarse)[name].float()
        assert F.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.99, name


def test_stages_of_a_pipeline_are_the_whole(small: Build) -> None:
    for is_tied in (False, True):
        whole = small(torch.float64, tie_word_embeddings=is_tied)
        first = Decoder(whole.shape, range(1), is_last=False).double()
        last = Decoder(whole.shape, range(1, 3), is_first=False).double()
        for stage in (first, last):
            stage.load_state_dict({name: whole.state_dict()[name] for name in stage.state_dict()})
        ids, context = tokens(30, whole), Packed.of([10, 20], wanted=torch.tensor([4, 29]))
        difference = last(first(ids, context), context) - whole(ids, replace(context, wanted=None))[[4, 29]]
        assert difference.abs().max() <= 1e-12
        assert set(first.state_dict()) | set(last.state_dict()) == set(whole.state_dict())


def test_no_gradient_is_made_where_none_is_wanted(small: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("a gradient was made")

    monkeypatch.setattr(loss_module._Buffers, "add", never)
    module = small()
    ids = tokens(20, module)
    with torch.no_grad():
        scored = module(ids, Packed.of([20]), ids, torch.ones(20))
    assert scored.weighted_sum == pytest.approx(-scored.logp.sum().item(), rel=1e-6)


@pytest.mark.parametrize("changes", SIZES[:4])
def test_parameters_and_flops_are_those_counted(small: Build, changes: dict[str, object]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    module = small(**changes)
    shape = module.shape
    assert shape.parameters() == sum(p.numel() for p in module.parameters())
    peer = LlamaForCausalLM(LlamaConfig(**shape.to_config(), attn_implementation="eager"))
    with FlopCounterMode(display=False) as counter:
        peer(tokens(64, module)[None]).logits.sum().backward()
    assert counter.get_total_flops() == pytest.approx(shape.flops_full(64, 64), rel=0.01)
    assert shape.flops(64, 64) == shape.flops_full(64, 64) > shape.flops(64, 32.5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the tracer looks at it
def test_compiled_blocks_give_the_same_gradients(small: Build) -> None:
    module, compiled = small(torch.float64), small(torch.float64)
    for block in compiled.blocks.values():
        block.compile(backend="aot_eager", fullgraph=True)
    for lengths in (LENGTHS, [24, 24]):
        ids = tokens(48, module)
        for each in (module, compiled):
            each(ids, Packed.of(lengths), ids, torch.ones(48)).weighted_sum.backward()
    assert largest_difference(gradients(module), gradients(compiled)) <= 1e-12
