"""A batch of a fixed number of virtual data shards: other numbers of ranks go on, and in exact mode with the same bits."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from test_train_architectures import DEEPSEEK

from athanor.cli.train import command as verb
from athanor.foundation.errors import LayoutError, RankError, UserError
from athanor.foundation.launch import run_ranks
from athanor.foundation.layout import Layout
from athanor.foundation.recipe import load_recipe
from athanor.foundation.run_folder import RunFolder, hash_file, hash_folder, read_json, read_jsonl
from athanor.parallel.exact import Shards, Tree, fold
from athanor.parallel.stages import Stages
from athanor.train.elastic import world_sizes
from athanor.train.optimizer import Optimizer
from athanor.train.settings import layout_of
from athanor.train.stage import claim_folder, resolve

Train = Callable[..., dict[str, Any]]
STAGE = "stage.pretrain."
STEPS, CLIP = 8, 0.3
SMALL = ("model.hidden_size=40", "model.intermediate_size=52", f"{STAGE}precision=fp32", f"{STAGE}steps={STEPS}",
         f"{STAGE}checkpoint_every=2", f"{STAGE}evaluate_every={STEPS}", f"{STAGE}gradient_clip={CLIP}",
         f"{STAGE}micro_batch_size=2", f"{STAGE}data_shards=4")
EXACT = f"{STAGE}reduction=exact"


def on(ranks: int) -> str:
    return f"parallel.dp_shard={ranks}"


def disturbed(train: Train, run: Path, *overrides: str) -> dict[str, Any]:
    """Four ranks are killed in their third step, then two in the fifth, then one in the seventh; four do the rest."""
    for ranks, step in ((4, 3), (2, 5), (1, 7)):
        with pytest.raises(RankError, match=f"rank {ranks - 1} was killed by signal 9"):
            train(run, *SMALL, *overrides, on(ranks), target="train_ranks:train_and_signal", at_step=step,
                  number=signal.SIGKILL, rank=ranks - 1, is_saved=True)
    return train(run, *SMALL, *overrides, on(4))


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("calm")


@pytest.fixture
def undisturbed(train: Train, calm: Path, data_folder: Path) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """Eight steps on four ranks, trained once for all tests."""

    def run(optimizer: str, *overrides: str) -> tuple[Path, dict[str, Any]]:
        folder = calm / "-".join([optimizer, *(each.rpartition("=")[2] for each in overrides)])
        if not folder.exists():
            folder.mkdir()
            (folder / "data").symlink_to(data_folder)
        return folder, train(folder, *SMALL, f"{STAGE}optimizer={optimizer}", *overrides, on(4))

    return run


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_fewer_and_more_ranks_train_the_same_bits(train: Train, undisturbed: Any, run_folder: Path, optimizer: str) -> None:
    calm, wanted = undisturbed(optimizer, EXACT)
    found = disturbed(train, run_folder, f"{STAGE}optimizer={optimizer}", EXACT)
    assert found["loss"] == wanted["loss"] and found["grad_norm"] == wanted["grad_norm"]
    assert len(found["loss"]) == STEPS and min(found["grad_norm"]) > CLIP, "every step was clipped"
    ours, theirs = (RunFolder(run).stage("pretrain") for run in (run_folder, calm))
    assert hash_folder(ours.model) == hash_folder(theirs.model)
    last = f"step-{STEPS:08d}"
    for shard in sorted((theirs.checkpoints / last).glob("rank-*.safetensors")):  # moments, too
        assert hash_file(ours.checkpoints / last / shard.name) == hash_file(shard)
    rows = [{row["step"]: row for row in read_jsonl(stage.metrics)} for stage in (ours, theirs)]
    assert rows[0][STEPS]["validation_loss"] == rows[1][STEPS]["validation_loss"]
    assert all(rows[0][step]["tokens"] == rows[1][step]["tokens"] and rows[0][step]["learning_rate"] ==
               rows[1][step]["learning_rate"] for step in range(1, STEPS + 1))
    starts = [(row["ranks"], row["step"]) for row in read_jsonl(ours.events) if row["kind"] == "start"]
    assert starts == [(4, 0), (2, 2), (1, 4), (4, 6)]
    book = read_json(ours.actual)
    assert book["tokens"] == rows[1][STEPS]["tokens"]


@pytest.mark.slow
def test_fast_is_the_same_but_for_rounding(train: Train, undisturbed: Any, run_folder: Path) -> None:
    calm, wanted = undisturbed("adamw")
    found = disturbed(train, run_folder, f"{STAGE}optimizer=adamw")
    np.testing.assert_allclose(found["loss"], wanted["loss"], rtol=1e-6)
    models = [hash_folder(RunFolder(run).stage("pretrain").model) for run in (run_folder, calm)]
    assert models[0] != models[1], "or nothing would show that exact is needed"


BASE = ("model.num_hidden_layers=2", "model.hidden_size=40", "model.intermediate_size=52", f"{STAGE}precision=fp32",
        f"{STAGE}micro_batch_size=2", f"{STAGE}gradient_clip={CLIP}", EXACT)
MIXTURE = ("model.architecture=mixtral", "model.num_experts=4", "model.num_experts_per_tok=2", f"{STAGE}optimizer=muon")
SIX = (f"{STAGE}global_batch_tokens=768", f"{STAGE}data_shards=6")
CASES = {
    "replicas": ((), ["dp_replicate=2", "dp_shard=2 dp_replicate=2"]),
    "a block at a time": ((f"{STAGE}data_shards=2",), ["dp_shard=2 keep_whole=false", "dp_replicate=2 keep_whole=false"]),
    "no power of two": (SIX, ["dp_shard=2", "dp_shard=3"]),
    "six ranks": (SIX, ["dp_shard=2 dp_replicate=3", "dp_shard=3 dp_replicate=2"]),
    "five shards a rank": ((f"{STAGE}global_batch_tokens=640", f"{STAGE}optimizer=adamw"), ["dp_shard=2", "dp_shard=5"]),
    "tp": (("parallel.tp=2",), ["dp_shard=2", "dp_replicate=2"]),
    "bf16": ((f"{STAGE}precision=bf16", f"{STAGE}optimizer_state_dtype=bf16"), ["dp_shard=2", "dp_shard=4"]),
    "mixture": (MIXTURE, ["dp_shard=4 recompute=full"]),
    "further tokens": (("model.architecture=deepseek_v3", *DEEPSEEK, "model.sizes.num_nextn_predict_layers=2"), ["dp_shard=4"]),
    "a growing batch": ((f"{STAGE}batch_ramp=[8,4,24]", f"{STAGE}optimizer=adamw"), ["dp_shard=2 recompute=selective"]),
}
QUICK = ("replicas", "no power of two")


@pytest.mark.parametrize("case", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES])
def test_layouts_give_the_same_losses_and_norms(recipe_file: Path, tmp_path: Path, case: str) -> None:
    choices, layouts = CASES[case]

    def steps(*overrides: str) -> dict[str, Any]:
        recipe = load_recipe(recipe_file, [*BASE, *choices, *overrides])
        return dict(run_ranks("parity_ranks:train", {"recipe": recipe}, abs(layout_of(recipe).world_size), log_folder=tmp_path,
                              threads=1, timeout=120)[0])

    wanted = steps(on(1))
    for layout in layouts:
        found = steps(*(f"parallel.{key}" for key in layout.split()))
        assert (found["loss"], found["grad_norm"], found["tokens"]) == (wanted["loss"], wanted["grad_norm"], wanted["tokens"])
        for name, weight in wanted["weights"].items():
            if case != "bf16":  # there one rank's parameters are copies; the next loss tells what they are of
                assert np.array_equal(weight, found["weights"][name]), (layout, name)


def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(train: Train, run_folder: Path) -> None:
    found = train(run_folder, *SMALL, EXACT, on(2), target="guards_ranks:one_step_is_spoiled", kind="gradient")
    assert found["skipped"] == [True, False] and found["kept"] and found["moved"] and found["same"], found


def paired(values: list[Any]) -> Any:
    """The sum by pairs of neighbours, level by level."""
    while len(values) > 1:
        values = [values[i] + values[i + 1] if i + 1 < len(values) else values[i] for i in range(0, len(values), 2)]
    return values[0]


@pytest.mark.parametrize("total", [1, 2, 3, 5, 6, 8, 12, 20, 30])
def test_every_split_adds_up_the_same_tree(total: int) -> None:
    leaves = list(np.random.default_rng(total).standard_normal((total, 64), dtype=np.float32))
    wanted = paired(leaves)
    if total > 3:
        assert not np.array_equal(wanted, sum(leaves[1:], leaves[0])), "or the order would not matter"
    for ranks in (r for r in range(1, total + 1) if total % r == 0):
        joint = Tree(total)
        for rank in range(ranks):
            shards = Shards(total, ranks, rank)
            tree = shards.tree()
            for leaf in leaves[tree.next:shards.end]:
                tree.add([torch.tensor(leaf)])
            assert [end - begin for begin, end, _ in tree.nodes] == shards.nodes(rank)
            assert len(tree.nodes) == 1 or total & (total - 1), "with a power of two one sum is left"
            for begin, end, values in tree.nodes:
                joint.add(values, end - begin)
            done = [end - begin for begin, end, _ in joint.nodes]
            assert done == shards.nodes(0, rank + 1)
        assert np.array_equal(joint.root()[0], wanted)


def test_a_fold_rounds_alike_in_any_company() -> None:
    x = torch.randn(7, 37)
    together = fold(x.clone())
    assert torch.equal(together, torch.stack([fold(row.clone()) for row in x]))
    torch.testing.assert_close(together, x.double().sum(1).float())


def test_adamw_rounds_an_element_alike_wherever_it_lies() -> None:
    """torch's kernel alone does not: of elements left over after a loop's last vector, it rounds every fourth otherwise."""
    draw = torch.Generator().manual_seed(0)
    begin, *gradients = (torch.randn(1000, generator=draw) for _ in range(4))
    ends = []
    for length in (1000, 10, 7):
        parts = {f"{i:03}": torch.nn.Parameter(part.clone()) for i, part in enumerate(begin.split(length))}
        optimizer = Optimizer(Stages.alone(torch.nn.ParameterDict(parts)), "adamw", 0.1, is_exact=True)
        for gradient in gradients:
            for piece, part in zip(optimizer.pieces, gradient.split(length), strict=True):
                piece.give(part.clone())
            optimizer.step(0.01, torch.ones((), dtype=torch.float64), torch.ones(()), math.inf)
        ends.append([torch.cat([piece.shard for piece in optimizer.pieces])]
                    + [torch.cat([piece.slots[slot] for piece in optimizer.pieces]) for slot in ("exp_avg", "exp_avg_sq")])
    assert all(torch.equal(*pair) for end in ends[1:] for pair in zip(ends[0], end, strict=True))


def test_working_numbers_of_ranks() -> None:
    assert world_sizes(Layout(), 12) == [1, 2, 3, 4, 6, 12]
    assert world_sizes(Layout(dp_shard=4, tp=2, pp=2), 4) == [4, 8, 16]
    assert world_sizes(Layout(dp_replicate=2, dp_shard=2, ep=2), 8) == [2, 4, 8], "experts are shared out among data ranks"


@pytest.mark.parametrize(("overrides", "ranks", "sentence"), [
    ([EXACT], 3, r"has 4 virtual data shards, which 3 data ranks cannot share out equally; .* it runs on 1, 2, 4 ranks"),
    ([], 3, r"has 4 virtual data shards, which 3 data ranks cannot share out equally"),
    ([f"{STAGE}data_shards=8", EXACT, "parallel.tp=2"], 6, r"it runs on 2, 4, 8, 16 ranks \(parallel.dp_shard\)"),
    ([f"{STAGE}data_shards=3", EXACT], 1, r"data_shards = 3, but 16 rows in micro-batches of 2 make 1, 2, 4, 8 shards"),
    ([EXACT, "parallel.pp=2"], 2, r"reduction = 'exact' goes with dp_shard, dp_replicate and a fixed tp, not with pp = 2"),
    ([EXACT, "parallel.cp=2"], 2, r"not with cp = 2"),
    ([EXACT, "parallel.num_microbatches=4"], 2, r"num_microbatches = 4 would make other micro-batches on other ranks"),
])
def test_what_cannot_be_exact_is_refused(recipe_file: Path, run_folder: Path, overrides: list[str], ranks: int,
                                         sentence: str) -> None:
    with pytest.raises(LayoutError, match=sentence):
        resolve(RunFolder(run_folder), load_recipe(recipe_file, [*SMALL, *overrides]), "pretrain", ranks)


def test_exact_needs_a_size_of_micro_batches(recipe_file: Path, run_folder: Path) -> None:
    recipe = load_recipe(recipe_file, ["stage.chat.reduction=exact", "stage.chat.start_from=nowhere"])
    recipe.get_stage("chat").micro_batch_size, recipe.get_stage("chat").start_from = None, None
    with pytest.raises(LayoutError, match=r"stage.chat.reduction = 'exact' needs stage.chat.micro_batch_size, or another number"):
        resolve(RunFolder(run_folder), recipe, "chat", 1)


def test_the_command_goes_on_with_another_number_of_ranks(train: Train, undisturbed: Any, recipe_file: Path,
                                                          run_folder: Path) -> None:
    muon = (*SMALL, EXACT, f"{STAGE}optimizer=muon")
    calm, wanted = undisturbed("muon", EXACT)
    train(run_folder, *muon, on(2), target="train_ranks:train_and_signal", at_step=2, number=signal.SIGTERM, rank=0)

    def command(*overrides: str) -> dict[str, Any]:
        arguments = [str(recipe_file), "--stage", "pretrain", "--run", str(run_folder), "--json", *muon, *overrides]
        return dict(json.loads(CliRunner().invoke(verb, arguments, catch_exceptions=False).stdout))

    with pytest.raises(LayoutError, match=r"which 3 data ranks cannot share out equally; .* it runs on 1, 2, 4 ranks"):
        command(on(3))
    for change, sentence in ((f"{STAGE}reduction=fast", "reduction was exact and is unset"),
                             (f"{STAGE}micro_batch_size=1", "micro_batch_size was 2 and is 1"),
                             (f"{STAGE}data_shards=2", "data_shards was 4 and is 2")):
        job = resolve(RunFolder(run_folder), load_recipe(recipe_file, [*muon, change]), "pretrain", 1)
        with pytest.raises(UserError, match=f"was trained with another configuration: .*{sentence}"):
            claim_folder(job, False)
    assert command(on(1))["loss"] == wanted["loss"]
    assert hash_folder(RunFolder(run_folder).stage("pretrain").model) == hash_folder(RunFolder(calm).stage("pretrain").model)
