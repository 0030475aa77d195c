"""A layout that is refused by the command line is told with the nearest ones that work, before any rank is started."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from athanor.cli.train import command, describe_machine, look_ahead
from athanor.foundation.errors import LayoutError
from athanor.foundation.layout import Layout, nearest
from athanor.foundation.recipe import load_recipe
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
