"""What accelerators are given: code that never waits for the device, and blocks that a compiler takes whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.autograd.function import FunctionCtx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from athanor.models import loss as loss_module
from athanor.models.context import Packed
from athanor.models.decoder import Decoder
from athanor.models.fp8 import convert
from athanor.models.shapes.decoder import DecoderShape
from athanor.objectives.zoo import pretrain

Build = Callable[..., Decoder]
SHAPE = DecoderShape(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2,
                     num_key_value_heads=1)


class NothingComesBack(TorchDispatchMode):
    """Refuses to copy from the device to the host. Reading a number or a length fails by itself: the tensors are fake."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x.device.type for x in args if isinstance(x, Tensor)]
        out = func(*args, **(kwargs or {}))
        if "cuda" in given and isinstance(out, Tensor):
            assert out.device.type == "cuda", f"{func} brings a tensor to the host"
        return out


class Indexed(TorchFunctionMode):
    """Takes parts of tensors by other names: torch's own wants to switch to the device first, which a CPU build cannot."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            return part_of(*args)
        if func is Tensor.__setitem__:
            return torch.ops.aten.copy_(part_of(*args[:2]), args[2])
        return func(*args, **(kwargs or {}))


def part_of(x: Tensor, index: Any) -> Tensor:
    """x[index] for whole numbers, slices and None."""
    dim = 0
    for key in index if isinstance(index, tuple) else (index,):
        if isinstance(key, int):
            x = x.select(dim, key)
            continue
        x = x.unsqueeze(dim) if key is None else torch.ops.aten.slice(x, dim, key.start, key.stop, 1)
        dim += 1
    return x


@pytest.fixture
def device() -> Iterator[torch.device]:
    """A device that is not there, on which everything runs but nothing is computed."""
    with FakeTensorMode(), torch.no_grad(), NothingComesBack(), Indexed():
        yield torch.device("cuda", 0)


def model_on(device: torch.device, dtype: torch.dtype) -> Decoder:
    torch.set_default_dtype(dtype)
    try:
        with device:
            return Decoder(SHAPE).requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


def context_on(device: torch.device, lengths: list[int]) -> Packed:
    positions = torch.empty(sum(lengths), dtype=torch.int64, device=device)
    ends = torch.empty(1 + len(lengths), dtype=torch.int32, device=device)
    return Packed(positions, ends, max(lengths), is_even=len(set(lengths)) == 1)


@pytest.mark.parametrize("lengths", [[128, 128], [256], [200, 50, 6]])
@pytest.mark.parametrize("is_converted", [False, True])
def test_a_forward_pass_never_waits_for_the_device(device: torch.device, lengths: list[int], is_converted: bool) -> None:
    model = model_on(device, torch.bfloat16)
    if is_converted:
        convert(model)
    columns = torch.empty(2, 256, dtype=torch.int64, device=device)
    weights = torch.empty(256, device=device)
    scored = model(columns[0], replace(context_on(device, lengths), z_loss=1e-4), columns[1], weights)
    assert scored.logp.device == device and scored.logp.dtype == torch.float32
    loss, found = pretrain.loss(scored, {"weight": weights}, {"tokens": 256.0})
    assert loss.device == device and set(found) == {"loss", "z_loss"}


def test_waiting_would_be_seen(device: torch.device) -> None:
    with pytest.raises(DataDependentOutputException):
        model_on(device, torch.float32)(torch.empty(256, dtype=torch.int64, device=device), context_on(device, [200, 56]))
    with pytest.raises(AssertionError, match="to the host"):
        torch.empty(4, device=device).cpu()


@pytest.mark.parametrize("rows", [256, 100])
def test_the_head_s_gradient_is_summed_in_fp32_on_the_device(device: torch.device, monkeypatch: pytest.MonkeyPatch,
                                                             rows: int) -> None:
    added: list[tuple[Any, ...]] = []

    def addmm(into: Tensor, a: Tensor, b: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        added.append((into.dtype, a.dtype, b.dtype, out_dtype, tuple(a.shape), into is out))
        return out

    monkeypatch.setattr(torch, "addmm", addmm)  # this one has no fake form where torch was built without accelerators
    monkeypatch.setattr(loss_module, "chunk_rows", lambda *given: rows)
    hidden, weight = (torch.empty(size, 32, dtype=torch.bfloat16, device=device) for size in (256, 512))
    targets, weights = torch.empty(256, dtype=torch.int64, device=device), torch.empty(256, device=device)
    ctx = FunctionCtx()
    loss_module._WeightedSum.forward(ctx, hidden, weight, targets, weights, None, 1e-4, True)
    chunks = [rows] * (256 // rows) + [256 % rows] * (256 % rows > 0)
    half, wide = torch.bfloat16, torch.float32
    assert added == ([] if len(chunks) == 1 else [(wide, half, half, wide, (512, size), True) for size in chunks])
    to_hidden, to_weight = ctx.to_save
    assert to_hidden.dtype == half and to_weight.dtype == (half if len(chunks) == 1 else wide)


def test_chunks_on_accelerators_are_thick() -> None:
    cuda = torch.device("cuda")
    assert loss_module.chunk_rows(8192, 128256, cuda) == 2048
    assert loss_module.chunk_rows(8192, 32000, cuda) == 8192  # all fit
    assert 2048 <= loss_module.chunk_rows(65536, 256000, cuda) <= 4096


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the tracer looks at it
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # it and the compiler use what they deprecate
@pytest.mark.parametrize(("dtype", "is_converted", "tolerance"), [
    (torch.float32, False, 1e-5), (torch.bfloat16, False, 2e-2), (torch.float32, True, 0.1)])  # fp8 has steps of 1/8
def test_a_compiled_block_is_the_eager_one(small: Build, dtype: torch.dtype, is_converted: bool, tolerance: float) -> None:
    results = []
    for is_compiled in (False, True):
        module = small(dtype)
        if is_converted:
            convert(module)
        if is_compiled:
            for block in module.blocks.values():
                block.compile(fullgraph=True, dynamic=False)
        ids = torch.arange(48) % 200
        loss = module(ids, Packed.of([20, 28]), ids, torch.full((48,), 1 / 48)).weighted_sum
        loss.backward()
        results.append((loss.item(), {name: p.grad for name, p in module.named_parameters()}))
    (loss, wanted), (found_loss, found) = results
    assert found_loss == pytest.approx(loss, rel=tolerance)
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm(), name
