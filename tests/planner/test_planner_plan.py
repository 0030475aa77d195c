from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from athanor.cluster.spec import ClusterSpec
from athanor.foundation.errors import LayoutError, ModelError, UserError
from athanor.foundation.layout import check_batch
from athanor.foundation.recipe import Recipe
from athanor.foundation.units import PD_FLOP
from athanor.laws import scaling
from athanor.models.shapes.decoder import DecoderShape
from athanor.models.shapes.find import new_shape
from athanor.planner.plan import Plan, make_plan
from athanor.planner.stage import budget_shares, vocabulary_for

SCAN = {"bytes": 10_000_000, "documents": 500}
Toy = Callable[..., Recipe]


def stage_of(plan: Plan, name: str) -> dict[str, object]:
    return next(stage for stage in plan.values["stage"] if stage["name"] == name)


def test_plan_fills_every_open_value_and_the_recipe_wins(machine: ClusterSpec, toy: Toy) -> None:
    recipe = toy("model.head_dim=64", "stage.pretrain.weight_decay=0.05")
    plan = make_plan(recipe, machine, SCAN)
    parsed = tomllib.loads(plan.to_toml())
    filled = recipe.with_plan(parsed)
    assert filled.model.hidden_size == parsed["model"]["hidden_size"]
    assert filled.origin("model.hidden_size") == "plan"
    assert filled.model.head_dim == 64 and filled.origin("model.head_dim") == "override"
    assert filled.get_stage("pretrain").weight_decay == 0.05
    left_open = {"share", "tokens", "data_shards", "start_from", "batch_ramp", "z_loss", "expert_bias_rate", "mtp_weight",
                 "evaluate_rows", "hang_seconds", "keep_every"}
    for stage in filled.stage:
        assert not {key for key, value in stage if value is None} - left_open
    assert {key for key, value in filled.model if value is None} == {"num_experts", "num_experts_per_tok"}, "a dense model"
    assert set(parsed["forecast"]) == {"pretrain", "chat", "chain"} and parsed["reason"]["model"]
    assert parsed["scan"]["bytes"] == 10_000_000
    assert make_plan(filled, machine, SCAN).values["model"] == plan.values["model"], "a plan, fed back, is kept"


def test_batches_of_a_plan_are_legal(machine: ClusterSpec, toy: Toy) -> None:
    for overrides in ([], ["parallel.tp=2"], ["stage.pretrain.micro_batch_size=3"], ["cluster.devices=1"]):
        plan = make_plan(toy(*overrides), machine, SCAN)
        parallel = plan.values["parallel"]
        for stage in plan.values["stage"]:
            rows, count = check_batch(
                global_batch_tokens=stage["global_batch_tokens"], seq_len=stage["seq_len"],
                micro_batch_size=stage["micro_batch_size"], data_ranks=parallel["dp_shard"] * parallel["dp_replicate"],
                tp=parallel["tp"])
            assert rows >= count >= 1


def test_minutes_buy_so_many_steps(machine: ClusterSpec, toy: Toy) -> None:
    plan = make_plan(toy(), machine, SCAN)
    seconds = sum(stage_of(plan, name)["steps"] * step.seconds for name, step in plan.steps.items())  # type: ignore[operator]
    assert 0.97 * 240 <= seconds <= 240
    longer = make_plan(toy("budget.minutes=40"), machine, SCAN)
    assert longer.books["pretrain"].tokens > plan.books["pretrain"].tokens


def test_unused_part_of_a_small_stage_goes_to_the_main_one(machine: ClusterSpec, toy: Toy) -> None:
    small = make_plan(toy(), machine, {"bytes": 300_000, "documents": 20})
    chat, pretrain = small.steps["chat"].seconds, small.steps["pretrain"].seconds
    assert stage_of(small, "chat")["steps"] * chat < 0.14 * 240  # type: ignore[operator]
    assert stage_of(small, "pretrain")["steps"] * pretrain > 0.86 * 240  # type: ignore[operator]
    assert "3 epochs" in small.reasons["stage.chat.steps"]


def test_other_budgets(machine: ClusterSpec, toy: Toy) -> None:
    tokens = make_plan(toy(budget="tokens = 4e6"), machine, SCAN)
    assert tokens.books["pretrain"].tokens == pytest.approx(0.85 * 4e6, rel=0.02)
    pd = make_plan(toy(budget="pd = 2e-7"), machine, SCAN)
    assert pd.books["pretrain"].model_flops == pytest.approx(0.85 * 2e-7 * PD_FLOP, rel=0.05)
    money = toy("cluster.price_per_device_hour=7.5", budget="money = 1.0")
    assert make_plan(money, machine, SCAN).values == make_plan(toy(), machine, SCAN).values
    with pytest.raises(UserError, match="there is no budget"):
        make_plan(toy(budget=""), machine, SCAN)
    fixed = make_plan(toy("stage.pretrain.steps=20", "stage.chat.steps=5", budget=""), machine, SCAN)
    assert [stage["steps"] for stage in fixed.values["stage"]] == [20, 5]


def test_budget_that_trains_nothing_names_one_that_does(machine: ClusterSpec, toy: Toy) -> None:
    with pytest.raises(UserError, match="the smallest that trains anything is 10 steps") as error:
        make_plan(toy("budget.minutes=0.001"), machine, SCAN)
    found = re.search(r"([\d.e-]+) minutes for this stage", str(error.value))
    assert found
    share = 0.15 if "stage.chat" in str(error.value) else 0.85
    plan = make_plan(toy(f"budget.minutes={1.5 * float(found.group(1)) / share}"), machine, SCAN)
    assert all(stage["steps"] >= 10 for stage in plan.values["stage"])


def test_fixed_sizes_and_degrees_are_kept(machine: ClusterSpec, toy: Toy) -> None:
    plan = make_plan(toy("model.hidden_size=96", "model.num_hidden_layers=5", "model.num_attention_heads=6", "parallel.tp=2",
                         "stage.pretrain.global_batch_tokens=8192"), machine, SCAN)
    model = plan.values["model"]
    assert (model["hidden_size"], model["num_hidden_layers"], model["num_attention_heads"], model["head_dim"]) == (96, 5, 6, 16)
    assert plan.values["parallel"]["tp"] == 2 and plan.values["parallel"]["dp_shard"] == 1
    assert stage_of(plan, "pretrain")["global_batch_tokens"] == 8192
    assert plan.reasons["model"].startswith("its sizes are given") and not plan.runner_ups
    assert plan.reasons["parallel"] == "tp=2 is given by the recipe"
    assert plan.reasons["stage.pretrain.micro_batch_size"].startswith("the fastest of what fits memory")
    assert "as measured" in plan.reasons["stage.pretrain.checkpoint_every"] and "down" not in plan.books["pretrain"].accounts


def without(machine: ClusterSpec, name: str) -> dict[str, list[list[Any]]]:
    return {key: rows for key, rows in machine.collectives.items() if key != name}


@pytest.mark.parametrize("axis", ["pp", "cp", "tp", "dp_replicate"])
def test_every_axis_is_forecast(machine: ClusterSpec, toy: Toy, axis: str) -> None:
    plan = make_plan(toy(f"parallel.{axis}=2"), machine, SCAN)
    account = {"pp": "pipeline", "cp": "context", "tp": "tensor", "dp_replicate": "data_parallel"}[axis]
    assert plan.values["parallel"][axis] == 2 and plan.forecast.accounts[account] > 0
    assert ("bubble" in plan.forecast.accounts) == (axis == "pp")
    assert {book.layout for book in (*plan.books.values(), plan.forecast)} == {f"{axis}=2"}
    for stage in plan.values["stage"]:
        rows = stage["global_batch_tokens"] // stage["seq_len"]
        data_ranks = 2 if axis == "dp_replicate" else 1
        assert rows // data_ranks // stage["micro_batch_size"] >= plan.values["parallel"]["pp"], "1F1B needs as many"


def test_pipelines_are_not_proposed_where_sending_was_not_measured(machine: ClusterSpec, toy: Toy) -> None:
    plan = make_plan(toy(), replace(machine, collectives=without(machine, "send")), SCAN)
    assert plan.values["parallel"]["pp"] == 1


def test_text_that_is_read_too_often_is_told(toy: Any, machine: ClusterSpec) -> None:
    few, many = (make_plan(toy(f"stage.pretrain.steps={steps}"), machine, SCAN).notes for steps in (20, 3_000_000))
    assert not any("teaches little more" in note for note in few)
    assert any("teaches little more" in note for note in many) and "e+" not in many[0]


def test_shapes_are_those_of_the_architecture(machine: ClusterSpec, toy: Toy) -> None:
    plain = make_plan(toy("model.architecture=gpt2", "model.hidden_size=96"), machine, SCAN).values["model"]
    assert plain["intermediate_size"] == 4 * 96 and plain["num_attention_heads"] * plain["head_dim"] == 96
    sizes = ["model.architecture=mixtral", "model.num_experts=4", "model.hidden_size=64", "model.num_hidden_layers=2"]
    mixture = make_plan(toy(*sizes), machine, SCAN).values["model"]
    assert mixture["num_experts"] == 4 and mixture["num_experts_per_tok"] == 2 and mixture["rope_theta"] == 1e6
    with pytest.raises(ModelError, match=r"num_experts is no size of the architecture 'gpt2'; it is one of deepseek_v3, mixtral"):
        make_plan(toy("model.architecture=gpt2", "model.num_experts=4"), machine, SCAN)


@pytest.mark.parametrize(("architecture", "sizes", "without"), [
    ("yuan", [], {"num_experts", "num_experts_per_tok"}), ("yuan", ["num_experts=4"], set()), ("gemma", [], {"num_experts"}),
    ("deepseek_v3", ["num_experts=4", "num_experts_per_tok=2", "sizes.kv_lora_rank=10", "sizes.qk_nope_head_dim=6",
                     "sizes.qk_rope_head_dim=4", "sizes.v_head_dim=8"], set())])
def test_a_plan_describes_the_model_that_it_is_for(machine: ClusterSpec, toy: Toy, architecture: str, sizes: list[str],
                                                   without: set[str]) -> None:
    recipe = toy(f"model.architecture={architecture}", *(f"model.{size}" for size in sizes))
    plan = make_plan(recipe, machine, SCAN)
    model = recipe.with_plan(tomllib.loads(plan.to_toml())).model
    assert not without & model.given().keys()
    made = new_shape(architecture, vocab_size=plan.values["data"]["vocab_size"], **model.given())
    assert made.head_dim == (10 if architecture == "deepseek_v3" else plan.values["model"]["head_dim"])


def test_what_cannot_be_laid_out_is_refused(machine: ClusterSpec, toy: Toy) -> None:
    with pytest.raises(UserError, match=r"send was not measured .* run `athanor check` again"):
        make_plan(toy("parallel.pp=2"), replace(machine, collectives=without(machine, "send")), SCAN)
    with pytest.raises(LayoutError, match=r"ep = 2, but the model has no experts"):
        make_plan(toy("parallel.ep=2"), machine, SCAN)
    with pytest.raises(LayoutError, match="tp = 3 cannot be laid out on 2 devices"):
        make_plan(toy("parallel.tp=3"), machine, SCAN)
    with pytest.raises(LayoutError, match="num_attention_heads"):
        make_plan(toy("parallel.tp=2", "model.hidden_size=96", "model.num_attention_heads=3"), machine, SCAN)
    with pytest.raises(UserError, match=r"no shape fits.* with micro_batch_size = 1, of the 100 kB of a device"):
        make_plan(toy(), replace(machine, memory_bytes=1e5), SCAN)
    with pytest.raises(UserError, match=r"smallest possible needs [\d.]+ [TP]B with micro_batch_size = 1000000, of the "):
        make_plan(toy("stage.pretrain.micro_batch_size=1000000"), machine, SCAN)
    with pytest.raises(UserError, match="2 were measured"):
        make_plan(toy("cluster.devices=4"), machine, SCAN)


def test_the_best_predicted_loss_is_chosen_and_the_next_are_shown(machine: ClusterSpec, toy: Toy) -> None:
    plan = make_plan(toy(), machine, SCAN)
    losses = [row["predicted_loss"] for row in plan.runner_ups]
    assert len(losses) == 5 and losses == sorted(losses)
    model, others = plan.values["model"], {(row["hidden_size"], row["num_hidden_layers"]) for row in plan.runner_ups}
    assert (model["hidden_size"], model["num_hidden_layers"]) not in others
    large = make_plan(toy("budget.minutes=4000"), machine, {"bytes": 10**10, "documents": 10**6})
    assert large.values["model"]["hidden_size"] > model["hidden_size"], "a larger budget buys a larger model"


def test_whole_forecast_adds_stages_and_steps_of_the_chain(machine: ClusterSpec, toy: Toy) -> None:
    plan = make_plan(toy(), machine, SCAN)
    stages = sum(book.wall_seconds for book in plan.books.values())
    assert plan.forecast.wall_seconds == pytest.approx(stages + sum(plan.chain.values()))
    assert plan.forecast.accounts["unattributed"] == pytest.approx(0.0, abs=1e-6)
    assert plan.forecast.accounts["data"] == pytest.approx(2 * plan.chain["data"])
    assert set(plan.chain) == {"check", "plan", "data", "evaluate", "registry", "serve", "report"} and plan.chain["check"] > 0
    before = make_plan(toy(), machine, SCAN, measures=False)
    assert before.forecast.accounts["check"] == pytest.approx(plan.forecast.accounts["check"] - 2 * plan.chain["check"])
    assert before.forecast.accounts["unattributed"] == pytest.approx(0.0, abs=1e-6)


def test_shares_of_the_budget(toy: Toy) -> None:
    stages = toy().stage
    assert budget_shares(stages) == pytest.approx({"pretrain": 0.85, "chat": 0.15})
    assert budget_shares(stages[:1]) == {"pretrain": 1.0} and budget_shares(stages[1:]) == {"chat": 1.0}
    assert budget_shares(toy("stage.chat.share=0.4").stage) == pytest.approx({"pretrain": 0.6, "chat": 0.4})
    with pytest.raises(UserError, match="leaves nothing for pretrain"):
        budget_shares(toy("stage.chat.share=1.0").stage)


def test_law_of_loss() -> None:
    assert scaling.effective_tokens(5.0, 10.0) == 5.0
    assert 10.0 < scaling.effective_tokens(20.0, 10.0) < 20.0
    assert scaling.effective_tokens(1e9, 10.0) < 10.0 * 17
    small, large = scaling.law_for(1e13), scaling.law_for(1e22)
    assert (small.name, large.name) == ("small", "refit")
    for law in (small, large):
        assert law.loss(1e6, 1e7, 1e9, 4096) < law.loss(1e5, 1e7, 1e9, 4096)
        assert law.loss(1e6, 1e7, 1e9, 4096) < law.loss(1e6, 1e6, 1e9, 4096)
        assert law.loss(1e6, 1e7, 1e9, 4096) < law.loss(1e6, 1e7, 1e9, 65536)
        assert law.loss(1e6, 1e7, 1e9, 4096) < law.loss(1e6, 1e7, 1e6, 4096)
    measured = {(188_928, 0.8e6, 2048): 4.66, (188_928, 3.84e6, 2048): 3.61, (803_968, 0.82e6, 4096): 4.57,
                (803_968, 3.28e6, 4096): 3.63}  # (parameters, tokens, batch): nats of validation, of 2.2 M tokens
    for (parameters, tokens, batch), nats in measured.items():
        assert small.loss(parameters, tokens, 2.2e6, batch) == pytest.approx(nats, rel=0.03)
    for kind in ("adamw", "muon"):
        assert math.isclose(scaling.learning_rate(512, kind, True) * 2, scaling.learning_rate(128, kind, True), rel_tol=0.05)
        assert scaling.learning_rate(512, kind, False) < scaling.learning_rate(512, kind, True)
    assert vocabulary_for(1e7) == 4096 and vocabulary_for(4e7) == 8192 and vocabulary_for(1) == 512


def test_rows_that_are_left_open_fit_the_model(machine: ClusterSpec, toy: Toy) -> None:
    plan = make_plan(toy("stage.pretrain.seq_len=128", "model.hidden_size=128", "model.num_hidden_layers=2"), machine, SCAN)
    assert [stage["seq_len"] for stage in plan.values["stage"]] == [128, 128]
    assert plan.values["model"]["max_position_embeddings"] == 128


def test_verb_plan_writes_plan_and_books(machine: ClusterSpec, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from athanor.cli.plan import command
    from athanor.ledger.book import read_book

    monkeypatch.setenv("ATHANOR_RUNS", str(tmp_path / "runs"))
    toy()
    (tmp_path / "text" / "a.txt").write_text("words " * 100_000)
    machine.write(tmp_path / "cluster.toml")
    arguments = [str(tmp_path / "toy.toml"), f"data.source.words.path={tmp_path / 'text'}",
                 "--cluster", str(tmp_path / "cluster.toml")]
    result = CliRunner().invoke(command, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    run = tmp_path / "runs" / "toy"
    assert tomllib.loads((run / "plan.toml").read_text())["model"] == printed["model"]
    assert read_book(run / "forecast.json").wall_seconds == pytest.approx(printed["wall_seconds"])
    assert read_book(run / "pretrain" / "forecast.json").tokens > 0
    assert printed["scan"]["bytes"] == 600_000 and printed["runner_ups"]
    assert CliRunner().invoke(command, arguments).exit_code == 0, "the table for people"


def test_a_model_to_start_from_fixes_the_shape(machine: ClusterSpec, toy: Toy, tmp_path: Path) -> None:
    shape = DecoderShape(vocab_size=1024, hidden_size=80, intermediate_size=224, num_hidden_layers=3, num_attention_heads=5,
                         tie_word_embeddings=True)
    (tmp_path / "config.json").write_text(json.dumps(shape.to_config()))
    plan = make_plan(toy(f"stage.pretrain.start_from={tmp_path}"), machine, SCAN)
    assert plan.values["model"]["hidden_size"] == 80 and plan.values["model"]["num_hidden_layers"] == 3
    with pytest.raises(UserError, match="does not exist"):
        make_plan(toy("stage.pretrain.start_from=/no/such/model"), machine, SCAN)
