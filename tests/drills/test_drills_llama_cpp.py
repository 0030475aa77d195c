"""llama.cpp gives our greedy answers and our token ids from the GGUF files that we write; it is built in its own environment."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cutters import CUTTERS, bpe, mixed_texts, train_pieces
from other_engines import (
    CONTEXT_TOKENS,
    MODELS,
    NARROW,
    NEW_TOKENS,
    ask,
    clear_answers,
    environment,
    random_model,
    random_prompts,
)

from athanor.data.text.tokenizer import Tokenizer, copy_tokenizer
from athanor.foundation.run_folder import write_json
from athanor.models.decoder import Decoder
from athanor.models.huggingface import load_model, logits
from athanor.registry.to_gguf import ARCHITECTURES, write_gguf

pytestmark = [pytest.mark.drill, pytest.mark.timeout(3600)]  # the first builds llama.cpp, ten minutes on two cores
GAP = 0.02  # of the logits' deviation; llama.cpp rounds what it multiplies with F16 to F16
VOCABULARY = 320
EXPORTED = [name for name, (kind, _) in (MODELS | NARROW).items() if kind in ARCHITECTURES]
LINES = [line for text in mixed_texts(1500, 1) for line in text.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def python() -> Path:
    return environment("llama-cpp-python==0.3.36", CMAKE_ARGS="-DLLAVA_BUILD=OFF -DGGML_OPENMP=OFF")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return mixed_texts(400)


def compare(python: Path, module: Decoder, folder: Path, prompts: list[list[int]]) -> None:
    """Four greedy answers from the folder's model as F16, and all logits of those texts as F16 and as Q8_0."""
    prompts, answers = clear_answers(module, prompts, GAP, 4)
    sequences = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    ours = torch.cat([logits(module, sequence) for sequence in sequences]).numpy()
    has_experts = hasattr(module.shape, "num_experts")  # some tokens go to another one when weights are rounded so far
    for kind, most in (("f16", 0.002), ("q8_0", 0.1 if has_experts else 0.05)):
        write_gguf(folder / "model", folder / f"{kind}.gguf", "m", kind)
        found = ask(python, "ask_llama_cpp.py", folder, {"model": str(folder / f"{kind}.gguf"), "prompts": prompts, "texts": [],
                    "sequences": sequences, "new_tokens": NEW_TOKENS, "context_tokens": CONTEXT_TOKENS})
        away = np.abs(np.load(folder / "logits.npy") - ours) / ours.std()
        alike = np.mean([a == b for a, b in zip(found["answers"], answers, strict=True)])
        print(f"\n{kind}: logits differ by {away.mean():.1e} of their deviation, {away.max():.1e} at most; {alike:.0%} equal")
        assert away.mean() <= most
        assert kind != "f16" or found["answers"] == answers


@pytest.mark.parametrize("name", EXPORTED)
def test_random_models_answer_alike(python: Path, name: str, tmp_path: Path) -> None:
    module = random_model(name, VOCABULARY, tmp_path / "model")
    bpe("qwen2", LINES, 300).save(str(tmp_path / "model" / "tokenizer.json"))
    compare(python, module, tmp_path, random_prompts(VOCABULARY))


def test_a_trained_model_answers_alike(python: Path, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(trained)
    module, tokenizer = load_model(trained), Tokenizer.load(trained)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.copy_(parameter.half().float())
    compare(python, module, tmp_path, [[tokenizer.bos_id, *tokenizer.encode(text)[:64]] for text in mixed_texts(160)[3:]])


def encoded(python: Path, folder: Path, texts: list[str]) -> tuple[list[str], dict[str, Any]]:
    """What the export says of a folder's tokenizer, and llama.cpp's token ids."""
    notes = write_gguf(folder / "model", folder / "m.gguf", "m", "f16")
    job = {"model": str(folder / "m.gguf"), "prompts": [], "sequences": [], "texts": texts, "context_tokens": CONTEXT_TOKENS}
    return notes, ask(python, "ask_llama_cpp.py", folder, job)


def check(python: Path, folder: Path, texts: list[str], adds_bos: bool, expected: list[list[int]] | None = None) -> None:
    """Nothing is said of the tokenizer, and each text becomes the same tokens, ours unless others are expected."""
    notes, found = encoded(python, folder, texts)
    tokenizer = Tokenizer.load(folder / "model")
    expected = [tokenizer.encode(text) for text in texts] if expected is None else expected
    wrong = [(text, ours, theirs) for text, ours, theirs in zip(texts, expected, found["encoded"], strict=True) if ours != theirs]
    assert notes == [] and not wrong, f"{len(wrong)} of {len(texts)} texts: {wrong[:5]}"
    assert found["begun"] == [[tokenizer.bos_id] * adds_bos + ids for ids in expected[:8]]


def share_alike(python: Path, folder: Path, texts: list[str], sentence: str) -> float:
    """The share of texts that become the same tokens, where the export says that not all do."""
    notes, found = encoded(python, folder, texts)
    ours = [Tokenizer.load(folder / "model").encode(text) for text in texts]
    alike = sum(a == b for a, b in zip(ours, found["encoded"], strict=True)) / len(texts)
    longer = sum(map(len, found["encoded"])) / sum(map(len, ours)) - 1
    print(f"\n{alike:.1%} of {len(texts)} texts become the same tokens, {longer:+.1%} tokens in all")
    assert any(sentence in note for note in notes)
    return alike


def named(folder: Path) -> Path:
    """A model in the folder whose tokenizer names what begins and ends a text."""
    random_model("llama", 1400, folder / "model")
    write_json(folder / "model" / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    return folder / "model"


@pytest.mark.parametrize("pre", CUTTERS)
def test_byte_level_bpe_cuts_and_joins_alike(python: Path, pre: str, texts: list[str], tmp_path: Path) -> None:
    content = json.loads(bpe(pre, LINES, 1200).to_str())
    del content["model"]["merges"][-300:]  # which leaves words that only one finds that takes them whole
    write_json(named(tmp_path) / "tokenizer.json", content)
    check(python, tmp_path, texts, adds_bos=True)


def in_own_form(folder: Path) -> None:
    """SentencePiece's file becomes the tokenizer.json that a stage's folder has."""
    copy_tokenizer(folder, folder.parent / "own")
    shutil.copyfile(folder.parent / "own" / "tokenizer.json", folder / "tokenizer.json")
    (folder / "tokenizer.model").unlink()


@pytest.mark.parametrize("has_prefix", [True, False])
def test_pieces_of_sentencepiece_join_alike(python: Path, has_prefix: bool, texts: list[str], tmp_path: Path) -> None:
    folder = named(tmp_path)
    peer = train_pieces(folder, "bpe", LINES, 1200, add_dummy_prefix=has_prefix)
    check(python, tmp_path, texts, True, [peer.encode(text) for text in texts])
    (tmp_path / "m.gguf").unlink()
    in_own_form(folder)
    check(python, tmp_path, texts, adds_bos=False)


def test_own_symbols_of_sentencepiece_stand_alone_alike(python: Path, texts: list[str], tmp_path: Path) -> None:
    """Those of several spaces too; with a space before every text they cannot, and in our own form nothing marks them."""
    folder, symbols = named(tmp_path), ["<sep>", "\u2581\u2581\u2581", "return"]
    peer = train_pieces(folder, "bpe", LINES, 1200, user_defined_symbols=symbols, add_dummy_prefix=False)
    texts = [text for text in texts if "\u2581" not in text]  # which SentencePiece does not tell from a space
    check(python, tmp_path, texts, True, [peer.encode(text) for text in texts])
    (tmp_path / "m.gguf").unlink()
    in_own_form(folder)
    assert share_alike(python, tmp_path, texts, "joins any two pieces") > 0.5
    (tmp_path / "m.gguf").unlink()
    (folder / "tokenizer.json").unlink()
    train_pieces(folder, "bpe", LINES, 1200, user_defined_symbols=symbols)
    assert share_alike(python, tmp_path, texts, "puts a space behind each") > 0.5


def test_unigram_chooses_as_sentencepiece_does(python: Path, texts: list[str], tmp_path: Path) -> None:
    """The tokenizers library differs from both where an accent follows a sign that its table of characters changes."""
    usual = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}
    peer = train_pieces(named(tmp_path), "unigram", LINES, 1200, byte_fallback=False, **usual)
    check(python, tmp_path, texts, False, [peer.encode(text) for text in texts])
    (tmp_path / "m.gguf").unlink()
    train_pieces(tmp_path / "model", "unigram", LINES, 1200, **usual)
    assert share_alike(python, tmp_path, [*texts, "\u16a0"], "as unknown, and not as bytes") < 1


def test_our_own_tokenizer_has_no_equal_there_and_the_export_says_so(python: Path, trained: Path, texts: list[str],
                                                                     tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(trained)
    assert 0.7 < share_alike(python, tmp_path, texts, "comes nearest") < 1
    table = Tokenizer.load(trained).token_bytes()
    found = json.loads((tmp_path / "answers.json").read_text())["encoded"]
    assert [b"".join(table[i] for i in ids) for ids in found] == [text.encode() for text in texts]
