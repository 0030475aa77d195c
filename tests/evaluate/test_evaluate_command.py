"""`athanor evaluate` on real ranks: two models at once, merged scores, and bad input in one sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from bigram_model import follow, write_bigram
from click.testing import CliRunner

from athanor.cli.evaluate import command, evaluate_run, interval, run_candidates
from athanor.data.text.tokenizer import Tokenizer
from athanor.evaluate.ranks import Candidate, evaluate
from athanor.evaluate.subject import spread
from athanor.foundation.errors import AthanorError, UserError
from athanor.foundation.recipe import load_recipe
from athanor.foundation.run_folder import RunFolder
from athanor.models.decoder import Decoder
from athanor.models.huggingface import save_model
from athanor.models.initialize import initialize
from athanor.models.shapes.decoder import DecoderShape
from athanor.registry.store import register

RECIPE = """name = "tiny"
[[data.source]]
name = "here"
kind = "python"
[[stage]]
name = "pretrain"
seq_len = 64
[[stage]]
name = "chat"
objective = "sft"
start_from = "pretrain"
seq_len = 32
[evaluate]
tasks = ["bits_per_byte", "python_parses"]
"""


@pytest.fixture
def run(tmp_path: Path, data: Path, tokenizer: Tokenizer, source: str, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run of two stages: one that knows the first document by heart, one that answers every question with `x`."""
    monkeypatch.setenv("ATHANOR_RUNS", str(tmp_path / "runs"))
    run = RunFolder(tmp_path / "runs" / "tiny")
    run.root.mkdir(parents=True)
    data.rename(run.data)
    (tmp_path / "tiny.toml").write_text(RECIPE)
    write_bigram(run.stage("pretrain").model, tokenizer, follow(tokenizer, [0, *tokenizer.encode(source), 1]), 256)
    answer = [tokenizer.special_ids["<|assistant|>"], *tokenizer.encode("x"), 1]
    write_bigram(run.stage("chat").model, tokenizer, follow(tokenizer, answer), 256)
    return run


def call(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments] + ["--json"], catch_exceptions=False)
    assert result.exit_code == 0
    content: dict[str, Any] = json.loads(result.stdout)
    return content


def test_a_recipe_scores_its_stages_and_keeps_other_scores(run: RunFolder, tmp_path: Path) -> None:
    run.scores.write_text(json.dumps({"schema": 1, "models": {"pretrain": {"identifiers": {"value": 0.25}}}}))
    found = call(tmp_path / "tiny.toml")
    assert found["scores"] == str(run.scores)
    written = json.loads(run.scores.read_text())["models"]
    assert list(written) == list(found["models"]) == ["pretrain", "chat"]
    assert written["pretrain"].pop("identifiers") == {"value": 0.25}
    assert written == found["models"]
    first, second = (written[stage]["bits_per_byte"] for stage in ("pretrain", "chat"))
    assert first["value"] < 0.8 * second["value"] and first["details"]["xz"] == second["details"]["xz"]
    assert (first["details"]["context_tokens"], second["details"]["context_tokens"]) == (64, 64)
    base, tuned = (written[stage]["python_parses"] for stage in ("pretrain", "chat"))
    assert (base["details"]["asked"], tuned["details"]["asked"]) == ("plain text", "chat template")
    assert base["count"] == tuned["count"] == 2
    assert set(found["seconds"]["chat"]) == {"bits_per_byte", "python_parses"}
    for task in ("bits_per_byte", "python_parses"):
        items = [written[stage][task]["details"]["items"] for stage in ("pretrain", "chat")]
        assert items[0]["hash"] == items[1]["hash"] and len(items[0]["above"].split()) == written["chat"][task]["count"]


def test_a_chain_scores_only_what_has_changed(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, asked = load_recipe(tmp_path / "tiny.toml"), list[tuple[list[str], list[str]]]()
    call(tmp_path / "tiny.toml", "--stage", "pretrain")

    def noted(candidates: Any, tasks: Any, *rest: Any, **settings: Any) -> Any:
        asked.append(([each.name for each in candidates], list(tasks)))
        return evaluate(candidates, tasks, *rest, **settings)

    monkeypatch.setattr("athanor.evaluate.ranks.evaluate", noted)
    everything = ["bits_per_byte", "python_parses"]
    evaluate_run(recipe, run, keeps_unchanged=True)
    assert asked.pop() == (["chat"], everything), "pretrain was scored by hand"
    kept = run.scores.read_bytes()
    assert evaluate_run(recipe, run, keeps_unchanged=True).scores == {} and not asked and run.scores.read_bytes() == kept
    more = load_recipe(tmp_path / "tiny.toml", ['evaluate.tasks=["bits_per_byte", "identifiers", "python_parses"]'])
    evaluate_run(more, run, keeps_unchanged=True)
    assert asked.pop() == (["pretrain", "chat"], ["identifiers"])
    evaluate_run(load_recipe(tmp_path / "tiny.toml", ["evaluate.limit=1"]), run, keeps_unchanged=True)
    assert asked.pop() == (["pretrain", "chat"], everything), "on fewer items"
    evaluate_run(recipe, run)
    assert asked.pop() == (["pretrain", "chat"], everything), "the verb does as it is told"
    config = run.stage("chat").model / "config.json"
    config.write_text(config.read_text() + "\n")
    evaluate_run(recipe, run, keeps_unchanged=True)
    assert asked.pop() == (["chat"], everything), "another model"
    with (run.data / "evaluation.jsonl").open("a") as file:
        file.write(json.dumps({"doc_id": "d", "source": "s", "uri": "d.py", "text": "x = 1\n" * 9}) + "\n")
    evaluate_run(recipe, run, keeps_unchanged=True)
    assert asked.pop() == (["pretrain", "chat"], everything), "other data"


def test_one_item_has_no_interval() -> None:
    score = {"value": 2.05, "low": 2.05, "high": 2.05, "count": 1}
    assert interval(score) == "of one item"
    assert interval(score | {"count": 2, "low": 1.23456}) == "1.23 to 2.05" and interval(score | {"count": 2}, 2) == "2 to 2"


def test_a_model_folder_on_its_own(run: RunFolder) -> None:
    folder = run.stage("pretrain").model
    found = call(folder, "--data", run.data, "--task", "identifiers", "--ask", "text", "--limit", 9)
    assert found["scores"] is None and found["models"]["pretrain"]["identifiers"]["count"] == 9
    assert not run.scores.exists()


def test_a_run_a_stage_and_a_registered_name(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a recipe would score them: on the run's data, by its tasks, asked as they were trained; kept nowhere."""
    monkeypatch.setenv("ATHANOR_REGISTRY", str(tmp_path / "registry"))
    by_recipe = call(tmp_path / "tiny.toml")["models"]
    run.scores.unlink()
    run.recipe.write_text(RECIPE)
    os.utime(run.stage("chat").model / "config.json", (2e9, 2e9))
    registered = register(run.root, "pretrain")
    for subject, name, stage in ((run.root, "tiny-chat", "chat"), ("tiny", "tiny-chat", "chat"),
                                 (run.stage("pretrain").root, "tiny-pretrain", "pretrain"),
                                 (registered.reference, "tiny-pretrain", "pretrain")):
        found = call(subject)
        assert found["models"] == {name: by_recipe[stage]} and found["scores"] is None, subject
    assert not run.scores.exists()
    with pytest.raises(UserError, match=r"'tiny-chap' is no model folder.*did you mean 'tiny"):
        CliRunner().invoke(command, ["tiny-chap"], catch_exceptions=False)


def test_a_limit_takes_items_from_everywhere() -> None:
    assert list(spread(range(10), 4)) == [0, 2, 5, 7]
    assert list(spread(range(3), 3)) == list(spread(range(3), 9)) == list(spread(range(3), None)) == [0, 1, 2]
    assert len(set(spread(range(1000), 999))) == 999


def test_progress_reaches_every_model_and_task(run: RunFolder, tmp_path: Path) -> None:
    candidates = [Candidate(name, run.stage("pretrain").model, False) for name in ("a", "b", "c")]
    messages: list[dict[str, Any]] = []
    result = evaluate(candidates, ["bits_per_byte"], run.data, log_folder=tmp_path / "logs", on_progress=messages.append)
    assert list(result.scores) == ["a", "b", "c"]
    assert result.scores["a"] == result.scores["b"] == result.scores["c"], "the same model scores the same, bit for bit"
    assert {m["model"] for m in messages if m["done"] == m["total"]} == {"a", "b", "c"}


def write_llama(folder: Path, tokenizer: Tokenizer, seed: int = 0) -> Path:
    """A Llama whose random weights are large enough for its answers to differ."""
    vocab_size = tokenizer.vocab_size + tokenizer.vocab_size % 2
    module = Decoder(DecoderShape(vocab_size, 64, 96, 2, 4, 2, max_position_embeddings=256, initializer_range=0.2))
    initialize(module, seed)
    save_model(module, folder)
    tokenizer.save(folder)
    return folder


def test_ranks_that_share_a_model_score_as_one_does(run: RunFolder, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The tasks that ask for answers are equal item by item; log-probabilities are sums in another order."""
    folder = write_llama(tmp_path / "m", tokenizer)
    tasks = [part for task in ("bits_per_byte", "identifiers", "python_parses") for part in ("--task", task)]
    one, two = (call(folder, "--data", run.data, *tasks, "--ask", "text", "--tp", tp)["models"]["m"] for tp in (1, 2))
    for task in ("identifiers", "python_parses"):
        assert one[task] == two[task]
    first, second = one["bits_per_byte"], two["bits_per_byte"]
    assert first["details"]["items"]["hash"] == second["details"]["items"]["hash"]
    for key in ("value", "low", "high"):
        assert first[key] == pytest.approx(second[key], rel=1e-6)


def test_groups_of_ranks_share_out_the_models(run: RunFolder, tmp_path: Path, tokenizer: Tokenizer,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """Three models on two groups of two: a group may have more of them than the other."""
    folders = {str(seed): write_llama(tmp_path / f"m{seed}", tokenizer, seed) for seed in range(3)}
    candidates = [Candidate(name, folder, False) for name, folder in folders.items()]
    alone = evaluate(candidates, ["bits_per_byte"], run.data, log_folder=tmp_path / "alone", limit=2)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(4))
    messages: list[dict[str, Any]] = []
    shared = evaluate(candidates, ["bits_per_byte"], run.data, log_folder=tmp_path / "shared", limit=2, tp=2,
                      on_progress=messages.append)
    assert list(shared.scores) == ["0", "1", "2"] and len(list((tmp_path / "shared").glob("rank-*.log"))) == 4
    for name in folders:
        assert shared.scores[name]["bits_per_byte"].value == pytest.approx(alone.scores[name]["bits_per_byte"].value, rel=1e-6)
    ends = [message["model"] for message in messages if message["done"] == message["total"]]
    assert sorted(ends) == ["0", "1", "2"], "one rank of a group speaks"


def test_a_recipe_says_how_many_share_a_model_and_what_cannot_be_is_refused(run: RunFolder, tmp_path: Path,
                                                                            tokenizer: Tokenizer) -> None:
    with pytest.raises(AthanorError, match=r"tp = 3 does not divide num_attention_heads = 2; tp may be 1, 2"):
        call(tmp_path / "tiny.toml", "evaluate.tp=3", "--stage", "pretrain", "--task", "bits_per_byte")
    with pytest.raises(AthanorError, match=r"evaluate\.tp"):
        call(tmp_path / "tiny.toml", "evaluate.tp=0")


def test_only_stages_with_a_model(run: RunFolder, tmp_path: Path) -> None:
    recipe = load_recipe(tmp_path / "tiny.toml")
    assert [(c.name, c.is_chat, c.context_tokens) for c in run_candidates(recipe, run)] == [
        ("pretrain", False, 64), ("chat", True, 64)]
    run.stage("chat").model.rename(tmp_path / "away")
    assert [c.name for c in run_candidates(recipe, run)] == ["pretrain"]
    with pytest.raises(AthanorError, match="train stage 'chat' first"):
        run_candidates(recipe, run, ("chat",))


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["tiny.toml", "--task", "bits_per_bite"], "no task 'bits_per_bite'; did you mean 'bits_per_byte'"),
    (["tiny.toml", "--task", "../x"], "no task '../x'"), (["tiny.toml", "--task", ".."], "no task '..'"),
    (["tiny.toml", "--stage", "chap"], "no stage 'chap'; did you mean 'chat'"),
    (["tiny.toml", "evaluate.taks=1"], "unknown key 'evaluate.taks'; did you mean 'tasks'"),
    (["runs/tiny/pretrain/model"], "goes with --data"),
    (["runs/tiny/data", "--data", "runs/tiny/data"], "holds no model: neither config.json"),
    (["runs/tiny", "evaluate.limit=3"], "runs/tiny is no recipe; overrides and --stage go with one"),
    (["runs/tiny/pretrain/model", "--data", "runs"], "evaluation.jsonl does not exist"),
    (["nothing.toml"], "nothing.toml does not exist"),
])
def test_bad_input_is_one_sentence_and_writes_nothing(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                      arguments: list[str], sentence: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AthanorError) as caught:
        CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
    assert not run.scores.exists()


def test_a_task_of_a_package_that_is_not_there_is_one_sentence(run: RunFolder, tmp_path: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"'lm_eval:arc_easy' needs .*; install it with: pip install 'athanor-llm\[lm-eval\]'"):
        CliRunner().invoke(command, [str(tmp_path / "tiny.toml"), "--task", "lm_eval:arc_easy"], catch_exceptions=False)
