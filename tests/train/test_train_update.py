"""Updates, schedules and settings, and what cannot begin."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from athanor.foundation.errors import CheckpointError, DataError, LayoutError, ModelError, RecipeError, UserError
from athanor.foundation.layout import Layout
from athanor.foundation.recipe import Recipe, load_recipe
from athanor.foundation.run_folder import RunFolder, StageFolder, read_json, write_json
from athanor.models.initialize import initialize
from athanor.models.shapes.decoder import DecoderShape
from athanor.models.zoo.llama import build
from athanor.parallel.mesh import Mesh
from athanor.parallel.stages import Stages
from athanor.train import checkpoint
from athanor.train.muon import newton_schulz, share_out
from athanor.train.optimizer import Optimizer, is_decayed
from athanor.train.saver import Saver
from athanor.train.schedule import learning_rate
from athanor.train.settings import Settings, layout_of, settle
from athanor.train.stage import resolve

ALONE = Mesh(Layout(), torch.device("cpu"), 0, None)
SHAPE = DecoderShape(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
Train = Callable[..., dict[str, Any]]


def model_and_gradients(steps: int) -> tuple[Any, list[list[torch.Tensor]]]:
    model = build(SHAPE).double()
    initialize(model, 3)
    generator = torch.Generator().manual_seed(5)
    return model, [[torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in model.parameters()]
                   for _ in range(steps)]


def take_step(optimizer: Optimizer, rate: float) -> None:
    """A step by the gradients that the model's parameters have, unclipped."""
    optimizer.step(rate, optimizer.squared_norm(), torch.ones(()), math.inf)
    optimizer.clear()


def test_adamw_is_that_of_torch() -> None:
    ours, gradients = model_and_gradients(5)
    theirs, _ = model_and_gradients(0)
    optimizer = Optimizer(Stages.alone(ours), "adamw", 0.1)
    named = list(theirs.named_parameters())
    groups = [{"params": [p for n, p in named if is_decayed(n, p)], "weight_decay": 0.1},
              {"params": [p for n, p in named if not is_decayed(n, p)], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)
    for step, parts in enumerate(gradients):
        for a, b, part in zip(ours.parameters(), theirs.parameters(), parts, strict=True):
            a.grad, b.grad = part.clone(), part.clone()
        for group in reference.param_groups:
            group["lr"] = 0.01 * (step + 1)
        reference.step()
        take_step(optimizer, 0.01 * (step + 1))
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13, msg=name)
    assert {len(group["params"]) for group in groups} == {15, 6}  # matrices of two blocks and the head; norms and embedding


def test_muon_makes_matrices_orthogonal_and_leaves_the_rest_to_adamw() -> None:
    for rows, columns in ((24, 16), (16, 24), (16, 16)):
        values = torch.linalg.svdvals(newton_schulz(torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))))
        assert float(values[:-2].min()) > 0.4 and float(values.max()) < 1.3
    model, _ = model_and_gradients(0)
    optimizer = Optimizer(Stages.alone(model), "muon", 0.1)
    slots = {key.rpartition(".")[2] for key, _, _ in optimizer.state()}
    assert slots == {"momentum", "exp_avg", "exp_avg_sq"}
    assert {piece.name for piece in optimizer.adamw} >= {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"}
    assert share_out([4.0, 3.0, 3.0, 1.0], 2) == [[0, 3], [1, 2]]


def test_muon_looks_ahead_along_its_momentum() -> None:
    model, gradients = model_and_gradients(2)
    optimizer = Optimizer(Stages.alone(model), "muon", 0.1)
    name = "model.layers.0.mlp.up_proj.weight"
    index = [n for n, _ in model.named_parameters()].index(name)
    wanted, momentum = dict(model.named_parameters())[name].detach().clone(), torch.zeros(24, 16, dtype=torch.float64)
    for parts in gradients:
        for parameter, part in zip(model.parameters(), parts, strict=True):
            parameter.grad = part.clone()
        take_step(optimizer, 0.01)
        momentum = 0.95 * momentum + 0.05 * parts[index]
        update = newton_schulz(0.05 * parts[index] + 0.95 * momentum)
        wanted = wanted * (1 - 0.01 * 0.1) - 0.01 * 0.2 * 24**0.5 * update
    torch.testing.assert_close(dict(model.named_parameters())[name].detach(), wanted, rtol=0, atol=1e-10)


def test_the_norm_is_that_of_the_whole_gradient() -> None:
    model, (parts,) = model_and_gradients(1)
    optimizer = Optimizer(Stages.alone(model), "adamw", 0.0)
    for parameter, part in zip(model.parameters(), parts, strict=True):
        parameter.grad = part.clone()
    wanted = torch.nn.utils.get_total_norm(parts)
    assert float(optimizer.squared_norm()) ** 0.5 == pytest.approx(float(wanted), rel=1e-14)


def test_schedules_by_value() -> None:
    def rates(schedule: str) -> list[float]:
        return [learning_rate(step, 10, 1.0, 4, schedule) for step in range(1, 11)]

    rise = [0.25, 0.5, 0.75, 1.0]
    assert rates("constant") == [*rise, *[1.0] * 6]
    np.testing.assert_allclose(rates("linear"), [*rise, *[1 - k / 7 for k in range(1, 7)]])
    np.testing.assert_allclose(rates("wsd"), [*rise, 1, 1, 1, 1, 2 / 3, 1 / 3])
    cosine = rates("cosine")
    assert cosine[:4] == rise and cosine[-1] == pytest.approx(0.1) and cosine[6] == pytest.approx(0.55)
    assert learning_rate(1, 10, 1.0, 0, "linear") == pytest.approx(10 / 11)
    with pytest.raises(RecipeError, match=r"'cosin' is unknown; did you mean 'cosine'\?"):
        learning_rate(5, 10, 1.0, 0, "cosin")


def settings(recipe: Recipe, **changes: Any) -> Settings:
    stage = recipe.get_stage("pretrain").model_copy(update=changes)
    return settle(recipe, stage, Layout(dp_shard=2), SHAPE)


def test_what_is_open_is_filled_and_what_cannot_be_is_refused(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    free = settings(recipe, micro_batch_size=None, global_batch_tokens=None, warmup_steps=None, steps=400)
    assert free.optimizer == "muon"
    assert free.global_batch_tokens == 4096 and free.num_microbatches * free.micro_batch_size * 2 == free.rows_per_step
    assert free.warmup_steps == 20 and free.learning_rate_schedule == "linear" and free.data_shards == free.rows_per_step // 64
    assert settings(recipe, steps=None, tokens=5120.0).steps == 10
    with pytest.raises(UserError, match="has neither steps nor tokens"):
        settings(recipe, steps=None)
    with pytest.raises(LayoutError, match="data_shards = 3 must divide the 16 rows"):
        settings(recipe, data_shards=3)
    with pytest.raises(LayoutError, match="nearest global_batch_tokens"):
        settings(recipe, global_batch_tokens=32 * 12)
    with pytest.raises(ModelError, match="longer than the model's max_position_embeddings = 2048"):
        settings(recipe, seq_len=4096)
    with pytest.raises(LayoutError, match=r"num_microbatches = 4, but 16 rows a step on 2 data rank.s. are 2 micro-batches of 4"):
        settings(load_recipe(recipe_file, ["parallel.num_microbatches=4"]))
    with pytest.raises(LayoutError, match=r"num_microbatches = 3, but 16 rows a step on 2 data rank.s. are 2 micro-batches of 4"):
        settings(load_recipe(recipe_file, ["parallel.num_microbatches=3"]))
    assert settings(load_recipe(recipe_file, ["parallel.num_microbatches=2"])).micro_batch_size == 4
    open_ = recipe_file.with_name("open.toml")
    open_.write_text(recipe_file.read_text().replace("micro_batch_size = 4\n", ""))
    assert settings(load_recipe(open_, ["parallel.num_microbatches=8"])).micro_batch_size == 1
    assert layout_of(recipe) == Layout(dp_shard=-1)


def test_a_stage_that_cannot_begin_says_why(recipe_file: Path, run_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    run = RunFolder(run_folder)
    with pytest.raises(ModelError, match="starts from stage 'pretrain', which has no model yet"):
        resolve(run, load_recipe(recipe_file), "chat", 1)
    with pytest.raises(ModelError, match=r"start_from = 'nowhere' is neither a stage of the recipe \(pretrain, chat\)"):
        resolve(run, load_recipe(recipe_file, ["stage.chat.start_from=nowhere"]), "chat", 1)
    with pytest.raises(DataError, match="is not a data folder"):
        resolve(RunFolder(tmp_path / "empty"), load_recipe(recipe_file), "pretrain", 1)
    with pytest.raises(LayoutError, match="every-9', but of 2 blocks none would be; at most every-2"):
        resolve(run, load_recipe(recipe_file, ["parallel.recompute=every-9"]), "pretrain", 1)
    with pytest.raises(RecipeError, match=r"'parallel.recompute' is 'selektive': .*\(none, full, selective"):
        load_recipe(recipe_file, ["parallel.recompute=selektive"])
    with pytest.raises(LayoutError, match="pipeline_schedule '1F2B' is unknown"):
        resolve(run, load_recipe(recipe_file, ["parallel.pipeline_schedule=1F2B"]), "pretrain", 1)
    with pytest.raises(ModelError, match="num_experts is no size of the architecture 'llama'; it is one of deepseek_v3, mixtral"):
        resolve(run, load_recipe(recipe_file, ["model.num_experts=4"]), "pretrain", 1)
    with pytest.raises(LayoutError, match="pp = 3 is more than the 2 blocks of the model"):
        resolve(run, load_recipe(recipe_file, ["parallel.pp=3"]), "pretrain", 3)
    small = tmp_path / "small"
    small.mkdir()
    write_json(small / "config.json", SHAPE.to_config())
    with pytest.raises(ModelError, match=r"has 64 tokens in its vocabulary, the data's tokenizer \d+; build the data with"):
        resolve(run, load_recipe(recipe_file, [f"stage.chat.start_from={small}"]), "chat", 1)


def test_answers_are_learned_from_where_pretraining_ended(train: Train, run_folder: Path) -> None:
    train(run_folder)
    chat = train(run_folder, stage="chat")
    assert len(chat["loss"]) == 3 and chat["loss"][-1] < chat["loss"][0]
    folder = RunFolder(run_folder).stage("chat")
    names = {path.name for path in folder.model.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    samples = folder.samples.read_text()
    assert "Handle" in samples and '"step": 3' in samples


def test_a_checkpoint_of_another_model_or_a_newer_format_is_refused(tmp_path: Path) -> None:
    model, _ = model_and_gradients(0)
    meta = checkpoint.Meta(1, 8, 64, 1, 0, 1, {}, {}, {})
    Saver(StageFolder(tmp_path), Stages.alone(model), Optimizer(Stages.alone(model), "adamw", 0.1), is_async=False).save(meta)
    (path,) = checkpoint.list_checkpoints(tmp_path / "checkpoints")
    wider = build(DecoderShape(vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2))
    before = [p.detach().clone() for p in wider.parameters()]
    with pytest.raises(CheckpointError, match=r"checkpoint of another model: .*model.layers.1.* is not in the model") as caught:
        checkpoint.load(path, Stages.alone(wider), Optimizer(Stages.alone(wider), "adamw", 0.1))
    assert "more" in str(caught.value)
    assert all(a.equal(b) or a.isnan().any() for a, b in zip(before, wider.parameters(), strict=True))
    write_json(path / "meta.json", {**read_json(path / "meta.json"), "format": 2})
    with pytest.raises(CheckpointError, match="has format 2, this version reads up to 1"):
        checkpoint.load(path, Stages.alone(model), Optimizer(Stages.alone(model), "adamw", 0.1))
    assert checkpoint.find_damage(path) == "meta.json does not have the content that was written"


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    model, _ = model_and_gradients(0)
    optimizer = Optimizer(Stages.alone(model), "muon", 0.1)
    folder = StageFolder(tmp_path)
    saver = Saver(folder, Stages.alone(model), optimizer)
    for step in (2, 4, 6, 8):
        saver.save(checkpoint.Meta(step, 0, 0, step, 0, 1, {}, {}, {}))
    saver.finish()
    (folder.checkpoints / ".step-00000010.building-0").mkdir()
    found = checkpoint.find_intact(folder.checkpoints, lambda path, reason: None)
    assert found is not None and found.name == "step-00000008"
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["step-00000006", "step-00000008"]
    assert checkpoint.load(found, Stages.alone(model), optimizer).step == 8 and optimizer.updates == 8
