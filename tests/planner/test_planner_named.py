"""Plans for accelerators that are not here: by datasheet, said so, and refused where something is missing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from athanor.cli.main import program
from athanor.cluster.spec import read_cluster
from athanor.foundation.errors import AthanorError, LayoutError, UserError
from athanor.foundation.recipe import Recipe, load_recipe
from athanor.laws.goodput import faults_per_second, typical_saving
from athanor.models.shapes.find import find_shape
from athanor.planner.estimate import estimate, read_cluster_words
from athanor.planner.named import named_cluster
from athanor.planner.plan import make_plan

LLAMA = Path(__file__).parents[2] / "recipes" / "llama3-8b.toml"
LONG = {"bytes": 10**15, "documents": 1}  # no row sees the end of a document


def test_a_plan_by_datasheet_forecasts_what_estimate_says_of_its_layout() -> None:
    recipe = load_recipe(LLAMA, ["cluster.devices=256", "parallel.dp_replicate=1", "parallel.dp_shard=-1",
                                 "stage.pretrain.global_batch_tokens=4194304"])
    plan = make_plan(recipe, named_cluster(recipe.cluster), LONG)
    words = "dp_shard=256 micro_batch_size=1 seq_len=8192 global_batch_tokens=4194304 zero=3 program=fsdp"
    alone = estimate(find_shape("llama-3-8b"), "H100-80 devices=256 per_node=8 nic_gbps=400", words)
    assert plan.values["stage"][0]["micro_batch_size"] == 1
    assert plan.steps["pretrain"].seconds == pytest.approx(alone["step_seconds"], rel=1e-3)
    said = next(note for note in plan.notes if "datasheet's of H100-80" in note)
    assert said in plan.forecast.notes


def test_the_command_plans_and_says_what_it_rests_on(toy: Callable[..., Recipe], tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    toy()
    (tmp_path / "text.md").write_text("words and words " * 5000)
    monkeypatch.chdir(tmp_path)
    arguments = ["plan", "toy.toml", "cluster.accelerator=H100-80", "cluster.devices=8", "model.hidden_size=1024",
                 "model.num_hidden_layers=16", "data.source.words.path=."]
    found = json.loads(CliRunner().invoke(program, [*arguments, "--json"], catch_exceptions=False).stdout)
    assert "nothing was measured" in found["notes"][-1] and found["chain_seconds"]["check"] == 0
    assert found["stage"][0]["precision"] == "bf16" and not (tmp_path / "runs" / "toy" / "cluster.toml").exists()
    assert "nothing was measured" in json.loads((tmp_path / "runs" / "toy" / "forecast.json").read_text())["notes"][0]


@pytest.mark.parametrize(("overrides", "words"), [
    (["cluster.accelerator=H100-8"], "did you mean 'H100-80'"), ([], "on how many H100-80"),
    (["cluster.devices=8", "cluster.nic_gbps=3200"], "of one device: nic_gbps=400"),
    (["cluster.devices=8", "stage.pretrain.precision=fp64"], "H100-80 is known to compute in bf16, fp16, fp32, fp8, not in fp64"),
    (["cluster.accelerator=V100-32", "cluster.devices=8"], "V100-32 is known to compute in fp16, fp32, not in bf16"),
    (["cluster.devices=8", "parallel.tp=3"], "tp = 3")])
def test_what_is_missing_or_wrong_is_said(toy: Callable[..., Recipe], overrides: list[str], words: str) -> None:
    recipe = toy(*(overrides if "accelerator" in "".join(overrides) else ["cluster.accelerator=H100-80", *overrides]))
    with pytest.raises(AthanorError, match=words):
        make_plan(recipe, named_cluster(recipe.cluster), LONG)


def test_bandwidth_is_of_one_device_everywhere(tmp_path: Path) -> None:
    recipe = load_recipe(LLAMA, [])
    spec = named_cluster(recipe.cluster)
    assert spec.network_bytes_per_second == 400e9 / 8
    spec.write(tmp_path / "cluster.toml")
    assert read_cluster(tmp_path / "cluster.toml") == spec
    facts = read_cluster_words(str(tmp_path / "cluster.toml")).facts
    assert facts["nic_gbps"] == read_cluster_words("H100-80 nic_gbps=400").facts["nic_gbps"] == recipe.cluster.nic_gbps == 400
    for text in ("H100-80 nic_gbps=3200", "H100-80 per_node=4 nic_gbps=1600"):
        with pytest.raises(UserError, match="of one device: nic_gbps=400"):
            read_cluster_words(text)


def test_a_chain_is_not_run_for_a_machine_that_is_not_here(toy: Callable[..., Recipe], tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    toy()
    (tmp_path / "text.md").write_text("words " * 5000)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is another machine"):
        CliRunner().invoke(program, ["run", "toy.toml", "cluster.accelerator=H100-80", "cluster.devices=8"],
                           catch_exceptions=False)


def test_a_budget_in_days_buys_what_faults_leave() -> None:
    for devices in (64, 2048):
        waiting, beside = (_bought(devices, save_async) for save_async in (False, True))
        assert beside["every"] < 0.7 * waiting["every"] and beside["steps"] > waiting["steps"], "cheaper saves come more often"
        one = waiting["checkpoint"] / (math.ceil(waiting["steps"] / waiting["every"]) + 1)  # the model's folder takes as long
        saving = typical_saving(one, True)
        assert waiting["why"].startswith("a save takes") and beside["why"].startswith("a save blocks")
        for found, written, slowed in ((waiting, 0.0, 0.0), (beside, saving.write_seconds, saving.slowed)):
            interval, beside_writes = found["every"] * found["seconds"], slowed * written / (found["every"] * found["seconds"])
            lost = faults_per_second(devices) * (interval / 2 + written + 900)  # half an interval, the write, a restart
            first_order = 1 - lost - found["checkpoint"] / (20 * 86400) - beside_writes
            assert 0.95 < first_order < 0.99
            assert found["steps"] * found["seconds"] / (20 * 86400) == pytest.approx(first_order, abs=2e-3)
            assert found["wall"] == pytest.approx(20 * 86400, rel=2e-3)


def _bought(devices: int, save_async: bool) -> dict[str, Any]:
    """What a plan for 20 days says of its only stage."""
    recipe = load_recipe(LLAMA, [f"cluster.devices={devices}", "parallel.dp_replicate=1", "parallel.dp_shard=-1",
                                 "budget.days=20", f"stage.pretrain.save_async={str(save_async).lower()}"])
    recipe.stage[0].tokens = None
    plan = make_plan(recipe, named_cluster(recipe.cluster), LONG)
    assert "faults a day are expected" in plan.notes[-1]
    stage, seconds, book = plan.values["stage"][0], plan.steps["pretrain"].seconds, plan.books["pretrain"]
    around = sum(book.accounts[name] for name in ("checkpoint", "lost", "down", "startup"))
    kernel = book.accounts["kernel"] - stage["steps"] * plan.steps["pretrain"].accounts["kernel"]
    assert kernel > 0 if save_async else kernel == pytest.approx(0, abs=1e-6 * book.device_seconds)
    return {"steps": stage["steps"], "seconds": seconds, "every": stage["checkpoint_every"],
            "checkpoint": book.accounts["checkpoint"] / devices, "why": plan.reasons["stage.pretrain.checkpoint_every"],
            "wall": stage["steps"] * seconds + (around + kernel) / devices}


def test_layouts_that_cannot_share_the_batch_are_passed_over() -> None:
    words = ["cluster.devices=256", "parallel.dp_replicate=1", "parallel.dp_shard=-1",
             "stage.pretrain.global_batch_tokens=1048576"]
    recipe = load_recipe(LLAMA, words)
    plan = make_plan(recipe, named_cluster(recipe.cluster), LONG)
    parallel, stage = plan.values["parallel"], plan.values["stage"][0]
    assert 128 % parallel["dp_shard"] == 0 and parallel["tp"] * parallel["pp"] > 1, "128 rows of 8,192 tokens"
    assert stage["global_batch_tokens"] == 1048576
    recipe = load_recipe(LLAMA, [*words, "parallel.tp=1", "parallel.pp=1"])
    with pytest.raises(LayoutError, match="128 rows per step do not split into micro-batches of 1 on 256 ranks"):
        make_plan(recipe, named_cluster(recipe.cluster), LONG)


def test_what_the_recipe_gives_is_not_explained_as_chosen() -> None:
    recipe = load_recipe(LLAMA, ["cluster.devices=64", "parallel.dp_replicate=1", "parallel.dp_shard=-1", "parallel.tp=8",
                                 "stage.pretrain.micro_batch_size=2", "stage.pretrain.checkpoint_every=70"])
    plan = make_plan(recipe, named_cluster(recipe.cluster), LONG)
    why = {key.removeprefix("stage.pretrain."): text for key, text in plan.reasons.items()}
    assert "fastest layout of 64 devices with dp_replicate=1 tp=8, as the recipe says," in why["parallel"]
    assert why["micro_batch_size"].startswith("given by the recipe; ")
    assert why["checkpoint_every"].endswith("is given by the recipe")
    times = 16777216 / (6 * math.sqrt(plan.books["pretrain"].tokens))  # laws.toml: 6 sqrt(tokens) is critical
    assert why["global_batch_tokens"].startswith(f"given by the recipe: {times:.2g} times the critical batch of ")


@pytest.mark.parametrize("budget", ["tokens = 100e9", "pd = 200"])
def test_faults_are_in_forecasts_of_every_budget(budget: str) -> None:
    """First order: each fault waits for new processes once, and undoes half an interval, the write and the save on average."""
    key, _, amount = budget.partition(" = ")
    recipe = load_recipe(LLAMA, ["cluster.devices=2048", f"budget.{key}={amount}"])
    recipe.stage[0].tokens = None
    plan = make_plan(recipe, named_cluster(recipe.cluster), LONG)
    book, stage = plan.books["pretrain"], plan.values["stage"][0]
    rate, step = faults_per_second(2048), plan.steps["pretrain"].seconds
    faults, interval = rate * stage["steps"] * step, stage["checkpoint_every"] * step
    assert 300 * faults < book.accounts["down"] / 2048 < 300 * rate * book.wall_seconds
    assert 0.8 < book.accounts["lost"] / 2048 / (faults * interval / 2) < 1.6
    assert "faults a day are expected on 2,048 devices" in plan.notes[-1]
    assert sum(book.accounts.values()) == pytest.approx(book.device_seconds)


def test_what_a_save_rests_on_is_said_and_can_be_set() -> None:
    words, saved = ["cluster.devices=256", "parallel.dp_replicate=1", "parallel.dp_shard=256"], []
    for more, rate in (([], "150 MB/s"), (["cluster.write_bytes_per_second=3e9"], "3 GB/s")):
        recipe = load_recipe(LLAMA, [*words, *more])
        plan = make_plan(recipe, named_cluster(recipe.cluster), LONG)
        assert f"at {rate} a device (cluster.write_bytes_per_second" in plan.reasons["stage.pretrain.checkpoint_every"]
        saved.append(plan.values["stage"][0]["checkpoint_every"])
    assert saved[1] < saved[0], "cheaper saves come more often"
