"""The card says what a stage was, from what it came, what it cost and how good it is; bad folders are refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

import athanor.registry
from athanor.cli.models import command
from athanor.foundation.errors import AthanorError, ModelError, UserError
from athanor.foundation.run_folder import RunFolder, hash_file, hash_folder, write_json
from athanor.registry.manifest import code_version
from athanor.registry.model_folder import check_model_folder
from athanor.registry.store import Registry, register

SCORES: dict[str, Any] = {"schema": 1, "models": {"chat": {"bits_per_byte": {
    "value": 1.5, "low": 1.4, "high": 1.6, "count": 9, "unit": "bits per byte", "higher_is_better": False, "details": {}}}}}


def test_the_card_of_a_stage(run: RunFolder, registry: Registry) -> None:
    parent = register(run.root, "pretrain", registry.root)
    card = register(run.root, "chat", registry.root)
    assert (card.model, parent.model) == ("tiny-chat", "tiny-pretrain")
    assert parent.parents == [] and card.parents == [
        {"model": "tiny-pretrain", "version": parent.version, "weights": parent.hashes["weights"]}]
    assert card.data and card.data["hash"] == "d" * 64 and "seconds" not in card.data
    assert card.recipe and card.recipe["sha256"] == hash_file(run.recipe) and card.recipe["stage"][1]["objective"] == "sft"
    assert card.stage == {"stage": {"name": "x", "seq_len": 64}}
    assert (card.steps, card.tokens, card.model_flops) == (30, 5e5, 3e12)
    assert card.book and card.book["device_hours"] == 0.5 and card.book["money"] == 1.5 and card.book["energy_joules"] is None
    assert card.book["accounts"] == {"useful": 1350.0, "unattributed": 450.0} and card.book["derived"]["end_to_end"] == 0.75
    assert card.book["layout"] == "tp=2" and parent.book and parent.book["layout"] == "dp_shard=2", "each its own"
    assert card.hashes["template"] == hash_file(registry.folder(card) / "chat_template.jinja")
    assert card.scores is None


def test_scores_that_come_later_refresh_the_card(run: RunFolder, registry: Registry) -> None:
    first = register(run.root, "chat", registry.root)
    write_json(run.scores, SCORES)
    second = register(run.root, "chat", registry.root)
    assert (second.version, second.created, second.code) == (first.version, first.created, first.code)
    assert second.scores == SCORES["models"]["chat"] and len(registry.rows()) == 1
    registry.import_folder(run.stage("chat").model, "tiny-chat")
    card = registry.get("tiny-chat")
    assert card == second, "importing the same content does not erase what the card knows"
    assert registry.verify("tiny-chat") == []


def test_lineage_walks_up_and_down(run: RunFolder, registry: Registry) -> None:
    child = register(run.root, "chat", registry.root)
    tree = registry.lineage("tiny-chat")
    assert [p["registered"] for p in tree["parents"]] == [False], "the parent is named even before it is registered"
    parent = register(run.root, "pretrain", registry.root)
    tree = registry.lineage("tiny-chat")
    assert [p["reference"] for p in tree["parents"]] == [parent.reference] and tree["parents"][0]["registered"]
    assert registry.lineage("tiny-pretrain")["children"] == [child.reference]


def test_lineage_sums_what_a_version_and_all_before_it_took(run: RunFolder, registry: Registry) -> None:
    register(run.root, "chat", registry.root)
    assert registry.lineage("tiny-chat")["cost"] == dict.fromkeys(("model_flops", "device_hours", "money", "energy_joules"))
    register(run.root, "pretrain", registry.root)
    assert registry.lineage("tiny-chat")["cost"] == {"model_flops": 6e12, "device_hours": 1.0, "money": 3.0,
                                                     "energy_joules": None}
    assert registry.lineage("tiny-pretrain")["cost"]["device_hours"] == 0.5
    assert registry.rows()[0]["money"] == 1.5, "the index holds what every card costs"


def test_a_parent_outside_the_run_is_found_by_content(run: RunFolder, registry: Registry, tmp_path: Path) -> None:
    shutil.copytree(run.stage("pretrain").model, tmp_path / "elsewhere")
    given = registry.import_folder(tmp_path / "elsewhere", "given")
    run.recipe.write_text(run.recipe.read_text().replace('start_from = "pretrain"', f'start_from = "{tmp_path / "elsewhere"}"'))
    register(run.root, "chat", registry.root)
    assert registry.lineage("tiny-chat")["parents"][0]["reference"] == given.reference


def test_a_stage_without_a_model_is_refused(run: RunFolder, registry: Registry) -> None:
    shutil.rmtree(run.stage("chat").model)
    with pytest.raises(ModelError, match=r"stage 'chat' .* has no model yet"):
        register(run.root, "chat", registry.root)
    with pytest.raises(AthanorError, match="no stage 'chatt'; did you mean 'chat'"):
        register(run.root, "chatt", registry.root)
    assert not registry.root.exists()


def _without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def _cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])


def _sharded_without_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001.safetensors"}}')


def _as_a_run(folder: Path) -> None:
    files = list(folder.iterdir())
    (folder / "pretrain" / "model").mkdir(parents=True)
    for file in files:
        file.rename(folder / "pretrain" / "model" / file.name)
    (folder / "data").mkdir()
    (folder / "data" / "train.bin").touch()


@pytest.mark.parametrize(("damage", "sentence"), [
    (_as_a_run, "is a run folder; its model is .*/pretrain/model"),
    (_without("config.json"), "has no config.json"),
    (_without("model.safetensors"), "has no weights; expected model.safetensors"),
    (_without("tokenizer.json"), "has no tokenizer; expected tokenizer.json"),
    (_cut, "the copy is incomplete"),
    (_sharded_without_shard, "names the shard 'model-00001.safetensors', which is not in"),
    (lambda folder: (folder / "pytorch_model.bin").write_bytes(b"\x80\x04"), "may be a pickle"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"\x80\x04K\x01."), "not a safetensors file"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"\x02" + b"\0" * 7 + b"[]"), "not a safetensors file"),
    (lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
     "is a pointer of Git LFS, not the weights"),
    (lambda folder: (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 40}}}'),
     "has ids up to 40, but its weights know only 40 from 0 on"),
    (lambda folder: (folder / "tokenizer.json").write_text('{"added_tokens": [{"id": 99, "content": "x"}]}'),
     "ids up to 99"),
    (lambda folder: (folder / "tokenizer.json").write_text('{"model": {"vocab": 3}}'), "is not a tokenizer"),
    (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
    (lambda folder: (folder / "config.json").write_text("{}"), "names neither 'architectures' nor"),
    (lambda folder: (folder / "config.json").write_text('{"architectures": {"a": 1}}'), "names neither 'architectures' nor"),
    (lambda folder: ((folder / "model.safetensors").unlink(),
                     (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}')), "no 'weight_map'"),
    (lambda folder: (folder / "config.json").write_text('{"model_type": "x", "vocab_size": 41, "hidden_size": 8}'),
     r"has shape \[40, 8\], but config.json says"),
    (lambda folder: (folder / "config.json").write_text('{"model_type": "x", "num_hidden_layers": 4}'),
     "its weights are of 1 layers, but config.json says num_hidden_layers = 4"),
])
def test_bad_folders_are_refused_in_one_sentence(registry: Registry, model: Callable[..., Path],
                                                 damage: Callable[[Path], object], sentence: str) -> None:
    source = model()
    damage(source)
    with pytest.raises(AthanorError, match=sentence) as caught:
        registry.import_folder(source, "m")
    assert str(source) in str(caught.value) and "\n" not in str(caught.value)
    assert registry.rows() == [] and not registry.root.exists()


@pytest.mark.parametrize(("changes", "words"), [
    ({}, []), ({"generation_config.json": {"eos_token_id": [7, 5]}}, []),
    ({"generation_config.json": {"eos_token_id": 7}}, ["config.json 5, generation_config.json 7, tokenizer_config.json 5"]),
    ({"tokenizer_config.json": {"eos_token": {"content": "<bye>"}}}, ["tokenizer_config.json 7"]),
    ({"tokenizer_config.json": {"eos_token": "<end>", "chat_template": "{{ messages }}"}}, ["never writes <end>, which ends"]),
    ({"tokenizer_config.json": {"eos_token": "<end>", "chat_template": "{{ messages }}{{ eos_token }}"}}, []),
    ({"generation_config.json": {"eos_token_id": [5, 7]}, "tokenizer_config.json": {"chat_template": "x<bye>"}}, [])])
def test_import_says_where_files_disagree_on_eos(registry: Registry, model: Callable[..., Path], changes: dict[str, Any],
                                                 words: list[str]) -> None:
    source = model()
    (source / "chat_template.jinja").unlink()
    config = json.loads((source / "config.json").read_text()) | {"eos_token_id": 5}
    (source / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "<bye>": 7}},'
                                           '"added_tokens": [{"id": 5, "content": "<end>"}]}')
    for name, content in {"config.json": config, "tokenizer_config.json": {"eos_token": "<end>"}, **changes}.items():
        (source / name).write_text(json.dumps(content))
    arguments = ["import", str(source), "--json", "--registry", str(registry.root)]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    notes = json.loads(result.stdout)["notes"]
    assert len(notes) == len(words) and all(word in note for word, note in zip(words, notes, strict=True)), notes


def test_sharded_weights_are_read_by_their_index(model: Callable[..., Path]) -> None:
    source = model()
    (source / "model.safetensors").unlink()
    for number, name in enumerate(("a", "b")):
        save_file({name: np.zeros((3, 2 + number), np.float32)}, source / f"model-{number}.safetensors")
    weight_map = {"a": "model-0.safetensors", "b": "model-1.safetensors"}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert check_model_folder(source).parameters == 6 + 9
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map | {"c": "model-1.safetensors"}}))
    with pytest.raises(ModelError, match="does not hold 'c'"):
        check_model_folder(source)


def test_the_commit_is_that_of_this_checkout() -> None:
    git = ["git", "-C", str(Path(athanor.registry.__file__).parent)]
    if subprocess.run([*git, "ls-files", "--error-unmatch", "manifest.py"], capture_output=True).returncode:
        assert code_version() is None
    else:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        assert (code_version() or {})["commit"] == head.stdout.strip()


def test_verbs_print_one_json_document(run: RunFolder, registry: Registry, tmp_path: Path) -> None:
    base = register(run.root, "pretrain", registry.root)
    chat = register(run.root, "chat", registry.root)

    def call(*arguments: str) -> dict[str, object]:
        result = CliRunner().invoke(command, [*arguments, "--json", "--registry", str(registry.root)], catch_exceptions=False)
        assert result.exit_code == 0
        content: dict[str, object] = json.loads(result.stdout)
        return content

    call("alias", "tiny-chat", "good")
    rows = call("list")["models"]
    assert isinstance(rows, list)
    assert [(row["model"], row["aliases"]) for row in rows] == [("tiny-chat", ["good"]), ("tiny-pretrain", [])]
    assert call("show", "tiny-chat@good")["version"] == chat.version
    assert call("verify", "tiny-chat") == {"reference": chat.reference, "problems": []}
    assert call("lineage", "tiny-pretrain")["children"] == [chat.reference]
    assert "hashes.weights" in call("diff", "tiny-chat", "tiny-pretrain")["differences"]  # type: ignore[operator]
    assert call("export", "tiny-chat", str(tmp_path / "out"))["reference"] == chat.reference
    (run.stage("chat").model / "config.json").touch()  # so that it is the newest
    exported = [call("export", str(model), str(tmp_path / f"out-{i}")) for i, model in enumerate((
        run.root, run.stage("chat").root, run.stage("chat").model, registry.folder(chat)))]
    assert [found["reference"] for found in exported] == [chat.reference] * 4, "the same content, wherever it lies"
    assert hash_folder(tmp_path / "out-0") == hash_folder(run.stage("chat").model)
    with pytest.raises(UserError, match=r"'tiny-chap' is no model folder, run folder.*did you mean 'tiny-chat'"):
        call("export", "tiny-chap", str(tmp_path / "none"))
    assert call("import", str(tmp_path / "out"), "--name", "copy")["version"] == chat.version
    assert call("reindex")["versions"] == 3
    (registry.folder(base) / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"is damaged: config\.json has other bytes"):
        CliRunner().invoke(command, ["verify", "tiny-pretrain", "--registry", str(registry.root)], catch_exceptions=False)


@pytest.mark.parametrize("verb", [["list"], ["show", "tiny-chat"], ["lineage", "tiny-chat"],
                                  ["diff", "tiny-chat", "tiny-pretrain"]])
def test_verbs_keep_standard_output_clean(run: RunFolder, registry: Registry, verb: list[str]) -> None:
    register(run.root, "pretrain", registry.root)
    register(run.root, "chat", registry.root)
    program = [sys.executable, "-c", "from athanor.cli.main import main; main()", "models", *verb]
    done = subprocess.run([*program, "--registry", str(registry.root)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "") and "tiny-chat" in done.stderr, done.stderr


def test_the_registry_loads_no_torch() -> None:
    code = ("import sys, athanor.registry.store, athanor.cli.models\n"
            "assert not {'torch', 'pyarrow', 'starlette'} & set(sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
