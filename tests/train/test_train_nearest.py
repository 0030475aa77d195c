"""A layout that is refused by the command line is told with the nearest ones that work, before any rank is started."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from athanor.cli.preflight import planned
from athanor.cli.train import command, describe_machine, look_ahead
from athanor.cluster.spec import SCHEMA, from_dict
from athanor.foundation.errors import LayoutError
from athanor.foundation.layout import Layout, nearest
from athanor.foundation.recipe import Recipe, load_recipe
from athanor.foundation.run_folder import RunFolder

MIXTURE = ("model.architecture=qwen3_moe", "model.num_experts=6", "model.num_experts_per_tok=2")


@pytest.mark.parametrize(("overrides", "refused", "first"), [
    (("parallel.tp=3", "cluster.devices=8"), "tp = 3 does not divide the 8 ranks", "dp_shard=4 tp=2"),  # two key heads: not tp=4
    (("parallel.tp=2", "parallel.dp_shard=3", "cluster.devices=8"), "= 6, but there are 8 ranks", "dp_shard=4 tp=2"),
    (("parallel.pp=4", "parallel.dp_shard=1"), "pp = 4 is more than the 2 blocks", "pp=2 dp_shard=2"),
    (("parallel.cp=64", "parallel.dp_shard=1"), "cp = 64 does not divide seq_len = 32", "dp_shard=2 cp=32"),
    ((*MIXTURE, "parallel.ep=4", "parallel.dp_shard=4"), "ep = 4 must divide both the 6 experts", "dp_shard=4 ep=2"),
    ((*MIXTURE, "parallel.tp=2", "parallel.dp_shard=1", "model.sizes.moe_intermediate_size=7"),
     "tp = 2 does not divide moe_intermediate_size = 7", "dp_shard=2"),
], ids=["devices", "degrees", "stages", "context", "experts", "width of experts"])
def test_what_is_refused_is_told_with_the_nearest_that_works(recipe_file: Path, run_folder: Path, overrides: tuple[str, ...],
                                                             refused: str, first: str) -> None:
    with pytest.raises(LayoutError) as caught:
        CliRunner().invoke(command, [str(recipe_file), "--stage", "pretrain", "--run", str(run_folder), *overrides],
                           catch_exceptions=False)
    told, _, works = str(caught.value).partition(" these layouts work: ")
    assert refused in told and "nearest" not in told and works.split("; ")[0] == first
    assert not (run_folder / "pretrain").exists(), "no rank was started"
    for layout in works.split("; "):
        degrees = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", layout)}
        given = [f"parallel.{key}={degrees.get(key, 1)}" for key in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")]
        recipe, run = load_recipe(recipe_file, [*overrides, *given]), RunFolder(run_folder)
        machine = describe_machine(recipe, run, "pretrain")
        assert machine["world_size"] == Layout(**degrees).world_size
        assert look_ahead(recipe, run, "pretrain", machine, True).layout == Layout(**degrees)


def test_the_nearest_come_first_and_none_is_left_out() -> None:
    assert nearest(Layout(tp=3, dp_shard=-1), 8)[0] == Layout(tp=4, dp_shard=2), "the rest may be anything"
    found = nearest(Layout(pp=2, tp=2, dp_shard=3), 12)
    assert found[0] == Layout(pp=2, tp=2, dp_shard=3) and len(found) == len(set(found)) == 15 * 5  # of 2 x 2, and of 3
    assert nearest(Layout(dp_shard=4, ep=4), 4)[0] == Layout(dp_shard=4, ep=4)
    assert len(nearest(Layout(), 1_000_000_007)) == 5, "a large prime takes no time"


def write_cluster(run_folder: Path, devices: int) -> None:
    facts = {"schema": SCHEMA, "accelerator": "cpu", "device_type": "cpu", "per_node": devices, "memory_bytes": 1e9,
             "threads_per_device": 1, "peak_flops": {"fp64": 1e9}, "memory_bytes_per_second": 1e9}
    from_dict({**facts, "devices": devices}, "cluster.toml").write(run_folder / "cluster.toml")


def test_degrees_beside_a_plan_share_out_the_devices_as_without_one(recipe_file: Path, run_folder: Path) -> None:
    write_cluster(run_folder, 2)

    def refused(*overrides: str) -> str:
        with pytest.raises(LayoutError) as caught:
            CliRunner().invoke(command, [str(recipe_file), "--stage", "pretrain", "--run", str(run_folder), *overrides],
                               catch_exceptions=False)
        return str(caught.value)

    def plan(degrees: str, *overrides: str) -> Recipe:
        (run_folder / "plan.toml").write_text(f"[parallel]\n{degrees}\n")
        return planned(load_recipe(recipe_file, list(overrides)), RunFolder(run_folder))

    four = ("parallel.tp=2", "parallel.pp=2")
    without = refused(*four)
    assert "pp x dp_replicate x cp x tp = 4 does not divide the 2 ranks" in without
    plan("pp = 1\ntp = 1\ndp_shard = 2")
    assert refused(*four) == without, "two ranks of the plan are not four for that"
    halved = plan("pp = 1\ntp = 1\ndp_shard = 2", "parallel.tp=2")
    machine = describe_machine(halved, RunFolder(run_folder), "pretrain")
    assert look_ahead(halved, RunFolder(run_folder), "pretrain", machine, True).layout == Layout(tp=2)
    assert plan("pp = 1\ntp = 2\ndp_shard = 1", "parallel.tp=2").parallel.dp_shard == 1, "it is the plan's own layout"
    plan("pp = 2\ntp = 1\ndp_shard = 1")
    assert "the 2 ranks (dp_shard = 1 makes 4 of them); pp = 2 from the plan; on 2 ranks" in refused("parallel.tp=2")


def test_more_ranks_than_devices_are_told(recipe_file: Path, run_folder: Path) -> None:
    write_cluster(run_folder, 1)
    arguments = [str(recipe_file), "--stage", "pretrain", "--run", str(run_folder), "stage.pretrain.steps=1"]
    result = CliRunner().invoke(command, [*arguments, "parallel.dp_shard=2"], catch_exceptions=False)
    assert result.exit_code == 0 and "2 ranks share 1 device(s) here" in result.stderr
