"""Layouts put on a model from outside: who holds what, that gradients are sums, and that waiting is recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from athanor.foundation.errors import LayoutError, ModelError
from athanor.foundation.launch import run_ranks
from athanor.foundation.layout import Layout
from athanor.foundation.placement import Box
from athanor.models.context import Packed
from athanor.models.initialize import initialize
from athanor.models.shapes.decoder import DecoderShape
from athanor.models.zoo.llama import TENSOR_DIMS, build
from athanor.parallel.apply import Choices, blocks_of, parallelize
from athanor.parallel.mesh import Mesh
from athanor.parallel.recompute import recomputed
from athanor.parallel.tensor import tensor_dim


def look(tmp_path: Path, keeps_whole: bool = False, **degrees: int) -> list[dict[str, Any]]:
    arguments, ranks = {"degrees": degrees, "keeps_whole": keeps_whole}, Layout(**degrees).world_size
    return run_ranks("parallel_ranks:look_at_shards", arguments, ranks, log_folder=tmp_path, threads=1, timeout=60)


def reference() -> nn.Module:
    model = build(DecoderShape(vocab_size=60, hidden_size=20, intermediate_size=28, num_hidden_layers=2, num_attention_heads=2))
    initialize(model, 0)
    return model


@pytest.mark.parametrize("degrees", [
    {"dp_shard": 3}, {"tp": 2}, {"dp_replicate": 2},
    pytest.param({"dp_shard": 2, "tp": 2}, marks=pytest.mark.slow)], ids=str)
def test_shards_are_the_boxes_they_say_and_gradients_are_summed(tmp_path: Path, degrees: dict[str, int]) -> None:
    model = reference()
    tokens = torch.arange(1, 13)
    model(tokens, Packed.of([12]), tokens + 1, torch.ones(12)).weighted_sum.backward()
    ranks = look(tmp_path, **degrees)
    copies = Layout(**degrees).data_ranks * 2  # every data rank read the same rows, in two micro-batches
    for name, parameter in model.named_parameters():
        filled = torch.zeros_like(parameter)
        for rank in ranks:
            box, shard, is_first = rank["boxes"][name]
            place = box.slices(Box((0,) * parameter.ndim, tuple(parameter.shape)))
            assert torch.equal(parameter[place], torch.from_numpy(shard)), name
            assert torch.equal(parameter, torch.from_numpy(rank["whole"][name]))
            filled[place] += float(is_first)
            torch.testing.assert_close(torch.from_numpy(rank["gradients"][name]), copies * parameter.grad, rtol=1e-4, atol=1e-5)
        assert (filled == 1).all(), f"every element of {name} has one owner"
    assert sorted(rank["place"]["data_rank"] for rank in ranks) == sorted(list(range(copies // 2)) * Layout(**degrees).tp)


@pytest.mark.parametrize(("keeps_whole", "waits"), [(False, 2 * (3 + 2 + 3)), (True, 3 + 3)])
def test_waiting_in_collectives_is_recorded_alike_on_all_ranks(tmp_path: Path, keeps_whole: bool, waits: int) -> None:
    """Two micro-batches of three units: gathered forward, blocks again backward, and reduced; or each once in all."""
    first, second = look(tmp_path, keeps_whole, dp_shard=2)
    names = [[(row[0], row[4]) for row in rank["rows"]] for rank in (first, second)]
    assert names[0] == names[1]
    assert [name for name, _ in names[0]] == ["data_parallel"] * waits
    assert len({group for _, group in names[0]}) == 1
    assert all(row[5] <= row[1] <= row[2] for row in first["rows"])


def test_one_rank_stays_as_it_is() -> None:
    model = reference()
    before = dict(model.named_parameters())
    assert parallelize(model, Mesh(Layout(), torch.device("cpu"), 0, None), TENSOR_DIMS, Choices()) is None
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    assert len(blocks_of(model)) == 2
    with pytest.raises(ModelError, match="Linear has no 'layers'"):
        blocks_of(nn.Linear(2, 2))


@pytest.mark.parametrize("policy", ["full", "every-2"])
def test_recomputing_changes_no_gradient(policy: str) -> None:
    tokens = torch.arange(1, 13)
    gradients = []
    for choice in ("none", policy):
        model = reference()
        parallelize(model, Mesh(Layout(), torch.device("cpu"), 0, None), TENSOR_DIMS, Choices(choice))
        model(tokens, Packed.of([5, 7]), tokens + 1, torch.ones(12)).weighted_sum.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_policies_name_their_blocks() -> None:
    assert recomputed("every-2", range(5)) == [False, True, False, True, False]
    assert recomputed("every-2", [3, 4]) == [True, False] and recomputed("every-3", [6]) == [False], "of the whole model"
    assert recomputed("full", range(2)) == [True, True] and recomputed("none", range(1)) == [False]
    with pytest.raises(LayoutError, match=r"'every-0'; allowed: none, full, selective, every-2"):
        recomputed("every-0", range(4))


def test_boxes_overlap_in_global_coordinates() -> None:
    left, right = Box((2, 0), (4, 6)), Box((4, 3), (5, 9))
    shared = left.overlap(right)
    assert shared == Box((4, 3), (2, 3))
    assert shared.slices(left) == (slice(2, 4), slice(3, 6)) and shared.slices(right) == (slice(0, 2), slice(0, 3))
    assert left.overlap(Box((6, 0), (1, 6))) is None and Box((), ()).overlap(Box((), ())) == Box((), ())


def test_every_parameter_has_a_tensor_dim() -> None:
    dims = {name: tensor_dim(name, TENSOR_DIMS) for name, _ in reference().named_parameters()}
    assert dims["model.layers.0.self_attn.o_proj.weight"] == 1 and dims["model.norm.weight"] is None
    with pytest.raises(ModelError, match=r"no entry for the parameter 'model\.router\.weight'"):
        tensor_dim("model.router.weight", TENSOR_DIMS)
