"""Tensor and context parallelism give the losses and gradients of one rank, in fp64; weights are the same for every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import models_ranks
import numpy as np
import pytest

from athanor.foundation.launch import run_ranks
from athanor.models.context import Packed
from athanor.models.initialize import initialize


def alone(is_tied: bool, weighted: bool, lengths: list[int] = models_ranks.LENGTHS, **changes: Any) -> tuple[Any, Any]:
    model = models_ranks.build(is_tied, **changes)
    models_ranks.initialize(model, 7)
    return model, models_ranks.results(model, replace(Packed.of(lengths), z_loss=models_ranks.Z_LOSS), weighted)


def ranks(target: str, arguments: dict[str, Any], count: int, tmp_path: Path) -> list[Any]:
    return run_ranks(f"models_ranks:{target}", arguments, count, log_folder=tmp_path, threads=1, timeout=120)


def close(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> bool:
    assert found.keys() == wanted.keys()
    return max(np.abs(found[name] - wanted[name]).max() for name in wanted) <= 1e-12


@pytest.mark.parametrize(("is_tied", "weighted"), [(False, True), (True, True), (False, False), (True, False)])
def test_tensor_parallel_ranks_compute_what_one_rank_does(is_tied: bool, weighted: bool, tmp_path: Path) -> None:
    model, wanted = alone(is_tied, weighted)
    logits = model(models_ranks.batch()["tokens"], Packed.of(models_ranks.LENGTHS)).detach().numpy()
    for found in ranks("tensor_parallel", {"is_tied": is_tied, "weighted": weighted}, 2, tmp_path):
        assert found["loss"] == pytest.approx(wanted["loss"], abs=1e-12)
        assert np.abs(found["logp"] - wanted["logp"]).max() <= 1e-12
        assert np.abs(found["logits"] - logits).max() <= 1e-12
        assert close(found["gradients"], wanted["gradients"])
        assert all((found["weights"][name] == p.detach().numpy()).all() for name, p in model.named_parameters())
        assert found["intervals"] == [("tensor", "tensor-0")]


@pytest.mark.parametrize(("count", "lengths", "kv_heads"), [
    (2, [5, 16, 1, 10], 2), (2, [5, 16, 1, 10], 1), (2, [32], 1), (2, [6, 10, 3, 13], 1),
    (3, [5, 16, 1, 11], 2), (3, [33], 4), (3, [4, 7, 11, 11], 2), (3, [2, 29, 2], 4)])
def test_context_parallel_ranks_compute_what_one_rank_does(count: int, lengths: list[int], kv_heads: int,
                                                           tmp_path: Path) -> None:
    _, wanted = alone(False, True, lengths, num_key_value_heads=kv_heads)
    arguments = {"lengths": lengths, "num_key_value_heads": kv_heads}
    for found in ranks("context_parallel", arguments, count, tmp_path):
        assert found["loss"] == pytest.approx(wanted["loss"], abs=1e-12)
        assert close(found["gradients"], wanted["gradients"])
        exchanges = 4 if kv_heads % count == 0 else 2  # heads go forth and back, keys and values go once; and backward
        assert found["intervals"] == ["context"] * 2 * exchanges  # of two blocks


@pytest.mark.parametrize(("count", "kv_heads"), [(2, 2), (2, 1)])
def test_windows_of_keys_reach_over_ranks(count: int, kv_heads: int, tmp_path: Path) -> None:
    """Whether heads are exchanged or keys gathered."""
    sizes: dict[str, Any] = {"num_key_value_heads": kv_heads, "use_sliding_window": True, "sliding_window": 6,
                             "max_window_layers": 1}
    lengths = [5, 16, 11]
    _, wanted = alone(False, True, lengths, architecture="qwen2", **sizes)
    for found in ranks("context_parallel", {"lengths": lengths, "architecture": "qwen2", **sizes}, count, tmp_path):
        assert found["loss"] == pytest.approx(wanted["loss"], abs=1e-12)
        assert close(found["gradients"], wanted["gradients"])


@pytest.mark.slow
@pytest.mark.parametrize(("count", "kv_heads"), [(2, 2), (3, 1)])
def test_compiled_blocks_exchange_the_same(count: int, kv_heads: int, tmp_path: Path) -> None:
    lengths = [5, 16, 1, 8]
    _, wanted = alone(False, True, lengths, num_key_value_heads=kv_heads)
    arguments = {"lengths": lengths, "num_key_value_heads": kv_heads, "is_compiled": True}
    for found in ranks("context_parallel", arguments, count, tmp_path):
        assert found["loss"] == pytest.approx(wanted["loss"], abs=1e-12)
        assert close(found["gradients"], wanted["gradients"])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "yuan", pytest.param("qwen2", marks=pytest.mark.slow),
                                          pytest.param("qwen3", marks=pytest.mark.slow)])
def test_weights_cut_both_ways_are_bitwise_the_same(tmp_path: Path, architecture: str) -> None:
    model = models_ranks.build(False, architecture)
    models_ranks.initialize(model, 7)
    arguments = {"folder": str(tmp_path / "model"), "architecture": architecture}
    for found in ranks("sharded_both_ways", arguments, 4, tmp_path):
        for name, parameter in model.named_parameters():
            assert (found["initial"][name] == parameter.detach().numpy()).all(), name
            assert (found["loaded"][name] == parameter.detach().numpy()).all(), name


def test_weights_depend_on_seed_and_name() -> None:
    first, again, other = (models_ranks.build(False) for _ in range(3))
    for model, seed in ((first, 7), (again, 7), (other, 8)):
        initialize(model, seed)
    layers = [dict(m.named_parameters()) for m in (first, again, other)]
    name = "model.layers.{}.self_attn.q_proj.weight"
    assert (layers[0][name.format(0)] == layers[1][name.format(0)]).all()
    assert (layers[0][name.format(0)] != layers[2][name.format(0)]).any()
    assert (layers[0][name.format(0)] != layers[0][name.format(1)]).any()
    assert layers[0]["model.embed_tokens.weight"].std().item() == pytest.approx(0.02, rel=0.05)
