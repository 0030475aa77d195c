"""SentencePiece models give the ids and texts of SentencePiece itself."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from athanor.data.text.tokenizer import Tokenizer, copy_tokenizer
from athanor.foundation.errors import DataError
from athanor.models.shapes.find import tokenizer_size

sentencepiece = pytest.importorskip("sentencepiece")
PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
KINDS: dict[str, dict[str, Any]] = {
    "bpe": {"model_type": "bpe", **PLAIN},  # as Llama's and Yuan's
    "unigram": {"model_type": "unigram"},
    "bpe without a prefix": {"model_type": "bpe", "add_dummy_prefix": False, "remove_extra_whitespaces": False,
                             "normalization_rule_name": "nfkc"},
    "own pieces": {"model_type": "bpe", "user_defined_symbols": ["<sep>", "<mask>"], "pad_id": 3, **PLAIN},
}
TEXTS = ["", "import os\nprint(1)", " two  spaces ", "\u6e90 2.0 \u4e2d\u6587 text", "caf\u00e9 na\u00efve \U0001f600",
         "</s> <s>", "x" * 50, "a<sep>b <mask> c", "</s>", "<unk>", "<0x41>", "<sep></s>", "a<sep><0x0A><mask><unk>"]


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sentencepiece")
    text = Path(sysconfig.get_paths()["stdlib"], "argparse.py").read_text() + "\u6e90\u4e2d\u6587" * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_prefix=str(place / "tokenizer"), vocab_size=600, byte_fallback=True,
        character_coverage=1.0, minloglevel=2, **KINDS[request.param])
    return place


def test_ids_and_texts_are_those_of_sentencepiece(folder: Path) -> None:
    peer, ours = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")), Tokenizer.load(folder)
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (peer.vocab_size(), peer.bos_id(), peer.eos_id())
    copy_tokenizer(folder, folder / "copied")
    for place in (folder, folder / "copied"):
        assert tokenizer_size(str(place)) == peer.vocab_size(), "as a plan counts them"
    assert ours.pad_id == (peer.pad_id() if peer.pad_id() >= 0 else peer.eos_id())

    # the tokenizers library loses a mark that follows a sign which SentencePiece's rules replace
    marks = [] if ours.encode("\u00b8\u0300") == peer.encode("\u00b8\u0300") else ["Mn", "Me"]

    @settings(max_examples=150, deadline=None)
    @given(st.text(st.characters(exclude_categories=["Cs", "Cc", *marks], exclude_characters="\u2581\x00"), max_size=30))
    def agree(text: str) -> None:
        assert ours.encode(text) == peer.encode(text), text
        assert ours.decode(ours.encode(text)) == peer.decode(peer.encode(text)), text

    agree()
    for text in TEXTS:
        assert ours.encode(text) == peer.encode(text), text


def test_a_copy_is_a_tokenizer_json_with_what_was_added(folder: Path, tmp_path: Path) -> None:
    source, size = tmp_path / "source", Tokenizer.load(folder).vocab_size
    source.mkdir()
    (source / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    (source / "added_tokens.json").write_text(json.dumps({"<eod>": size + 1, "<sep2>": size}))
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eod>"}))
    copied = copy_tokenizer(source, tmp_path / "copy")
    assert copied.eos_id == size + 1 and copied.vocab_size == size + 2 and copied.special_ids["<sep2>"] == size
    assert (tmp_path / "copy" / "tokenizer.json").is_file() and not (tmp_path / "copy" / "tokenizer.model").exists()
    assert [copied.encode(text) for text in TEXTS] == [Tokenizer.load(folder).encode(text) for text in TEXTS]
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert theirs.eos_token_id == size + 1
    (source / "added_tokens.json").write_text(json.dumps({"<eod>": size + 5}))
    with pytest.raises(DataError, match=f"'<eod>' has the id {size + 5}, but {size} is the next one free"):
        Tokenizer.load(source)
    (source / "added_tokens.json").write_text(json.dumps(["<eod>"]))
    with pytest.raises(DataError, match="must have a name and a whole number"):
        Tokenizer.load(source)


@pytest.mark.parametrize("content", [b"", b"no model at all", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x03\x0a\x01a", b"\x80"])
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(DataError, match="is not a SentencePiece model"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(("more", "words"), [
    (b"\x1a\x06\x12\x04junk", "Precompiled"),  # normalizer_spec.precompiled_charsmap
    (b"\x1a\x02\x10\x05", "a number"),
    (b"\x12\x05\xf2\x02\x02\xff\xfe", "utf-8"),  # trainer_spec.bos_piece
    (b"\x0a\x06\x0a\x04</s>", "it has the piece '</s>' twice")])
def test_what_is_damaged_behind_the_pieces_is_refused(folder: Path, tmp_path: Path, more: bytes, words: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes() + more)
    with pytest.raises(DataError, match=f"is not a SentencePiece model: .*{words}"):
        Tokenizer.load(tmp_path)
