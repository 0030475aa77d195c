"""Recomputation: no gradient changes, memory falls, and the second time is recorded."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from athanor.foundation.errors import LayoutError
from athanor.foundation.intervals import Recorder, activate
from athanor.foundation.layout import Layout
from athanor.models import attention, fused
from athanor.models.context import Packed
from athanor.models.initialize import initialize
from athanor.models.shapes.decoder import DecoderShape
from athanor.models.zoo.llama import TENSOR_DIMS, build
from athanor.parallel import recompute
from athanor.parallel.apply import Choices, parallelize
from athanor.parallel.mesh import Mesh

SHAPE = DecoderShape(vocab_size=60, hidden_size=32, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2)
TOKENS = torch.arange(256) % 59


def make(policy: str, dtype: torch.dtype = torch.float32, is_compiled: bool = False) -> Any:
    model = build(SHAPE).to(dtype)
    initialize(model, 0)
    parallelize(model, Mesh(Layout(), torch.device("cpu"), 0), TENSOR_DIMS, Choices(policy, is_compiled))
    return model


def forward(model: Any) -> torch.Tensor:
    loss: torch.Tensor = model(TOKENS, Packed.of([100, 156]), (TOKENS + 1) % 59, torch.ones(256)).weighted_sum
    return loss


class Made(TorchDispatchMode):
    """Knows the storages of all tensors that operators made, and which of them are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        out = operator(*arguments, **(options or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[id(storage)] = weakref.ref(storage), storage.nbytes()
        return out

    def bytes(self) -> int:
        return sum(size for storage, size in self.storages.values() if storage() is not None)


def kept_bytes(policy: str) -> int:
    """Bytes that are left after a forward pass, to be used in the backward pass."""
    model = make(policy)
    with Made() as made:
        loss = forward(model)
    assert loss.requires_grad
    return made.bytes()


def plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute as accelerators do: element-wise expressions instead of hand-written ones, attention from torch's pieces."""

    monkeypatch.setattr(fused, "_by_hand", lambda x: False)
    monkeypatch.setattr(attention, "choose", lambda *about: "pieces")


@pytest.mark.parametrize("is_plain", [False, True], ids=["by hand", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("policy", ["selective", "full", "every-2"])
def test_no_gradient_changes(monkeypatch: pytest.MonkeyPatch, policy: str, dtype: torch.dtype, is_plain: bool) -> None:
    if is_plain:
        plainly(monkeypatch)
    gradients = []
    for choice in ("none", policy):
        model = make(choice, dtype)
        for _ in range(2):  # micro-batches
            forward(model).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(("is_plain", "most"), [(False, 0.97), (True, 0.7)], ids=["by hand", "plain"])
def test_memory_falls_with_what_is_kept(monkeypatch: pytest.MonkeyPatch, is_plain: bool, most: float) -> None:
    """Hand-written pieces keep little beyond what products and attention give; plain expressions keep more than that."""
    if is_plain:
        plainly(monkeypatch)
    none, selective, full = (kept_bytes(policy) for policy in ("none", "selective", "full"))
    assert full < 0.3 * none and 2 * full < selective < most * none, (none, selective, full)


def test_the_second_time_is_recorded_and_leaves_products_out(monkeypatch: pytest.MonkeyPatch) -> None:
    products = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            products.append(operator._schema.name in recompute.KEPT)
            return operator(*arguments, **(options or {}))

    counts, recorded = {}, {}
    for policy in ("none", "selective", "full"):
        model, recorder = make(policy), Recorder()
        activate(recorder)
        products.clear()
        with Counting():
            forward(model).backward()
        activate(None)
        counts[policy], recorded[policy] = sum(products), [row.name for row in recorder.rows].count("recompute")
    assert recorded == {"none": 0, "selective": 2, "full": 2}
    assert counts["none"] == counts["selective"] < counts["full"], counts


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the tracer looks at it
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("policy", ["selective", "full"])
def test_compiled_blocks_recompute_alike(policy: str) -> None:
    gradients = []
    for choice, is_compiled in (("none", False), (policy, True)):
        model = make(choice, torch.float64, is_compiled)
        for _ in range(2):
            forward(model).backward()
        gradients.append([p.grad for p in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_policies_name_their_blocks() -> None:
    assert recompute.recomputed("selective", range(3)) == [True] * 3
    with pytest.raises(LayoutError, match="'selectve'; allowed: none, full, selective, every-2"):
        recompute.recomputed("selectve", range(3))
