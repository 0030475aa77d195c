"""The tokenizer: lossless, deterministic, and what transformers loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from athanor.data.text.chat import ChatTemplate
from athanor.data.text.tokenizer import SPECIAL_TOKENS, Tokenizer, copy_tokenizer, train_tokenizer
from athanor.foundation.errors import DataError

TEXTS = [file.read_text(encoding="utf-8") for file in sorted((Path(sysconfig.get_path("stdlib")) / "json").glob("*.py"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(iter(TEXTS), 700).save(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


def test_three_trainings_give_equal_bytes(tmp_path: Path, folder: Path) -> None:
    program = ("import sys, json; from pathlib import Path; from athanor.data.text.tokenizer import train_tokenizer\n"
               "train_tokenizer(iter(json.load(sys.stdin)), 700).save(Path(sys.argv[1]))")
    for threads in ("1", "3"):  # in processes of their own: other hash seeds, another division of the work
        subprocess.run([sys.executable, "-c", program, str(tmp_path / threads)], input=json.dumps(TEXTS), text=True, check=True,
                       env={**os.environ, "RAYON_NUM_THREADS": threads}, timeout=120)
        for file in folder.iterdir():
            assert (tmp_path / threads / file.name).read_bytes() == file.read_bytes()


def test_special_tokens_have_their_ids(tokenizer: Tokenizer) -> None:
    assert [tokenizer.special_ids[token] for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4, 5]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (0, 1, 2, 700)


@settings(max_examples=150, deadline=None)
@given(text=st.one_of(st.text(), st.text(alphabet=" \t\r\n_.:(\"'a1é中\u2028\ufeff")))
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.token_bytes()[token] for token in ids) == text.encode()
    stream = tokenizer.stream()
    assert "".join([stream.push(token) for token in ids]) + stream.finish() == text


def test_special_text_in_a_document_is_ordinary_text(tokenizer: Tokenizer) -> None:
    for text in (*SPECIAL_TOKENS, "a<|end|>b <|user|>"):
        ids = tokenizer.encode(text)
        assert not set(ids) & set(range(6))
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch(["a<|end|>b", "x"]) == [tokenizer.encode("a<|end|>b"), tokenizer.encode("x")]


def test_stream_never_shows_half_a_character(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    ids = tokenizer.encode("中é")
    assert len(ids) == 5  # a byte each: the training text has no such characters
    assert [stream.push(token) for token in ids] == ["", "", "中", "", "é"]
    assert tokenizer.stream().push(tokenizer.encode("中")[0]) == ""
    stream.push(ids[0])
    assert stream.finish() == "\ufffd"


def test_code_takes_few_tokens(tokenizer: Tokenizer) -> None:
    text = "\n".join(TEXTS)
    assert len(text.encode()) / len(tokenizer.encode(text)) > 2.3


def test_transformers_loads_the_folder(folder: Path, tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    for text in [*TEXTS, "é 中\r\n\t x"]:
        assert theirs(text).input_ids == [tokenizer.bos_id, *tokenizer.encode(text)]
        assert theirs.decode(tokenizer.encode(text)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    messages = [{"role": role, "content": text} for role, text in (("system", "s"), ("user", "def f():"), ("assistant", "é"))]
    template = ChatTemplate.load(folder)
    assert theirs.apply_chat_template(messages, return_dict=False) == template.render(messages)
    assert theirs.apply_chat_template(messages[:2], add_generation_prompt=True, return_dict=False) == template.render(
        messages[:2], True)


def test_foreign_folder_is_copied_and_checked(tmp_path: Path, folder: Path) -> None:
    copied = copy_tokenizer(folder / "tokenizer.json", tmp_path / "copy")
    assert copied.encode(TEXTS[0]) == Tokenizer.load(folder).encode(TEXTS[0])
    (tmp_path / "copy" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "copy" / "special_tokens_map.json").unlink()
    with pytest.raises(DataError, match="names no eos_token"):
        Tokenizer.load(tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="is not a tokenizer"):
        Tokenizer.load(tmp_path / "copy")
    with pytest.raises(DataError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_pieces_of_other_families_have_bytes(tmp_path: Path) -> None:
    import tokenizers
    from tokenizers import decoders, models

    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("\u2581a", -1.0), ("b", -1.0), *((f"<0x{i:02X}>", -9.0) for i in range(256))]
    inner = tokenizers.Tokenizer(models.Unigram(pieces, 0, byte_fallback=True))
    inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    foreign = Tokenizer(inner, 1, 1, 1)
    ids = [2, 3, 4 + 0xC3, 4 + 0xA9]
    stream = foreign.stream()
    assert "".join(stream.push(i) for i in ids) + stream.finish() == foreign.decode(ids) == " abé"
