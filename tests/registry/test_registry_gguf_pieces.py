"""A tokenizer of SentencePiece in a GGUF file: llama.cpp's way of joining pieces, written from its description, gives its ids."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from cutters import train_pieces
from test_registry_gguf import make, read
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors

from athanor.data.text.tokenizer import Tokenizer as Own
from athanor.foundation.errors import ModelError
from athanor.registry.to_gguf import write_gguf

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")
pytest.importorskip("sentencepiece")

LINES = ["def area(width, height):", "    return width * height", "It's the engine they will use in 2026: 12,345 times!",
         "a wide river and a narrow one", "the farmer saw the teacher and said nothing to the farmer"]
TEXTS = [*LINES, "area  of a  box", "unknown caf\u00e9 \u4e2d\u6587 \U0001f600", "", "x", "  begins with spaces"]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def joined(text: str, fields: dict[str, Any]) -> list[int]:
    """Ids as llama.cpp's kind `llama` finds them: characters at first; then again and again the two neighbours that make the
    piece of the highest score, the left ones among equals; what is no piece becomes bytes."""
    tokens, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    ids = {token: i for i, (token, kind) in enumerate(zip(tokens, fields["tokenizer.ggml.token_type"], strict=True))
           if kind in (NORMAL, USER_DEFINED, BYTE)}
    if text and fields["tokenizer.ggml.add_space_prefix"]:
        text = " " + text
    parts = list(text.replace(" ", "\u2581"))
    while True:
        found = [(-scores[ids[a + b]], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ids]
        if not found:
            break
        at = min(found)[1]
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
    return [i for part in parts for i in ([ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()])]


def test_the_file_of_sentencepiece_gives_its_ids(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", vocab_size=400)
    peer = train_pieces(folder, "bpe", LINES * 20, 330)
    (folder / "added_tokens.json").write_text(json.dumps({"<sep>": peer.get_piece_size()}))
    assert write_gguf(folder, tmp_path / "m.gguf", "m", "f16") == []
    fields, _, _ = read(tmp_path / "m.gguf")
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("llama", "default")
    assert [joined(text, fields) for text in TEXTS] == [peer.encode(text) for text in TEXTS]
    size, kinds = peer.get_piece_size(), fields["tokenizer.ggml.token_type"]
    assert kinds[:4] == [UNKNOWN, CONTROL, CONTROL, BYTE] and kinds[size:size + 2] == [CONTROL, UNUSED] and len(kinds) == 400
    assert fields["tokenizer.ggml.tokens"][size] == "<sep>"
    ids = [fields[f"tokenizer.ggml.{key}"] for key in ("bos_token_id", "eos_token_id", "unknown_token_id", "add_bos_token")]
    assert ids == [peer.bos_id(), peer.eos_id(), peer.unk_id(), True]


@pytest.mark.parametrize("has_prefix", [True, False])
def test_own_symbols_are_kept_as_they_stand_in_a_text(tmp_path: Path, has_prefix: bool) -> None:
    """llama.cpp looks for them before spaces become signs, and puts its space before a text behind each of them too."""
    folder = make(tmp_path / "m", vocab_size=400)
    symbols = ["\u2581\u2581", "<sep>"]
    peer = train_pieces(folder, "bpe", LINES * 20, 330, user_defined_symbols=symbols, add_dummy_prefix=has_prefix)
    notes = write_gguf(folder, tmp_path / "m.gguf", "m", "f16")
    assert ["puts a space behind each" in note for note in notes] == [True] * has_prefix
    fields, _, _ = read(tmp_path / "m.gguf")
    own = [peer.piece_to_id(piece) for piece in symbols]
    assert [fields["tokenizer.ggml.tokens"][i] for i in own] == ["  ", "<sep>"]
    assert [fields["tokenizer.ggml.token_type"][i] for i in own] == [USER_DEFINED] * 2


def test_our_own_form_of_it_gives_the_same_ids(tmp_path: Path) -> None:
    """A stage's folder holds tokenizer.json alone, in which merges stand for scores."""
    folder = make(tmp_path / "m", vocab_size=400)
    peer = train_pieces(folder, "bpe", LINES * 20, 330)
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    ours = Own.load(folder)
    (folder / "tokenizer.json").write_text(ours.inner.to_str())
    (folder / "tokenizer.model").unlink()
    notes = write_gguf(folder, tmp_path / "m.gguf", "m", "f16")
    fields, _, _ = read(tmp_path / "m.gguf")
    assert notes == [] and fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_space_prefix"]
    assert [joined(text, fields) for text in TEXTS] == [peer.encode(text) for text in TEXTS]
    assert not fields["tokenizer.ggml.add_bos_token"], "no post-processor puts it there"


def test_a_tokenizer_json_of_bytes_and_pieces_without_a_prefix(tmp_path: Path) -> None:
    """As Gemma's: spaces become the piece's sign, and nothing is put before a text."""
    folder = make(tmp_path / "m", "gemma", vocab_size=400)
    vocab = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3} | {f"<0x{i:02X}>": 4 + i for i in range(256)}
    for piece in ("\u2581", "a", "r", "e", "ar", "ea", "area", "\u2581a"):
        vocab[piece] = len(vocab)
    inner = Tokenizer(models.BPE(vocab, [("a", "r"), ("e", "a"), ("ar", "ea"), ("\u2581", "a")], unk_token="<unk>", fuse_unk=True,
                                 byte_fallback=True))
    inner.normalizer = normalizers.Replace(" ", "\u2581")
    inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>"])
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>", "eos_token": "<eos>"}))
    assert write_gguf(folder, tmp_path / "m.gguf", "m", "f16") == []
    fields, _, _ = read(tmp_path / "m.gguf")
    assert fields["tokenizer.ggml.add_space_prefix"] is False and fields["tokenizer.ggml.add_bos_token"] is True
    for text in ("area", "a area", " are a", "b"):
        assert joined(text, fields) == inner.encode(text, add_special_tokens=False).ids
    inner.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(" "), "\u2581")])
    content = json.loads(inner.to_str())
    content["model"]["merges"] = content["model"]["merges"][:3]  # nothing joins the sign and `a` now, though the piece is there
    (folder / "tokenizer.json").write_text(json.dumps(content))
    notes = write_gguf(folder, tmp_path / "n.gguf", "n", "f16")
    assert len(notes) == 2 and "joins any two pieces" in notes[0] and "does not normalise texts" in notes[1]


def test_unigram_keeps_its_scores_under_its_own_kind(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", vocab_size=420)
    peer = train_pieces(folder, "unigram", LINES * 20, 330, normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True)
    (note,) = write_gguf(folder, tmp_path / "m.gguf", "m", "f16")
    assert "as unknown, and not as bytes" in note
    fields, _, _ = read(tmp_path / "m.gguf")
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.remove_extra_whitespaces"]) == ("t5", True)
    size = peer.get_piece_size()
    assert fields["tokenizer.ggml.scores"][:size] == pytest.approx([peer.get_score(i) for i in range(size)])
    assert fields["tokenizer.ggml.tokens"][:size] == [peer.id_to_piece(i) for i in range(size)]
    assert len(fields["tokenizer.ggml.precompiled_charsmap"]) > 1000


@pytest.mark.parametrize(("content", "words"), [(b"", "no model of subwords"), (b"junk", "is not a SentencePiece model")])
def test_a_damaged_file_is_one_sentence(tmp_path: Path, content: bytes, words: str) -> None:
    folder = make(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(content)
    with pytest.raises(Exception, match=words) as caught:
        write_gguf(folder, tmp_path / "m.gguf", "m", "f16")
    assert "\n" not in str(caught.value) and isinstance(caught.value, ModelError) == (content == b"")
