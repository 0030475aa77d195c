from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from athanor.cli.chain import hash_output
from athanor.foundation.run_folder import read_jsonl
from athanor.ledger.book import read_book

STEPS = ["check", "plan", "data", "train pretrain", "train chat", "evaluate", "registry", "serve", "report"]


def ran(lines: list[dict[str, Any]]) -> list[str]:
    return [line["step"] for line in lines if line["event"] == "done"]


@pytest.mark.slow
def test_what_single_verbs_trained_stands_in_the_book_with_its_time(athanor: Any, recipe: Path, tmp_path: Path) -> None:
    for verb in (("plan", recipe), ("data", "build", recipe), ("train", recipe, "--stage", "pretrain"), ("run", recipe)):
        done = athanor(*verb, "--json")
        assert done.returncode == 0, done.stderr
    book = read_book(tmp_path / "runs" / "small" / "actual.json")
    stage = read_book(tmp_path / "runs" / "small" / "pretrain" / "actual.json")
    assert book.wall_seconds > stage.wall_seconds and book.accounts["useful"] >= stage.accounts["useful"]
    assert abs(book.derived()["unattributed_share"]) < 0.05, book.accounts
    alone = [line for line in read_jsonl(tmp_path / "runs" / "small" / "chain.jsonl") if line["event"] == "alone"]
    assert [line["step"] for line in alone] == ["plan", "data"]
    for account, line in zip(("check", "data"), alone, strict=True):
        assert book.accounts[account] >= line["devices"] * line["seconds"] > 0.05


LATENT = [f"model.sizes.{key}" for key in ("kv_lora_rank=16", "qk_nope_head_dim=16", "qk_rope_head_dim=16", "v_head_dim=16")]


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "more"), [("gpt2", []), ("deepseek_v3", ["model.num_experts=4",
                                                                               "model.num_experts_per_tok=2", *LATENT])])
def test_other_architectures_go_the_whole_way(athanor: Any, recipe: Path, tmp_path: Path, architecture: str,
                                              more: list[str]) -> None:
    """Those whose config.json has other keys than most, or blocks that are not alike."""
    done = athanor("run", recipe, f"model.architecture={architecture}", "stage.pretrain.steps=4", "stage.chat.steps=4", *more)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "small"
    assert ran(read_jsonl(run / "chain.jsonl")) == STEPS
    config = json.loads((run / "chat" / "model" / "config.json").read_text())
    assert config["model_type"] == architecture and config.get("first_k_dense_replace", 1) == 1  # one of two blocks has experts


def test_the_chain_is_walked_once_accounted_for_and_then_skipped(athanor: Any, recipe: Path, tmp_path: Path) -> None:
    first = athanor("run", recipe, "--json")
    assert first.returncode == 0, first.stderr
    run = tmp_path / "runs" / "small"
    lines = read_jsonl(run / "chain.jsonl")
    assert ran(lines) == STEPS
    assert [step["step"] for step in json.loads(first.stdout)["steps"]] == STEPS

    planned = next(i for i, line in enumerate(lines) if line["event"] == "done" and line["step"] == "plan")
    trained = next(i for i, line in enumerate(lines) if line["event"] == "start" and line["step"] == "train pretrain")
    assert planned < trained and lines[planned]["outputs"]["forecast.json"] == hash_output(run / "forecast.json")

    book = read_book(run / "actual.json")
    assert abs(book.derived()["unattributed_share"]) < 0.05, book.accounts
    assert abs(sum(book.accounts.values()) - book.device_seconds) < 1e-6 * book.device_seconds
    assert book.tokens > 0.8 * (24 + 12) * 1024 * 0.5 and book.accounts["data_parallel"] > 0
    for name in ("useful", "kernel", "optimizer", "input", "checkpoint", "evaluation", "startup", "data", "check", "publish"):
        assert book.accounts[name] > 0, name
    scores = json.loads((run / "scores.json").read_text())["models"]
    assert set(scores) == {"pretrain", "chat"} and set(scores["chat"]) == {"bits_per_byte", "identifiers", "python_parses"}
    assert "<svg" in (run / "report.html").read_text()
    losses = [row["loss"] for row in read_jsonl(run / "pretrain" / "metrics.jsonl")]
    assert len(losses) == 24 and sum(losses[-4:]) < sum(losses[:4])

    begin = time.monotonic()
    again = athanor("run", recipe)
    assert again.returncode == 0 and time.monotonic() - begin < read_book(run / "actual.json").wall_seconds
    assert read_jsonl(run / "chain.jsonl") == lines and again.stderr.count("unchanged") == len(STEPS)

    listed = json.loads(athanor("models", "list", "--json").stdout)
    assert {row["model"] for row in listed} == {"small-pretrain", "small-chat"} if isinstance(listed, list) else listed
    changed = athanor("run", recipe, 'evaluate.tasks=["bits_per_byte"]')
    assert changed.returncode == 0, changed.stderr
    assert set(ran(read_jsonl(run / "chain.jsonl")[len(lines):])) <= {"plan", "evaluate", "registry", "report"}


@pytest.mark.parametrize(("override", "words"), [
    ("model.hiden_size=3", "did you mean 'hidden_size'"), ("data.source.json.path=/nowhere", "/nowhere"),
    ("cluster.file=/none.toml", "/none.toml"), ("plan.file=/none.toml", "/none.toml"),
    ("stage.chat.objective=sfd", "did you mean 'sft'"), ("model.architecture=lama", "did you mean 'llama'"),
    ("evaluate.tasks=[\"bits_per_bite\"]", "did you mean 'bits_per_byte'"),
    ("stage.chat.data=/none.jsonl", "stage.chat.data = '/none.jsonl' does not exist"),
    ("stage.chat.start_from=pretran", "did you mean 'pretrain'"),
    ("stage.chat.start_from=/none", "/none"), ("parallel.tp=3", "2 devices"),
])
def test_wrong_input_is_one_sentence_before_the_first_step(athanor: Any, recipe: Path, tmp_path: Path, override: str,
                                                           words: str) -> None:
    result = athanor("run", recipe, override)
    assert result.returncode == 2, result.stderr
    sentence = result.stderr.strip().splitlines()[-1]
    assert sentence.startswith("athanor: ") and words in sentence and "Traceback" not in result.stderr, result.stderr
    assert not ran(read_jsonl(tmp_path / "runs" / "small" / "chain.jsonl")), "told only after work was done"


def test_another_architecture_than_the_model_to_start_from_is_told_first(athanor: Any, recipe: Path, tmp_path: Path) -> None:
    from athanor.models.shapes.qwen3 import Shape

    sizes = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(Shape(**sizes).to_config()))
    result = athanor("run", recipe, f"stage.chat.start_from={tmp_path / 'other'}")
    assert result.returncode == 2 and "'llama', but the model in" in result.stderr and "is a 'qwen3'" in result.stderr
    assert not ran(read_jsonl(tmp_path / "runs" / "small" / "chain.jsonl"))


def test_a_line_that_is_no_conversation_is_told_first(athanor: Any, recipe: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"message": turns}) + "\n")
    result = athanor("run", recipe, f"stage.chat.data={tmp_path / 'talk.jsonl'}")
    assert result.returncode == 2 and "talk.jsonl line 2" in result.stderr
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": turns[:1]}) + "\n")
    result = athanor("run", recipe, f"stage.chat.data={tmp_path / 'talk.jsonl'}")
    assert result.returncode == 2 and "no message of the role 'assistant'" in result.stderr
    assert not ran(read_jsonl(tmp_path / "runs" / "small" / "chain.jsonl"))


@pytest.mark.slow
def test_what_single_verbs_made_is_gone_on_with_and_its_forecast_stays(athanor: Any, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "small"
    for arguments in (("plan", recipe), ("data", "build", recipe), ("train", recipe, "--stage", "pretrain")):
        result = athanor(*arguments)
        assert result.returncode == 0, result.stderr
    plan, steps = (run / "plan.toml").read_bytes(), read_jsonl(run / "pretrain" / "metrics.jsonl")
    refused = athanor("plan", recipe, "seed=4")
    assert refused.returncode == 2 and "has been trained with its plan" in refused.stderr
    assert athanor("plan", recipe, "--out", tmp_path / "other.toml").returncode == 0
    assert athanor("evaluate", recipe).returncode == 0
    scores = json.loads((run / "scores.json").read_text())["models"]["pretrain"]
    result = athanor("run", recipe)
    assert result.returncode == 0, result.stderr
    assert "scored before, of the same model and data: pretrain bits_per_byte, pretrain identifiers" in result.stderr
    assert json.loads((run / "scores.json").read_text())["models"]["pretrain"] == scores
    assert (run / "plan.toml").read_bytes() == plan and read_jsonl(run / "pretrain" / "metrics.jsonl") == steps
    assert "bits_per_byte" in result.stderr


def test_two_runs_do_not_share_a_folder(athanor: Any, recipe: Path, tmp_path: Path) -> None:
    import fcntl

    run = tmp_path / "runs" / "small"
    run.mkdir(parents=True)
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = athanor("run", recipe)
    assert result.returncode == 2 and "another process is working in" in result.stderr
