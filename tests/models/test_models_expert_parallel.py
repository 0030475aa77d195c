"""Expert and tensor parallelism give the losses and gradients of one rank, in fp64, and every rank holds the part it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import experts_ranks
import models_ranks
import numpy as np
import pytest

from athanor.foundation.launch import run_ranks
from athanor.foundation.placement import Box
from athanor.models.context import Packed
from athanor.models.initialize import initialize

LENGTHS = [length for part in experts_ranks.PARTS for length in part]


def ranks(target: str, degrees: dict[str, int], tmp_path: Path, **arguments: Any) -> list[Any]:
    count = int(np.prod([size for axis, size in degrees.items() if axis != "ep" or "dp_shard" not in degrees]))
    return run_ranks(f"experts_ranks:{target}", {"degrees": degrees, **arguments}, count, log_folder=tmp_path, threads=1,
                     timeout=120)


@pytest.mark.parametrize(("degrees", "is_starved", "is_compiled"), [
    ({"ep": 2}, False, False), ({"ep": 2}, True, False), ({"tp": 2}, False, False), ({"ep": 2, "tp": 2}, False, False),
    pytest.param({"ep": 2, "tp": 2}, True, False, marks=pytest.mark.slow),
    pytest.param({"ep": 2}, True, True, marks=pytest.mark.slow)])
def test_ranks_compute_what_one_rank_does(degrees: dict[str, int], is_starved: bool, is_compiled: bool, tmp_path: Path) -> None:
    model = experts_ranks.build()
    initialize(model, 7)
    if is_starved:
        experts_ranks.starve(model)
    wanted = models_ranks.results(model, Packed.of(LENGTHS), True)
    idle = "model.layers.0.mlp.experts.up_proj.weight"
    assert all((part == 0).all() == (is_starved and number >= 4) for number, part in enumerate(wanted["gradients"][idle]))
    for found in ranks("train", degrees, tmp_path, is_starved=is_starved, is_compiled=is_compiled):
        assert found["loss"] == pytest.approx(wanted["loss"], abs=1e-11)
        assert found["gradients"].keys() == wanted["gradients"].keys()
        for name, gradient in wanted["gradients"].items():
            assert np.abs(found["gradients"][name] - gradient).max() <= 1e-11, name
        assert {name for name, _ in found["intervals"]} == {{"ep": "expert", "tp": "tensor"}[axis] for axis in degrees}
        assert set(found["is_one_graph"]) == {"ep" not in degrees}


@pytest.mark.parametrize("degrees", [
    {"dp_shard": 2, "ep": 2, "tp": 2}, {"dp_shard": 4, "ep": 2},
    pytest.param({"dp_shard": 4, "ep": 2, "tp": 2}, marks=pytest.mark.slow)], ids=str)
def test_boxes_are_what_a_rank_holds(degrees: dict[str, int], tmp_path: Path) -> None:
    model = experts_ranks.build()
    initialize(model, 7)
    found = ranks("look_at_shards", degrees, tmp_path, folder=str(tmp_path / "model"))
    for name, parameter in model.named_parameters():
        whole = parameter.detach().numpy()
        filled = np.zeros_like(whole)
        for rank in found:
            box, shard = rank["boxes"][name]
            place = box.slices(Box((0,) * parameter.ndim, tuple(parameter.shape)))
            assert (whole[place] == shard).all(), name
            assert (rank["whole"][name] == whole).all() and (rank["again"][name] == whole).all(), name
            filled[place] += 1
        assert (filled >= 1).all()
        assert ".experts." not in name or (filled == 1).all(), "no two ranks hold the same part of an expert"


def test_experts_that_cannot_be_shared_out_are_refused(tmp_path: Path) -> None:
    for said in ranks("refuse", {"ep": 2}, tmp_path, changes={"num_experts": 5}):
        assert said == "ep = 2 does not divide dim 0 of model.layers.0.mlp.experts.gate_proj.weight, which is 5"
